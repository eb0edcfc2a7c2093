//! The loop of a thread.

use crate::completion::{Keep, Operation, Operations};
use crate::pool::BLOCKING;
use crate::ring::Ring;
use crate::timer::Timers;
use crate::unix;
use async_task::{Runnable, Task};
use io_uring::{opcode, squeue, types};
use parking_lot::Mutex;
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

/// How many tasks run before completions are looked at again.
const TASKS_IN_A_ROW: usize = 64;
/// How many requests a loop carries out by itself before it looks at anything else.
const AT_ONCE_IN_A_ROW: u32 = 64;

/// What other threads reach a loop by.
struct Remote {
    /// Is readable when the loop is to look at what is below.
    event: Arc<OwnedFd>,
    /// The loop waits, or is about to.
    sleeping: AtomicBool,
    /// The future that `block_on` runs is to be polled.
    main_ready: AtomicBool,
    inbox: Mutex<Inbox>,
}

/// What other threads bring.
#[derive(Default)]
struct Inbox {
    runnables: Vec<Runnable>,
    results: Vec<(usize, i32)>,
    /// The loop is gone.
    closed: bool,
}

impl Remote {
    fn wake_loop(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            unix::signal(&self.event);
        }
    }

    /// Has a thread's result reach the operation `key`.
    fn finish(&self, key: usize, result: i32) {
        self.inbox.lock().results.push((key, result));
        self.wake_loop();
    }

    fn schedule(self: &Arc<Self>, runnable: Runnable) {
        let mut runnable = Some(runnable);
        let _ = LOOP.try_with(|cell| {
            if let Some(here) = cell.get().filter(|here| Arc::ptr_eq(&here.0.remote, self)) {
                here.0.ready.borrow_mut().extend(runnable.take());
            }
        });
        let Some(runnable) = runnable else { return };
        let mut inbox = self.inbox.lock();
        if inbox.closed {
            // Only its own thread may drop a task's future, and that has ended.
            std::mem::forget(runnable);
            return;
        }
        inbox.runnables.push(runnable);
        drop(inbox);
        self.wake_loop();
    }
}

impl Wake for Remote {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.main_ready.store(true, Ordering::SeqCst);
        self.wake_loop();
    }
}

/// A file descriptor that a task waits for, where there is no ring.
struct Awaited {
    fd: RawFd,
    events: i16,
    key: usize,
}

/// The loop of one thread.
pub(crate) struct Loop {
    remote: Arc<Remote>,
    ready: RefCell<VecDeque<Runnable>>,
    pub(crate) operations: Rc<Operations>,
    pub(crate) timers: Rc<Timers>,
    ring: Option<Ring>,
    /// The ring watches the event.
    event_armed: Cell<bool>,
    awaited: RefCell<Vec<Awaited>>,
    running: Cell<bool>,
    /// How many more requests may be carried out at once.
    at_once: Cell<u32>,
}

/// A thread's hold of its loop.
struct Held(Rc<Loop>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.remote.inbox.lock().closed = true;
    }
}

thread_local! {
    static LOOP: OnceCell<Held> = const { OnceCell::new() };
}

/// This thread's loop.
pub(crate) fn current() -> Rc<Loop> {
    LOOP.with(|cell| cell.get_or_init(|| Held(Rc::new(Loop::new()))).0.clone())
}

/// Runs `future`, and the tasks of this thread's loop beside it, until the future is ready.
///
/// # Panics
/// If this thread is within `block_on` already, or the process has no file descriptors left for a loop.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let here = current();
    assert!(!here.running.replace(true), "block_on within block_on");
    let _running = Running(&here);
    let waker = Waker::from(here.remote.clone());
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    here.remote.main_ready.store(true, Ordering::SeqCst);
    loop {
        if here.remote.main_ready.swap(false, Ordering::SeqCst)
            && let Poll::Ready(value) = future.as_mut().poll(&mut context)
        {
            return value;
        }
        here.turn();
    }
}

/// Says that a loop runs until it is dropped.
struct Running<'a>(&'a Loop);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.set(false);
    }
}

