//! What must not be done with nodes that jobs use.

use crate::event::JobType;
use block_graph::{Edge, Errno, Error, NodeRef, Result};
use std::sync::Arc;

/// Something that is done with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    /// It is closed.
    Delete,
    /// Its length is changed.
    Resize,
    /// Another is put above it for those who write to it.
    Snapshot,
    /// It takes an internal snapshot, or loses one.
    InternalSnapshot,
    /// It is opened otherwise.
    Reopen,
    /// It names another backing file.
    ChangeBacking,
    /// Its data are committed, or it takes those of others.
    Commit,
    /// It takes data of those below.
    Stream,
    /// A mirror copies it.
    Mirror,
    /// A backup copies it.
    Backup,
    /// A job writes to it.
    Target,
}

/// A job's hold of a node.
pub(crate) struct Blocker {
    pub(crate) job: String,
    pub(crate) kind: JobType,
    pub(crate) allowed: &'static [Op],
    pub(crate) hold: Arc<Edge>,
}

/// Whether that may be done with a node.
///
/// # Errors
/// A job is in the way.
pub(crate) fn check(blockers: &[Blocker], node: &NodeRef, op: Op) -> Result<()> {
    let in_the_way =
        |blocker: &&Blocker| Arc::ptr_eq(&blocker.hold.node(), node) && !blocker.allowed.contains(&op);
    match blockers.iter().find(in_the_way) {
        None => Ok(()),
        Some(blocker) => Err(Error::new(
            Errno::BUSY,
            format!(
                "Node '{}' is busy: block device is in use by block job: {}",
                node.name(),
                blocker.kind.name()
            ),
        )),
    }
}
