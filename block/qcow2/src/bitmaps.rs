//! Persistent dirty bitmaps (section "Bitmaps").
//!
//! While an image is open for writing, its bitmaps are marked as in use in the file, so that a crash leaves bitmaps that
//! say of themselves that they cannot be trusted. The marks are flags in the directory, changed where it is: each is
//! within a sector. When the image is closed and any content has changed, all contents are written: data, tables and a
//! directory in new clusters, then the header that names them, and then the old ones are freed.
//!
//! Contents are in memory only where they are needed: those of bitmaps that record writes, and those that somebody asked
//! for.

use crate::engine::frees::Why;
use crate::engine::state::Qcow2;
use crate::format::Geometry;
use crate::format::bitmap::{
    BitmapCluster, BitmapEntry, BitmapFlags, MAX_BITMAP_BYTES, MAX_GRANULARITY_BITS, MAX_NAME,
    MAX_TABLE_ENTRIES, MIN_GRANULARITY_BITS, encode_directory, parse_directory,
};
use crate::format::extensions::{BitmapsPointer, Extent};
use crate::format::header::Autoclear;
use crate::format::{MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS};
use crate::storage::{NodeFile, read_vec, write_all};
use block_graph::{BitmapInfo, DirtyBitmap, Errno, Error, Granularity, Result};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The most bytes of bits that are loaded because bitmaps record writes.
const MAX_RECORDING_BYTES: u64 = 1 << 30;
/// The default granularity is that of a cluster, within these bounds.
const DEFAULT_GRANULARITY: std::ops::RangeInclusive<u64> = 4096..=65536;

/// The bitmaps of an open image.
#[derive(Debug, Default)]
pub(crate) struct PersistentBitmaps {
    list: Mutex<Vec<Arc<Persistent>>>,
    /// Whether any records writes.
    recording: AtomicBool,
    /// Bitmaps were added or removed, or have other flags than in the file.
    directory_changed: AtomicBool,
}

/// One bitmap.
#[derive(Debug)]
struct Persistent {
    name: String,
    granularity: Granularity,
    /// Whether it was not stored when the image was last written to: it cannot be used.
    inconsistent: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    enabled: bool,
    /// The table in the file; `None` if the bitmap was never stored.
    table: Option<Extent>,
    content: Option<Arc<DirtyBitmap>>,
    /// Whether the content may differ from what is in the file.
    changed: bool,
}

impl Persistent {
    fn flags(&self, in_use: bool) -> BitmapFlags {
        let mut flags = BitmapFlags::empty();
        flags.set(BitmapFlags::IN_USE, in_use || self.inconsistent);
        flags.set(BitmapFlags::AUTO, self.is_enabled());
        flags
    }

    fn is_enabled(&self) -> bool {
        let state = self.state.lock();
        state.content.as_ref().map_or(state.enabled, |content| content.enabled())
    }

    /// The directory's entry; `None` if the bitmap is not in the file.
    fn entry(&self, in_use: bool) -> Option<BitmapEntry> {
        let table = self.state.lock().table?;
        Some(BitmapEntry {
            table_offset: table.offset,
            table_entries: (table.length / 8) as u32,
            flags: self.flags(in_use),
            granularity_bits: self.granularity.bits() as u8,
            name: self.name.clone(),
        })
    }

    fn usable(&self) -> Result<()> {
        if !self.inconsistent {
            return Ok(());
        }
        let error = Error::invalid(format!("Bitmap '{}' is inconsistent and cannot be used", self.name));
        Err(error.hint("Try block-dirty-bitmap-remove to delete this bitmap from disk"))
    }
}

