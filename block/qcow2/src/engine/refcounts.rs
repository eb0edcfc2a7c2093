//! Refcounts: reading and changing them, and the growth of their table.

use super::allocator::Allocator;
use super::cache::Slice;
use super::metadata_map::Metadata;
use super::state::Qcow2;
use crate::format::entry::RefcountTableEntry;
use crate::format::{MAX_REFCOUNT_TABLE_BYTES, refcount};
use block_graph::{Errno, Error, Result};
use io_loop::IoBuffer;
use std::ops::Range;
use std::sync::Arc;

impl Qcow2 {
    /// Where the refcount block of a cluster is; `None` if there is none.
    pub(crate) async fn block_of(&self, allocator: &Allocator, cluster: u64) -> Result<Option<u64>> {
        let index = cluster >> self.geometry.refcount_block_bits();
        let entry = usize::try_from(index).ok().and_then(|index| allocator.table.get(index));
        let offset = RefcountTableEntry(entry.copied().unwrap_or(0)).offset();
        if self.geometry.in_cluster(offset) != 0 {
            let what = format!("Refblock offset {offset:#x} unaligned (reftable index: {index:#x})");
            return Err(self.corrupt(what).await);
        }
        Ok((offset != 0).then_some(offset))
    }

    /// The slice of a refcount block at `block` that has a cluster's refcount.
    pub(crate) async fn block_slice(&self, block: u64, cluster: u64) -> Result<Arc<Slice>> {
        let index = cluster & (self.geometry.refcount_block_entries() - 1);
        let byte = (index << self.geometry.refcount_order) >> 3;
        self.blocks.get(&self.file.node(), block + byte).await
    }

    /// Base-2 logarithm of the refcounts in a slice.
    pub(crate) fn refcounts_per_slice_bits(&self) -> u32 {
        self.blocks.slice_size().trailing_zeros() + 3 - self.geometry.refcount_order
    }

    /// The refcount of a cluster.
    pub(crate) async fn refcount(&self, allocator: &Allocator, cluster: u64) -> Result<u64> {
        let Some(block) = self.block_of(allocator, cluster).await? else { return Ok(0) };
        let slice = self.block_slice(block, cluster).await?;
        let index = cluster & ((1 << self.refcounts_per_slice_bits()) - 1);
        let value = refcount::get(&slice.bytes(), self.geometry.refcount_order, index);
        value.map_err(Error::from)
    }

