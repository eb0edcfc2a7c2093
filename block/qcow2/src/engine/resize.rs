//! Changing the disk's size.

use super::frees::Why;
use super::metadata_map::Metadata;
use super::state::Qcow2;
use crate::format::entry::{L2Entry, SubclusterKind};
use crate::format::{MAX_L1_BYTES, SUBCLUSTERS};
use block_graph::{Errno, Error, Preallocation, Result, Truncate, WriteFlags, ZeroFlags};
use io_loop::IoBuffer;
use std::sync::atomic::Ordering;

impl Qcow2 {
    /// Makes the disk `size` bytes long.
    pub(crate) async fn truncate(&self, size: u64, how: Truncate) -> Result<()> {
        self.check_writable()?;
        let _alone = self.requests.exclusive().await;
        self.resize(size, how).await
    }

    /// [`Qcow2::truncate`] for those that are alone.
    pub(crate) async fn resize(&self, size: u64, how: Truncate) -> Result<()> {
        if !size.is_multiple_of(512) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        if self.version_2() && !self.snapshots.lock().is_empty() {
            return Err(Error::unsupported("Can't resize a v2 image which has snapshots"));
        }
        let old = self.disk_size();
        if size < old {
            if how.preallocation != Preallocation::Off {
                return Err(Error::invalid("Preallocation can't be used for shrinking an image"));
            }
            self.shrink(old, size).await?;
        } else {
            self.grow_l1(self.geometry.l1_entries_for(size)).await?;
        }
        if let Some(data) = &self.data_file {
            let data = data.node();
            let exact = how.exact && self.data_file_raw();
            if how.preallocation != Preallocation::Off || exact || data.len() < size {
                let preallocation = match how.preallocation {
                    Preallocation::Metadata => Preallocation::Off,
                    other => other,
                };
                data.truncate(size, Truncate { exact, preallocation, zero: false }).await?;
            }
        }
        if size > old {
            self.fill_new_part(old, size, how).await?;
        }
        self.write_everything().await?;
        self.change_header(|header| header.size = size).await?;
        self.size.store(size, Ordering::Release);
        self.file.node().flush().await
    }

    /// Allocates what is to be allocated of a new part, and hides what the backing file has there.
    async fn fill_new_part(&self, old: u64, size: u64, how: Truncate) -> Result<()> {
        if how.preallocation != Preallocation::Off {
            self.preallocate(old, size, how.preallocation).await?;
        }
        let backed = self.backing_node().is_some_and(|backing| backing.len() > old);
        if how.zero && backed && how.preallocation == Preallocation::Off {
            // The part of the last cluster that was behind the end, too.
            self.zero_guest(old, size - old, ZeroFlags::empty()).await?;
        }
        Ok(())
    }

    /// Allocates all clusters of a guest range that are not; what they hold then is zero.
    pub(crate) async fn preallocate(&self, from: u64, to: u64, how: Preallocation) -> Result<()> {
        let geometry = &self.geometry;
        if matches!(how, Preallocation::Falloc | Preallocation::Full)
            && !geometry.data_file
            && self.file.node().driver().grows()
        {
            let clusters = geometry.clusters(to) - from / geometry.cluster_size();
            let tables = geometry.l1_entries_for(to - from) + 1;
            let blocks = (clusters + tables) / geometry.refcount_block_entries() + 2;
            let end = self
                .allocator
                .lock()
                .await
                .fresh
                .saturating_add((clusters + tables + blocks) << geometry.cluster_bits);
            let file = self.file.node();
            let truncate = Truncate { exact: false, preallocation: how, zero: false };
            file.truncate(end.max(file.len()), truncate)
                .await
                .map_err(|error| error.context("Could not resize underlying file"))?;
        }
        let mut guest = geometry.cluster_start(from);
        while guest < to {
            guest = self.allocate_run(guest, to).await?;
        }
        let end = self.allocator.lock().await.fresh;
        let file = self.file.node();
        if !geometry.data_file
            && file.driver().grows()
            && (file.len() < end || how != Preallocation::Metadata)
        {
            // The last cluster is in the file as a whole, and nothing behind it.
            file.truncate(end, Truncate { exact: false, ..Truncate::default() }).await?;
        }
        Ok(())
    }

    /// Allocates the first clusters of a range that are not allocated; returns how far that is done.
    async fn allocate_run(&self, guest: u64, to: u64) -> Result<u64> {
        let geometry = &self.geometry;
        let size = geometry.cluster_size();
        let slice = self.own_l2_slice(guest).await?;
        let end = geometry.clusters(to).saturating_mul(size).min(self.slice_end(guest));
        let missing = |guest: u64| {
            let entry = self.entry_in(&slice, guest);
            !entry.has_host_cluster(geometry) && entry.descriptor & crate::format::entry::COMPRESSED == 0
        };
        if !missing(guest) {
            return Ok(guest + size);
        }
        let wanted = (guest..end).step_by(size as usize).take_while(|at| missing(*at)).count() as u64;
        let (host, count, fresh) = if geometry.data_file {
            (guest, wanted, true)
        } else {
            let mut allocator = self.allocator.lock().await;
            let taken = self.take_some(&mut allocator, wanted).await?;
            (taken.offset, taken.clusters, taken.fresh)
        };
        let backed = self.backing_node().is_some_and(|backing| backing.len() > guest);
        for index in 0..count {
            let at = index * size;
            let entry = L2Entry::normal(host + at, geometry.extended_l2);
            // What is there already is not to be seen: zeros are, or what the backing file has not.
            let entry = match (fresh && !backed, geometry.extended_l2) {
                _ if backed => entry_that_hides(entry, geometry.extended_l2),
                (true, _) => entry,
                (false, extended) => entry_that_hides(entry, extended),
            };
            self.l2
                .change(&slice, |bytes| geometry.set_l2_entry(bytes, self.index_in_slice(guest + at), entry));
        }
        Ok(guest + count * size)
    }