impl PersistentBitmaps {
    /// Reads the directory of an image that is being opened. If it is opened for writing, the bitmaps are marked as in
    /// use in the file, and those that record writes are loaded.
    pub(crate) async fn load(engine: &Qcow2) -> Result<Self> {
        let pointer = engine.first_cluster.lock().extensions.bitmaps;
        let Some(pointer) = pointer else { return Ok(Self::default()) };
        let file = NodeFile(engine.file.node());
        let directory = pointer.directory;
        if directory.offset.saturating_add(directory.length) > engine.file.node().len() {
            return Err(Error::invalid("Failed to read bitmap directory: it goes past the end of the file"));
        }
        let bytes = read_vec(&file, directory.offset, directory.length as usize).await;
        let bytes = bytes.map_err(|error| Error::from(error).context("Failed to read bitmap directory"))?;
        let entries = parse_directory(&bytes, pointer.count)?;
        let mut list = Vec::new();
        for entry in &entries {
            entry.check(&engine.geometry, engine.disk_size())?;
            list.push(Arc::new(Persistent {
                name: entry.name.clone(),
                granularity: granularity(entry.granularity_bits)?,
                inconsistent: entry.flags.contains(BitmapFlags::IN_USE),
                state: Mutex::new(State {
                    enabled: entry.flags.contains(BitmapFlags::AUTO),
                    table: Some(Extent {
                        offset: entry.table_offset,
                        length: u64::from(entry.table_entries) * 8,
                    }),
                    ..State::default()
                }),
            }));
        }
        let bitmaps = Self { list: Mutex::new(list), ..Self::default() };
        if engine.writable {
            let mut budget = MAX_RECORDING_BYTES;
            for one in bitmaps.all() {
                if one.is_enabled() && !one.inconsistent {
                    let bytes = BitmapEntry::data_bytes(one.granularity.bits() as u8, engine.disk_size());
                    budget = budget.checked_sub(bytes).ok_or_else(|| {
                        Error::new(Errno::NO_MEMORY, "The image's bitmaps are too large to be recorded")
                    })?;
                    bitmaps.content(engine, &one).await?;
                }
            }
            bitmaps.update_recording();
            if entries.iter().any(|entry| !entry.flags.contains(BitmapFlags::IN_USE)) {
                bitmaps.write_flags(engine, true).await?;
            }
        }
        Ok(bitmaps)
    }

    fn all(&self) -> Vec<Arc<Persistent>> {
        self.list.lock().clone()
    }

    fn find(&self, name: &str) -> Result<Arc<Persistent>> {
        let found = self.list.lock().iter().find(|bitmap| bitmap.name == name).cloned();
        found.ok_or_else(|| Error::new(Errno::NOT_FOUND, format!("Dirty bitmap '{name}' not found")))
    }

    fn update_recording(&self) {
        let any = self.all().iter().any(|one| one.is_enabled() && one.state.lock().content.is_some());
        self.recording.store(any, Ordering::Release);
    }

    /// Records that a range of the disk was written.
    pub(crate) fn wrote(&self, offset: u64, len: u64) {
        if !self.recording.load(Ordering::Acquire) {
            return;
        }
        for bitmap in &*self.list.lock() {
            let mut state = bitmap.state.lock();
            if let Some(content) = &state.content
                && content.enabled()
            {
                content.set(offset, len);
                state.changed = true;
            }
        }
    }

    /// The bitmaps, as users see them.
    pub(crate) fn infos(&self) -> Vec<BitmapInfo> {
        let info = |bitmap: &Arc<Persistent>| BitmapInfo {
            name: bitmap.name.clone(),
            granularity: bitmap.granularity.bytes(),
            in_use: bitmap.inconsistent,
            auto: bitmap.is_enabled(),
            count: bitmap.state.lock().content.as_ref().map(|content| content.dirty_bytes()),
        };
        self.list.lock().iter().map(info).collect()
    }

