//! Time that is made of instructions.

use crate::Nanos;
use std::sync::atomic::{AtomicU64, Ordering};

/// The greatest shift: an instruction takes about a microsecond.
pub const MAX_SHIFT: u8 = 10;

/// Counts the instructions of a VM with one vCPU, and makes time of them. The vCPU's thread writes it.
#[derive(Debug)]
pub struct Counter {
    count: AtomicU64,
    /// Time that was passed over, modulo 2^64.
    idle: AtomicU64,
    shift: u8,
}

impl Counter {
    pub(crate) fn new(shift: u8) -> Self {
        Self { count: AtomicU64::new(0), idle: AtomicU64::new(0), shift: shift.min(MAX_SHIFT) }
    }

    /// The count.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Sets the count, and with it the time.
    pub fn set_count(&self, count: u64) {
        self.count.store(count, Ordering::Relaxed);
    }

    /// The time.
    pub fn now(&self) -> Nanos {
        (self.count() << self.shift).wrapping_add(self.idle.load(Ordering::Relaxed))
    }

    /// The first count at which `time` is reached if no time is passed over until then.
    pub fn count_at(&self, time: Nanos) -> u64 {
        let left = time.saturating_sub(self.now());
        self.count().saturating_add(left.div_ceil(1 << self.shift))
    }

    /// Passes over the time until `time`, without instructions. Time never goes back.
    pub fn advance_to(&self, time: Nanos) {
        let ahead = time.saturating_sub(self.now());
        self.idle.store(self.idle.load(Ordering::Relaxed).wrapping_add(ahead), Ordering::Relaxed);
    }

    /// Sets the time, and leaves the count.
    pub(crate) fn set_time(&self, time: Nanos) {
        self.idle.store(time.wrapping_sub(self.count() << self.shift), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use crate::VmClock;

    #[test]
    fn time_is_made_of_instructions_and_idle_time() {
        let clock = VmClock::counted(3);
        let counter = clock.counter().unwrap().clone();
        clock.start();
        assert_eq!((clock.now(), clock.is_running()), (0, false));
        counter.set_count(10);
        assert_eq!(
            (clock.now(), counter.count_at(81), counter.count_at(80), counter.count_at(0)),
            (80, 11, 10, 10)
        );
        counter.advance_to(1000);
        counter.advance_to(500);
        assert_eq!((clock.now(), counter.count_at(1016)), (1000, 12));
        counter.set_count(11);
        assert_eq!(clock.now(), 1008);
        clock.set(5);
        assert_eq!((clock.now(), counter.count()), (5, 11));
        assert!(VmClock::new().counter().is_none());
    }
}
