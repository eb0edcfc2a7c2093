//! Guest time: the time-stamp counters and kvmclock follow the VM's clock.
//!
//! The counter of a VM whose guest never wrote to it is the VM's clock in ticks, and never goes back. KVM
//! knows each vCPU's counter as an offset to the host's. When the first vCPU begins to run, the VM's offset is
//! chosen so that the counter goes on from where the clock is; each vCPU moves its own by as much as the VM's
//! moved, so that what the guest made of the differences between its vCPUs stays.

use clock::{VmClock, ticks_in};
use parking_lot::Mutex;
use std::io;

/// How often the two clocks are read together at most, and the distance in nanoseconds that is good enough.
const READINGS: u32 = 16;
const CLOSE: u64 = 20_000;

#[derive(Debug, Default)]
struct State {
    /// How many vCPUs run.
    running: u32,
    /// The VM's counter less the host's.
    offset: u64,
    /// The VM's counter when the last vCPU stopped: what comes next is no less.
    frozen: u64,
}

/// A VM's time.
#[derive(Debug)]
pub(crate) struct VmTime {
    clock: VmClock,
    /// The rate of the counter.
    hertz: u64,
    state: Mutex<State>,
}

impl VmTime {
    pub(crate) fn new(clock: VmClock, hertz: u64) -> Self {
        Self { clock, hertz, state: Mutex::default() }
    }

    pub(crate) fn hertz(&self) -> u64 {
        self.hertz
    }

    pub(crate) fn clock(&self) -> &VmClock {
        &self.clock
    }

    /// A vCPU begins to run, which reads the host's counter by `host`; gives the VM's offset. For the first,
    /// `first` is called with the time on the VM's clock.
    ///
    /// # Errors
    /// Those of the two; the vCPU does not run then.
    pub(crate) fn enter(
        &self,
        host: impl Fn() -> io::Result<u64>,
        first: impl FnOnce(u64) -> io::Result<()>,
    ) -> io::Result<u64> {
        let mut state = self.state.lock();
        if state.running == 0 {
            let (now, host) = self.read_together(host)?;
            let start = ticks_in(now, self.hertz).max(state.frozen);
            state.offset = start.wrapping_sub(host);
            first(now)?;
        }
        state.running += 1;
        Ok(state.offset)
    }

    /// The VM's clock and the host's counter at one moment: of some readings the two that were closest. The
    /// clock's is the earlier one, so that the guest's counter is never ahead of it.
    fn read_together(&self, host: impl Fn() -> io::Result<u64>) -> io::Result<(u64, u64)> {
        let mut best = (u64::MAX, (0, 0));
        for _ in 0..READINGS {
            let now = self.clock.now();
            let host = host()?;
            let distance = self.clock.now().saturating_sub(now);
            if distance < best.0 {
                best = (distance, (now, host));
            }
            if distance < CLOSE {
                break;
            }
        }
        Ok(best.1)
    }

    /// A vCPU stopped, which sees the host's counter as `host`.
    pub(crate) fn leave(&self, host: u64) {
        let mut state = self.state.lock();
        state.running -= 1;
        if state.running == 0 {
            state.frozen = host.wrapping_add(state.offset);
        }
    }

    /// The counter of the stopped VM. (While vCPUs run this is the moment when none did last.)
    pub(crate) fn now(&self) -> u64 {
        let state = self.state.lock();
        ticks_in(self.clock.now(), self.hertz).max(state.frozen)
    }

    /// What the counter is at the moment `time` of the VM's clock, when it is set by that.
    pub(crate) fn at(&self, time: u64) -> u64 {
        ticks_in(time, self.hertz)
    }

    /// The VM's clock is about to be set to another time: the counter follows, even backwards.
    pub(crate) fn forget(&self) {
        self.state.lock().frozen = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_stands_still_between_runs_and_never_goes_back() {
        let clock = VmClock::new();
        let time = VmTime::new(clock.clone(), 2_000_000_000);
        clock.set(1_000);
        let mut told = 0;
        let offset = time
            .enter(
                || Ok(500),
                |now| {
                    told = now;
                    Ok(())
                },
            )
            .unwrap();
        assert_eq!((told, 500u64.wrapping_add(offset)), (1_000, 2_000));
        assert_eq!(time.enter(|| Ok(700), |_| panic!("the second")).unwrap(), offset);
        time.leave(800);
        time.leave(900);
        assert_eq!(time.now(), 2_400, "two ticks a nanosecond, and 400 of the host's passed");
        // The next run begins there, though the clock is behind.
        let offset = time.enter(|| Ok(10_000), |_| Ok(())).unwrap();
        assert_eq!(10_000u64.wrapping_add(offset), 2_400);
        time.leave(10_100);
        clock.set(5_000);
        assert_eq!(time.now(), 10_000);
        clock.set(100);
        time.forget();
        assert_eq!(time.now(), 200);
    }

    #[test]
    fn a_vcpu_that_cannot_begin_does_not_count_as_running() {
        let time = VmTime::new(VmClock::new(), 1_000_000_000);
        let broken = || Err(io::Error::other("no counter"));
        assert!(time.enter(broken, |_| Ok(())).is_err());
        assert!(time.enter(|| Ok(5), |_| Err(io::Error::other("no clock"))).is_err());
        let mut first = false;
        let note = |_| {
            first = true;
            Ok(())
        };
        time.enter(|| Ok(5), note).unwrap();
        assert!(first);
    }
}