    /// What `info` shows of the bitmaps in the file.
    pub(crate) fn to_json(&self, writable: bool) -> Option<Value> {
        let one = |bitmap: &Arc<Persistent>| {
            let flags = bitmap.flags(writable);
            let names = [(BitmapFlags::IN_USE, "in-use"), (BitmapFlags::AUTO, "auto")];
            let flags: Vec<&str> =
                names.into_iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| name).collect();
            json!({"flags": flags, "name": bitmap.name, "granularity": bitmap.granularity.bytes()})
        };
        let list = self.list.lock();
        // Those that are not in the file yet are not shown.
        let all: Vec<Value> =
            list.iter().filter(|bitmap| bitmap.state.lock().table.is_some()).map(one).collect();
        (!all.is_empty()).then_some(Value::Array(all))
    }

    /// Adds a bitmap with nothing dirty; it is stored when the image is closed.
    pub(crate) fn add(&self, engine: &Qcow2, name: &str, bytes: Option<u64>, enabled: bool) -> Result<()> {
        engine.check_writable()?;
        if name.is_empty() {
            return Err(Error::invalid("Bitmap name cannot be empty"));
        }
        let (least, most) = (*DEFAULT_GRANULARITY.start(), *DEFAULT_GRANULARITY.end());
        let bytes = bytes.unwrap_or_else(|| engine.geometry.cluster_size().clamp(least, most));
        if !bytes.is_power_of_two() || bytes < 512 || bytes > u64::from(u32::MAX) {
            return Err(Error::invalid("Granularity must be power of 2 and at least 512"));
        }
        let mut list = self.list.lock();
        if list.iter().any(|bitmap| bitmap.name == name) {
            return Err(Error::new(Errno::EXISTS, format!("Bitmap already exists: {name}")));
        }
        let refused = |error: Error| {
            let image = engine.file.node().filename().unwrap_or_default();
            error.context(format_args!("Can't make bitmap '{name}' persistent in '{image}'"))
        };
        if engine.version_2() {
            return Err(refused(Error::invalid("Cannot store dirty bitmaps in qcow2 v2 files")));
        }
        check_constraints(&engine.geometry, engine.disk_size(), name, bytes).map_err(refused)?;
        let directory: u64 = list.iter().map(|bitmap| entry_bytes(&bitmap.name)).sum();
        if list.len() as u64 >= u64::from(MAX_BITMAPS) {
            return Err(refused(Error::invalid("Maximum number of persistent bitmaps is already reached")));
        }
        if directory + entry_bytes(name) > MAX_BITMAP_DIRECTORY_BYTES {
            return Err(refused(Error::invalid("Not enough space in the bitmap directory")));
        }
        let granularity = granularity(bytes.trailing_zeros() as u8)?;
        let content = DirtyBitmap::new(Some(name), engine.disk_size(), granularity);
        content.set_enabled(enabled);
        let state = State { enabled, table: None, content: Some(Arc::new(content)), changed: true };
        list.push(Arc::new(Persistent {
            name: name.to_owned(),
            granularity,
            inconsistent: false,
            state: Mutex::new(state),
        }));
        drop(list);
        self.directory_changed.store(true, Ordering::Release);
        self.update_recording();
        Ok(())
    }

    /// Removes a bitmap, from the file at once. The caller is alone.
    pub(crate) async fn remove(&self, engine: &Qcow2, name: &str) -> Result<()> {
        engine.check_writable()?;
        let bitmap = self.find(name)?;
        self.list.lock().retain(|other| !Arc::ptr_eq(other, &bitmap));
        self.update_recording();
        let table = bitmap.state.lock().table.take();
        if let Some(table) = table {
            self.write_directory(engine, true).await?;
            self.free_table(engine, table).await;
        }
        Ok(())
    }

    /// A bitmap's content, which the caller may change.
    pub(crate) async fn get(&self, engine: &Qcow2, name: &str) -> Result<Arc<DirtyBitmap>> {
        let bitmap = self.find(name)?;
        bitmap.usable()?;
        let content = self.content(engine, &bitmap).await?;
        bitmap.state.lock().changed |= engine.writable;
        self.update_recording();
        Ok(content)
    }

    /// Has a bitmap record writes, or not.
    pub(crate) async fn set_enabled(&self, engine: &Qcow2, name: &str, enabled: bool) -> Result<()> {
        engine.check_writable()?;
        let bitmap = self.find(name)?;
        bitmap.usable()?;
        self.content(engine, &bitmap).await?.set_enabled(enabled);
        self.directory_changed.store(true, Ordering::Release);
        self.update_recording();
        Ok(())
    }

    /// Has all bitmaps be in memory, for a change of the disk's size.
    pub(crate) async fn before_resize(&self, engine: &Qcow2) -> Result<()> {
        for bitmap in self.all() {
            bitmap.usable().map_err(|error| error.with_errno(Errno::NOT_SUPPORTED))?;
            self.content(engine, &bitmap).await?;
        }
        Ok(())
    }

    /// Has all bitmaps be as long as the disk is now.
    pub(crate) fn after_resize(&self, len: u64) {
        for bitmap in self.all() {
            let mut state = bitmap.state.lock();
            if let Some(content) = &state.content {
                content.resize(len);
                state.changed = true;
            }
        }
    }

    async fn content(&self, engine: &Qcow2, bitmap: &Persistent) -> Result<Arc<DirtyBitmap>> {
        let (table, enabled) = {
            let state = bitmap.state.lock();
            if let Some(content) = &state.content {
                return Ok(content.clone());
            }
            (state.table, state.enabled)
        };
        let content = DirtyBitmap::new(Some(&bitmap.name), engine.disk_size(), bitmap.granularity);
        content.set_enabled(enabled);
        if let Some(table) = table {
            read_bits(engine, table, &content).await.map_err(|error| {
                error.context(format_args!("Could not read bitmap '{}' from image", bitmap.name))
            })?;
        }
        // Whoever else has read it meanwhile was first.
        let mut state = bitmap.state.lock();
        Ok(state.content.get_or_insert_with(|| Arc::new(content)).clone())
    }

    /// Stores what changed and clears the marks. The caller is alone, and everything else is written.
    pub(crate) async fn close(&self, engine: &Qcow2) -> Result<()> {
        let all = self.all();
        if !engine.writable || (all.is_empty() && !self.directory_changed.load(Ordering::Acquire)) {
            return Ok(());
        }
        let mut old = Vec::new();
        let mut moved = self.directory_changed.load(Ordering::Acquire)
            && all.iter().any(|bitmap| bitmap.state.lock().table.is_none());
        let any_changed = moved || all.iter().any(|one| !one.inconsistent && one.state.lock().changed);
        for bitmap in all.iter().filter(|bitmap| any_changed && !bitmap.inconsistent) {
            let content = self.content(engine, bitmap).await?;
            let stored = self.store_bits(engine, &content).await;
            let table = stored.map_err(|error| {
                error.context(format_args!("Failed to write bitmap '{}' to file", bitmap.name))
            })?;
            old.extend(bitmap.state.lock().table.replace(table));
            moved = true;
        }
        if moved {
            self.write_directory(engine, false).await?;
            for table in old {
                self.free_table(engine, table).await;
            }
            engine.write_everything().await?;
        } else {
            self.write_flags(engine, false).await?;
        }
        self.directory_changed.store(false, Ordering::Release);
        all.iter().for_each(|bitmap| bitmap.state.lock().changed = false);
        Ok(())
    }

    /// Writes the directory where it is: only flags differ.
    async fn write_flags(&self, engine: &Qcow2, in_use: bool) -> Result<()> {
        let pointer = engine.first_cluster.lock().extensions.bitmaps;
        let Some(pointer) = pointer else { return Ok(()) };
        let entries: Vec<_> = self.all().iter().filter_map(|bitmap| bitmap.entry(in_use)).collect();
        let bytes = encode_directory(&entries)?;
        if bytes.len() as u64 != pointer.directory.length {
            return Err(Error::invalid(
                "Can't update bitmap directory: its length is not that of its entries",
            ));
        }
        let file = NodeFile(engine.file.node());
        let failed = |error: std::io::Error| Error::from(error).context("Can't update bitmap directory");
        // What a mark stands for is on the disk before it goes.
        engine.file.node().flush().await?;
        write_all(&file, pointer.directory.offset, &bytes).await.map_err(failed)?;
        engine.file.node().flush().await
    }

    /// Writes a new directory, has the header name it, and frees the old one.
    async fn write_directory(&self, engine: &Qcow2, in_use: bool) -> Result<()> {
        let entries: Vec<_> = self.all().iter().filter_map(|bitmap| bitmap.entry(in_use)).collect();
        let bytes = encode_directory(&entries)?;
        let pointer = if entries.is_empty() {
            None
        } else {
            let offset = take(engine, bytes.len() as u64).await?;
            write_all(&NodeFile(engine.file.node()), offset, &bytes).await?;
            let directory = Extent { offset, length: bytes.len() as u64 };
            Some(BitmapsPointer { count: entries.len() as u32, directory })
        };
        // Refcounts and contents are on the disk before the header names them.
        engine.write_everything().await?;
        engine.file.node().flush().await?;
        let mut old = None;
        let change = |first: &mut crate::engine::state::FirstCluster| {
            old = std::mem::replace(&mut first.extensions.bitmaps, pointer);
            first.header.autoclear.set(Autoclear::BITMAPS, pointer.is_some());
        };
        let changed = engine.change_first_cluster(change).await;
        changed.map_err(|error| error.context("Failed to update bitmap extension"))?;
        engine.file.node().flush().await?;
        if let Some(old) = old {
            let clusters = engine.geometry.clusters(old.directory.length);
            engine.free_clusters(old.directory.offset, clusters, Why::Other);
        }
        Ok(())
    }

    /// Writes a bitmap's bits to new clusters, and a table of them.
    async fn store_bits(&self, engine: &Qcow2, content: &DirtyBitmap) -> Result<Extent> {
        let geometry = engine.geometry;
        let cluster = geometry.cluster_size();
        let bits = content.granularity().bits();
        let data = BitmapEntry::data_bytes(bits as u8, content.len());
        let mut table = vec![BitmapCluster::Zeros; geometry.clusters(data) as usize];
        let covered = (cluster * 8) << bits;
        let file = NodeFile(engine.file.node());
        let mut at = 0;
        while let Some(dirty) = content.next_dirty(at) {
            let index = dirty.start / covered;
            let mut bytes = vec![0; cluster as usize];
            let there = (data - index * cluster).min(cluster) as usize;
            content.to_bytes(index * covered, &mut bytes[..there]);
            let offset = take(engine, cluster).await?;
            write_all(&file, offset, &bytes).await?;
            table[index as usize] = BitmapCluster::At(offset);
            at = (index + 1) * covered;
        }
        let bytes = BitmapCluster::encode_table(&table);
        if bytes.is_empty() {
            return Err(Error::invalid("Bitmaps of empty disks cannot be stored"));
        }
        let offset = take(engine, bytes.len() as u64).await?;
        write_all(&file, offset, &bytes).await?;
        Ok(Extent { offset, length: bytes.len() as u64 })
    }

    /// Frees a table and the data that it names. One that cannot be read leaks.
    async fn free_table(&self, engine: &Qcow2, table: Extent) {
        let bytes = read_vec(&NodeFile(engine.file.node()), table.offset, table.length as usize).await;
        let Ok(Ok(clusters)) = bytes.map(|bytes| BitmapCluster::parse_table(&bytes, &engine.geometry)) else {
            return;
        };
        for cluster in clusters {
            if let BitmapCluster::At(offset) = cluster {
                engine.free_clusters(offset, 1, Why::Other);
            }
        }
        engine.free_clusters(table.offset, engine.geometry.clusters(table.length), Why::Other);
    }
}

