//! Why a machine could not be made or run.

use std::io;
use std::path::PathBuf;

/// Why a machine could not be made or run. Every message names the thing and says what is accepted.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The memory size is out of bounds.
    #[error("{bytes} bytes of memory are not possible; accepted are {least} to {most}, in steps of 4096")]
    MemorySize {
        /// The size asked for.
        bytes: u64,
        /// The least.
        least: u64,
        /// The most.
        most: u64,
    },
    /// The number of vCPUs is out of bounds.
    #[error("{vcpus} vCPUs are not possible; accepted are 1 to {most}")]
    VcpuCount {
        /// The number asked for.
        vcpus: u32,
        /// The most.
        most: u32,
    },
    /// Too many devices of a kind.
    #[error("{count} {what} are too many; this machine has room for {most}")]
    TooMany {
        /// What they are.
        what: &'static str,
        /// The number asked for.
        count: usize,
        /// The most.
        most: usize,
    },
    /// Another device is where a device was asked to be.
    #[error("the device {device} cannot be put there: {reason}")]
    Occupied {
        /// The device.
        device: &'static str,
        /// What is in the way.
        reason: String,
    },
    /// Disks cannot be changed while the VM runs.
    #[error("nothing can be done with disks while the VM runs: {0}")]
    Storage(String),
    /// A file cannot be read.
    #[error("cannot read the {what} {path}: {source}", path = .path.display())]
    File {
        /// What it is for.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// A file is larger than guest memory.
    #[error("the {what} {path} has {len} bytes, more than the guest's memory of {memory}", path = .path.display())]
    FileTooLarge {
        /// What it is for.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Its size.
        len: u64,
        /// The guest's memory in bytes.
        memory: u64,
    },
    /// A file is no firmware image.
    #[error("{path} is no firmware image; accepted are whole pages of 4096 bytes, up to {most}", path = .path.display())]
    FirmwareSize {
        /// Which file.
        path: PathBuf,
        /// The most bytes.
        most: u64,
    },
    /// The kernel cannot be booted.
    #[error("cannot boot {path}: {source}", path = .path.display())]
    Boot {
        /// The kernel.
        path: PathBuf,
        /// What is wrong with it.
        source: boot::BootError,
    },
    /// A drive cannot be opened.
    #[error("cannot open the drive {file}: {reason}")]
    Drive {
        /// The image.
        file: String,
        /// Why.
        reason: String,
    },
    /// The NUMA nodes are not possible.
    #[error(transparent)]
    Numa(#[from] crate::NumaError),
    /// Threads cannot be placed on the host as asked.
    #[error(transparent)]
    Placement(#[from] placement::PlacementError),
    /// Guest memory cannot be had.
    #[error(transparent)]
    Memory(#[from] guest_memory::MemoryError),
    /// The accelerator refused.
    #[error(transparent)]
    Accel(#[from] accel::AccelError),
    /// A character device cannot be opened.
    #[error(transparent)]
    Chardev(#[from] chardev::ChardevError),
    /// Devices do not fit together: a mistake of the machine type's.
    #[error("the machine cannot be wired: {0}")]
    Wiring(String),
    /// There is no recording, or no replay.
    #[error("the recording {path} cannot be used: {source}", path = .path.display())]
    Trace {
        /// The recording.
        path: PathBuf,
        /// Why.
        source: crate::TraceError,
    },
    /// The host cannot give a thread.
    #[error("the host cannot start a thread: {0}")]
    Thread(io::Error),
}
