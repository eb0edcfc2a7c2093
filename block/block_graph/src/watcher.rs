//! Those who see a node's writes before its driver does: copies of what is overwritten, and of what is written.

use crate::{DetectZeroes, Node, NodeRef, Result, WriteFlags, ZeroFlags};
use async_trait::async_trait;
use io_loop::IoVec;
use std::sync::Arc;

/// A change of a node's content.
#[derive(Debug, Clone, Copy)]
pub enum Change<'a> {
    /// A write.
    Data {
        /// Where, in bytes.
        offset: u64,
        /// What. Guest memory may change while the write is under way.
        from: &'a IoVec,
        /// How.
        flags: WriteFlags,
    },
    /// A range that becomes zero.
    Zeroes {
        /// Where, in bytes.
        offset: u64,
        /// Its bytes.
        len: u64,
        /// How.
        flags: ZeroFlags,
    },
    /// A range that may read as anything afterwards.
    Discard {
        /// Where, in bytes.
        offset: u64,
        /// Its bytes.
        len: u64,
    },
}

impl Change<'_> {
    /// Where the change begins, and its bytes.
    pub fn range(&self) -> (u64, u64) {
        match *self {
            Self::Data { offset, from, .. } => (offset, from.len() as u64),
            Self::Zeroes { offset, len, .. } | Self::Discard { offset, len } => (offset, len),
        }
    }

    /// The same change, or a request for zeroes where it writes nothing else.
    pub(crate) fn detecting_zeroes(self, mode: DetectZeroes) -> Self {
        match self {
            Self::Data { offset, from, flags }
                if mode != DetectZeroes::Off && from.is_zero(0, from.len()) =>
            {
                let mut how = ZeroFlags::empty();
                how.set(ZeroFlags::MAY_UNMAP, mode == DetectZeroes::Unmap);
                how.set(ZeroFlags::FUA, flags.contains(WriteFlags::FUA));
                Self::Zeroes { offset, len: from.len() as u64, flags: how }
            }
            other => other,
        }
    }
}

/// Sees every change of a node's content.
#[async_trait(?Send)]
pub trait WriteWatcher: Send + Sync {
    /// Has `next` make the change, which is a request in flight at the node: what has to come before or after it is done
    /// here, at the node itself by requests `within`.
    ///
    /// # Errors
    /// Those of `next`, or whatever else is to be the end of the request.
    async fn around(&self, change: Change<'_>, next: Next<'_>) -> Result<()>;

    /// The nodes that it writes to, by requests `within` that of the node that is watched: who drains one of them drains
    /// that too.
    fn targets(&self) -> Vec<NodeRef> {
        Vec::new()
    }
}

/// What is still to come of a change: other watchers, and the driver.
#[derive(Clone, Copy)]
pub struct Next<'a> {
    node: &'a Node,
    watchers: &'a [Arc<dyn WriteWatcher>],
}

impl<'a> Next<'a> {
    pub(crate) fn new(node: &'a Node, watchers: &'a [Arc<dyn WriteWatcher>]) -> Self {
        Self { node, watchers }
    }

    /// Makes the change.
    ///
    /// # Errors
    /// The driver's, or that of a watcher.
    pub async fn run(self, change: Change<'_>) -> Result<()> {
        match self.watchers {
            [first, rest @ ..] => first.around(change, Next { watchers: rest, ..self }).await,
            [] => self.node.make_recorded(change).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use io_loop::IoBuffer;

    #[test]
    fn writes_of_zeroes_become_requests_for_zeroes() {
        let zeroes = IoBuffer::zeroed(4096).into_io();
        let data = IoBuffer::from(&[0, 0, 1][..]).into_io();
        let write = |from| Change::Data { offset: 5, from, flags: WriteFlags::FUA };
        let flags = |change| match change {
            Change::Zeroes { offset: 5, len: 4096, flags } => Some(flags),
            _ => None,
        };
        assert_eq!(flags(write(&zeroes).detecting_zeroes(DetectZeroes::Off)), None);
        assert_eq!(flags(write(&data).detecting_zeroes(DetectZeroes::Unmap)), None);
        assert_eq!(flags(write(&zeroes).detecting_zeroes(DetectZeroes::On)), Some(ZeroFlags::FUA));
        let unmap = ZeroFlags::FUA | ZeroFlags::MAY_UNMAP;
        assert_eq!(flags(write(&zeroes).detecting_zeroes(DetectZeroes::Unmap)), Some(unmap));
    }
}
