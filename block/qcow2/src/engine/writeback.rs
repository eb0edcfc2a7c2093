//! Writing what is dirty, in the order that keeps the file whole, and what happens to freed clusters.

use super::allocate::Allocator;
use super::cache::Extract;
use super::state::Qcow2;
use crate::format::Geometry;
use crate::format::entry::{ClusterKind, L2Entry};
use crate::format::header::Incompatible;
use block_graph::{NodeRef, Result};
use futures_util::stream::{FuturesUnordered, TryStreamExt};
use io_loop::IoBuffer;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::Ordering;

/// Freed entries that are kept in memory before tables are written so that the clusters can be used again.
const MOST_FREED: usize = 8192;
/// Writes of tables at a time.
const WRITES_AT_A_TIME: usize = 16;

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
    offset: u64,
    clusters: u64,
    why: Why,
    /// Guest clusters in the external data file, which are not counted.
    in_data_file: bool,
}

/// Clusters on their way to be free.
#[derive(Debug, Default)]
pub(crate) struct Frees {
    /// The file may still name them.
    unstable: Vec<Freed>,
    /// Nothing names them; free when all requests from before the epoch have ended.
    stable: VecDeque<(u64, Vec<Freed>)>,
}

impl Qcow2 {
    /// Says that tables in memory no longer name these clusters, so that they are one reference less.
    pub(crate) fn free_clusters(&self, offset: u64, clusters: u64, why: Why) {
        self.free(Freed { offset, clusters, why, in_data_file: false });
    }

    fn free(&self, freed: Freed) {
        let mut frees = self.frees.lock();
        if let Some(last) = frees.unstable.last_mut()
            && (last.why, last.in_data_file) == (freed.why, freed.in_data_file)
            && last.offset + (last.clusters << self.geometry.cluster_bits) == freed.offset
        {
            last.clusters += freed.clusters;
            return;
        }
        frees.unstable.push(freed);
    }

    /// Says that an L2 entry is no longer.
    pub(crate) fn free_entry(&self, entry: L2Entry, why: Why) {
        let geometry: &Geometry = &self.geometry;
        match entry.kind(geometry) {
            ClusterKind::Compressed => {
                let (offset, clusters) = entry.compressed_extent(geometry).clusters(geometry);
                self.free_clusters(offset, clusters, why);
            }
            ClusterKind::Normal | ClusterKind::ZeroAllocated => {
                let in_data_file = geometry.data_file;
                self.free(Freed { offset: entry.offset(), clusters: 1, why, in_data_file });
            }
            ClusterKind::Unallocated | ClusterKind::ZeroPlain => (),
        }
    }

    /// Lowers the refcounts of clusters that nothing names any more and nobody uses.
    pub(crate) async fn apply_frees(&self, allocator: &mut Allocator) -> Result<()> {
        loop {
            let batch = {
                let mut frees = self.frees.lock();
                match frees.stable.front() {
                    Some((epoch, _)) if self.requests.ended_before(*epoch) => frees.stable.pop_front(),
                    _ => return Ok(()),
                }
            };
            for freed in batch.map(|(_, batch)| batch).unwrap_or_default() {
                self.apply_free(allocator, freed).await?;
            }
        }
    }

    async fn apply_free(&self, allocator: &mut Allocator, freed: Freed) -> Result<()> {
        let geometry = &self.geometry;
        let pass_on = match freed.why {
            Why::Request => self.discards.request,
            Why::Snapshot => self.discards.snapshot,
            Why::Always => true,
            Why::Other => self.discards.other,
        };
        let length = freed.clusters << geometry.cluster_bits;
        if freed.in_data_file {
            if pass_on && let Err(error) = self.data().discard(freed.offset, length).await {
                tracing::debug!("discarding {length} bytes at {:#x}: {error}", freed.offset);
            }
            return Ok(());
        }
        self.event("cluster_free");
        self.before_refcounts_change().await?;
        let first = freed.offset >> geometry.cluster_bits;
        let mut free: Vec<(u64, u64)> = Vec::new();
        let note = |free: &mut Vec<(u64, u64)>, cluster: u64| match free.last_mut() {
            Some((start, count)) if *start + *count == cluster => *count += 1,
            _ => free.push((cluster, 1)),
        };
        let all = first..first + freed.clusters;
        let result =
            self.add_to_refcounts(allocator, all.clone(), -1, |cluster| note(&mut free, cluster)).await;
        if result.is_err() {
            free.clear();
            for cluster in all {
                let one = cluster..cluster + 1;
                let result =
                    self.add_to_refcounts(allocator, one, -1, |cluster| note(&mut free, cluster)).await;
                if let Err(error) = result {
                    // The image counted too few before: what a check reports, and no reason to stop.
                    tracing::warn!("freeing cluster {cluster}: {error}");
                }
            }
        }
        for (start, count) in free {
            let packed = allocator.packed >> geometry.cluster_bits;
            if (start..start + count).contains(&packed) {
                allocator.packed = 0;
            }
            let (offset, length) = (start << geometry.cluster_bits, count << geometry.cluster_bits);
            self.decompressed.forget();
            if pass_on && let Err(error) = self.file.node().discard(offset, length).await {
                tracing::debug!("discarding {length} bytes at {offset:#x}: {error}");
            }
        }
        Ok(())
    }

