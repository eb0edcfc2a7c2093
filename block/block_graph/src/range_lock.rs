//! Requests that must not overlap.

use parking_lot::Mutex;
use std::future::poll_fn;
use std::ops::Range;
use std::task::{Poll, Waker};

/// Ranges that somebody has to himself, such as clusters that are being allocated, or blocks that are read, changed and
/// written back.
#[derive(Debug, Default)]
pub struct RangeLock {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<(u64, Range<u64>)>,
    next: u64,
    waiting: Vec<Waker>,
}

/// A range that is held until this is dropped.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    of: &'a RangeLock,
    number: u64,
}

impl RangeLock {
    /// A lock of which nothing is held.
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits until nobody holds any of `range`, and holds it. Who waits first need not be served first.
    pub async fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        poll_fn(|context| {
            let mut state = self.state.lock();
            match state.take(&range) {
                Some(number) => Poll::Ready(RangeGuard { of: self, number }),
                None => {
                    state.waiting.push(context.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Holds `range` if nobody holds any of it.
    pub fn try_lock(&self, range: Range<u64>) -> Option<RangeGuard<'_>> {
        let number = self.state.lock().take(&range)?;
        Some(RangeGuard { of: self, number })
    }
}

impl State {
    fn take(&mut self, range: &Range<u64>) -> Option<u64> {
        let overlaps = |(_, held): &(u64, Range<u64>)| held.start < range.end && range.start < held.end;
        if self.held.iter().any(overlaps) {
            return None;
        }
        self.next += 1;
        self.held.push((self.next, range.clone()));
        Some(self.next)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.of.state.lock();
        state.held.retain(|(number, _)| *number != self.number);
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }
}
