//! Clusters on their way to be free.

use std::collections::VecDeque;

/// Freed runs that are kept in memory before tables are written so that the clusters can be used again.
const MOST_FREED: usize = 8192;
/// The most bytes that wait for that: while they do, what is written makes the file longer.
const MOST_FREED_BYTES: u64 = 16 << 20;

/// Why clusters are freed: decides whether the file is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// The guest discarded them.
    Request,
    /// Their snapshot was deleted.
    Snapshot,
    /// The image shrinks: always passed on.
    Always,
    /// Anything else: they were copied, or compressed anew.
    Other,
}

/// Clusters that something named that is no longer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Freed {
    pub(crate) offset: u64,
    pub(crate) clusters: u64,
    pub(crate) why: Why,
}

/// Clusters on their way to be free.
#[derive(Debug, Default)]
pub(crate) struct Frees {
    /// The file may still name them.
    pub(crate) unstable: Vec<Freed>,
    /// Nothing names them; free when all requests from before the epoch have ended.
    pub(crate) stable: VecDeque<(u64, Vec<Freed>)>,
}

impl Frees {
    /// Whether so much waits for tables to be written that they should be.
    pub(crate) fn are_many(&self, cluster_bits: u32) -> bool {
        let clusters = || self.unstable.iter().map(|freed| freed.clusters).sum::<u64>();
        self.unstable.len() > MOST_FREED || clusters() << cluster_bits >= MOST_FREED_BYTES
    }
}