    /// Adds `delta` to the refcounts of clusters, all of which have a refcount block; calls `freed` with each that is
    /// free then. If one overflows or goes below zero, none is changed.
    pub(crate) async fn add_to_refcounts(
        &self,
        allocator: &mut Allocator,
        clusters: Range<u64>,
        delta: i64,
        mut freed: impl FnMut(u64),
    ) -> Result<()> {
        let mut at = clusters.start;
        while at < clusters.end {
            match self.add_in_slice(allocator, at..clusters.end, delta, &mut freed).await {
                Ok(next) => at = next,
                Err(error) => {
                    let mut back = clusters.start;
                    while back < at {
                        back = self.add_in_slice(allocator, back..at, -delta, &mut |_| ()).await?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// The part of [`Self::add_to_refcounts`] that is in the first slice; returns where the rest begins.
    async fn add_in_slice(
        &self,
        allocator: &mut Allocator,
        clusters: Range<u64>,
        delta: i64,
        freed: &mut impl FnMut(u64),
    ) -> Result<u64> {
        let order = self.geometry.refcount_order;
        let no_block =
            || Error::new(Errno::INVALID, format!("Cluster {} has no refcount block", clusters.start));
        let block = self.block_of(allocator, clusters.start).await?.ok_or_else(no_block)?;
        let slice = self.block_slice(block, clusters.start).await?;
        let mask = (1u64 << self.refcounts_per_slice_bits()) - 1;
        let end = clusters.end.min((clusters.start | mask) + 1);
        self.blocks.change(&slice, |bytes| {
            let typed = |error: crate::format::Qcow2Error| Error::from(error);
            for cluster in clusters.start..end {
                let old = refcount::get(bytes, order, cluster & mask).map_err(typed)?;
                if old.checked_add_signed(delta).is_none_or(|new| new > self.geometry.refcount_max()) {
                    let errno = Errno::INVALID;
                    return Err(Error::new(
                        errno,
                        format!("Cluster {cluster}: refcount {old} cannot change by {delta}"),
                    ));
                }
            }
            for cluster in clusters.start..end {
                let new =
                    refcount::get(bytes, order, cluster & mask).map_err(typed)?.wrapping_add_signed(delta);
                refcount::set(bytes, order, cluster & mask, new).map_err(typed)?;
                if new == 0 {
                    freed(cluster);
                    allocator.hint = allocator.hint.min(cluster);
                }
            }
            Ok(end)
        })
    }

    /// Makes an empty refcount block for the clusters around `covered` at `place`, which that block or another one
    /// counts and whose refcount is zero.
    pub(crate) async fn create_block(
        &self,
        allocator: &mut Allocator,
        covered: u64,
        place: u64,
    ) -> Result<()> {
        let index = (covered >> self.geometry.refcount_block_bits()) as usize;
        let offset = place << self.geometry.cluster_bits;
        self.check_no_overlap(offset, self.geometry.cluster_size()).await?;
        self.event("refblock_alloc_write");
        self.blocks.forget(offset..offset + self.geometry.cluster_size());
        let mut zeros = IoBuffer::zeroed(self.geometry.cluster_size() as usize);
        self.file.node().write(offset, &zeros.io(), Default::default()).await?;
        allocator.used(offset + self.geometry.cluster_size());
        let old = std::mem::replace(&mut allocator.table[index], offset);
        if let Err(error) = self.add_to_refcounts(allocator, place..place + 1, 1, |_| ()).await {
            allocator.table[index] = old;
            return Err(error);
        }
        allocator.table_dirty.insert(index);
        self.metadata.write().add(offset, self.geometry.cluster_size(), Metadata::RefcountBlock);
        Ok(())
    }

    /// Makes the refcount table cover at least `clusters` clusters: writes a larger one behind all that the old one
    /// covers, with the blocks that count it, and has the header name it.
    pub(crate) async fn grow_refcount_table(&self, allocator: &mut Allocator, clusters: u64) -> Result<()> {
        let geometry = self.geometry;
        let (old_entries, per_block) = (allocator.table.len() as u64, geometry.refcount_block_entries());
        let per_cluster = geometry.cluster_size() / 8;
        let first = old_entries * per_block;
        let mut entries = clusters.div_ceil(per_block).max(old_entries + old_entries / 2).max(1);
        let (table_clusters, blocks) = loop {
            let table_clusters = entries.div_ceil(per_cluster);
            // Blocks count themselves, too.
            let mut blocks = 1;
            while blocks * per_block < table_clusters + blocks {
                blocks += 1;
            }
            entries = table_clusters * per_cluster;
            if entries >= old_entries + blocks {
                break (table_clusters, blocks);
            }
            entries = old_entries + blocks;
        };
        let table_bytes = table_clusters * geometry.cluster_size();
        if table_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::new(
                Errno::TOO_LARGE,
                "The image cannot grow: its refcount table is as large as possible",
            ));
        }
        self.event("reftable_grow");
        let offset = first << geometry.cluster_bits;
        let area = (blocks + table_clusters) << geometry.cluster_bits;
        self.check_no_overlap(offset, area).await?;
        self.blocks.forget(offset..offset + area);
        let mut table = allocator.table.clone();
        table.resize(entries as usize, 0);
        let mut bytes = vec![0; area as usize];
        for block in 0..blocks {
            table[(old_entries + block) as usize] = offset + (block << geometry.cluster_bits);
        }
        for cluster in 0..blocks + table_clusters {
            // Blocks stand one behind the other, and so do their refcounts.
            refcount::set(&mut bytes, geometry.refcount_order, cluster, 1).map_err(Error::from)?;
        }
        let table_offset = offset + (blocks << geometry.cluster_bits);
        for (index, entry) in table.iter().enumerate() {
            if allocator.table_dirty.contains(&index) {
                // Its block is not in the file as it must be: it is named later.
                continue;
            }
            let at = (blocks << geometry.cluster_bits) as usize + index * 8;
            bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
        }
        self.file.node().write(offset, &IoBuffer::from(&bytes[..]).into_io(), Default::default()).await?;
        allocator.used(offset + area);
        self.event("refblock_alloc_switch_table");
        self.file.node().flush().await?;
        self.change_header(|header| {
            header.refcount_table_offset = table_offset;
            header.refcount_table_clusters = table_clusters as u32;
        })
        .await?;
        let old_offset = std::mem::replace(&mut allocator.table_offset, table_offset);
        let old_clusters = old_entries.div_ceil(per_cluster);
        allocator.table = table;
        let mut metadata = self.metadata.write();
        metadata.remove(old_offset, old_entries * 8);
        metadata.add(table_offset, table_bytes, Metadata::RefcountTable);
        metadata.add(offset, blocks << geometry.cluster_bits, Metadata::RefcountBlock);
        drop(metadata);
        if old_clusters > 0 {
            self.free_clusters(old_offset, old_clusters, super::frees::Why::Other);
        }
        Ok(())
    }
}
