//! How much processor time a VM's threads take.

use parking_lot::Mutex;
use rustix::param::clock_ticks_per_second;
use rustix::thread::{Pid, gettid};
use std::ops::AddAssign;
use std::time::Duration;

/// Processor time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// Outside the host's kernel: translated code, devices, and under KVM the guest.
    pub user: Duration,
    /// In the host's kernel.
    pub system: Duration,
    /// Ready to run, and waiting for a processor: what a guest sees as stolen.
    pub waiting: Duration,
}

impl CpuTime {
    /// Time spent on processors.
    pub fn total(&self) -> Duration {
        self.user + self.system
    }
}

impl AddAssign for CpuTime {
    fn add_assign(&mut self, other: Self) {
        self.user += other.user;
        self.system += other.system;
        self.waiting += other.waiting;
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct VcpuMeter {
    /// Of threads that ended.
    past: CpuTime,
    /// The thread that runs it now.
    thread: Option<Pid>,
}

/// Keeps the account of a VM's vCPUs over all threads that ran them.
#[derive(Debug)]
pub struct CpuMeter {
    vcpus: Mutex<Vec<VcpuMeter>>,
}

/// Has the calling thread's time counted as a vCPU's until it is dropped, on the same thread.
#[derive(Debug)]
pub struct Measuring<'a> {
    meter: &'a CpuMeter,
    vcpu: u32,
}

impl CpuMeter {
    /// An account of `vcpus` vCPUs.
    pub fn new(vcpus: u32) -> Self {
        Self { vcpus: Mutex::new(vec![VcpuMeter::default(); vcpus as usize]) }
    }

    /// Counts the calling thread's time as that of `vcpu`. To be called at the thread's start.
    pub fn measure(&self, vcpu: u32) -> Measuring<'_> {
        if let Some(meter) = self.vcpus.lock().get_mut(vcpu as usize) {
            meter.thread = Some(gettid());
        }
        Measuring { meter: self, vcpu }
    }

    /// What each vCPU took.
    pub fn vcpus(&self) -> Vec<CpuTime> {
        let read = |meter: &VcpuMeter| {
            let mut time = meter.past;
            time += meter.thread.map(of_thread).unwrap_or_default();
            time
        };
        self.vcpus.lock().iter().map(read).collect()
    }

    /// The host's number of the thread that runs each vCPU now, if one does.
    pub fn threads(&self) -> Vec<Option<i32>> {
        self.vcpus.lock().iter().map(|meter| meter.thread.map(|pid| pid.as_raw_nonzero().get())).collect()
    }

    /// What the whole process took beyond its vCPUs. How long its threads waited is not known.
    pub fn io(&self) -> CpuTime {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let mut rest = parse_stat(&stat).unwrap_or_default();
        for vcpu in self.vcpus() {
            rest.user = rest.user.saturating_sub(vcpu.user);
            rest.system = rest.system.saturating_sub(vcpu.system);
        }
        rest
    }
}

impl Drop for Measuring<'_> {
    fn drop(&mut self) {
        if let Some(meter) = self.meter.vcpus.lock().get_mut(self.vcpu as usize)
            && let Some(thread) = meter.thread.take()
        {
            meter.past += of_thread(thread);
        }
    }
}

/// The time of a thread of this process; zeros if it has ended.
fn of_thread(thread: Pid) -> CpuTime {
    let folder = format!("/proc/self/task/{}", thread.as_raw_nonzero());
    let read = |name: &str| std::fs::read_to_string(format!("{folder}/{name}")).unwrap_or_default();
    let mut time = parse_stat(&read("stat")).unwrap_or_default();
    // Nanoseconds on a processor, nanoseconds of waiting for one, and time slices.
    let waiting = read("schedstat").split(' ').nth(1).and_then(|text| text.parse().ok());
    time.waiting = Duration::from_nanos(waiting.unwrap_or(0));
    time
}

/// User and system time out of a `stat` file (proc_pid_stat(5)).
fn parse_stat(text: &str) -> Option<CpuTime> {
    // Names may have anything in them; the last parenthesis ends the name. What follows is field 3.
    let (_, fields) = text.rsplit_once(") ")?;
    let ticks = |field: usize| {
        let ticks: u64 = fields.split(' ').nth(field - 3)?.parse().ok()?;
        Some(Duration::from_millis(ticks.saturating_mul(1000) / clock_ticks_per_second().max(1)))
    };
    Some(CpuTime { user: ticks(14)?, system: ticks(15)?, waiting: Duration::ZERO })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_files_are_read() {
        let text = "17 (a) (b) R 1 1 1 0 -1 4194560 1 2 3 4 250 50 7 8 20 0 3 0 100 1 1";
        let time = parse_stat(text).unwrap();
        let second = clock_ticks_per_second() as f64;
        assert!((time.user.as_secs_f64() - 250.0 / second).abs() < 0.002, "{time:?}");
        assert!((time.system.as_secs_f64() - 50.0 / second).abs() < 0.002, "{time:?}");
        assert_eq!(parse_stat("17 (a) R 1"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn time_counts_for_the_vcpu_that_took_it_and_stays_when_its_thread_ends() {
        let meter = CpuMeter::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _measuring = meter.measure(1);
                let before = meter.vcpus()[1];
                while meter.vcpus()[1].total() < before.total() + Duration::from_millis(30) {
                    std::hint::black_box((0..10_000u64).sum::<u64>());
                }
            });
        });
        let vcpus = meter.vcpus();
        assert_eq!(vcpus[0], CpuTime::default());
        assert!(vcpus[1].total() >= Duration::from_millis(30), "{vcpus:?}");
        assert_eq!(meter.vcpus(), vcpus);
        let _outside = meter.measure(9);
        let _ = meter.io();
    }
}
