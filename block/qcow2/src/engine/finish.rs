//! The end of an image's use, VM state, and discarding everything.

use super::frees::Why;
use super::state::Qcow2;
use crate::format::header::Incompatible;
use block_graph::{Errno, Error, Result, Truncate};
use io_loop::IoVec;

impl Qcow2 {
    /// Writes everything and says in the header that it is. The caller is alone.
    pub(crate) async fn finish(&self) -> Result<()> {
        self.write_everything().await?;
        let file = self.file.node();
        // Compressed data may end within a sector; who reads whole sectors is to find one.
        let end = file.len().next_multiple_of(512);
        if end != file.len() && file.driver().grows() {
            file.truncate(end, Truncate::default()).await?;
        }
        if self.is_dirty() && self.lazy_refcounts.load(std::sync::atomic::Ordering::Relaxed) {
            self.change_header(|header| header.incompatible &= !Incompatible::DIRTY).await?;
            file.flush().await?;
        }
        Ok(())
    }

    /// Writes VM state, `offset` bytes behind where it begins.
    pub(crate) async fn write_vm_state(&self, offset: u64, from: &IoVec) -> Result<()> {
        self.check_writable()?;
        self.event("vmstate_save");
        let too_large = || Error::errno_only(Errno::TOO_LARGE);
        let start = self.vm_state_start().checked_add(offset).ok_or_else(too_large)?;
        let end = start.checked_add(from.len() as u64).ok_or_else(too_large)?;
        let entries = self.geometry.l1_entries_for(end);
        if entries > self.l1.read().entries.len() as u64 {
            let _alone = self.requests.exclusive().await;
            self.grow_l1(entries).await?;
        }
        let _request = self.begin_change().await?;
        self.write_guest(start, from).await
    }

    /// Reads VM state, `offset` bytes behind where it begins.
    pub(crate) async fn read_vm_state(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.corruption.check()?;
        self.event("vmstate_load");
        let _request = self.requests.enter().await;
        let start = self.vm_state_start().checked_add(offset);
        let start = start.ok_or_else(|| Error::errno_only(Errno::TOO_LARGE))?;
        // What is behind the L1 table's end is zero, and never the backing file's.
        self.read_own(start, into).await
    }

    /// Has the disk hold nothing, so that the backing file is seen. The caller is alone.
    pub(crate) async fn discard_all(&self) -> Result<()> {
        let end = self.disk_size().next_multiple_of(self.geometry.cluster_size());
        if end > 0 {
            self.discard_guest(0..end, Why::Snapshot, true).await?;
        }
        self.write_everything().await?;
        self.cut_file().await
    }
}