    /// Sets the dirty bit if refcounts are to be written late.
    pub(crate) async fn before_refcounts_change(&self) -> Result<()> {
        if !self.lazy_refcounts.load(Ordering::Relaxed) || self.is_dirty() {
            return Ok(());
        }
        self.change_header(|header| header.incompatible |= Incompatible::DIRTY).await?;
        self.file.node().flush().await
    }

    /// Writes tables if so much is dirty, or so much waits to be freed, that it should not become more. To be called by
    /// requests that hold no lock, before they change anything.
    pub(crate) async fn relieve(&self) -> Result<()> {
        let many = self.l2.wants_writeback()
            || self.blocks.wants_writeback()
            || self.frees.lock().unstable.len() > MOST_FREED;
        if many { self.write_tables(!self.blocks.wants_writeback()).await.map(drop) } else { Ok(()) }
    }

    fn anything_to_write(&self, with_refcounts: bool) -> bool {
        self.l2.is_dirty()
            || !self.l1.read().dirty.is_empty()
            || !self.frees.lock().unstable.is_empty()
            || with_refcounts && self.blocks.is_dirty()
    }

    /// Writes all tables that are dirty, in order. `lazily` leaves refcounts out where the image may be dirty.
    /// Afterwards, what was written last may still be unflushed; `true` says that it is not.
    pub(crate) async fn write_tables(&self, lazily: bool) -> Result<bool> {
        let _writing = self.writing.lock().await;
        let lazy = lazily && self.lazy_refcounts.load(Ordering::Relaxed) && self.is_dirty();
        if lazy && !self.anything_to_write(false) {
            return Ok(false);
        }
        let allocator = self.allocator.lock().await;
        // What is taken later may hold more than what is taken earlier, never less: an L1 entry's table, an L2 entry's
        // refcount, a refcount block's entry in its table.
        let freed = std::mem::take(&mut self.frees.lock().unstable);
        let l1_dirty = {
            let mut l1 = self.l1.write();
            let dirty = std::mem::take(&mut l1.dirty);
            dirty.into_iter().filter_map(|index| Some((index, *l1.entries.get(index)?))).collect()
        };
        let tables = self.l2.take_dirty();
        let (blocks, table_dirty) = if lazy {
            Default::default()
        } else {
            // New blocks are to be in the file before the table names them, with the refcounts that they have now:
            // both are taken at one moment. Entries stay dirty until they are written.
            (self.blocks.take_dirty(), allocator.table_dirty.clone())
        };
        drop(allocator);
        let mut work = Work { freed, l1_dirty, tables, blocks, table_dirty };
        let result = self.write_in_order(&mut work, lazy).await;
        if result.is_err() {
            self.take_back(work);
        }
        result
    }

    async fn write_in_order(&self, work: &mut Work, lazy: bool) -> Result<bool> {
        let file = self.file.node();
        let mut synced = false;
        self.write_extracts(&file, &work.blocks, "refblock_update_part").await?;
        if !lazy {
            synced = self.write_refcount_table(&file, &work.table_dirty).await?;
        }
        if !work.tables.is_empty() || !work.l1_dirty.is_empty() {
            if !synced {
                self.sync(&file).await?;
            }
            self.write_extracts(&file, &work.tables, "l2_update").await?;
            synced = false;
        }
        if !work.l1_dirty.is_empty() {
            self.sync(&file).await?;
            self.write_l1(&file, &work.l1_dirty).await?;
        }
        if !work.freed.is_empty() {
            self.sync(&file).await?;
            synced = true;
            let freed = std::mem::take(&mut work.freed);
            let epoch = self.requests.next_epoch();
            self.frees.lock().stable.push_back((epoch, freed));
        }
        Ok(synced)
    }

    fn take_back(&self, work: Work) {
        self.blocks.give_back(work.blocks);
        self.l2.give_back(work.tables);
        self.l1.write().dirty.extend(work.l1_dirty.into_keys());
        let mut frees = self.frees.lock();
        let newer = std::mem::replace(&mut frees.unstable, work.freed);
        frees.unstable.extend(newer);
    }

