//! What a VM is to be: plain data, made from command lines and, later, from libvirt's XML.

use crate::NumaSpec;
use accel::{CpuSpec, Tier};
use block_graph::CacheMode;
use chardev::ChardevSpec;
use guest_memory::MemoryOptions;
use placement::PlacementSpec;
use std::path::PathBuf;
use std::time::Duration;
use virtio_blk::ErrorPolicy;

/// The least memory that a machine has, in bytes.
pub const MIN_MEMORY: u64 = 4 << 20;
/// The most memory that a machine has, in bytes.
pub const MAX_MEMORY: u64 = 256 << 30;
/// The most vCPUs that a machine has: with the xAPIC's 8-bit ids, one of which is broadcast.
pub const MAX_VCPUS: u32 = 254;
/// The most serial ports that a PC has.
pub const MAX_SERIALS: usize = 4;

/// Machine types.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum MachineKind {
    /// A PC with a chipset like Q35's.
    #[default]
    Pc,
    /// A machine without chipset and PCI, which starts faster.
    Micro,
}

impl MachineKind {
    /// The names that people give them, the usual ones first.
    pub const NAMES: &[(&str, Self)] = &[("pc", Self::Pc), ("microvm", Self::Micro), ("q35", Self::Pc)];
}

/// A whole machine.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// The machine type.
    pub kind: MachineKind,
    /// Guest memory in bytes.
    pub memory: u64,
    /// How many vCPUs.
    pub vcpus: u32,
    /// What they are.
    pub cpu: CpuSpec,
    /// How they execute, where the accelerator has a choice.
    pub tier: Tier,
    /// Which vCPUs and which memory are near each other; without nodes, all are.
    pub numa: NumaSpec,
    /// What it takes of the host.
    pub host: HostSpec,
    /// What to boot.
    pub boot: BootSpec,
    /// Disks, in the order of their slots.
    pub drives: Vec<DriveSpec>,
    /// Serial ports, COM1 first.
    pub serials: Vec<ChardevSpec>,
    /// A virtio console, if there is one.
    pub console: Option<ChardevSpec>,
    /// Whether there is a virtio entropy source.
    pub rng: bool,
    /// Whether there is a virtio balloon.
    pub balloon: bool,
    /// Other devices.
    pub devices: Vec<DeviceSpec>,
    /// Whether a reset ends the program instead of rebooting the guest.
    pub no_reboot: bool,
    /// If everything is to happen by counts of instructions.
    pub deterministic: Option<DeterministicSpec>,
}

/// How a machine runs that does the same whenever it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeterministicSpec {
    /// An instruction takes `1 << shift` nanoseconds; at most [`clock::MAX_SHIFT`].
    pub shift: u8,
    /// Whether an idle vCPU waits as long on the host as in the VM. The guest sees no difference.
    pub sleep: bool,
    /// What all random numbers are made of.
    pub seed: u64,
    /// What the real-time clock begins with, in seconds since 1970.
    pub epoch: i64,
    /// What is done about recordings.
    pub trace: Option<TraceSpec>,
}

impl DeterministicSpec {
    /// 2026-01-01, in seconds since 1970: where the real-time clock begins if nobody says otherwise.
    pub const EPOCH: i64 = 1_767_225_600;
}

impl Default for DeterministicSpec {
    /// An instruction takes a nanosecond.
    fn default() -> Self {
        Self { shift: 0, sleep: true, seed: 0, epoch: Self::EPOCH, trace: None }
    }
}

/// What a deterministic machine does about recordings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TraceSpec {
    /// Makes one in this file.
    Record(PathBuf),
    /// Has the one in this file happen again.
    Replay(PathBuf),
}

/// A device that a machine has only if asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceSpec {
    /// A debug-exit device.
    DebugExit {
        /// Its first port.
        port: u16,
        /// How many ports it has.
        count: u16,
    },
    /// A debug console: a port that passes on what is written to it.
    DebugConsole {
        /// Its port.
        port: u16,
        /// Where the characters go.
        output: ChardevSpec,
    },
    /// What CPU test programs expect of a PC.
    PcTestdev,
}

impl DeviceSpec {
    /// The name that people give it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::DebugExit { .. } => "isa-debug-exit",
            Self::DebugConsole { .. } => "isa-debugcon",
            Self::PcTestdev => "pc-testdev",
        }
    }
}

/// How a machine uses the host that it runs on. The guest does not see it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostSpec {
    /// What guest memory is made of. Its bindings are those of the NUMA nodes.
    pub memory: MemoryOptions,
    /// Where threads run.
    pub placement: PlacementSpec,
    /// How long halted vCPUs look for work before they sleep: see [`accel::VmSpec::halt_poll`].
    pub halt_poll: Option<Duration>,
}

/// What a machine begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootSpec {
    /// A kernel, without firmware.
    Kernel(KernelSpec),
    /// The file of a firmware image: it ends at 4 GiB, and its last 128 KiB are below 1 MiB as well. Processors
    /// begin in it as after a reset.
    Firmware(PathBuf),
}

/// A kernel to boot without firmware.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelSpec {
    /// bzImage, or an ELF file for PVH, multiboot or Linux's 64-bit protocol.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The command line.
    pub append: String,
    /// Whether a bzImage is unpacked on the host and entered behind the code that would unpack it.
    pub unpack: bool,
}

/// A disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DriveSpec {
    /// The drive's name for those who control the VM; without it, `virtio` and a number.
    pub id: Option<String>,
    /// The image: a path, or a name of a protocol, or `json:`.
    pub file: String,
    /// The image's format; without it, what its first bytes say.
    pub format: Option<String>,
    /// Whether the guest must not write.
    pub read_only: bool,
    /// Whether what the guest writes is kept for as long as the VM exists only, and not in the image.
    pub snapshot: bool,
    /// What the guest sees as the serial number.
    pub serial: Option<String>,
    /// Request queues; without it, one per vCPU.
    pub queues: Option<u16>,
    /// The cache mode; without it, `writeback`.
    pub cache: Option<CacheMode>,
    /// Which files that the image names may be opened.
    pub references: References,
    /// What is done about reads that the host fails; without it, the guest is told.
    pub read_errors: Option<ErrorPolicy>,
    /// What is done about other requests that the host fails; without it, the guest is told.
    pub write_errors: Option<ErrorPolicy>,
    /// What the image's and its file's drivers are told besides, by name.
    pub options: Vec<(String, String)>,
}

/// Which files an image may name, as its backing file or for its data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum References {
    /// Files by their paths.
    #[default]
    Files,
    /// Anything that can be opened: other protocols, and options in JSON.
    Any,
    /// None.
    Nothing,
}