/// Starts `future` as a task of this thread's loop; it runs while the thread is within [`block_on`].
pub fn spawn<F: Future + 'static>(future: F) -> Task<F::Output>
where
    F::Output: 'static,
{
    let remote = current().remote.clone();
    let (runnable, task) = async_task::spawn_local(future, move |runnable| remote.schedule(runnable));
    runnable.schedule();
    task
}

/// Waits until `file` can be read from without waiting; an event descriptor, until it was written to. The future may
/// be dropped at any time, and kept for as long as it takes.
///
/// # Errors
/// The host's.
pub async fn readable(file: &Arc<OwnedFd>) -> io::Result<()> {
    current().await_ready(file, libc::POLLIN)?.await.map(drop)
}

/// Lets other tasks run.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// How an operation is carried out.
impl Loop {
    pub(crate) fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref()
    }

    /// Has the ring do what `entry` says, which points at nothing but what `keep` keeps.
    ///
    /// # Safety
    /// What the entry points at must stay while `keep` lives.
    pub(crate) unsafe fn submit(
        self: &Rc<Self>,
        ring: &Ring,
        keep: Keep,
        entry: squeue::Entry,
    ) -> io::Result<Operation> {
        let key = self.operations.begin(keep);
        let operation = Operation { of: self.operations.clone(), key };
        // SAFETY: what it points at is kept until the operation ends.
        if let Err(error) = unsafe { ring.push(&entry.user_data(key as u64)) } {
            self.operations.end(key, 0);
            return Err(error);
        }
        Ok(operation)
    }

    /// Has a thread make a system call, which returns what system calls return, or a negated error number.
    pub(crate) fn on_thread(self: &Rc<Self>, call: impl FnOnce() -> i32 + Send + 'static) -> Operation {
        let key = self.operations.begin(Keep::default());
        let remote = self.remote.clone();
        BLOCKING.run(Box::new(move || remote.finish(key, call())));
        Operation { of: self.operations.clone(), key }
    }

    /// Waits until `file` is ready for `events` of poll(2).
    pub(crate) fn await_ready(self: &Rc<Self>, file: &Arc<OwnedFd>, events: i16) -> io::Result<Operation> {
        let keep = Keep { file: Some(file.clone()), ..Keep::default() };
        if let Some(ring) = &self.ring {
            let entry = opcode::PollAdd::new(types::Fd(file.as_raw_fd()), events as u32).build();
            // SAFETY: the entry points at nothing.
            return unsafe { self.submit(ring, keep, entry) };
        }
        let key = self.operations.begin(keep);
        self.awaited.borrow_mut().push(Awaited { fd: file.as_raw_fd(), events, key });
        Ok(Operation { of: self.operations.clone(), key })
    }

    /// Ends waits for files to be ready that nobody is interested in any more.
    fn end_unwanted(&self) {
        for key in self.operations.take_unwanted() {
            if let Some(ring) = &self.ring {
                ring.cancel_poll(key);
                continue;
            }
            self.awaited.borrow_mut().retain(|awaited| awaited.key != key);
            self.operations.end(key, -libc::ECANCELED);
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // What the kernel still writes to must not be given back.
        while let Some(ring) = &self.ring
            && self.operations.memory_in_use()
        {
            if ring.enter(Some(None)).is_err() {
                self.operations.leak();
            }
            ring.reap(&self.operations);
        }
    }
}

impl Loop {
    fn new() -> Self {
        let event = unix::event().expect("a file descriptor for the loop's event");
        // For comparing the two, and for hosts where the ring is not to be trusted.
        let wanted = std::env::var_os("VIREO_IO_URING").is_none_or(|value| value != "off");
        Self {
            remote: Arc::new(Remote {
                event: Arc::new(event),
                sleeping: AtomicBool::new(false),
                main_ready: AtomicBool::new(false),
                inbox: Mutex::default(),
            }),
            ready: RefCell::default(),
            operations: Rc::default(),
            timers: Rc::default(),
            ring: wanted.then(|| Ring::new().ok()).flatten(),
            event_armed: Cell::new(false),
            awaited: RefCell::default(),
            running: Cell::new(false),
            at_once: Cell::new(AT_ONCE_IN_A_ROW),
        }
    }

