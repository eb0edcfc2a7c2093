//! The write-back cache of metadata tables: L2 tables and refcount blocks, in slices.

use block_graph::{Node, Result};
use io_loop::IoBuffer;
use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The largest slice, in bytes; of smaller clusters, a slice is a cluster.
const SLICE: u64 = 4096;

/// A part of a table, as it is to be in the file.
#[derive(Debug)]
pub(crate) struct Slice {
    /// Where in the file it is.
    offset: u64,
    /// Held by who loads it.
    loading: futures_util::lock::Mutex<()>,
    state: Mutex<SliceState>,
    /// Used since the eviction looked the last time.
    used: AtomicBool,
}

#[derive(Debug, Default)]
struct SliceState {
    /// `None` until it has been loaded.
    bytes: Option<Box<[u8]>>,
    dirty: bool,
}

impl Slice {
    fn new(offset: u64, bytes: Option<Box<[u8]>>) -> Self {
        Self {
            offset,
            loading: futures_util::lock::Mutex::new(()),
            state: Mutex::new(SliceState { bytes, dirty: false }),
            used: AtomicBool::new(true),
        }
    }

    fn is_loaded(&self) -> bool {
        self.state.lock().bytes.is_some()
    }

    /// The bytes; the lock is for moments.
    ///
    /// # Panics
    /// If it is not loaded: the cache gives away only slices that are.
    pub(crate) fn bytes(&self) -> MappedMutexGuard<'_, [u8]> {
        MutexGuard::map(self.state.lock(), |state| &mut **state.bytes.as_mut().expect("the slice is loaded"))
    }
}

/// A part of the file as it is to be written.
#[derive(Debug)]
pub(crate) struct Extract {
    /// Where it goes.
    pub(crate) offset: u64,
    /// What goes there.
    pub(crate) bytes: Vec<u8>,
    slices: Vec<Arc<Slice>>,
}

/// The cache of one kind of table. Slices that are dirty or in somebody's hands are never evicted, so that it may grow
/// over its limit by what is dirty: users look at [`SliceCache::wants_writeback`] before they dirty more.
#[derive(Debug)]
pub(crate) struct SliceCache {
    slice_size: u64,
    /// What filters that inject errors know the loading of a slice as.
    load_event: &'static str,
    /// Slices.
    limit: usize,
    map: Mutex<Map>,
    dirty: Mutex<BTreeMap<u64, Arc<Slice>>>,
}

#[derive(Debug, Default)]
struct Map {
    slices: HashMap<u64, Arc<Slice>>,
    /// Second-chance order of eviction. May name slices that are no longer there.
    order: VecDeque<u64>,
}

impl SliceCache {
    /// A cache of at most `bytes` bytes.
    pub(crate) fn new(cluster_size: u64, bytes: u64, load_event: &'static str) -> Self {
        let slice_size = cluster_size.min(SLICE);
        let limit = usize::try_from(bytes / slice_size).unwrap_or(usize::MAX).max(4);
        Self { slice_size, load_event, limit, map: Mutex::default(), dirty: Mutex::default() }
    }

    /// Bytes of a slice: tables are multiples of it, and aligned to it.
    pub(crate) fn slice_size(&self) -> u64 {
        self.slice_size
    }

    /// Whether so much is dirty that it should be written before there is more.
    pub(crate) fn wants_writeback(&self) -> bool {
        self.dirty.lock().len() >= self.limit.div_ceil(2)
    }

