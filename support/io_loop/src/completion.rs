//! Operations that are under way, by a key that whoever carries them out gives back with the result.

use crate::buffer::IoVec;
use slab::Slab;
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// What an operation uses until it ends.
#[derive(Default)]
pub(crate) struct Keep {
    /// The file that it is on.
    pub(crate) file: Option<Arc<OwnedFd>>,
    /// The memory that it reads or writes.
    pub(crate) memory: IoVec,
    /// The list of the memory's pieces as the kernel wants it; it must not move.
    pub(crate) list: Vec<libc::iovec>,
}

enum State {
    Waiting {
        waker: Option<Waker>,
        keep: Keep,
    },
    /// Nobody waits any more.
    Abandoned {
        #[allow(dead_code, reason = "held until the operation ends")]
        keep: Keep,
    },
    Done(i32),
}

/// The operations of one loop.
#[derive(Default)]
pub(crate) struct Operations {
    slots: RefCell<Slab<State>>,
    /// Lists of pieces to be used again.
    lists: RefCell<Vec<Vec<libc::iovec>>>,
    /// Waits for files to be ready that nobody is interested in any more, for the loop to end them.
    unwanted: RefCell<Vec<usize>>,
}

impl Operations {
    /// Begins an operation; the kernel or a thread will name it by the key.
    pub(crate) fn begin(&self, keep: Keep) -> usize {
        self.slots.borrow_mut().insert(State::Waiting { waker: None, keep })
    }

    /// The list of the pieces of `memory`, with room taken from an earlier operation.
    pub(crate) fn list_of(&self, memory: &IoVec) -> Vec<libc::iovec> {
        let mut list = self.lists.borrow_mut().pop().unwrap_or_default();
        list.extend(
            memory.segments().iter().map(|s| libc::iovec { iov_base: s.start.cast(), iov_len: s.len }),
        );
        list
    }

    /// Ends the operation `key` with what a system call would have returned, or a negated error number.
    pub(crate) fn end(&self, key: usize, result: i32) {
        let mut slots = self.slots.borrow_mut();
        let Some(state) = slots.get_mut(key) else { return };
        match std::mem::replace(state, State::Done(result)) {
            State::Waiting { waker, keep } => {
                drop(slots);
                self.recycle(keep);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            State::Abandoned { keep } => {
                slots.remove(key);
                drop(slots);
                self.recycle(keep);
            }
            State::Done(_) => unreachable!("operations end once"),
        }
    }

    /// The waits for files to be ready that nobody is interested in any more since this was last asked.
    pub(crate) fn take_unwanted(&self) -> Vec<usize> {
        self.unwanted.take()
    }

    fn recycle(&self, keep: Keep) {
        let Keep { file: _, memory: _, mut list } = keep;
        if list.capacity() > 0 {
            list.clear();
            let mut lists = self.lists.borrow_mut();
            if lists.len() < 64 {
                lists.push(list);
            }
        }
    }

    /// Whether an operation that has not ended has memory.
    pub(crate) fn memory_in_use(&self) -> bool {
        self.slots.borrow().iter().any(|(_, state)| match state {
            State::Waiting { keep, .. } | State::Abandoned { keep } => !keep.memory.is_empty(),
            State::Done(_) => false,
        })
    }

    /// Never gives back the memory of what has not ended.
    pub(crate) fn leak(&self) {
        std::mem::forget(self.slots.take());
    }
}

/// The result of an operation.
pub(crate) struct Operation {
    pub(crate) of: Rc<Operations>,
    pub(crate) key: usize,
}

impl Future for Operation {
    type Output = io::Result<u32>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut slots = self.of.slots.borrow_mut();
        let state = slots.get_mut(self.key).expect("an operation's slot lives as long as its future");
        match state {
            State::Done(result) => {
                let result = *result;
                Poll::Ready(u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result)))
            }
            State::Waiting { waker, .. } => {
                if !waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                    *waker = Some(context.waker().clone());
                }
                Poll::Pending
            }
            State::Abandoned { .. } => unreachable!("only dropping the future abandons the operation"),
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let mut slots = self.of.slots.borrow_mut();
        let Some(state) = slots.get_mut(self.key) else { return };
        match std::mem::replace(state, State::Done(0)) {
            State::Done(_) => drop(slots.remove(self.key)),
            State::Waiting { waker: _, keep } => {
                let waits_for_ready = keep.file.is_some() && keep.memory.is_empty();
                *state = State::Abandoned { keep };
                drop(slots);
                if waits_for_ready {
                    self.of.unwanted.borrow_mut().push(self.key);
                }
            }
            State::Abandoned { .. } => unreachable!("only dropping the future abandons the operation"),
        }
    }
}
