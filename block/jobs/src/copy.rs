//! Copying ranges from one node to another.

use crate::transfer::{CopyError, Transfer};
use block_graph::{BlockStatus, NodeRef, Result, WriteFlags, ZeroFlags, async_trait, skip_filters};
use io_loop::IoBuffer;
use std::ops::Range;
use std::sync::Arc;

/// The most bytes that are read at once.
const MOST_READ: u64 = 1 << 20;

/// From where to where is copied, and what need not be.
///
/// What is written to the target is part of a request at the source, and drained with it: the target may have the source
/// below it, so that neither can be drained before the other.
#[derive(Debug, Clone)]
pub(crate) struct Copier {
    pub(crate) source: NodeRef,
    pub(crate) target: NodeRef,
    /// What the source's chain has not above this node, the target sees already; nothing such if it is `None`.
    pub(crate) base: Option<NodeRef>,
    /// What is copied together, because the target stores it so, in bytes.
    pub(crate) unit: u64,
    pub(crate) compressed: bool,
    /// The target reads as zeroes wherever nothing was written, and nothing is written twice.
    pub(crate) target_is_zero: bool,
}

/// What a range of a source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Data,
    Zero,
    /// The target sees it already.
    Seen,
}

/// The bytes that a node stores together.
pub(crate) fn cluster_size(node: &NodeRef) -> u64 {
    let node = skip_filters(node);
    let cluster = node.driver().image().and_then(|image| image.info().cluster_size);
    cluster.unwrap_or(1).max(u64::from(node.driver().limits().request_alignment)).max(1)
}

impl Copier {
    /// What the source's bytes from `at` on are, and how many are alike. The caller has entered the source.
    pub(crate) async fn find_out(&self, at: u64, len: u64) -> Result<(Kind, u64)> {
        let status = self.status(at, len).await?;
        let alike = if status.len == 0 { len } else { status.len.min(len) };
        let kind = match status {
            _ if !status.allocated && self.base.is_some() => Kind::Seen,
            _ if status.zero || status.len == 0 => Kind::Zero,
            _ => Kind::Data,
        };
        Ok((kind, alike))
    }

    async fn status(&self, at: u64, len: u64) -> Result<BlockStatus> {
        let node = skip_filters(&self.source);
        if !Arc::ptr_eq(&node, &self.source) {
            return Ok(blockdev::status::above(&node, self.base.as_ref(), at, len).await?.0);
        }
        let status = node.block_status_within(at, len, true).await?;
        if status.allocated || status.len == 0 {
            return Ok(status);
        }
        let below = match node.backing() {
            Some(below) if self.base.as_ref().is_some_and(|base| Arc::ptr_eq(base, &below)) => {
                return Ok(status);
            }
            Some(below) => below,
            None => return Ok(BlockStatus { zero: true, ..status }),
        };
        let len = status.len;
        let (below, _) = blockdev::status::above(&below, self.base.as_ref(), at, len).await?;
        Ok(if below.len == 0 { BlockStatus::zero(len) } else { below })
    }

    async fn zero(&self, at: u64, len: u64) -> std::result::Result<(), CopyError> {
        if self.target_is_zero {
            return Ok(());
        }
        self.target.write_zeroes_within(at, len, ZeroFlags::MAY_UNMAP).await.map_err(CopyError::Write)
    }

    async fn copy_data(&self, at: u64, len: u64) -> std::result::Result<(), CopyError> {
        let memory = IoBuffer::scratch(usize::try_from(len).unwrap_or(usize::MAX)).into_io();
        self.source.read_within(at, &memory).await.map_err(CopyError::Read)?;
        if memory.is_zero(0, memory.len()) {
            return self.zero(at, len).await;
        }
        let mut flags = WriteFlags::empty();
        flags.set(WriteFlags::COMPRESSED, self.compressed);
        self.target.write_within(at, &memory, flags).await.map_err(CopyError::Write)
    }
}

#[async_trait(?Send)]
impl Transfer for Copier {
    fn source(&self) -> &NodeRef {
        &self.source
    }

    async fn transfer(&self, range: Range<u64>) -> std::result::Result<(), CopyError> {
        let mut at = range.start;
        while at < range.end {
            let rest = range.end - at;
            let (mut kind, mut len) = self.find_out(at, rest).await.map_err(CopyError::Read)?;
            if len < rest && len % self.unit != 0 {
                if len > self.unit {
                    len -= len % self.unit;
                } else {
                    // What the target stores together is of several kinds: it is read as a whole.
                    (kind, len) = (Kind::Data, self.unit.min(rest));
                }
            }
            match kind {
                Kind::Seen => {}
                Kind::Zero => self.zero(at, len).await?,
                Kind::Data => {
                    let most = if self.compressed { self.unit } else { MOST_READ.max(self.unit) };
                    len = len.min(most);
                    self.copy_data(at, len).await?;
                }
            }
            at += len;
        }
        Ok(())
    }
}
