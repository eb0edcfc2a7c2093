//! Points in time that tasks wait for.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// The timers of one loop, by time and a number that tells equal times apart.
#[derive(Default)]
pub(crate) struct Timers {
    waiting: RefCell<BTreeMap<(Instant, u64), Waker>>,
    last: Cell<u64>,
}

impl Timers {
    /// How long until the first is due.
    pub(crate) fn next(&self) -> Option<Duration> {
        let waiting = self.waiting.borrow();
        let ((at, _), _) = waiting.first_key_value()?;
        Some(at.saturating_duration_since(Instant::now()))
    }

    /// Wakes those that are due.
    pub(crate) fn fire(&self) {
        loop {
            let mut waiting = self.waiting.borrow_mut();
            let Some(first) = waiting.first_entry() else { return };
            if first.key().0 > Instant::now() {
                return;
            }
            let waker = first.remove();
            drop(waiting);
            waker.wake();
        }
    }
}

/// Is ready at a point in time.
pub(crate) struct Sleep {
    of: Rc<Timers>,
    at: Instant,
    number: Option<u64>,
}

impl Sleep {
    /// Until `at`, by these timers.
    pub(crate) fn new(of: Rc<Timers>, at: Instant) -> Self {
        Self { of, at, number: None }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.at {
            return Poll::Ready(());
        }
        let of = self.of.clone();
        let mut waiting = of.waiting.borrow_mut();
        let number = *self.number.get_or_insert_with(|| {
            of.last.update(|last| last + 1);
            of.last.get()
        });
        waiting.insert((self.at, number), context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.of.waiting.borrow_mut().remove(&(self.at, number));
        }
    }
}
