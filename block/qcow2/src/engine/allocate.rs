//! Finding clusters that are free, and taking them.

use super::allocator::{Allocator, Taken};
use super::state::Qcow2;
use crate::format::refcount;
use block_graph::{Errno, Error, Result};
use std::ops::Range;

impl Qcow2 {
    /// Takes up to `most` clusters in a row, at least one.
    pub(crate) async fn take_some(&self, allocator: &mut Allocator, most: u64) -> Result<Taken> {
        self.take(allocator, most, false).await
    }

    /// Takes `count` clusters in a row.
    pub(crate) async fn take_exactly(&self, allocator: &mut Allocator, count: u64) -> Result<Taken> {
        self.take(allocator, count, true).await
    }

    async fn take(&self, allocator: &mut Allocator, count: u64, exactly: bool) -> Result<Taken> {
        self.event("cluster_alloc");
        // Where the file can grow, small holes are left for what fits into them: data that belong together stay so.
        let file = self.file.node();
        let exactly = exactly || file.driver().grows();
        self.apply_frees(allocator).await?;
        self.before_refcounts_change().await?;
        let mut found = self.find_free(allocator, allocator.hint, count, exactly).await?;
        let covered = self.cover(allocator, found.clone()).await?;
        if !covered {
            // The refcount structures that had to be made may have taken some of what was found.
            found = self.find_free(allocator, allocator.hint, count, exactly).await?;
            if !self.cover(allocator, found.clone()).await? {
                return Err(Error::new(Errno::IO, "No refcount block could be made for free clusters"));
            }
        }
        let (offset, length) = (found.start << self.geometry.cluster_bits, self.bytes_of(&found));
        if found.start == 0 {
            return Err(self
                .corrupt("Preventing invalid allocation of data cluster at offset 0".into())
                .await);
        }
        if !file.driver().grows() && offset + length > file.len() {
            return Err(Error::errno_only(Errno::NO_SPACE));
        }
        self.check_no_overlap(offset, length).await?;
        self.add_to_refcounts(allocator, found.clone(), 1, |_| ()).await?;
        allocator.hint = found.end;
        let fresh = self.fresh_is_zero && offset >= allocator.fresh;
        allocator.used(offset + length);
        Ok(Taken { offset, clusters: found.end - found.start, fresh })
    }

    fn bytes_of(&self, clusters: &Range<u64>) -> u64 {
        (clusters.end - clusters.start) << self.geometry.cluster_bits
    }

    /// The first free clusters from `from` on: `count` in a row, or fewer if not `exactly`. Clusters without a refcount
    /// block are free.
    pub(crate) async fn find_free(
        &self,
        allocator: &Allocator,
        from: u64,
        count: u64,
        exactly: bool,
    ) -> Result<Range<u64>> {
        let mut found = from..from;
        let per_slice = 1u64 << self.refcounts_per_slice_bits();
        let most = 1u64 << (56 - self.geometry.cluster_bits);
        while found.end - found.start < count {
            let at = found.end;
            if at >= most {
                return Err(Error::new(Errno::TOO_LARGE, "File too large"));
            }
            let missing = count - (found.end - found.start);
            let Some(block) = self.block_of(allocator, at).await? else {
                let block_end = (at | (self.geometry.refcount_block_entries() - 1)) + 1;
                found.end = block_end.min(at + missing);
                continue;
            };
            let slice = self.block_slice(block, at).await?;
            let bytes = slice.bytes();
            let end = (at | (per_slice - 1)) + 1;
            for cluster in at..end {
                let value = refcount::get(&bytes, self.geometry.refcount_order, cluster & (per_slice - 1));
                if value? == 0 {
                    found.end = cluster + 1;
                    if found.end - found.start == count {
                        return Ok(found);
                    }
                } else if !exactly && found.end > found.start {
                    return Ok(found);
                } else {
                    found = cluster + 1..cluster + 1;
                }
            }
        }
        Ok(found)
    }

