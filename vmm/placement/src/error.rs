//! Why threads cannot be placed as asked.

use std::io;

/// Why threads cannot be placed as asked.
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    /// A vCPU that the guest does not have.
    #[error("vCPU {vcpu} cannot be placed: the guest has {vcpus}, numbered from 0")]
    NoVcpu {
        /// The vCPU.
        vcpu: u32,
        /// How many the guest has.
        vcpus: u32,
    },
    /// A processor that the host does not have, or has switched off.
    #[error("CPU {cpu} is not on this host; online are {online}")]
    NoCpu {
        /// The processor.
        cpu: u32,
        /// Those that are online, as a list.
        online: String,
    },
    /// The host's processors cannot be told.
    #[error("cannot tell which CPUs this host has: {0}")]
    HostCpus(io::Error),
    /// The host does not let the thread onto all of these processors.
    #[error("{who} cannot be pinned to CPUs {wanted}: this process may use {allowed} only (its cpuset)")]
    NotAllowed {
        /// Whose thread it is.
        who: String,
        /// The processors wanted.
        wanted: String,
        /// Those that the host permits.
        allowed: String,
    },
    /// The host refuses to pin a thread.
    #[error("{who} cannot be pinned to CPUs {wanted}: {source}")]
    Pin {
        /// Whose thread it is.
        who: String,
        /// The processors wanted.
        wanted: String,
        /// The host's error.
        source: io::Error,
    },
    /// The process may not set this policy.
    #[error(
        "{who} cannot have the scheduling policy {policy}: no permission; run as root, give the program \
         CAP_SYS_NICE, or raise its limit of real-time priorities (ulimit -r, LimitRTPRIO= in a systemd unit)"
    )]
    NoPermission {
        /// Whose thread it is.
        who: String,
        /// The policy wanted.
        policy: String,
    },
    /// The host refuses the policy.
    #[error("{who} cannot have the scheduling policy {policy}: {source}")]
    Schedule {
        /// Whose thread it is.
        who: String,
        /// The policy wanted.
        policy: String,
        /// The host's error.
        source: io::Error,
    },
    /// The host gives no thread to try placements on.
    #[error("the host cannot start a thread: {0}")]
    Thread(io::Error),
}