    /// Makes the L1 table at least `entries` long, in a new place.
    pub(crate) async fn grow_l1(&self, entries: u64) -> Result<()> {
        if entries <= self.l1.read().entries.len() as u64 {
            return Ok(());
        }
        if entries > MAX_L1_BYTES / 8 {
            return Err(Error::new(Errno::TOO_LARGE, "Failed to grow the L1 table"));
        }
        let mut table = self.l1.read().entries.clone();
        // In steps of a half, so that growing in small steps does not copy it each time.
        let room = (table.len() as u64 + table.len() as u64 / 2).min(MAX_L1_BYTES / 8);
        table.resize(if table.is_empty() { entries } else { entries.max(room) } as usize, 0);
        self.replace_l1(table).await
    }

    /// Writes another active L1 table to a new place and has the header name it. All that it names must be in the file
    /// and counted there. The caller is alone.
    pub(crate) async fn replace_l1(&self, entries: Vec<u64>) -> Result<()> {
        let geometry = &self.geometry;
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let clusters = geometry.clusters(bytes.len() as u64).max(1);
        let taken = {
            let mut allocator = self.allocator.lock().await;
            self.take_exactly(&mut allocator, clusters).await?
        };
        let result = self.write_new_l1(taken.offset, &bytes, &entries).await;
        if let Err(error) = result {
            self.give_back(taken.offset, clusters).await;
            return Err(error);
        }
        let mut l1 = self.l1.write();
        let old_offset = std::mem::replace(&mut l1.offset, taken.offset);
        let old = std::mem::replace(&mut l1.entries, entries);
        l1.dirty.clear();
        drop(l1);
        let old_bytes = old.len() as u64 * 8;
        let mut metadata = self.metadata.write();
        metadata.remove(old_offset, old_bytes);
        metadata.add(taken.offset, bytes.len() as u64, Metadata::ActiveL1);
        drop(metadata);
        if old_bytes > 0 {
            self.free_clusters(old_offset, geometry.clusters(old_bytes), Why::Other);
        }
        Ok(())
    }

    async fn write_new_l1(&self, offset: u64, bytes: &[u8], entries: &[u64]) -> Result<()> {
        let file = self.file.node();
        self.event("l1_grow_alloc_table");
        self.write_tables(false).await?;
        self.event("l1_grow_write_table");
        file.write(offset, &IoBuffer::from(bytes).into_io(), WriteFlags::empty()).await?;
        file.flush().await?;
        self.event("l1_grow_activate_table");
        self.change_header(|header| {
            header.l1_offset = offset;
            header.l1_entries = entries.len() as u32;
        })
        .await?;
        file.flush().await
    }

    /// Makes data of a range zero that would be seen again if the disk grew: what is behind its end in the last cluster.
    async fn wipe(&self, from: u64, to: u64) -> Result<()> {
        let mut at = from;
        while at < to {
            let run = self.map(at, to - at).await?;
            if matches!(run.kind, SubclusterKind::Normal | SubclusterKind::Compressed) {
                self.zero_guest(at, run.len, ZeroFlags::empty()).await?;
            }
            at += run.len;
        }
        Ok(())
    }

    async fn shrink(&self, old: u64, size: u64) -> Result<()> {
        let geometry = &self.geometry;
        let from = geometry.clusters(size) << geometry.cluster_bits;
        let to = geometry.clusters(old) << geometry.cluster_bits;
        self.wipe(size, from.min(old)).await?;
        if from < to {
            self.discard_guest(from..to, Why::Always, true)
                .await
                .map_err(|error| error.context("Failed to discard cropped clusters"))?;
        }
        // L2 tables that describe nothing of the disk any more.
        let kept = geometry.l1_entries_for(size) as usize;
        let gone: Vec<u64> = {
            let mut l1 = self.l1.write();
            let vm_state = geometry.l1_entries_for(old) as usize;
            let range = kept.min(l1.entries.len())..vm_state.min(l1.entries.len());
            let mut gone = Vec::new();
            for index in range {
                let entry = std::mem::take(&mut l1.entries[index]);
                if entry != 0 {
                    l1.dirty.insert(index);
                    gone.push(crate::format::entry::L1Entry(entry).offset());
                }
            }
            gone
        };
        for offset in gone {
            self.l2.forget(offset..offset + geometry.cluster_size());
            self.metadata.write().remove(offset, geometry.cluster_size());
            self.free_clusters(offset, 1, Why::Always);
        }
        self.write_everything().await?;
        self.cut_file().await
    }

    /// Cuts unused clusters off the file's end.
    pub(crate) async fn cut_file(&self) -> Result<()> {
        let file = self.file.node();
        if !file.driver().grows() {
            return Ok(());
        }
        let geometry = &self.geometry;
        let mut allocator = self.allocator.lock().await;
        let mut clusters = geometry.clusters(file.len());
        while clusters > 1 && self.refcount(&allocator, clusters - 1).await? == 0 {
            clusters -= 1;
        }
        let end = clusters << geometry.cluster_bits;
        if end < file.len() {
            file.truncate(end, Truncate::default()).await?;
            allocator.fresh = end;
        }
        Ok(())
    }
}

/// An entry with a host cluster of which nothing is read.
fn entry_that_hides(entry: L2Entry, extended: bool) -> L2Entry {
    if extended {
        entry.with_bitmaps(0, u32::MAX >> (32 - SUBCLUSTERS))
    } else {
        L2Entry { descriptor: entry.descriptor | crate::format::entry::ZERO, bitmap: 0 }
    }
}
