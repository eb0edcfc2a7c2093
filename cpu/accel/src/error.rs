//! Why an accelerator refused.

/// Why an accelerator refused.
#[derive(Debug, thiserror::Error)]
pub enum AccelError {
    /// No CPU model has this name, or it cannot be had.
    #[error("{reason} (accelerator {accelerator})")]
    Cpu {
        /// The accelerator.
        accelerator: &'static str,
        /// Why.
        reason: String,
    },
    /// A CPU feature cannot be switched on or off, or there is none of that name.
    #[error("CPU feature {name:?} of a {cpu} cannot be changed: {reason}")]
    CpuFeature {
        /// The feature's name.
        name: String,
        /// The CPU model.
        cpu: String,
        /// Why not.
        reason: String,
    },
    /// A number of vCPUs that is not possible.
    #[error("{vcpus} vCPUs are not possible; the {accelerator} accelerator takes 1 to {most}")]
    VcpuCount {
        /// The accelerator.
        accelerator: &'static str,
        /// The number asked for.
        vcpus: u32,
        /// The most that are possible.
        most: u32,
    },
    /// A vCPU that is not in the VM's spec, or that was made already.
    #[error("vCPU {id} cannot be made: {reason}")]
    VcpuId {
        /// Its number.
        id: u32,
        /// Why not.
        reason: &'static str,
    },
    /// A way of executing that this accelerator lacks.
    #[error("the {accelerator} accelerator has no tier {tier:?}: {reason}")]
    Tier {
        /// The accelerator.
        accelerator: &'static str,
        /// The tier's name.
        tier: &'static str,
        /// Why not.
        reason: String,
    },
    /// Execution by counts of instructions that is not possible.
    #[error("the {accelerator} accelerator cannot count instructions: {reason}")]
    Counted {
        /// The accelerator.
        accelerator: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// More regions of guest memory than the accelerator takes.
    #[error("{regions} regions of guest memory are too many; the {accelerator} accelerator takes {most}")]
    MemoryRegions {
        /// The accelerator.
        accelerator: &'static str,
        /// How many there are.
        regions: usize,
        /// The most that are possible.
        most: u32,
    },
    /// A region of guest memory that the host does not take.
    #[error(
        "the {accelerator} accelerator does not take guest memory at {:#x}..{:#x}: {source}",
        range.start,
        range.end
    )]
    MemoryRegion {
        /// The accelerator.
        accelerator: &'static str,
        /// Its guest physical addresses.
        range: std::ops::Range<u64>,
        /// The host's error.
        source: std::io::Error,
    },
    /// A saved vCPU state that is none.
    #[error("saved state of vCPU {id} is refused: {field} is {reason}")]
    BadState {
        /// The vCPU.
        id: u32,
        /// The part of the state.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Debugging that the accelerator cannot do.
    #[error("vCPU {id} cannot be debugged so: {reason}")]
    Debug {
        /// The vCPU.
        id: u32,
        /// What is not possible, and what is.
        reason: String,
    },
    /// The host refused.
    #[error("{what}: {source}")]
    Host {
        /// What was wanted of it.
        what: &'static str,
        /// Its error.
        source: std::io::Error,
    },
}
