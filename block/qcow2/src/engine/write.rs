//! Writing.

use super::cache::Slice;
use super::clusters::Run;
use super::copy::{CopyPlan, NewEntries};
use super::frees::Why;
use super::metadata_map::Metadata;
use super::parts::Parts;
use super::requests::Claim;
use super::state::Qcow2;
use crate::format::entry::{L1Entry, L2Entry, SubclusterKind};
use block_graph::{Result, WriteFlags};
use io_loop::{IoBuffer, IoVec};
use std::sync::Arc;

/// What an L2 table has for the first clusters of a range that is to be written.
enum Found {
    /// Data can be written where they are.
    InPlace(Run),
    /// As many clusters that already have host clusters of their own, where not all of the range is allocated yet.
    Reuse(u64),
    /// As many clusters that need new host clusters.
    New(u64),
}

/// Clusters that are ready to be written to, and how the L2 table is to name them then.
struct Allocation<'a> {
    /// Other requests that allocate the same clusters wait until this goes.
    _claim: Claim<'a>,
    slice: Arc<Slice>,
    /// What is written, with what is copied around it.
    plan: CopyPlan,
    entries: NewEntries,
    /// Clusters that were taken for this, at the plan's host cluster.
    taken: u64,
}

impl Qcow2 {
    /// Writes guest data; the range is within the disk, or within the VM state behind it.
    pub(crate) async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        self.check_writable()?;
        {
            let _request = self.begin_change().await?;
            if flags.contains(WriteFlags::COMPRESSED) {
                self.write_compressed(offset, from).await?;
            } else {
                self.write_guest(offset, from).await?;
            }
        }
        if flags.contains(WriteFlags::FUA) { self.flush().await } else { Ok(()) }
    }

    /// [`Qcow2::write`] for those that are within a request, or alone.
    pub(crate) async fn write_guest(&self, offset: u64, from: &IoVec) -> Result<()> {
        let len = from.len() as u64;
        if let Some(run) = self.map_in_memory(offset, len)
            && run.len == len
            && run.in_place()
        {
            return self.write_in_place(run.host, offset, from).await;
        }
        let mut parts = Parts::new();
        let result =
            self.write_parts(&mut parts, offset, from, |ready, data| self.write_part(ready, data)).await;
        parts.end(result).await
    }

    async fn write_parts<'a, F: Future<Output = Result<()>>>(
        &'a self,
        parts: &mut Parts<F>,
        offset: u64,
        from: &IoVec,
        begin: impl Fn(Ready<'a>, IoVec) -> F,
    ) -> Result<()> {
        let (len, mut done) = (from.len() as u64, 0);
        while done < len {
            let (part, ready) = parts.beside(self.prepare(offset + done, len - done)).await?;
            let data = from.slice(done as usize..(done + part) as usize);
            parts.begin(begin(ready, data)).await;
            done += part;
        }
        Ok(())
    }

    async fn write_part(&self, ready: Ready<'_>, data: IoVec) -> Result<()> {
        match ready {
            Ready::InPlace(host, guest) => self.write_in_place(host, guest, &data).await,
            Ready::Allocated(allocation) => self.write_allocated(*allocation, data).await,
        }
    }

    async fn write_in_place(&self, host: u64, guest: u64, from: &IoVec) -> Result<()> {
        if !self.geometry.data_file {
            self.check_no_overlap(host, from.len() as u64).await?;
        }
        self.write_host(host, guest, from).await
    }

    /// Finds or makes room for the first bytes of a guest range; returns for how many.
    async fn prepare(&self, guest: u64, len: u64) -> Result<(u64, Ready<'_>)> {
        let run = self.map(guest, len).await?;
        if run.in_place() && (run.len == len || !self.goes_on(&run, guest).await?) {
            return Ok((run.len, Ready::InPlace(run.host, guest)));
        }
        let geometry = &self.geometry;
        let end = (guest + len).min(self.slice_end(guest));
        let claimed = geometry.cluster_start(guest)..geometry.clusters(end) << geometry.cluster_bits;
        let mut claim = self.claims.claim(claimed).await;
        let slice = self.own_l2_slice(guest).await?;
        // While this waited, another request may have allocated what was missing.
        match self.look(&slice, guest, end - guest).await? {
            Found::InPlace(run) => Ok((run.len, Ready::InPlace(run.host, guest))),
            Found::Reuse(clusters) => {
                let part = self.bytes_within(guest, end, clusters);
                claim.shorten(geometry.clusters(guest + part) << geometry.cluster_bits);
                let host = self.entry_in(&slice, guest).offset();
                let (plan, entries) = self.plan_copy(&slice, guest, part, host, false, false);
                let allocation = Allocation { _claim: claim, slice, plan, entries, taken: 0 };
                Ok((part, Ready::Allocated(Box::new(allocation))))
            }
            Found::New(clusters) => {
                let (host, clusters, taken, fresh) = if geometry.data_file {
                    (geometry.cluster_start(guest), clusters, 0, false)
                } else {
                    let mut allocator = self.allocator.lock().await;
                    let taken = self.take_some(&mut allocator, clusters).await?;
                    (taken.offset, taken.clusters, taken.clusters, taken.fresh)
                };
                let part = self.bytes_within(guest, end, clusters);
                claim.shorten(geometry.clusters(guest + part) << geometry.cluster_bits);
                let (plan, entries) = self.plan_copy(&slice, guest, part, host, true, fresh);
                let allocation = Allocation { _claim: claim, slice, plan, entries, taken };
                Ok((part, Ready::Allocated(Box::new(allocation))))
            }
        }
    }

    /// Whether the cluster behind a run that is written in place can be written together with it: it has the next host
    /// cluster, although nothing is in it yet.
    async fn goes_on(&self, run: &Run, guest: u64) -> Result<bool> {
        let (next, host) = (guest + run.len, run.host + run.len);
        if self.geometry.in_cluster(next) != 0 || next == self.slice_end(guest) {
            return Ok(false);
        }
        let Some(table) = self.l2_table(next).await? else { return Ok(false) };
        let slice = self.l2.get(&self.file.node(), self.l2_entry_offset(table, next)).await?;
        let entry = self.entry_in(&slice, next);
        Ok(entry.copied() && entry.has_host_cluster(&self.geometry) && entry.offset() == host)
    }

    /// The bytes from `guest` to `end`, or to the end of as many clusters.
    fn bytes_within(&self, guest: u64, end: u64, clusters: u64) -> u64 {
        let clusters_end = self.geometry.cluster_start(guest) + (clusters << self.geometry.cluster_bits);
        end.min(clusters_end) - guest
    }

    /// What the table has for a range within one slice.
    async fn look(&self, slice: &Arc<Slice>, guest: u64, len: u64) -> Result<Found> {
        let run = self.map(guest, len).await?;
        if run.in_place() && (run.len == len || !self.goes_on(&run, guest).await?) {
            return Ok(Found::InPlace(run));
        }
        let geometry = &self.geometry;
        let last = geometry.cluster_start(guest + len - 1);
        let bytes = slice.bytes();
        let mut cluster = geometry.cluster_start(guest);
        let entry = |cluster: u64| geometry.l2_entry(&bytes, self.index_in_slice(cluster));
        let reusable = |entry: L2Entry| entry.copied() && entry.has_host_cluster(geometry);
        let first = entry(cluster);
        let mut count = 1;
        let reuse = reusable(first);
        while cluster < last {
            cluster += geometry.cluster_size();
            let next = entry(cluster);
            let fits = if reuse {
                let wanted = first.offset() + (count << geometry.cluster_bits);
                reusable(next) && next.offset() == wanted
            } else {
                !reusable(next) && next.subcluster_kind(geometry, 0) != SubclusterKind::Invalid
            };
            if !fits {
                break;
            }
            count += 1;
        }
        Ok(if reuse { Found::Reuse(count) } else { Found::New(count) })
    }

    /// Writes data with what is copied around them, and has the L2 table name them.
    async fn write_allocated(&self, allocation: Allocation<'_>, data: IoVec) -> Result<()> {
        let result = self.copy_and_write(&allocation.plan, data).await;
        if let Err(error) = result {
            if allocation.taken > 0 {
                self.give_back(allocation.plan.host_cluster, allocation.taken).await;
            }
            return Err(error);
        }
        let old = self.link(&allocation.slice, &allocation.entries);
        if allocation.entries.replace {
            for entry in old {
                self.free_entry(entry, Why::Other);
            }
        }
        Ok(())
    }

    /// Sets entries in a slice; returns what they were.
    pub(crate) fn link(&self, slice: &Arc<Slice>, entries: &NewEntries) -> Vec<L2Entry> {
        self.l2.change(slice, |bytes| {
            let mut old = Vec::with_capacity(entries.entries.len());
            for (index, entry) in entries.entries.iter().enumerate() {
                old.push(self.geometry.l2_entry(bytes, entries.first + index));
                self.geometry.set_l2_entry(bytes, entries.first + index, *entry);
            }
            old
        })
    }

    /// The slice with a guest offset's entry, of an L2 table that is the active L1 table's alone: made, or copied from
    /// the one that snapshots have, if need be.
    pub(crate) async fn own_l2_slice(&self, guest: u64) -> Result<Arc<Slice>> {
        let file = self.file.node();
        if let Some(table) = self.l2_table(guest).await?.filter(|table| table.copied()) {
            return self.l2.get(&file, self.l2_entry_offset(table, guest)).await;
        }
        let mut allocator = self.allocator.lock().await;
        let old = self.l2_table(guest).await?;
        let table = match old.filter(|table| table.copied()) {
            Some(table) => table,
            None => {
                let taken = self.take_exactly(&mut allocator, 1).await?;
                if let Err(error) = self.fill_l2_table(old, taken.offset).await {
                    drop(allocator);
                    self.give_back(taken.offset, 1).await;
                    return Err(error);
                }
                self.set_l1_entry(guest, old, taken.offset);
                self.write_refcounts_early(&allocator).await?;
                L1Entry::new(taken.offset)
            }
        };
        drop(allocator);
        self.l2.get(&file, self.l2_entry_offset(table, guest)).await
    }

    fn set_l1_entry(&self, guest: u64, old: Option<L1Entry>, offset: u64) {
        let cluster = self.geometry.cluster_size();
        let index = self.geometry.l1_index(guest) as usize;
        self.metadata.write().add(offset, cluster, Metadata::ActiveL2);
        let mut l1 = self.l1.write();
        l1.entries[index] = L1Entry::new(offset).0;
        l1.dirty.insert(index);
        drop(l1);
        if let Some(old) = old {
            self.metadata.write().add(old.offset(), cluster, Metadata::InactiveL2);
            self.free_clusters(old.offset(), 1, Why::Other);
        }
    }

    /// Writes a new L2 table at `offset`: empty, or a copy.
    async fn fill_l2_table(&self, old: Option<L1Entry>, offset: u64) -> Result<()> {
        let file = self.file.node();
        let size = self.geometry.cluster_size();
        let mut table = IoBuffer::zeroed(size as usize);
        if let Some(old) = old {
            let mut at = 0;
            while at < size {
                let slice = self.l2.get(&file, old.offset() + at).await?;
                let to = at as usize..(at + self.l2.slice_size()) as usize;
                table.bytes_mut()[to].copy_from_slice(&slice.bytes());
                at += self.l2.slice_size();
            }
        }
        self.l2.forget(offset..offset + size);
        self.event("l2_alloc_write");
        file.write(offset, &table.into_io(), WriteFlags::empty()).await
    }
}

/// Where the first bytes of a range can be written.
enum Ready<'a> {
    /// At this host offset, as they are; and the guest's.
    InPlace(u64, u64),
    /// In clusters that the L2 table does not name yet.
    Allocated(Box<Allocation<'a>>),
}
