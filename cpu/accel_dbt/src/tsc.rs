//! The time-stamp counter before the guest's offset.
//!
//! While vCPUs run it is the host's counter plus a constant, so that it can be read without a call. When
//! the last vCPU stops it stands still; when the first runs again it is set by the VM's clock, so that it
//! never drifts away from that for longer than the VM runs without a stop.

use clock::{NANOS_PER_SECOND, VmClock, ticks_in};
use parking_lot::Mutex;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long the host's counter is watched to learn its rate. The error of the two clock readings, some
/// tens of nanoseconds, makes a few parts per million of this.
const CALIBRATION: Duration = Duration::from_millis(20);

/// The host's counter and its rate.
#[derive(Debug, Clone, Copy)]
struct HostCounter {
    hertz: u64,
    /// Where the counter's own reading cannot be used: nanoseconds since then.
    epoch: Option<Instant>,
}

#[cfg(target_arch = "x86_64")]
fn raw_counter() -> Option<u64> {
    use std::arch::x86_64::{__cpuid, _rdtsc};
    static INVARIANT: OnceLock<bool> = OnceLock::new();
    let invariant = *INVARIANT.get_or_init(|| {
        // CPUID leaf 0x80000007, EDX bit 8: the counter runs at one rate in all states.
        __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & 1 << 8 != 0
    });
    // SAFETY: every x86-64 processor has the counter.
    invariant.then(|| unsafe { _rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn raw_counter() -> Option<u64> {
    None
}

impl HostCounter {
    /// Found out once per process.
    fn get() -> Self {
        static COUNTER: OnceLock<HostCounter> = OnceLock::new();
        *COUNTER.get_or_init(|| {
            let start = Instant::now();
            let Some(first) = raw_counter() else {
                return Self { hertz: NANOS_PER_SECOND, epoch: Some(start) };
            };
            // The smallest of several distances between the two clocks' readings is the truest.
            let read = || {
                let before = raw_counter().unwrap_or(0);
                let now = Instant::now();
                let after = raw_counter().unwrap_or(0);
                (after.wrapping_sub(before), before.wrapping_add(after.wrapping_sub(before) / 2), now)
            };
            let best = |_| (0..32).map(|_| read()).min_by_key(|reading| reading.0);
            let begin = best(first);
            std::thread::sleep(CALIBRATION);
            let end = best(first);
            let (Some((_, begin, begin_time)), Some((_, end, end_time))) = (begin, end) else {
                return Self { hertz: NANOS_PER_SECOND, epoch: Some(start) };
            };
            let nanos = end_time.duration_since(begin_time).as_nanos().max(1);
            let ticks = u128::from(end.wrapping_sub(begin));
            let hertz = (ticks * u128::from(NANOS_PER_SECOND) / nanos) as u64;
            if hertz < 1_000_000 {
                return Self { hertz: NANOS_PER_SECOND, epoch: Some(start) };
            }
            // The watch is good to some kilohertz; rates are round.
            Self { hertz: (hertz + 500) / 1000 * 1000, epoch: None }
        })
    }

    fn read(&self) -> u64 {
        match self.epoch {
            None => raw_counter().unwrap_or(0),
            Some(epoch) => epoch.elapsed().as_nanos() as u64,
        }
    }
}

#[derive(Debug)]
struct Running {
    vcpus: u32,
    /// The reading when the last vCPU stopped: what comes next is no less.
    frozen: u64,
}

/// A VM's counter.
#[derive(Debug)]
pub(crate) struct TscSource {
    host: HostCounter,
    /// It is made of the VM's clock at any time, as that counts instructions.
    counted: bool,
    clock: VmClock,
    /// This counter less the host's, while vCPUs run.
    offset: AtomicU64,
    running: Mutex<Running>,
}

impl TscSource {
    pub(crate) fn new(clock: VmClock) -> Self {
        Self {
            host: HostCounter::get(),
            counted: false,
            clock,
            offset: AtomicU64::new(0),
            running: Mutex::new(Running { vcpus: 0, frozen: 0 }),
        }
    }

    /// A counter of that rate that follows a clock which counts instructions.
    pub(crate) fn counted(clock: VmClock, hertz: u64) -> Self {
        Self {
            host: HostCounter { hertz, epoch: None },
            counted: true,
            clock,
            offset: AtomicU64::new(0),
            running: Mutex::new(Running { vcpus: 0, frozen: 0 }),
        }
    }

    pub(crate) fn hertz(&self) -> u64 {
        self.host.hertz
    }

    /// The counter on a running vCPU.
    pub(crate) fn read(&self) -> u64 {
        if self.counted {
            return self.at(self.clock.now());
        }
        self.host.read().wrapping_add(self.offset.load(Ordering::Relaxed))
    }

    /// This counter less the host's own, which stays while vCPUs run; `None` if it is made of another clock.
    pub(crate) fn host_offset(&self) -> Option<u64> {
        (self.host.epoch.is_none() && !self.counted).then(|| self.offset.load(Ordering::Relaxed))
    }

    /// A vCPU begins to run; it stops when what this returns is dropped.
    pub(crate) fn enter(&self) -> RunningVcpu<'_> {
        let mut running = self.running.lock();
        if running.vcpus == 0 {
            let start = self.at(self.clock.now()).max(running.frozen);
            self.offset.store(start.wrapping_sub(self.host.read()), Ordering::Relaxed);
        }
        running.vcpus += 1;
        RunningVcpu { source: self }
    }

    /// The counter of the stopped VM. (While vCPUs run it moves on.)
    pub(crate) fn now(&self) -> u64 {
        let running = self.running.lock();
        if running.vcpus != 0 || self.counted {
            return self.read();
        }
        self.at(self.clock.now()).max(running.frozen)
    }

    /// What the counter is at the moment `time` of the VM's clock, when it is set by that.
    pub(crate) fn at(&self, time: u64) -> u64 {
        ticks_in(time, self.host.hertz)
    }

    /// The VM's clock is about to be set to another time: the counter follows, even backwards.
    pub(crate) fn forget(&self) {
        self.running.lock().frozen = 0;
    }
}

/// A vCPU that runs.
#[derive(Debug)]
pub(crate) struct RunningVcpu<'a> {
    source: &'a TscSource,
}

impl Drop for RunningVcpu<'_> {
    fn drop(&mut self) {
        let mut running = self.source.running.lock();
        running.vcpus -= 1;
        if running.vcpus == 0 {
            running.frozen = self.source.read();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_stands_still_with_the_vm_and_never_goes_back() {
        let clock = VmClock::new();
        let source = TscSource::new(clock.clone());
        assert_eq!(source.now(), 0);
        clock.set(1_000_000);
        let one_millisecond = source.hertz() / 1000;
        assert_eq!(source.now(), one_millisecond);
        let first = {
            let _one = source.enter();
            let _two = source.enter();
            source.read()
        };
        assert!(first >= one_millisecond);
        let frozen = source.now();
        assert!(frozen >= first && source.now() == frozen);
        let _again = source.enter();
        assert!(source.read() >= frozen);
    }

    #[test]
    fn a_restored_clock_takes_the_counter_along() {
        let clock = VmClock::new();
        let source = TscSource::new(clock.clone());
        clock.set(5_000_000_000);
        drop(source.enter());
        source.forget();
        clock.set(1_000_000_000);
        assert_eq!(source.now(), source.hertz());
    }
}
