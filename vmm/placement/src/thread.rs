//! Placing the thread that calls.

use crate::cpu_list::{CpuList, MAX_CPU};
use crate::error::PlacementError;
use crate::spec::SchedulingPolicy;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::io;
use thread_priority::unix::{
    NormalThreadSchedulePolicy, RealtimeThreadSchedulePolicy, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};
use thread_priority::{Error, ThreadPriority, ThreadPriorityValue};

/// EPERM of errno(3).
const NO_PERMISSION: i32 = 1;

/// Where one thread is to run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ThreadPlacement {
    /// On these processors.
    pub(crate) cpus: Option<CpuList>,
    /// Under this policy.
    pub(crate) policy: Option<SchedulingPolicy>,
}

/// The processors that this thread may run on; all of them if the host does not tell.
pub(crate) fn affinity() -> Option<CpuList> {
    let set = sched_getaffinity(None).ok()?;
    CpuList::new((0..=MAX_CPU).filter(|cpu| set.is_set(*cpu as usize)))
}

impl ThreadPlacement {
    /// Places the calling thread, which is `who`'s.
    pub(crate) fn apply(&self, who: impl Fn() -> String) -> Result<(), PlacementError> {
        if let Some(cpus) = &self.cpus {
            pin(cpus, &who)?;
        }
        self.policy.map_or(Ok(()), |policy| schedule(policy, &who))
    }
}

fn pin(cpus: &CpuList, who: &dyn Fn() -> String) -> Result<(), PlacementError> {
    let mut set = CpuSet::new();
    for cpu in cpus.iter() {
        set.set(cpu as usize);
    }
    let wanted = || cpus.to_string();
    sched_setaffinity(None, &set).map_err(|errno| PlacementError::Pin {
        who: who(),
        wanted: wanted(),
        source: errno.into(),
    })?;
    // The kernel leaves out silently what the process's cpuset does not have.
    match affinity() {
        Some(allowed) if allowed != *cpus => {
            Err(PlacementError::NotAllowed { who: who(), wanted: wanted(), allowed: allowed.to_string() })
        }
        _ => Ok(()),
    }
}

fn schedule(policy: SchedulingPolicy, who: &dyn Fn() -> String) -> Result<(), PlacementError> {
    let real_time = |policy, priority: u8| {
        let priority = ThreadPriorityValue::try_from(priority).unwrap_or(ThreadPriorityValue::MIN);
        (ThreadPriority::Crossplatform(priority), ThreadSchedulePolicy::Realtime(policy))
    };
    // Half of the crate's range is the niceness 0.
    let middle = ThreadPriorityValue::try_from(49).unwrap_or(ThreadPriorityValue::MIN);
    let normal = |policy| (ThreadPriority::Crossplatform(middle), ThreadSchedulePolicy::Normal(policy));
    let (priority, system) = match policy {
        SchedulingPolicy::Other => normal(NormalThreadSchedulePolicy::Other),
        SchedulingPolicy::Batch => normal(NormalThreadSchedulePolicy::Batch),
        SchedulingPolicy::Idle => normal(NormalThreadSchedulePolicy::Idle),
        SchedulingPolicy::Fifo(priority) => real_time(RealtimeThreadSchedulePolicy::Fifo, priority),
        SchedulingPolicy::RoundRobin(priority) => {
            real_time(RealtimeThreadSchedulePolicy::RoundRobin, priority)
        }
    };
    set_thread_priority_and_policy(thread_native_id(), priority, system).map_err(|error| {
        let source = match error {
            Error::OS(NO_PERMISSION) => {
                return PlacementError::NoPermission { who: who(), policy: policy.to_string() };
            }
            Error::OS(code) => io::Error::from_raw_os_error(code),
            other => io::Error::other(format!("{other:?}")),
        };
        PlacementError::Schedule { who: who(), policy: policy.to_string(), source }
    })
}
