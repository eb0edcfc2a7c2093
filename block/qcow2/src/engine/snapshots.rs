//! Internal snapshots.

use super::allocator::Allocator;
use super::frees::Why;
use super::metadata_map::Metadata;
use super::state::{L1Table, Qcow2};
use crate::format::entry::{COPIED, ClusterKind, L1Entry, L2Entry};
use crate::format::snapshot::{self, Snapshot};
use crate::format::{MAX_L1_BYTES, MAX_SNAPSHOTS, Table};
use block_graph::{Errno, Error, Result, SnapshotInfo, Truncate, WriteFlags};
use io_loop::IoBuffer;
use std::ops::Range;
use std::sync::atomic::Ordering;

impl Qcow2 {
    /// The snapshots, as users see them.
    pub(crate) fn list_snapshots(&self) -> Vec<SnapshotInfo> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let snapshots = self.snapshots.lock();
        let infos = snapshots.iter().map(|snapshot| SnapshotInfo {
            id: text(&snapshot.id),
            name: text(&snapshot.name),
            vm_state_size: snapshot.vm_state_size,
            date_seconds: snapshot.seconds,
            date_nanoseconds: snapshot.nanoseconds,
            vm_clock_ns: snapshot.vm_clock,
            icount: snapshot.icount.filter(|count| *count != u64::MAX),
            disk_size: snapshot.disk_size.unwrap_or_else(|| self.disk_size()),
        });
        infos.collect()
    }

    /// The index of the snapshot with this ID, else of the one with this name.
    fn find_snapshot(&self, id_or_name: &str) -> Result<usize> {
        let snapshots = self.snapshots.lock();
        let by = |field: fn(&Snapshot) -> &[u8]| {
            snapshots.iter().position(|snapshot| field(snapshot) == id_or_name.as_bytes())
        };
        by(|snapshot| &snapshot.id)
            .or_else(|| by(|snapshot| &snapshot.name))
            .ok_or_else(|| Error::errno_only(Errno::NOT_FOUND))
    }

    /// Makes a snapshot of the disk as it is.
    pub(crate) async fn create_snapshot(&self, info: SnapshotInfo) -> Result<()> {
        self.check_writable()?;
        if self.geometry.data_file {
            return Err(Error::errno_only(Errno::NOT_SUPPORTED));
        }
        let _alone = self.requests.exclusive().await;
        let mut list = self.snapshots.lock().clone();
        if list.len() as u64 >= u64::from(MAX_SNAPSHOTS) {
            return Err(Error::errno_only(Errno::TOO_LARGE));
        }
        let number = |snapshot: &Snapshot| String::from_utf8_lossy(&snapshot.id).parse::<u64>().unwrap_or(0);
        let id = match info.id.is_empty() {
            true => (list.iter().map(number).max().unwrap_or(0).saturating_add(1)).to_string(),
            false => info.id,
        };
        if list.iter().any(|snapshot| snapshot.id == id.as_bytes()) {
            return Err(Error::errno_only(Errno::EXISTS));
        }
        self.write_everything().await?;
        let entries = self.l1.read().entries.clone();
        let taken = {
            let mut allocator = self.allocator.lock().await;
            let clusters = self.geometry.clusters(entries.len() as u64 * 8).max(1);
            let taken = self.take_exactly(&mut allocator, clusters).await?;
            if let Err(error) = self.count_tree(&mut allocator, &entries, 1).await {
                drop(allocator);
                self.give_back(taken.offset, taken.clusters).await;
                return Err(error);
            }
            taken
        };
        self.refresh_copied().await?;
        list.push(Snapshot {
            l1_offset: taken.offset,
            l1_entries: entries.len() as u32,
            id: id.into_bytes(),
            name: info.name.into_bytes(),
            seconds: info.date_seconds,
            nanoseconds: info.date_nanoseconds,
            vm_clock: info.vm_clock_ns,
            vm_state_size: info.vm_state_size,
            disk_size: Some(self.disk_size()),
            icount: Some(info.icount.unwrap_or(u64::MAX)),
            ..Snapshot::default()
        });
        // Without the flags, which mean nothing there.
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| (entry & !COPIED).to_be_bytes()).collect();
        let file = self.file.node();
        file.write(taken.offset, &IoBuffer::from(&bytes[..]).into_io(), WriteFlags::empty()).await?;
        self.metadata.write().add(taken.offset, bytes.len() as u64, Metadata::InactiveL1);
        if let Err(error) = self.write_snapshot_table(list).await {
            // As it was: what counts the snapshot's tree goes.
            let mut allocator = self.allocator.lock().await;
            let _ = self.count_tree(&mut allocator, &entries, -1).await;
            drop(allocator);
            self.give_back(taken.offset, taken.clusters).await;
            let _ = self.refresh_copied().await;
            return Err(error);
        }
        // VM state that was written behind the disk belongs to the snapshot now, and to nobody else.
        self.discard_vm_state().await?;
        self.write_everything().await
    }

    /// Has the active disk forget VM state behind its end.
    async fn discard_vm_state(&self) -> Result<()> {
        let start = self.vm_state_start();
        let end = (self.l1.read().entries.len() as u64).saturating_mul(1 << self.geometry.l1_shift());
        if start < end { self.discard_guest(start..end, Why::Other, true).await } else { Ok(()) }
    }

    /// Where VM state begins among guest offsets: with the first L1 entry that describes nothing of the disk.
    pub(crate) fn vm_state_start(&self) -> u64 {
        self.geometry.l1_entries_for(self.disk_size()) << self.geometry.l1_shift()
    }

    /// Removes a snapshot.
    pub(crate) async fn delete_snapshot(&self, id_or_name: &str) -> Result<()> {
        self.check_writable()?;
        let _alone = self.requests.exclusive().await;
        let index = self.find_snapshot(id_or_name)?;
        let mut list = self.snapshots.lock().clone();
        let gone = list.remove(index);
        let entries = self.snapshot_l1(&gone).await?;
        self.write_everything().await?;
        self.write_snapshot_table(list).await?;
        let bytes = u64::from(gone.l1_entries) * 8;
        self.metadata.write().remove(gone.l1_offset, bytes);
        let freed = async {
            let mut allocator = self.allocator.lock().await;
            self.count_tree(&mut allocator, &entries, -1).await?;
            drop(allocator);
            self.free_clusters(gone.l1_offset, self.geometry.clusters(bytes), Why::Snapshot);
            self.refresh_copied().await?;
            self.write_everything().await
        };
        freed.await.map_err(|error| {
            eprintln!("qcow2_free_clusters failed: {}", error.errno());
            error.context("Failed to free the cluster and L1 table")
        })
    }

    /// Makes the disk what it was at a snapshot.
    pub(crate) async fn apply_snapshot(&self, id_or_name: &str) -> Result<()> {
        self.check_writable()?;
        if self.geometry.data_file {
            return Err(Error::errno_only(Errno::NOT_SUPPORTED));
        }
        let _alone = self.requests.exclusive().await;
        let index = self.find_snapshot(id_or_name)?;
        let snapshot = self.snapshots.lock()[index].clone();
        let mut entries = self.snapshot_l1(&snapshot).await?;
        let size = snapshot.disk_size.unwrap_or_else(|| self.disk_size());
        if size != self.disk_size() {
            self.resize(size, Truncate { exact: true, ..Truncate::default() }).await?;
        }
        self.write_everything().await?;
        let old = self.l1.read().entries.clone();
        entries.resize(entries.len().max(old.len()), 0);
        {
            let mut allocator = self.allocator.lock().await;
            self.count_tree(&mut allocator, &entries, 1).await?;
        }
        self.replace_l1(entries).await?;
        {
            let mut allocator = self.allocator.lock().await;
            self.count_tree(&mut allocator, &old, -1).await?;
        }
        self.refresh_copied().await?;
        self.write_everything().await
    }

    /// Has a disk that is open for reading only show a snapshot.
    pub(crate) async fn load_snapshot(&self, id: Option<&str>, name: Option<&str>) -> Result<()> {
        if self.writable {
            return Err(Error::invalid("Can't load a snapshot of an image that may be written to"));
        }
        let _alone = self.requests.exclusive().await;
        let matches = |snapshot: &Snapshot| {
            id.is_none_or(|id| snapshot.id == id.as_bytes())
                && name.is_none_or(|name| snapshot.name == name.as_bytes())
        };
        let found = self.snapshots.lock().iter().find(|snapshot| matches(snapshot)).cloned();
        let snapshot = found.ok_or_else(|| Error::new(Errno::NOT_FOUND, "Can't find snapshot"))?;
        let entries = self.snapshot_l1(&snapshot).await?;
        let size = snapshot.disk_size.unwrap_or_else(|| self.disk_size());
        if self.geometry.l1_entries_for(size) > entries.len() as u64 {
            return Err(Error::invalid("Snapshot L1 table too small"));
        }
        *self.l1.write() = L1Table { offset: snapshot.l1_offset, entries, ..L1Table::default() };
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Reads a snapshot's L1 table.
    async fn snapshot_l1(&self, snapshot: &Snapshot) -> Result<Vec<u64>> {
        let length = u64::from(snapshot.l1_entries);
        self.geometry.check_table(Table::SnapshotL1, snapshot.l1_offset, length, 8, MAX_L1_BYTES)?;
        let file = self.file.node();
        if snapshot.l1_offset + length * 8 > file.len().next_multiple_of(self.geometry.cluster_size()) {
            return Err(Error::new(Errno::IO, "Snapshot L1 table is beyond the end of the file"));
        }
        let mut buffer = IoBuffer::zeroed(length as usize * 8);
        file.read(snapshot.l1_offset, &buffer.io()).await?;
        let entry = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
        Ok(buffer.bytes().chunks_exact(8).map(entry).collect())
    }

    /// Writes another snapshot table to a new place, after all that it names, and has the header name it.
    async fn write_snapshot_table(&self, list: Vec<Snapshot>) -> Result<()> {
        let geometry = &self.geometry;
        let bytes = snapshot::encode_table(&list)?;
        let file = self.file.node();
        let mut offset = 0;
        if !bytes.is_empty() {
            let taken = {
                let mut allocator = self.allocator.lock().await;
                self.take_exactly(&mut allocator, geometry.clusters(bytes.len() as u64)).await?
            };
            offset = taken.offset;
            file.write(offset, &IoBuffer::from(&bytes[..]).into_io(), WriteFlags::empty()).await?;
        }
        self.write_tables(false).await?;
        file.flush().await?;
        let old_offset = self.first_cluster.lock().header.snapshots_offset;
        self.change_header(|header| {
            header.snapshots_offset = offset;
            header.snapshots = list.len() as u32;
        })
        .await?;
        file.flush().await?;
        let old = std::mem::replace(&mut *self.snapshots.lock(), list);
        let old_bytes: u64 = old.iter().map(old_length).sum();
        let mut metadata = self.metadata.write();
        metadata.remove(old_offset, old_bytes);
        metadata.add(offset, bytes.len() as u64, Metadata::SnapshotTable);
        drop(metadata);
        if old_bytes > 0 {
            self.free_clusters(old_offset, geometry.clusters(old_bytes), Why::Other);
        }
        Ok(())
    }

    /// Adds `delta` to the refcounts of everything that is reachable through the L1 table `entries`. If that fails, it
    /// is undone. The caller is alone, and holds the allocator.
    pub(crate) async fn count_tree(
        &self,
        allocator: &mut Allocator,
        entries: &[u64],
        delta: i64,
    ) -> Result<()> {
        self.before_refcounts_change().await?;
        let mut done = 0;
        let result = self.count_tables(allocator, entries, delta, &mut done).await;
        if result.is_err() {
            let mut undone = 0;
            self.count_tables(allocator, &entries[..done], -delta, &mut undone).await?;
        }
        result
    }

    /// [`Self::count_tree`] without undoing; says in `done` how many entries of the L1 table are done.
    async fn count_tables(
        &self,
        allocator: &mut Allocator,
        entries: &[u64],
        delta: i64,
        done: &mut usize,
    ) -> Result<()> {
        for (index, entry) in entries.iter().enumerate() {
            let entry = L1Entry(*entry);
            if entry.offset() != 0 {
                self.count_table(allocator, entry.offset(), delta).await?;
            }
            *done = index + 1;
        }
        Ok(())
    }

    /// The part of [`Self::count_tree`] that is one L2 table: undone if it fails.
    async fn count_table(&self, allocator: &mut Allocator, table: u64, delta: i64) -> Result<()> {
        if self.geometry.in_cluster(table) != 0 {
            return Err(self.corrupt(format!("L2 table offset {table:#x} unaligned")).await);
        }
        let mut runs = self.clusters_of_table(table).await?;
        let first = table >> self.geometry.cluster_bits;
        runs.push(first..first + 1);
        let mut free = Vec::new();
        for index in 0..runs.len() {
            let result = self
                .add_to_refcounts(allocator, runs[index].clone(), delta, |cluster| free.push(cluster))
                .await;
            if let Err(error) = result {
                for run in &runs[..index] {
                    self.add_to_refcounts(allocator, run.clone(), -delta, |_| ()).await?;
                }
                return Err(error);
            }
        }
        if free.contains(&first) {
            self.l2.forget(table..table + self.geometry.cluster_size());
            self.metadata.write().remove(table, self.geometry.cluster_size());
        }
        self.freed_of_snapshot(allocator, &free).await;
        Ok(())
    }

    /// Discards in the file what nothing uses any more, if that is wished.
    async fn freed_of_snapshot(&self, allocator: &mut Allocator, free: &[u64]) {
        let bits = self.geometry.cluster_bits;
        self.decompressed.forget();
        if free.contains(&(allocator.packed >> bits)) {
            allocator.packed = 0;
        }
        if !self.discards.snapshot {
            return;
        }
        for run in free.chunk_by(|a, b| *b == a + 1) {
            let _ = self.file.node().discard(run[0] << bits, (run.len() as u64) << bits).await;
        }
    }

    /// Whether an L2 table of a snapshot says of any cluster that it is zero.
    pub(crate) async fn snapshots_say_zero(&self) -> Result<bool> {
        let snapshots = self.snapshots.lock().clone();
        for snapshot in snapshots {
            for table in self.snapshot_l1(&snapshot).await?.into_iter().map(|entry| L1Entry(entry).offset()) {
                let mut at = 0;
                while table != 0 && at < self.geometry.cluster_size() {
                    let slice = self.l2.get(&self.file.node(), table + at).await?;
                    let bytes = slice.bytes();
                    let zero = |index: usize| {
                        let kind = self.geometry.l2_entry(&bytes, index).kind(&self.geometry);
                        matches!(kind, ClusterKind::ZeroPlain | ClusterKind::ZeroAllocated)
                    };
                    if (0..self.entries_per_slice()).any(zero) {
                        return Ok(true);
                    }
                    at += self.l2.slice_size();
                }
            }
        }
        Ok(false)
    }

    /// The host clusters that an L2 table names, in runs; those that several entries name are there several times.
    async fn clusters_of_table(&self, table: u64) -> Result<Vec<Range<u64>>> {
        let geometry = &self.geometry;
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut add = |offset: u64, count: u64| {
            let first = offset >> geometry.cluster_bits;
            match runs.last_mut() {
                Some(last) if last.end == first => last.end += count,
                _ => runs.push(first..first + count),
            }
        };
        let mut at = 0;
        while at < geometry.cluster_size() {
            let slice = self.l2.get(&self.file.node(), table + at).await?;
            let bytes = slice.bytes();
            for index in 0..self.entries_per_slice() {
                let entry = geometry.l2_entry(&bytes, index);
                match entry.kind(geometry) {
                    ClusterKind::Compressed => {
                        let (first, count) = entry.compressed_extent(geometry).clusters(geometry);
                        add(first, count);
                    }
                    ClusterKind::Normal | ClusterKind::ZeroAllocated
                        if geometry.in_cluster(entry.offset()) != 0 =>
                    {
                        drop(bytes);
                        let what = format!("Cluster allocation offset {:#x} unaligned", entry.offset());
                        return Err(self.corrupt(what).await);
                    }
                    ClusterKind::Normal | ClusterKind::ZeroAllocated => add(entry.offset(), 1),
                    ClusterKind::Unallocated | ClusterKind::ZeroPlain => (),
                }
            }
            at += self.l2.slice_size();
        }
        Ok(runs)
    }

    /// Sets the flags of the active tables that say whether refcounts are one. The caller is alone.
    pub(crate) async fn refresh_copied(&self) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let length = self.l1.read().entries.len();
        for index in 0..length {
            let entry = L1Entry(self.l1.read().entries[index]);
            if entry.offset() == 0 {
                continue;
            }
            self.relieve().await?;
            let allocator = self.allocator.lock().await;
            let single = self.refcount(&allocator, entry.offset() >> bits).await? == 1;
            let new = if single { L1Entry::new(entry.offset()) } else { L1Entry(entry.offset()) };
            let what = if single { Metadata::ActiveL2 } else { Metadata::InactiveL2 };
            self.metadata.write().add(entry.offset(), self.geometry.cluster_size(), what);
            if new != entry {
                let mut l1 = self.l1.write();
                l1.entries[index] = new.0;
                l1.dirty.insert(index);
            }
            self.refresh_table(&allocator, entry.offset()).await?;
        }
        Ok(())
    }

    async fn refresh_table(&self, allocator: &Allocator, table: u64) -> Result<()> {
        let geometry = &self.geometry;
        let mut at = 0;
        while at < geometry.cluster_size() {
            let slice = self.l2.get(&self.file.node(), table + at).await?;
            let mut changes: Vec<(usize, L2Entry)> = Vec::new();
            for index in 0..self.entries_per_slice() {
                let entry = geometry.l2_entry(&slice.bytes(), index);
                if entry.has_host_cluster(geometry) && !geometry.data_file {
                    let single =
                        self.refcount(allocator, entry.offset() >> geometry.cluster_bits).await? == 1;
                    if entry.copied() != single {
                        changes.push((index, entry.with_copied(single)));
                    }
                }
            }
            if !changes.is_empty() {
                self.l2.change(&slice, |bytes| {
                    for (index, entry) in changes {
                        geometry.set_l2_entry(bytes, index, entry);
                    }
                });
            }
            at += self.l2.slice_size();
        }
        Ok(())
    }
}

/// Bytes that an entry of the snapshot table takes in the file as it was read.
pub(crate) fn old_length(snapshot: &Snapshot) -> u64 {
    let length =
        snapshot::ENTRY_BYTES + snapshot.extra_length as usize + snapshot.id.len() + snapshot.name.len();
    length.next_multiple_of(8) as u64
}