    /// Sees to it that all `clusters`, which are free, have refcount blocks. `false` says that for this the refcount
    /// table had to grow, and may have taken some of them.
    async fn cover(&self, allocator: &mut Allocator, clusters: Range<u64>) -> Result<bool> {
        let bits = self.geometry.refcount_block_bits();
        let (first, last) = (clusters.start >> bits, (clusters.end - 1) >> bits);
        // One block more, for the blocks that these may need.
        if last + 1 >= allocator.table.len() as u64 {
            let needed =
                (first..=last).any(|block| allocator.table.get(block as usize).is_none_or(|e| *e == 0));
            if needed {
                self.grow_refcount_table(allocator, (last + 2) << bits).await?;
                return Ok(false);
            }
        }
        for block in (first..=last).rev() {
            if allocator.table[block as usize] == 0 {
                let place = self.place_for_block(allocator, block << bits, &clusters).await?;
                self.create_block(allocator, block << bits, place).await?;
            }
        }
        Ok(true)
    }

    /// A free cluster, none of `taken`, for the refcount block of the clusters from `covered` on: one that this block or
    /// an existing one counts.
    async fn place_for_block(
        &self,
        allocator: &mut Allocator,
        covered: u64,
        taken: &Range<u64>,
    ) -> Result<u64> {
        let bits = self.geometry.refcount_block_bits();
        let own_end = covered + (1 << bits);
        if (covered..own_end).contains(&taken.end) {
            return Ok(taken.end);
        }
        if taken.start > covered {
            // Nothing of this block's is in use yet.
            return Ok(covered);
        }
        // All that it counts is taken: a cluster behind, that an existing block counts.
        let place = self.find_free(allocator, taken.end, 1, false).await?.start;
        if self.block_of(allocator, place).await?.is_none() {
            if (place >> bits) as usize >= allocator.table.len() {
                return Err(Error::new(Errno::TOO_LARGE, "File too large"));
            }
            let start = place >> bits << bits;
            Box::pin(self.create_block(allocator, start, place)).await?;
            return Ok(self.find_free(allocator, place + 1, 1, false).await?.start);
        }
        Ok(place)
    }

    /// Takes `size` bytes for compressed data, at most a cluster's, in a row; several may share clusters.
    pub(crate) async fn take_bytes(&self, allocator: &mut Allocator, size: u64) -> Result<u64> {
        self.event("cluster_alloc_bytes");
        let geometry = &self.geometry;
        if allocator.packed != 0 {
            let at = allocator.packed;
            let cluster = at >> geometry.cluster_bits;
            let last = (at + size - 1) >> geometry.cluster_bits;
            let count = self.refcount(allocator, cluster).await?;
            let mut fits = count > 0 && count < geometry.refcount_max();
            if fits && last > cluster {
                self.apply_frees(allocator).await?;
                let next = self.find_free(allocator, cluster + 1, last - cluster, false).await?;
                fits = next == (cluster + 1..last + 1)
                    && allocator.table.len() as u64 > (last >> geometry.refcount_block_bits()) + 1
                    && self.cover(allocator, next).await?;
            }
            if fits {
                self.before_refcounts_change().await?;
                self.add_to_refcounts(allocator, cluster..last + 1, 1, |_| ()).await?;
                allocator.used((last + 1) << geometry.cluster_bits);
                allocator.hint =
                    if last > cluster && allocator.hint == cluster + 1 { last + 1 } else { allocator.hint };
                self.end_packed_at(allocator, at + size);
                return Ok(at);
            }
        }
        let taken = self.take_exactly(allocator, geometry.clusters(size)).await?;
        self.end_packed_at(allocator, taken.offset + size);
        Ok(taken.offset)
    }

    fn end_packed_at(&self, allocator: &mut Allocator, end: u64) {
        allocator.packed = if self.geometry.in_cluster(end) == 0 { 0 } else { end };
    }

    /// Gives back clusters that nothing names and nobody uses, at once.
    pub(crate) async fn give_back(&self, offset: u64, clusters: u64) {
        let mut allocator = self.allocator.lock().await;
        let first = offset >> self.geometry.cluster_bits;
        if let Err(error) = self.add_to_refcounts(&mut allocator, first..first + clusters, -1, |_| ()).await {
            tracing::warn!("{clusters} clusters at {offset:#x} leak: {error}");
        }
    }

    /// Refuses to write where there is metadata, which only a corrupt image asks for.
    pub(crate) async fn check_no_overlap(&self, offset: u64, length: u64) -> Result<()> {
        let overlap = if self.overlap_check { self.metadata.read().overlap(offset, length) } else { None };
        match overlap {
            None => Ok(()),
            Some(what) => {
                let what = format!("Preventing invalid write on metadata (overlaps with {})", what.name());
                Err(self.corrupt(what).await)
            }
        }
    }
}
