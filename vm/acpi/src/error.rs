//! What can be wrong with a description of a machine.

use std::ops::Range;

/// Why tables can't be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// A machine has at least one vCPU, and [`crate::AcpiConfig::MAX_CPUS`] at most.
    #[error("{count} vCPUs; between 1 and {max} can be described")]
    CpuCount {
        /// The number given.
        count: usize,
        /// The most.
        max: usize,
    },
    /// Two vCPUs with one APIC id.
    #[error("two vCPUs have the APIC id {id}")]
    DuplicateApicId {
        /// That id.
        id: u32,
    },
    /// More serial ports than a PC has addresses for.
    #[error("{count} serial ports; at most {max} can be described")]
    SerialCount {
        /// The number given.
        count: usize,
        /// The most.
        max: usize,
    },
    /// More virtio devices than there are names for.
    #[error("{count} virtio devices; at most {max} can be described")]
    VirtioCount {
        /// The number given.
        count: usize,
        /// The most.
        max: usize,
    },
    /// The PCI host bridge decodes between 1 and 256 buses.
    #[error("{buses} PCI buses; between 1 and 256 can be described")]
    BusCount {
        /// The number given.
        buses: u16,
    },
    /// More NUMA nodes than can be described, or none.
    #[error("{count} NUMA nodes; between 1 and {max} can be described")]
    NodeCount {
        /// The number given.
        count: usize,
        /// The most.
        max: usize,
    },
    /// The NUMA nodes' vCPUs are not the machine's.
    #[error("the NUMA nodes don't have each of the machine's vCPUs once")]
    NodeCpus,
    /// The table of distances has not one row and one column for each node.
    #[error("the distances are not {nodes} times {nodes}, for as many NUMA nodes")]
    NodeDistances {
        /// The number of nodes.
        nodes: usize,
    },
    /// A distance that guests don't believe.
    #[error("{distance} from NUMA node {from} to {to}: 10 is the distance to itself, others are farther")]
    NodeDistance {
        /// The row.
        from: usize,
        /// The column.
        to: usize,
        /// The distance.
        distance: u8,
    },
    /// An address range that's empty, too high or not where it belongs.
    #[error("{what} {start:#x}..{end:#x} isn't a valid range here")]
    Range {
        /// The thing described.
        what: &'static str,
        /// Its start.
        start: u64,
        /// Its end.
        end: u64,
    },
    /// The tables' window is too small.
    #[error("the tables have {need} bytes, more than the window {:#x}..{:#x} holds", window.start, window.end)]
    WindowTooSmall {
        /// The bytes needed.
        need: u64,
        /// The window.
        window: Range<u64>,
    },
    /// Tables with 32-bit pointers must lie below 4 GiB.
    #[error("the window {:#x}..{:#x} isn't below 4 GiB", window.start, window.end)]
    WindowTooHigh {
        /// The window.
        window: Range<u64>,
    },
}
