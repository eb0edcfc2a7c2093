//! Making guest ranges zero, and discarding them.

use super::cache::Slice;
use super::copy::{NewEntries, bits};
use super::frees::Why;
use super::state::Qcow2;
use crate::format::entry::{ClusterKind, L2Entry, SubclusterKind};
use block_graph::{Errno, Error, Result, ZeroFlags, status_above};
use io_loop::IoBuffer;
use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

/// The most bytes of zeros that are written at a time.
const ZEROS: u64 = 1 << 20;

impl Qcow2 {
    /// Makes a guest range zero.
    pub(crate) async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.check_writable()?;
        {
            let _request = self.begin_change().await?;
            self.zero_guest(offset, len, flags).await?;
        }
        if flags.contains(ZeroFlags::FUA) { self.flush().await } else { Ok(()) }
    }

    /// [`Qcow2::write_zeroes`] for those that are within a request, or alone.
    pub(crate) async fn zero_guest(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let unit = self.geometry.subcluster_size();
        let end = offset + len;
        let cannot_mark = self.version_2() && self.backing_node().is_some();
        // The disk's last subcluster is whole although the disk ends within it.
        let whole_end = if end == self.disk_size() { end.next_multiple_of(unit) } else { end & !(unit - 1) };
        let whole_start = offset.next_multiple_of(unit);
        if cannot_mark || whole_start >= whole_end {
            return self.zero_part(offset..end, flags).await;
        }
        self.zero_part(offset..whole_start, flags).await?;
        self.mark_zero(whole_start..whole_end, flags).await?;
        self.zero_part(whole_end.min(end)..end, flags).await
    }

    /// Makes a range zero that is less than subclusters: by marking them if all else in them is zero, too.
    async fn zero_part(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        let unit = self.geometry.subcluster_size();
        let mut at = range.start;
        while at < range.end {
            let start = at & !(unit - 1);
            let end = range.end.min(start + unit);
            let must_write = self.data_file_raw() || self.version_2() && self.backing_node().is_some();
            if !must_write
                && self.rest_is_zero(start, at..end).await?
                && self.mark_if_unwritten(start..start + unit, flags).await?
            {
                // It is a zero cluster, or subcluster, now.
            } else if flags.contains(ZeroFlags::NO_FALLBACK) {
                return Err(Error::errno_only(Errno::NOT_SUPPORTED));
            } else {
                let mut done = at;
                while done < end {
                    let len = (end - done).min(ZEROS);
                    self.write_guest(done, &IoBuffer::zeroed(len as usize).into_io()).await?;
                    done += len;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Whether a subcluster has no data of its own, and what is around `part` in it reads as zero.
    async fn rest_is_zero(&self, start: u64, part: Range<u64>) -> Result<bool> {
        let unit = self.geometry.subcluster_size();
        match self.map(start, unit).await?.kind {
            SubclusterKind::ZeroPlain | SubclusterKind::ZeroAllocated => return Ok(true),
            SubclusterKind::UnallocatedPlain | SubclusterKind::UnallocatedAllocated => {}
            _ => return Ok(false),
        }
        let Some(backing) = self.backing_node() else { return Ok(true) };
        let end = (start + unit).min(self.disk_size());
        for mut rest in [start..part.start, part.end..end] {
            while rest.start < rest.end {
                let len = rest.end - rest.start;
                let (status, _) = status_above(&backing, None, rest.start, len, true).await?;
                if status.len == 0 {
                    break;
                }
                if !status.zero {
                    return Ok(false);
                }
                rest.start += status.len;
            }
        }
        Ok(true)
    }

    /// Has no entry of the active L2 tables say that its cluster is zero. The caller is alone.
    pub(crate) async fn spell_out_zeros(&self, progress: &dyn Fn(u64, u64)) -> Result<()> {
        let size = self.geometry.cluster_size();
        let end = self.disk_size().next_multiple_of(size);
        let mut at = 0;
        while at < end {
            let run = self.map(at, end - at).await?;
            match run.kind {
                SubclusterKind::ZeroPlain | SubclusterKind::ZeroAllocated => {
                    let backed = self.backing_node().is_some_and(|backing| backing.len() > at);
                    if backed {
                        let mut done = 0;
                        while done < run.len {
                            let len = (run.len - done).min(ZEROS);
                            self.write_guest(at + done, &IoBuffer::zeroed(len as usize).into_io()).await?;
                            done += len;
                        }
                    } else {
                        self.discard_guest(at..at + run.len, Why::Other, true).await?;
                    }
                    self.relieve().await?;
                }
                _ => (),
            }
            at += run.len;
            progress(at, end);
        }
        Ok(())
    }

    /// Has the L2 tables say that whole subclusters are zero.
    async fn mark_zero(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        self.mark_where(range, flags, |_, _| true).await
    }

    /// Has an L2 table say that a subcluster is zero, unless somebody has written data to it by now: says whether it did.
    async fn mark_if_unwritten(&self, range: Range<u64>, flags: ZeroFlags) -> Result<bool> {
        let marked = Cell::new(false);
        let geometry = &self.geometry;
        let unwritten = |entry: L2Entry, touched: u32| {
            let free = match entry.kind(geometry) {
                ClusterKind::Compressed => false,
                ClusterKind::Normal => geometry.extended_l2 && entry.allocated_bits() & touched == 0,
                _ => true,
            };
            marked.set(free);
            free
        };
        self.mark_where(range, flags, unwritten).await?;
        Ok(marked.get())
    }

    /// [`Qcow2::mark_zero`] of the subclusters that `may` says.
    async fn mark_where(
        &self,
        range: Range<u64>,
        flags: ZeroFlags,
        may: impl Fn(L2Entry, u32) -> bool,
    ) -> Result<()> {
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        let geometry = &self.geometry;
        self.change_entries(range, Why::Request, flags.difference(ZeroFlags::FUA), |entry, touched| {
            if !may(entry, touched) {
                return Change::Nothing;
            }
            let kind = entry.kind(geometry);
            if geometry.extended_l2 && touched != u32::MAX {
                // Some subclusters of the cluster: compressed ones have been written as data by then.
                let allocated = entry.allocated_bits() & !touched;
                return Change::To(entry.with_bitmaps(allocated, entry.zero_bits() | touched));
            }
            if self.version_2() {
                return Change::To(L2Entry::UNALLOCATED);
            }
            let keeps = (!unmap || self.discards.no_unref) && entry.has_host_cluster(geometry);
            if keeps {
                let new = if geometry.extended_l2 {
                    entry.with_bitmaps(0, u32::MAX)
                } else {
                    L2Entry { descriptor: entry.descriptor | crate::format::entry::ZERO, bitmap: 0 }
                };
                return Change::To(new);
            }
            match kind {
                ClusterKind::ZeroPlain => Change::Nothing,
                _ => Change::To(L2Entry::zero_plain(geometry.extended_l2)),
            }
        })
        .await
    }

    /// Discards the whole clusters of a guest range.
    pub(crate) async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        let _request = self.begin_change().await?;
        if self.version_2() && self.backing_node().is_some() {
            // The backing file's data would show.
            return Err(Error::errno_only(Errno::NOT_SUPPORTED));
        }
        let size = self.geometry.cluster_size();
        let end = offset + len;
        let last = if end == self.disk_size() { end.next_multiple_of(size) } else { end & !(size - 1) };
        let first = offset.next_multiple_of(size);
        if first >= last {
            return Ok(());
        }
        self.discard_guest(first..last, Why::Request, false).await
    }

    /// Discards whole clusters. `fully` has them be unallocated, so that the backing file shows; otherwise they are zero.
    pub(crate) async fn discard_guest(&self, range: Range<u64>, why: Why, fully: bool) -> Result<()> {
        let geometry = &self.geometry;
        let backed = self.backing_node().is_some();
        self.change_entries(range, why, ZeroFlags::MAY_UNMAP, |entry, _| {
            let allocated = matches!(
                entry.kind(geometry),
                ClusterKind::Normal | ClusterKind::ZeroAllocated | ClusterKind::Compressed
            );
            let new = if fully {
                L2Entry::UNALLOCATED
            } else if !backed && !allocated {
                return Change::Nothing;
            } else if self.version_2() {
                L2Entry::UNALLOCATED
            } else if self.discards.no_unref && entry.has_host_cluster(geometry) {
                if geometry.extended_l2 {
                    entry.with_bitmaps(0, u32::MAX)
                } else {
                    L2Entry { descriptor: entry.descriptor | crate::format::entry::ZERO, bitmap: 0 }
                }
            } else {
                L2Entry::zero_plain(geometry.extended_l2)
            };
            if new == entry { Change::Nothing } else { Change::To(new) }
        })
        .await
    }

    /// Changes the entries of the subclusters of `range`, in L2 tables that are the active L1 table's alone. Clusters
    /// that an entry no longer names are freed. `change` gets each entry and which of its subclusters are meant. Where
    /// an external data file is a raw image too, the range becomes zero there by `flags`.
    async fn change_entries(
        &self,
        range: Range<u64>,
        why: Why,
        flags: ZeroFlags,
        change: impl Fn(L2Entry, u32) -> Change,
    ) -> Result<()> {
        let geometry = &self.geometry;
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(self.slice_end(at));
            if self.skip_unallocated(at, &change).await? {
                // Nothing in the whole table: on to the next.
                at = range.end.min((at | ((1 << geometry.l1_shift()) - 1)) + 1);
                continue;
            }
            let claimed = geometry.cluster_start(at)..geometry.clusters(end) << geometry.cluster_bits;
            let _claim = self.claims.claim(claimed).await;
            self.expand_partly_compressed(at..end).await?;
            let slice = self.own_l2_slice(at).await?;
            let changes = self.changes_in_slice(&slice, at..end, &change);
            if self.data_file_raw() && !changes.is_empty() {
                let len = end.min(self.data().len()).saturating_sub(at);
                if len > 0 {
                    self.data().write_zeroes(at, len, flags).await?;
                }
            }
            let freed = self.change_in_slice(&slice, changes);
            if geometry.data_file {
                self.discard_in_data_file(&freed, why).await;
            } else {
                freed.into_iter().for_each(|old| self.free_entry(old, why));
            }
            at = end;
        }
        Ok(())
    }

    /// Tells the external data file of clusters that entries no longer name. Whoever calls this has claimed them: they
    /// belong to one place of the guest's disk, where the next write may put data again.
    async fn discard_in_data_file(&self, freed: &[L2Entry], why: Why) {
        // A raw image has been made zero already. An emptied overlay's data must stay until nothing in the file names
        // it, after which nobody would come back for it.
        if self.data_file_raw() || why == Why::Snapshot || !self.passes_on(why) {
            return;
        }
        let size = self.geometry.cluster_size();
        let named = freed.iter().filter(|entry| entry.has_host_cluster(&self.geometry));
        let mut offsets = named.map(|entry| entry.offset()).peekable();
        while let Some(start) = offsets.next() {
            let mut end = start + size;
            while offsets.next_if_eq(&end).is_some() {
                end += size;
            }
            if let Err(error) = self.data().discard(start, end - start).await {
                tracing::debug!("discarding {} bytes at {start:#x}: {error}", end - start);
            }
        }
    }

    /// Whether there is no L2 table for a guest offset, and none is needed.
    async fn skip_unallocated(&self, guest: u64, change: &impl Fn(L2Entry, u32) -> Change) -> Result<bool> {
        let wanted = match change(L2Entry::UNALLOCATED, u32::MAX) {
            Change::Nothing => L2Entry::UNALLOCATED,
            Change::To(entry) => entry,
        };
        Ok(wanted == L2Entry::UNALLOCATED && self.l2_table(guest).await?.is_none())
    }

    /// Writes the data of compressed clusters of which only some subclusters are to change uncompressed.
    async fn expand_partly_compressed(&self, range: Range<u64>) -> Result<()> {
        let geometry = &self.geometry;
        if !geometry.extended_l2 {
            return Ok(());
        }
        for guest in [geometry.cluster_start(range.start), geometry.cluster_start(range.end - 1)] {
            let whole = range.start <= guest && guest + geometry.cluster_size() <= range.end;
            if whole || self.map(guest, 1).await?.kind != SubclusterKind::Compressed {
                continue;
            }
            self.expand(guest).await?;
        }
        Ok(())
    }

    /// Writes a compressed cluster's data uncompressed. The caller has claimed it.
    async fn expand(&self, guest: u64) -> Result<()> {
        let slice = self.own_l2_slice(guest).await?;
        let taken = {
            let mut allocator = self.allocator.lock().await;
            self.take_exactly(&mut allocator, 1).await?
        };
        let data = IoBuffer::scratch(self.geometry.cluster_size() as usize).into_io();
        let (plan, entries) =
            self.plan_copy(&slice, guest, data.len() as u64, taken.offset, true, taken.fresh);
        let result = match self.read_guest(guest, &data).await {
            Ok(()) => self.copy_and_write(&plan, data).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            self.give_back(taken.offset, 1).await;
            return Err(error);
        }
        for old in self.link(&slice, &entries) {
            self.free_entry(old, Why::Other);
        }
        Ok(())
    }

    /// The entries of a range in one slice that `change` changes, with the guest offsets of their clusters: before and
    /// after.
    fn changes_in_slice(
        &self,
        slice: &Arc<Slice>,
        range: Range<u64>,
        change: &impl Fn(L2Entry, u32) -> Change,
    ) -> Vec<(u64, L2Entry, L2Entry)> {
        let geometry = &self.geometry;
        let mut guest = geometry.cluster_start(range.start);
        let mut changes = Vec::new();
        while guest < range.end {
            let unit = geometry.subcluster_bits();
            let from = range.start.saturating_sub(guest) >> unit;
            let to = (range.end - guest).min(geometry.cluster_size()).div_ceil(1 << unit);
            let old = self.entry_in(slice, guest);
            let touched = if geometry.extended_l2 { bits(from as u32..to as u32) } else { u32::MAX };
            if let Change::To(new) = change(old, touched)
                && new != old
            {
                changes.push((guest, old, new));
            }
            guest += geometry.cluster_size();
        }
        changes
    }

    /// Makes the changes in a slice; returns the entries whose host cluster is no longer named.
    fn change_in_slice(&self, slice: &Arc<Slice>, changes: Vec<(u64, L2Entry, L2Entry)>) -> Vec<L2Entry> {
        let mut freed = Vec::new();
        for (guest, old, new) in changes {
            let first = self.index_in_slice(guest);
            self.link(slice, &NewEntries { first, entries: vec![new], replace: true });
            if !(new.has_host_cluster(&self.geometry) && new.offset() == old.offset()) {
                freed.push(old);
            }
        }
        freed
    }
}

/// What becomes of an entry.
pub(crate) enum Change {
    /// It stays.
    Nothing,
    /// It becomes this one.
    To(L2Entry),
}
