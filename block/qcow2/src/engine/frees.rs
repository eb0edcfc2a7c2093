//! Clusters on their way to be free.

use std::collections::VecDeque;

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
    /// Guest clusters in the external data file, which are not counted.
    pub(crate) in_data_file: bool,
}

/// Clusters on their way to be free.
#[derive(Debug, Default)]
pub(crate) struct Frees {
    /// The file may still name them.
    pub(crate) unstable: Vec<Freed>,
    /// Nothing names them; free when all requests from before the epoch have ended.
    pub(crate) stable: VecDeque<(u64, Vec<Freed>)>,
}
