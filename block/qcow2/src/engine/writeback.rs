//! Writing what is dirty, in the order that keeps the file whole.

use super::allocator::Allocator;
use super::cache::Extract;
use super::frees::Freed;
use super::requests::Request;
use super::state::Qcow2;
use crate::format::header::Incompatible;
use block_graph::{NodeRef, Result};
use futures_util::stream::{FuturesUnordered, TryStreamExt};
use io_loop::IoBuffer;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

/// Writes of tables at a time.
const WRITES_AT_A_TIME: usize = 16;

impl Qcow2 {
    /// Sets the dirty bit if refcounts are to be written late.
    pub(crate) async fn before_refcounts_change(&self) -> Result<()> {
        if !self.lazy_refcounts.load(Ordering::Relaxed) || self.is_dirty() {
            return Ok(());
        }
        self.change_header(|header| header.incompatible |= Incompatible::DIRTY).await?;
        self.file.node().flush().await
    }

    /// Begins a request that changes something.
    pub(crate) async fn begin_change(&self) -> Result<Request<'_>> {
        let request = self.requests.enter().await;
        if !self.wants_relief() {
            return Ok(request);
        }
        self.relieve().await?;
        drop(request);
        // What was freed until then can be used by requests that begin now.
        Ok(self.requests.enter().await)
    }

    fn wants_relief(&self) -> bool {
        self.l2.wants_writeback()
            || self.blocks.wants_writeback()
            || self.frees.lock().are_many(self.geometry.cluster_bits)
    }

    /// Writes tables if so much is dirty, or so much waits to be freed, that it should not become more. To be called by
    /// requests that hold no lock, before they change anything.
    pub(crate) async fn relieve(&self) -> Result<()> {
        if !self.wants_relief() {
            return Ok(());
        }
        self.write_tables(!self.blocks.wants_writeback()).await.map(drop)
    }

    /// With lazy refcounts: writes those that are dirty, if nobody writes tables now. Called when an L2 table is made, so
    /// that a crash leaves only clusters of data uncounted.
    pub(crate) async fn write_refcounts_early(&self, allocator: &Allocator) -> Result<()> {
        if !self.lazy_refcounts.load(Ordering::Relaxed) || !allocator.table_dirty.is_empty() {
            return Ok(());
        }
        let Some(_writing) = self.writing.try_lock() else { return Ok(()) };
        let blocks = self.blocks.take_dirty();
        let written = self.write_extracts(&self.file.node(), &blocks, "refblock_update_part").await;
        if written.is_err() {
            self.blocks.give_back(blocks);
        }
        written
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
