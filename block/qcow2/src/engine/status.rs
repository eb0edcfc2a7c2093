//! What guest ranges are, without reading them.

use super::clusters::Run;
use super::state::Qcow2;
use crate::format::entry::SubclusterKind;
use block_graph::{BlockStatus, Result};

impl Qcow2 {
    /// The status of the first bytes of a guest range that are alike.
    pub(crate) async fn status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.corruption.check()?;
        let _request = self.requests.enter().await;
        let mut status = self.status_of(self.map(offset, len).await?);
        // Runs end with a slice; people want to see where something else begins.
        while status.len < len {
            let next = self.status_of(self.map(offset + status.len, len - status.len).await?);
            if !status.continues(&next) || status.compressed {
                break;
            }
            status.len += next.len;
        }
        status.eof = offset + status.len == self.disk_size();
        Ok(status)
    }

    fn status_of(&self, run: Run) -> BlockStatus {
        let placed = |status: BlockStatus| {
            if self.has_plain_data() { status.stored_at(self.data(), run.host) } else { status }
        };
        match run.kind {
            SubclusterKind::UnallocatedPlain => BlockStatus::unallocated(run.len),
            SubclusterKind::UnallocatedAllocated => placed(BlockStatus::unallocated(run.len)),
            SubclusterKind::ZeroPlain => BlockStatus::zero(run.len),
            SubclusterKind::ZeroAllocated => placed(BlockStatus::zero(run.len)),
            SubclusterKind::Normal => {
                let status = placed(BlockStatus::data(run.len));
                BlockStatus { recurse: status.at.is_some() && self.is_preallocated(), ..status }
            }
            SubclusterKind::Compressed | SubclusterKind::Invalid => {
                BlockStatus { compressed: true, ..BlockStatus::data(run.len) }
            }
        }
    }

    /// Whether much of the file is holes, as in images whose clusters were preallocated and never written: the file
    /// knows then which of them are zero. Found out once, as a rough guess: a wrong one costs time or precision alone.
    fn is_preallocated(&self) -> bool {
        *self.preallocated.get_or_init(|| {
            let node = self.data();
            let Some(stored) = node.driver().allocated_size() else { return false };
            let (clusters, stored) =
                (self.geometry.clusters(node.len()), stored >> self.geometry.cluster_bits);
            clusters >= (stored * 10 / 9).max(stored + 2)
        })
    }

    fn has_plain_data(&self) -> bool {
        self.crypt.is_none()
    }
}
