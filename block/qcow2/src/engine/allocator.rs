//! What is known of the clusters that are free.

use std::collections::BTreeSet;

/// What must be held to take clusters or give them back.
#[derive(Debug, Default)]
pub(crate) struct Allocator {
    /// The refcount table.
    pub(crate) table: Vec<u64>,
    /// Where it is.
    pub(crate) table_offset: u64,
    /// Entries of it that are not in the file yet.
    pub(crate) table_dirty: BTreeSet<usize>,
    /// Where the search for free clusters begins: before it are none, or only holes that were too small.
    pub(crate) hint: u64,
    /// Clusters from this offset on have never been used: the file ends there, or before.
    pub(crate) fresh: u64,
    /// Where the next compressed data may go, in a cluster that other compressed data begin; 0 for nowhere.
    pub(crate) packed: u64,
}

impl Allocator {
    /// Says that the file is in use up to `end`.
    pub(crate) fn used(&mut self, end: u64) {
        self.fresh = self.fresh.max(end);
    }
}

/// Clusters that were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// Where they are.
    pub(crate) offset: u64,
    /// How many.
    pub(crate) clusters: u64,
    /// Whether they are known to read as zeros.
    pub(crate) fresh: bool,
}