    /// Makes durable what has been written: tables, and data that they name.
    async fn sync(&self, file: &NodeRef) -> Result<()> {
        self.event("flush_to_disk");
        if let Some(data) = &self.data_file {
            data.node().flush().await?;
        }
        file.flush().await
    }

    async fn write_extracts(&self, file: &NodeRef, extracts: &[Extract], event: &'static str) -> Result<()> {
        let mut writes = FuturesUnordered::new();
        for extract in extracts {
            self.event(event);
            if writes.len() >= WRITES_AT_A_TIME {
                writes.try_next().await?;
            }
            writes.push(write_bytes(file, extract.offset, &extract.bytes));
        }
        while writes.try_next().await?.is_some() {}
        Ok(())
    }

    /// Writes `dirty` entries of the refcount table, which name new blocks, after those blocks; says whether it did.
    async fn write_refcount_table(&self, file: &NodeRef, dirty: &BTreeSet<usize>) -> Result<bool> {
        if dirty.is_empty() {
            return Ok(false);
        }
        let mut allocator = self.allocator.lock().await;
        self.sync(file).await?;
        self.event("refblock_alloc_hookup");
        for range in sectors(dirty, allocator.table.len()) {
            // Blocks that are newer still are not in the file as they must be.
            let newer = |index: &usize| allocator.table_dirty.contains(index) && !dirty.contains(index);
            let entry = |index: usize| if newer(&index) { 0 } else { allocator.table[index] };
            let bytes: Vec<u8> = range.clone().flat_map(|index| entry(index).to_be_bytes()).collect();
            write_bytes(file, allocator.table_offset + range.start as u64 * 8, &bytes).await?;
        }
        allocator.table_dirty.retain(|index| !dirty.contains(index));
        self.sync(file).await?;
        Ok(true)
    }

    async fn write_l1(&self, file: &NodeRef, dirty: &BTreeMap<usize, u64>) -> Result<()> {
        let offset = self.l1.read().offset;
        let mut runs: Vec<(usize, Vec<u8>)> = Vec::new();
        for (index, entry) in dirty {
            match runs.last_mut() {
                Some((start, bytes)) if *start + bytes.len() / 8 == *index => {
                    bytes.extend(entry.to_be_bytes())
                }
                _ => runs.push((*index, entry.to_be_bytes().to_vec())),
            }
        }
        for (index, bytes) in runs {
            self.event("l1_update");
            write_bytes(file, offset + index as u64 * 8, &bytes).await?;
        }
        Ok(())
    }

    /// Makes everything durable that was acknowledged before.
    pub(crate) async fn flush(&self) -> Result<()> {
        self.event("flush_to_os");
        let mut synced = false;
        if self.writable && (self.anything_to_write(true)) {
            synced = self.write_tables(true).await?;
        }
        if !synced {
            self.sync(&self.file.node()).await?;
        }
        Ok(())
    }

    /// Writes everything, with all that freeing clusters still brings: for the end, when no request is under way.
    pub(crate) async fn write_everything(&self) -> Result<()> {
        // Freed clusters change refcounts, once; the third round has nothing to do.
        for _ in 0..4 {
            let mut allocator = self.allocator.lock().await;
            self.apply_frees(&mut allocator).await?;
            drop(allocator);
            if !self.anything_to_write(true) && self.frees.lock().stable.is_empty() {
                break;
            }
            self.write_tables(false).await?;
        }
        self.sync(&self.file.node()).await
    }
}

/// What one round writes.
struct Work {
    freed: Vec<Freed>,
    /// Entries of the L1 table as they were when their L2 tables were taken.
    l1_dirty: BTreeMap<usize, u64>,
    tables: Vec<Extract>,
    blocks: Vec<Extract>,
    /// Entries of the refcount table that name new blocks, all of which are among `blocks`.
    table_dirty: BTreeSet<usize>,
}

/// The runs of a table's entries that are to be written for those of `dirty`: whole sectors of 64 entries.
fn sectors(dirty: &BTreeSet<usize>, length: usize) -> Vec<std::ops::Range<usize>> {
    let mut ranges: Vec<std::ops::Range<usize>> = Vec::new();
    for index in dirty.iter().filter(|index| **index < length) {
        let start = index & !63;
        let end = (start + 64).min(length);
        match ranges.last_mut() {
            Some(last) if last.end >= start => last.end = last.end.max(end),
            _ => ranges.push(start..end),
        }
    }
    ranges
}

async fn write_bytes(file: &NodeRef, offset: u64, bytes: &[u8]) -> Result<()> {
    file.write(offset, &IoBuffer::from(bytes).into_io(), Default::default()).await
}