fn entry_bytes(name: &str) -> u64 {
    (24 + name.len() as u64).next_multiple_of(8)
}

fn granularity(bits: u8) -> Result<Granularity> {
    Granularity::from_bytes(1 << bits)
        .ok_or_else(|| Error::invalid("Granularity must be power of 2 and at least 512"))
}

/// Takes clusters for `bytes` bytes.
async fn take(engine: &Qcow2, bytes: u64) -> Result<u64> {
    let mut allocator = engine.allocator.lock().await;
    let taken = engine.take_exactly(&mut allocator, engine.geometry.clusters(bytes)).await?;
    Ok(taken.offset)
}

/// Reads a bitmap's bits into `content`, which is clean.
async fn read_bits(engine: &Qcow2, table: Extent, content: &DirtyBitmap) -> Result<()> {
    let geometry = engine.geometry;
    let cluster = geometry.cluster_size();
    let bits = content.granularity().bits();
    let data = BitmapEntry::data_bytes(bits as u8, content.len());
    if geometry.clusters(data) != table.length / 8 {
        return Err(Error::errno_only(Errno::INVALID));
    }
    let file = NodeFile(engine.file.node());
    let bytes = read_vec(&file, table.offset, table.length as usize).await?;
    let clusters = BitmapCluster::parse_table(&bytes, &geometry)?;
    let covered = (cluster * 8) << bits;
    for (index, entry) in clusters.into_iter().enumerate() {
        let start = index as u64 * covered;
        match entry {
            BitmapCluster::Zeros => {}
            BitmapCluster::Ones => content.set(start, covered.min(content.len() - start)),
            BitmapCluster::At(offset) => {
                let there = (data - index as u64 * cluster).min(cluster) as usize;
                content.take_bytes(start, &read_vec(&file, offset, there).await?);
            }
        }
    }
    Ok(())
}

/// Checks that a new bitmap can be stored.
fn check_constraints(geometry: &Geometry, disk: u64, name: &str, granularity: u64) -> Result<()> {
    let bits = granularity.trailing_zeros();
    if bits > MAX_GRANULARITY_BITS.into() {
        let most = 1u64 << MAX_GRANULARITY_BITS;
        return Err(Error::invalid(format!("Granularity exceeds maximum ({most} bytes)")));
    }
    if bits < MIN_GRANULARITY_BITS.into() {
        let least = 1u64 << MIN_GRANULARITY_BITS;
        return Err(Error::invalid(format!("Granularity is under minimum ({least} bytes)")));
    }
    let data = BitmapEntry::data_bytes(bits as u8, disk);
    if data > MAX_BITMAP_BYTES || geometry.clusters(data) > MAX_TABLE_ENTRIES.into() {
        return Err(Error::invalid("Too much space will be occupied by the bitmap. Use larger granularity"));
    }
    if name.len() > MAX_NAME {
        return Err(Error::invalid(format!("Name length exceeds maximum ({MAX_NAME} characters)")));
    }
    Ok(())
}