    /// Whether anything is dirty.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.lock().is_empty()
    }

    /// The slice that holds the byte at `offset`, if it is in memory.
    pub(crate) fn cached(&self, offset: u64) -> Option<Arc<Slice>> {
        let map = self.map.lock();
        let slice = map.slices.get(&(offset & !(self.slice_size - 1)))?;
        if !slice.is_loaded() {
            return None;
        }
        slice.used.store(true, Ordering::Relaxed);
        Some(slice.clone())
    }

    /// The slice that holds the byte at `offset`, read from `file` if need be. What is past the file's end is zero.
    pub(crate) async fn get(&self, file: &Node, offset: u64) -> Result<Arc<Slice>> {
        let offset = offset & !(self.slice_size - 1);
        let slice = {
            let mut map = self.map.lock();
            match map.slices.get(&offset) {
                Some(slice) => slice.clone(),
                None => self.insert(&mut map, Slice::new(offset, None)),
            }
        };
        slice.used.store(true, Ordering::Relaxed);
        if slice.is_loaded() {
            return Ok(slice);
        }
        let loading = slice.loading.lock().await;
        if !slice.is_loaded() {
            let mut buffer = IoBuffer::zeroed(self.slice_size as usize);
            file.driver().debug_event(self.load_event);
            file.read(offset, &buffer.io()).await?;
            slice.state.lock().bytes.get_or_insert_with(|| buffer.bytes().into());
        }
        drop(loading);
        Ok(slice)
    }

    fn insert(&self, map: &mut Map, slice: Slice) -> Arc<Slice> {
        let slice = Arc::new(slice);
        if map.slices.insert(slice.offset, slice.clone()).is_none() {
            map.order.push_back(slice.offset);
        }
        let mut looked = 0;
        while map.slices.len() > self.limit && looked < 64 {
            looked += 1;
            let Some(oldest) = map.order.pop_front() else { break };
            let Some(candidate) = map.slices.get(&oldest) else { continue };
            // Whoever else holds it may be about to change it, or it is dirty or being written.
            if candidate.used.swap(false, Ordering::Relaxed) || Arc::strong_count(candidate) > 1 {
                map.order.push_back(oldest);
            } else {
                map.slices.remove(&oldest);
            }
        }
        slice
    }

    /// Changes a slice's bytes; it is dirty then.
    pub(crate) fn change<R>(&self, slice: &Arc<Slice>, change: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut state = slice.state.lock();
        let result = change(state.bytes.as_mut().expect("the slice is loaded"));
        if !state.dirty {
            state.dirty = true;
            self.dirty.lock().insert(slice.offset, slice.clone());
        }
        result
    }

    /// Drops what the cache holds of a range of whole clusters, dirty or not: the table that was there is no more.
    pub(crate) fn forget(&self, range: Range<u64>) {
        let mut map = self.map.lock();
        let mut dirty = self.dirty.lock();
        let mut offset = range.start & !(self.slice_size - 1);
        while offset < range.end {
            map.slices.remove(&offset);
            dirty.remove(&offset);
            offset += self.slice_size;
        }
    }

    /// Takes everything that is dirty out, in the file's order and neighbours together, for writing it. It counts as
    /// clean from then on; if it could not be written, [`SliceCache::give_back`] makes it dirty again.
    pub(crate) fn take_dirty(&self) -> Vec<Extract> {
        let dirty = std::mem::take(&mut *self.dirty.lock());
        let mut extracts: Vec<Extract> = Vec::new();
        for (offset, slice) in dirty {
            let mut state = slice.state.lock();
            state.dirty = false;
            let bytes = state.bytes.as_deref().expect("the slice is loaded");
            match extracts.last_mut() {
                Some(last)
                    if last.offset + last.bytes.len() as u64 == offset && last.bytes.len() < 1 << 20 =>
                {
                    last.bytes.extend(bytes);
                    last.slices.push(slice.clone());
                }
                _ => {
                    let bytes = bytes.to_vec();
                    extracts.push(Extract { offset, bytes, slices: vec![slice.clone()] });
                }
            }
        }
        extracts
    }

    /// Makes dirty again what [`SliceCache::take_dirty`] took, unless its table has gone meanwhile.
    pub(crate) fn give_back(&self, extracts: Vec<Extract>) {
        for slice in extracts.into_iter().flat_map(|extract| extract.slices) {
            let here =
                self.map.lock().slices.get(&slice.offset).is_some_and(|held| Arc::ptr_eq(held, &slice));
            let mut state = slice.state.lock();
            if here && !state.dirty {
                state.dirty = true;
                self.dirty.lock().insert(slice.offset, slice.clone());
            }
        }
    }
}