    /// Whether one more request may be carried out by the loop itself before others have their turn.
    pub(crate) fn take_at_once(&self) -> bool {
        let left = self.at_once.get();
        self.at_once.set(left.saturating_sub(1));
        left > 0
    }

    /// Runs what is ready, and waits if nothing is.
    fn turn(&self) {
        self.at_once.set(AT_ONCE_IN_A_ROW);
        self.timers.fire();
        self.empty_inbox();
        for _ in 0..TASKS_IN_A_ROW {
            let Some(runnable) = self.ready.borrow_mut().pop_front() else { break };
            runnable.run();
        }
        // What has completed is looked at before the loop counts as sleeping: whom it wakes need not wake the loop.
        if let Some(ring) = &self.ring {
            ring.reap(&self.operations);
        }
        if self.is_busy() {
            self.look(None);
            return;
        }
        self.remote.sleeping.store(true, Ordering::SeqCst);
        // Whoever comes from here on sees that the loop sleeps.
        let inbox = self.remote.inbox.lock();
        let came = !inbox.runnables.is_empty() || !inbox.results.is_empty();
        drop(inbox);
        if came || self.remote.main_ready.load(Ordering::SeqCst) {
            self.look(None);
        } else {
            self.look(Some(self.timers.next()));
        }
        self.remote.sleeping.store(false, Ordering::SeqCst);
    }

    fn is_busy(&self) -> bool {
        !self.ready.borrow().is_empty() || self.remote.main_ready.load(Ordering::SeqCst)
    }

    fn empty_inbox(&self) {
        let (runnables, results) = {
            let mut inbox = self.remote.inbox.lock();
            if inbox.runnables.is_empty() && inbox.results.is_empty() {
                return;
            }
            (std::mem::take(&mut inbox.runnables), std::mem::take(&mut inbox.results))
        };
        self.ready.borrow_mut().extend(runnables);
        for (key, result) in results {
            self.operations.end(key, result);
        }
    }

    /// Looks for completions; with `wait`, sleeps until there is one or the time is over.
    fn look(&self, wait: Option<Option<Duration>>) {
        self.end_unwanted();
        let result = match &self.ring {
            Some(ring) => self.look_at_ring(ring, wait),
            None => self.look_at_descriptors(wait),
        };
        result.expect("the kernel lets a loop wait");
    }

    fn look_at_ring(&self, ring: &Ring, wait: Option<Option<Duration>>) -> io::Result<()> {
        if wait.is_some() && !self.event_armed.replace(true) {
            ring.watch(&self.remote.event)?;
        }
        ring.enter(wait)?;
        self.remote.sleeping.store(false, Ordering::SeqCst);
        ring.reap(&self.operations);
        if ring.watched_came() {
            unix::drain(&self.remote.event);
            self.event_armed.set(false);
        }
        Ok(())
    }

    fn look_at_descriptors(&self, wait: Option<Option<Duration>>) -> io::Result<()> {
        let mut list: Vec<libc::pollfd> = vec![unix::poll_entry(self.remote.event.as_raw_fd(), libc::POLLIN)];
        list.extend(self.awaited.borrow().iter().map(|awaited| unix::poll_entry(awaited.fd, awaited.events)));
        if list.len() == 1 && wait.is_none() {
            return Ok(());
        }
        unix::poll(&mut list, wait.unwrap_or(Some(Duration::ZERO)))?;
        if list[0].revents != 0 {
            unix::drain(&self.remote.event);
        }
        let mut entries = list[1..].iter();
        let mut ended = Vec::new();
        self.awaited.borrow_mut().retain(|awaited| {
            let revents = entries.next().map_or(0, |entry| entry.revents);
            if revents != 0 {
                ended.push((awaited.key, i32::from(revents)));
            }
            revents == 0
        });
        for (key, result) in ended {
            self.operations.end(key, result);
        }
        Ok(())
    }
}
