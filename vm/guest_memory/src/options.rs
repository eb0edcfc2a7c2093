//! What guest memory is to be made of.

use std::ops::Range;
use std::path::PathBuf;

/// What guest memory is to be made of, and how the host is to treat it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryOptions {
    /// Where its pages come from.
    pub source: MemorySource,
    /// Whether other processes may map it and see what the guest writes, and it is on a file descriptor.
    pub shared: bool,
    /// Whether all of it is allocated before the guest starts.
    pub prealloc: bool,
    /// The threads that do so; without a number, one per processor, 16 at most.
    pub prealloc_threads: Option<usize>,
    /// Whether it may be swapped out.
    pub lock: Lock,
    /// Advice on transparent huge pages: for, against, or as the host is set.
    pub transparent_huge: Option<bool>,
    /// Whether the host may merge equal pages (KSM).
    pub merge: bool,
    /// Whether it becomes part of core dumps.
    pub dump: bool,
    /// The host's NUMA nodes for parts of it.
    pub bindings: Vec<NodeBinding>,
}

impl Default for MemoryOptions {
    /// Private, of the host's normal pages, allocated when touched, swappable.
    fn default() -> Self {
        Self {
            source: MemorySource::Anonymous,
            shared: false,
            prealloc: false,
            prealloc_threads: None,
            lock: Lock::Off,
            transparent_huge: None,
            merge: false,
            dump: true,
            bindings: Vec::new(),
        }
    }
}

/// Where the pages of guest memory come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum MemorySource {
    /// The host's normal pages.
    #[default]
    Anonymous,
    /// Reserved huge pages of this many bytes.
    HugePages(u64),
    /// A file. Shared memory is written to it; it is made if it is missing. Private memory starts as a copy
    /// of it. A folder gets a file without a name.
    File(PathBuf),
}

/// Whether guest memory may be swapped out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Lock {
    /// It may.
    #[default]
    Off,
    /// It is allocated at once and stays in RAM.
    On,
    /// Pages stay in RAM once they were touched.
    OnFault,
}

/// Binds a part of guest memory to NUMA nodes of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeBinding {
    /// Guest physical addresses; what is not memory of them does not count.
    pub range: Range<u64>,
    /// The host's nodes.
    pub nodes: Vec<u32>,
    /// How pages are taken from them.
    pub policy: NodePolicy,
}

/// How pages are taken from NUMA nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NodePolicy {
    /// From these nodes only.
    #[default]
    Bind,
    /// From these nodes while they have any.
    Preferred,
    /// From these nodes in turn.
    Interleave,
}

/// Told of the progress of an allocation: bytes that are done, and bytes in all. Called on several threads.
pub type PreallocProgress<'a> = &'a (dyn Fn(u64, u64) + Sync);
