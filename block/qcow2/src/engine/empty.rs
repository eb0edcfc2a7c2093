//! Emptying an image at once: new tables in place of the old ones, and nothing else.

use super::state::Qcow2;
use crate::format::header::{CryptMethod, Incompatible};
use crate::format::refcount;
use block_graph::{Result, Truncate, WriteFlags, ZeroFlags};
use io_loop::IoBuffer;
use std::sync::atomic::Ordering;

impl Qcow2 {
    /// Whether [`Qcow2::rebuild_empty`] can be used: nothing but guest data and the first tables is in the file, and one
    /// refcount block counts what will be.
    pub(crate) fn can_be_rebuilt_empty(&self) -> bool {
        let first = self.first_cluster.lock();
        !self.version_2()
            && first.header.snapshots == 0
            && first.extensions.bitmaps.is_none()
            && self.crypt_method != CryptMethod::Luks
            && !self.geometry.data_file
            && self.file.node().driver().grows()
            && 3 + self.l1_clusters() <= self.geometry.refcount_block_entries()
    }

    fn l1_clusters(&self) -> u64 {
        self.geometry.clusters(self.l1.read().entries.len() as u64 * 8)
    }

    /// Makes the file one that has a header, a refcount table of a cluster, a refcount block, and an L1 table that names
    /// nothing. While this goes on, the dirty bit says that refcounts are not to be trusted: a crash loses data that are
    /// not wanted any more, and the image is repaired when it is opened next. Whatever comes of it, this state cannot be
    /// used afterwards. The caller is alone.
    pub(crate) async fn rebuild_empty(&self) -> Result<()> {
        self.write_everything().await?;
        let rebuilt = self.write_empty_tables().await;
        // Memory has other tables than the file now.
        self.corruption.fatal.store(true, Ordering::SeqCst);
        rebuilt
    }

    async fn write_empty_tables(&self) -> Result<()> {
        let file = self.file.node();
        let size = self.geometry.cluster_size();
        let (l1_clusters, old_l1) = (self.l1_clusters(), self.l1.read().offset);
        self.change_header(|header| header.incompatible |= Incompatible::DIRTY).await?;
        file.flush().await?;
        self.event("l1_update");
        file.write_zeroes(old_l1, l1_clusters * size, ZeroFlags::empty()).await?;
        file.flush().await?;
        self.event("empty_image_prepare");
        file.write_zeroes(size, (2 + l1_clusters) * size, ZeroFlags::empty()).await?;
        file.flush().await?;
        self.event("l1_update");
        self.event("reftable_update");
        self.change_header(|header| {
            header.l1_offset = 3 * size;
            header.refcount_table_offset = size;
            header.refcount_table_clusters = 1;
        })
        .await?;
        file.flush().await?;
        self.event("refblock_alloc");
        let mut block = vec![0; size as usize];
        for cluster in 0..3 + l1_clusters {
            refcount::set(&mut block, self.geometry.refcount_order, cluster, 1)?;
        }
        file.write(2 * size, &IoBuffer::from(&block[..]).into_io(), WriteFlags::empty()).await?;
        file.flush().await?;
        let entry = IoBuffer::from(&(2 * size).to_be_bytes()[..]).into_io();
        file.write(size, &entry, WriteFlags::empty()).await?;
        file.flush().await?;
        self.change_header(|header| header.incompatible &= !Incompatible::DIRTY).await?;
        file.truncate((3 + l1_clusters) * size, Truncate::default()).await?;
        file.flush().await
    }
}
