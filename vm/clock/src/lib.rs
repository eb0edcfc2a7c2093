//! The VM's clock, which stops with the VM, and its timer service.
//!
//! All guest-visible time of devices is [`VmClock`] time: nanoseconds that pass only while the VM runs, so
//! that a paused or restored guest sees no jump. [`TimerService`] calls back at a moment of that clock.
//!
//! The time of a clock is the host's, or made of the instructions that the guest executes ([`VmClock::counted`]): then
//! everything in the VM happens at the same moments whenever it runs.

mod counter;
mod timer;

pub use counter::{Counter, MAX_SHIFT};
pub use timer::{Timer, TimerService};

use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Instant;

/// Nanoseconds of VM time.
pub type Nanos = u64;

/// Nanoseconds in one second.
pub const NANOS_PER_SECOND: u64 = 1_000_000_000;

#[derive(Debug)]
struct ClockState {
    /// VM time when the clock was last started or stopped.
    base: Nanos,
    /// The host's time at which the clock was started; `None` while it stands still.
    running_since: Option<Instant>,
}

/// Monotonic VM time. It stands still at first; clones share one clock.
#[derive(Debug, Clone)]
pub struct VmClock {
    source: Source,
}

/// What the time is made of.
#[derive(Debug, Clone)]
enum Source {
    Host(Arc<Mutex<ClockState>>),
    Counter(Arc<Counter>),
}

impl Default for VmClock {
    fn default() -> Self {
        Self::new()
    }
}

impl VmClock {
    /// A clock at 0 that stands still until [`VmClock::start`].
    pub fn new() -> Self {
        Self { source: Source::Host(Arc::new(Mutex::new(ClockState { base: 0, running_since: None }))) }
    }

    /// A clock at 0 whose time is what instructions take, `1 << shift` nanoseconds each (at most [`MAX_SHIFT`] counts),
    /// and what its [`Counter`] was advanced by while the guest was idle. It stands still while nobody counts, and
    /// starting and stopping it do nothing.
    pub fn counted(shift: u8) -> Self {
        Self { source: Source::Counter(Arc::new(Counter::new(shift))) }
    }

    /// What instructions are counted with, if they make the time.
    pub fn counter(&self) -> Option<&Arc<Counter>> {
        match &self.source {
            Source::Host(_) => None,
            Source::Counter(counter) => Some(counter),
        }
    }

    /// The VM time now.
    pub fn now(&self) -> Nanos {
        match &self.source {
            Source::Host(state) => state.lock().now(),
            Source::Counter(counter) => counter.now(),
        }
    }

    /// Lets the clock run on from where it stands. Does nothing if it runs.
    pub fn start(&self) {
        let Source::Host(state) = &self.source else { return };
        let mut state = state.lock();
        if state.running_since.is_none() {
            state.running_since = Some(Instant::now());
        }
    }

    /// Stops the clock. Does nothing if it stands.
    pub fn stop(&self) {
        let Source::Host(state) = &self.source else { return };
        let mut state = state.lock();
        state.base = state.now();
        state.running_since = None;
    }

    /// Whether time passes by itself.
    pub fn is_running(&self) -> bool {
        match &self.source {
            Source::Host(state) => state.lock().running_since.is_some(),
            Source::Counter(_) => false,
        }
    }

    /// Sets the time, for a restored VM and for tests.
    pub fn set(&self, now: Nanos) {
        match &self.source {
            Source::Host(state) => {
                let mut state = state.lock();
                state.base = now;
                if state.running_since.is_some() {
                    state.running_since = Some(Instant::now());
                }
            }
            Source::Counter(counter) => counter.set_time(now),
        }
    }
}

impl ClockState {
    fn now(&self) -> Nanos {
        let passed = self.running_since.map_or(0, |since| since.elapsed().as_nanos());
        self.base.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX))
    }
}

/// How many ticks of `hertz` have passed after `nanos`, rounded down.
pub fn ticks_in(nanos: Nanos, hertz: u64) -> u64 {
    (u128::from(nanos) * u128::from(hertz) / u128::from(NANOS_PER_SECOND)) as u64
}

/// The first moment at which `ticks` of `hertz` have passed: rounded up. `hertz` must not be 0.
pub fn nanos_for(ticks: u64, hertz: u64) -> Nanos {
    let nanos = (u128::from(ticks) * u128::from(NANOS_PER_SECOND)).div_ceil(u128::from(hertz));
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_clock_stands_still() {
        let clock = VmClock::new();
        assert_eq!(clock.now(), 0);
        clock.set(500);
        assert_eq!(clock.now(), 500);
        clock.start();
        let first = clock.now();
        assert!(first >= 500);
        clock.stop();
        let stopped = clock.now();
        assert_eq!(clock.now(), stopped);
    }

    #[test]
    fn tick_conversions_agree() {
        for ticks in [0, 1, 2, 1193, 1_193_182, u64::from(u32::MAX)] {
            assert_eq!(ticks_in(nanos_for(ticks, 1_193_182), 1_193_182), ticks);
        }
    }
}
