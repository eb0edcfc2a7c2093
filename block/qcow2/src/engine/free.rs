//! Freeing clusters: a reference less once the file no longer names them, and no request uses them any more.

use super::allocator::Allocator;
use super::frees::{Freed, Why};
use super::state::Qcow2;
use crate::format::Geometry;
use crate::format::entry::{ClusterKind, L2Entry};
use block_graph::Result;

impl Qcow2 {
    /// Says that tables in memory no longer name these clusters, so that they are one reference less.
    pub(crate) fn free_clusters(&self, offset: u64, clusters: u64, why: Why) {
        self.event("cluster_free");
        let mut frees = self.frees.lock();
        if let Some(last) = frees.unstable.last_mut()
            && last.why == why
            && last.offset + (last.clusters << self.geometry.cluster_bits) == offset
        {
            last.clusters += clusters;
            return;
        }
        frees.unstable.push(Freed { offset, clusters, why });
    }

    /// Says that an L2 entry is no longer. Clusters in an external data file are not counted: they are never free.
    pub(crate) fn free_entry(&self, entry: L2Entry, why: Why) {
        let geometry: &Geometry = &self.geometry;
        match entry.kind(geometry) {
            ClusterKind::Compressed => {
                let (offset, clusters) = entry.compressed_extent(geometry).clusters(geometry);
                self.free_clusters(offset, clusters, why);
            }
            ClusterKind::Normal | ClusterKind::ZeroAllocated if !geometry.data_file => {
                self.free_clusters(entry.offset(), 1, why);
            }
            _ => (),
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

    /// Whether the file is told of clusters that are freed for this reason.
    pub(crate) fn passes_on(&self, why: Why) -> bool {
        match why {
            Why::Request => self.discards.request,
            Why::Snapshot => self.discards.snapshot,
            Why::Always => true,
            Why::Other => self.discards.other,
        }
    }

    async fn apply_free(&self, allocator: &mut Allocator, freed: Freed) -> Result<()> {
        let geometry = &self.geometry;
        let pass_on = self.passes_on(freed.why);
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
}
