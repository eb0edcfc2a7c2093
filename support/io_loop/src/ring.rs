//! The io_uring of a loop.

use crate::completion::Operations;
use io_uring::{IoUring, opcode, squeue, types};
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

/// Entries of the submission queue.
const ENTRIES: u32 = 256;

/// Has entering the kernel do what it has put off, such as completions (`io_uring_enter(2)`).
const IORING_ENTER_GETEVENTS: u32 = 1;

/// What a completion carries that nobody waits for.
const NO_KEY: u64 = u64::MAX;
/// What the completion of [`Ring::watch`] carries.
const WATCH_KEY: u64 = u64::MAX - 1;

/// A ring, used by the thread that made it.
pub(crate) struct Ring {
    ring: RefCell<IoUring>,
    watched_came: Cell<bool>,
}

impl Ring {
    /// A ring, if the kernel has one for us.
    pub(crate) fn new() -> io::Result<Self> {
        // One submitter, and completions handled when the thread asks for them (kernels from 6.1 on) or at least when it
        // enters the kernel (from 6.0 on), save interrupts.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(ENTRIES * 4)
            .build(ENTRIES)
            .or_else(|_| {
                let mut builder = IoUring::builder();
                builder.setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag();
                builder.setup_cqsize(ENTRIES * 4).build(ENTRIES)
            })
            .or_else(|_| IoUring::new(ENTRIES))?;
        let params = ring.params();
        // Waiting with a time limit (5.11) and completions that are never lost (5.5).
        if !params.is_feature_ext_arg() || !params.is_feature_nodrop() || !params.is_feature_submit_stable() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self { ring: RefCell::new(ring), watched_came: Cell::new(false) })
    }

    /// Queues `entry`.
    ///
    /// # Safety
    /// What the entry points at must stay until its completion comes.
    pub(crate) unsafe fn push(&self, entry: &squeue::Entry) -> io::Result<()> {
        let mut ring = self.ring.borrow_mut();
        loop {
            // SAFETY: the caller answers for what the entry points at.
            if unsafe { ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            match ring.submit() {
                Ok(_) => {}
                // Too many completions wait to be taken; those stay in the kernel until there is room.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Err(error),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Hands what is queued to the kernel, if anything is, or if the kernel has something for us. With `wait`, waits for
    /// a completion, as long as that says if it says anything.
    pub(crate) fn enter(&self, wait: Option<Option<Duration>>) -> io::Result<()> {
        let mut ring = self.ring.borrow_mut();
        let queue = ring.submission();
        let (queued, kernel_has_work) = (queue.len() as u32, queue.taskrun() || queue.cq_overflow());
        drop(queue);
        let result = match wait {
            None if queued == 0 && !kernel_has_work => return Ok(()),
            // SAFETY: there is no argument; what the entries point at is kept until they complete.
            None => unsafe { ring.submitter().enter::<()>(queued, 0, IORING_ENTER_GETEVENTS, None) },
            Some(None) => ring.submit_and_wait(1),
            Some(Some(limit)) => {
                let limit = types::Timespec::from(limit);
                ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&limit))
            }
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Ends operations whose completions are there; says whether there were any.
    pub(crate) fn reap(&self, operations: &Operations) -> bool {
        let mut any = false;
        loop {
            // The ring is not borrowed while wakers run.
            let Some(completion) = self.ring.borrow_mut().completion().next() else { return any };
            any = true;
            match completion.user_data() {
                NO_KEY => {}
                WATCH_KEY => self.watched_came.set(true),
                key => operations.end(key as usize, completion.result()),
            }
        }
    }

    /// Ends a wait of [`Ring::turn`] when `event` is readable, once.
    pub(crate) fn watch(&self, event: &OwnedFd) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(event.as_raw_fd()), libc::POLLIN as u32).build();
        // SAFETY: the entry points at nothing.
        unsafe { self.push(&entry.user_data(WATCH_KEY)) }
    }

    /// Whether what is watched became readable since this was last asked.
    pub(crate) fn watched_came(&self) -> bool {
        self.watched_came.take()
    }

    /// Ends the operation `key`, which waits for a file to be ready; its completion comes later.
    pub(crate) fn cancel_poll(&self, key: usize) {
        let entry = opcode::PollRemove::new(key as u64).build();
        // SAFETY: the entry points at nothing. If there is no room, the operation waits on, unseen.
        let _ = unsafe { self.push(&entry.user_data(NO_KEY)) };
    }
}
