//! What is asked for: plain data, made from command lines and, later, from libvirt's XML.

use crate::cpu_list::{CpuList, CpuListError};
use std::fmt;
use std::str::FromStr;

/// Where a VM's threads are to run. Of several words on one thread the last counts, but words on single
/// vCPUs count more than those on all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PlacementSpec {
    /// The processors for threads.
    pub pins: Vec<Pin>,
    /// The scheduling policies for threads.
    pub schedules: Vec<Schedule>,
}

/// Some of a VM's threads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// All vCPUs.
    Vcpus,
    /// These vCPUs.
    Some(CpuList),
    /// All threads that are no vCPUs: devices', timers, control (libvirt's emulator threads).
    Io,
}

/// Processors for threads, written `TARGET=CPUS`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    /// Which threads.
    pub target: Target,
    /// Where each of them may run.
    pub cpus: CpuList,
}

/// A scheduling policy for threads, written `TARGET=POLICY`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// Which threads.
    pub target: Target,
    /// Their policy.
    pub policy: SchedulingPolicy,
}

/// A scheduling policy (sched(7)), written `fifo:10`, `rr:10`, `other`, `batch` or `idle`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchedulingPolicy {
    /// The normal one.
    Other,
    /// For work that nobody waits for.
    Batch,
    /// For when nobody else wants the processor.
    Idle,
    /// Real-time with a priority from 1 to 99: runs until it sleeps.
    Fifo(u8),
    /// Real-time with a priority from 1 to 99: takes turns with others of the same.
    RoundRobin(u8),
}

/// Why a text is no part of a [`PlacementSpec`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// There is no `=`.
    #[error(
        "{text:?} lacks what is to be placed; accepted is {accepted}, where TARGET is a vCPU, a list of them, vcpus or io"
    )]
    NoTarget {
        /// The text.
        text: String,
        /// The form.
        accepted: &'static str,
    },
    /// It names no threads.
    #[error("{text:?} names no threads; accepted are a vCPU, a list of them such as 0-3, vcpus, and io")]
    BadTarget {
        /// The text.
        text: String,
    },
    /// It is no list of processors.
    #[error(transparent)]
    Cpus(#[from] CpuListError),
    /// It is no policy.
    #[error(
        "{text:?} is no scheduling policy; accepted are fifo:N and rr:N with N from 1 to 99, other, batch and idle"
    )]
    BadPolicy {
        /// The text.
        text: String,
    },
}

impl FromStr for Target {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        match text {
            "vcpus" => Ok(Self::Vcpus),
            "io" | "emulator" => Ok(Self::Io),
            _ => match text.parse() {
                Ok(vcpus) => Ok(Self::Some(vcpus)),
                Err(_) => Err(SpecError::BadTarget { text: text.into() }),
            },
        }
    }
}

impl FromStr for Pin {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (target, cpus) = split(text, "TARGET=CPUS")?;
        Ok(Self { target: target.parse()?, cpus: cpus.parse()? })
    }
}

impl FromStr for Schedule {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (target, policy) = split(text, "TARGET=POLICY")?;
        Ok(Self { target: target.parse()?, policy: policy.parse()? })
    }
}

fn split<'a>(text: &'a str, accepted: &'static str) -> Result<(&'a str, &'a str), SpecError> {
    text.split_once('=').ok_or_else(|| SpecError::NoTarget { text: text.into(), accepted })
}

impl FromStr for SchedulingPolicy {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let error = || SpecError::BadPolicy { text: text.into() };
        let (name, priority) = match text.split_once(':') {
            Some((name, priority)) => (name, Some(priority)),
            None => (text, None),
        };
        let real_time = || {
            let priority = priority.and_then(|text| text.parse().ok());
            priority.filter(|priority| (1..=99).contains(priority)).ok_or_else(error)
        };
        match (name, priority) {
            ("other", None) => Ok(Self::Other),
            ("batch", None) => Ok(Self::Batch),
            ("idle", None) => Ok(Self::Idle),
            ("fifo", Some(_)) => Ok(Self::Fifo(real_time()?)),
            ("rr", Some(_)) => Ok(Self::RoundRobin(real_time()?)),
            _ => Err(error()),
        }
    }
}

impl fmt::Display for SchedulingPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other => f.write_str("other"),
            Self::Batch => f.write_str("batch"),
            Self::Idle => f.write_str("idle"),
            Self::Fifo(priority) => write!(f, "fifo:{priority}"),
            Self::RoundRobin(priority) => write!(f, "rr:{priority}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_people_write() {
        let list = |text: &str| text.parse::<CpuList>().unwrap();
        let pin = |text: &str| text.parse::<Pin>().unwrap();
        assert_eq!(pin("vcpus=0-1"), Pin { target: Target::Vcpus, cpus: list("0,1") });
        assert_eq!(pin("0,2=3"), Pin { target: Target::Some(list("0,2")), cpus: list("3") });
        assert_eq!(pin("io=4").target, pin("emulator=4").target);
        let schedule: Schedule = "1=fifo:99".parse().unwrap();
        assert_eq!(
            schedule,
            Schedule { target: Target::Some(list("1")), policy: SchedulingPolicy::Fifo(99) }
        );
        for policy in ["other", "batch", "idle", "fifo:1", "rr:99"] {
            assert_eq!(policy.parse::<SchedulingPolicy>().unwrap().to_string(), policy);
        }
        for text in ["", "0", "=1", "x=1", "0=", "io=x"] {
            assert!(text.parse::<Pin>().is_err(), "{text}");
        }
        for text in ["fifo", "fifo:0", "rr:100", "rr:-1", "other:1", "deadline", ""] {
            assert!(text.parse::<SchedulingPolicy>().is_err(), "{text}");
        }
    }
}
