//! T0's copy of the VM's memory, and its comparison with the real one.

use guest_memory::{CodeWriteHook, DeviceWriteHook, GuestMemory, MemoryError, PAGE_SIZE};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Accessed and dirty bits of an entry.
const USED: u64 = 0x60;
/// Writes that are remembered; after more of them all memory is copied.
const MOST_WRITES: usize = 1 << 16;
/// Bytes that are copied at once.
const PIECE: u64 = 64 << 10;
/// How often and how long to wait for a device whose write is not complete.
const PATIENCE: (u32, Duration) = (100, Duration::from_millis(1));

/// What devices wrote to the real memory and T0's does not have yet.
#[derive(Debug, Default)]
pub(crate) struct DeviceWrites {
    some: AtomicBool,
    list: Mutex<Vec<(u64, u64)>>,
    too_many: AtomicBool,
}

impl DeviceWrites {
    /// Takes all writes: address and length.
    pub(crate) fn take(&self) -> Vec<(u64, u64)> {
        if !self.pending() {
            return Vec::new();
        }
        let mut list = self.list.lock();
        self.some.store(false, Ordering::SeqCst);
        std::mem::take(&mut list)
    }

    fn pending(&self) -> bool {
        self.some.load(Ordering::Acquire)
    }
}

impl DeviceWriteHook for DeviceWrites {
    fn device_wrote(&self, gpa: u64, len: u64) {
        let mut list = self.list.lock();
        let count = list.len();
        match list.last_mut() {
            Some((start, length)) if *start + *length == gpa => *length += len,
            _ if count < MOST_WRITES => list.push((gpa, len)),
            _ => self.too_many.store(true, Ordering::SeqCst),
        }
        self.some.store(true, Ordering::SeqCst);
    }
}

/// What T0 stored since it was last compared.
#[derive(Debug, Default)]
struct Stores {
    list: Mutex<Vec<(u64, u64)>>,
    /// What is written now is not T0's.
    muted: AtomicBool,
}

impl CodeWriteHook for Stores {
    fn code_written(&self, gpa: u64, len: u64) {
        if self.muted.load(Ordering::Relaxed) {
            return;
        }
        let mut list = self.list.lock();
        match list.last_mut() {
            Some((start, length)) if *start + *length == gpa => *length += len,
            _ => list.push((gpa, len)),
        }
    }
}

/// The real memory and the copy.
pub(crate) struct Memories {
    pub(crate) real: GuestMemory,
    pub(crate) copy: GuestMemory,
    pub(crate) device_writes: Arc<DeviceWrites>,
    stores: Arc<Stores>,
    spare: Vec<(u64, u64)>,
    /// Pages that T0 stored to since pages were last compared.
    touched: HashSet<u64>,
    last_touched: u64,
    /// Pages that hold, or held, page table entries, and their size.
    tables: HashMap<u64, u64>,
}

impl Memories {
    /// A copy with nothing in it.
    pub(crate) fn new(real: &GuestMemory) -> Result<Self, MemoryError> {
        let regions: Vec<_> =
            real.regions().iter().map(|region| region.gpa..region.gpa + region.len).collect();
        let copy = GuestMemory::new(&regions)?;
        let (device_writes, stores) = (Arc::<DeviceWrites>::default(), Arc::<Stores>::default());
        real.set_device_write_hook(device_writes.clone());
        copy.set_code_hook(stores.clone());
        // Every store is then reported.
        for region in &regions {
            for gpa in region.clone().step_by(PAGE_SIZE as usize) {
                copy.mark_code(gpa);
            }
        }
        Ok(Self {
            real: real.clone(),
            copy,
            device_writes,
            stores,
            spare: Vec::new(),
            touched: HashSet::new(),
            last_touched: u64::MAX,
            tables: HashMap::new(),
        })
    }

    /// Writes what T0 did not store to its memory.
    pub(crate) fn mirror(&self, gpa: u64, data: &[u8]) {
        self.stores.muted.store(true, Ordering::Relaxed);
        let written = self.copy.write(gpa, data);
        debug_assert!(written.is_ok(), "both memories have the same layout");
        self.stores.muted.store(false, Ordering::Relaxed);
    }

    /// Makes the copy as the real memory.
    pub(crate) fn synchronise(&mut self) {
        for region in self.real.regions() {
            let same = self.copy.set_read_only(region.gpa, region.is_read_only());
            debug_assert!(same.is_ok(), "both memories have the same layout");
        }
        self.device_writes.too_many.store(false, Ordering::SeqCst);
        self.device_writes.take();
        self.stores.list.lock().clear();
        self.touched.clear();
        self.last_touched = u64::MAX;
        let mut page = [0; PAGE_SIZE as usize];
        let mut old = page;
        for gpa in self.pages_in_use() {
            if self.read_both(gpa, &mut page, &mut old) && page != old {
                self.mirror(gpa, &page);
            }
        }
    }

    /// Gives T0 what devices wrote.
    pub(crate) fn take_device_writes(&mut self) {
        if !self.device_writes.pending() {
            return;
        }
        if self.device_writes.too_many.load(Ordering::SeqCst) {
            return self.synchronise();
        }
        let mut buffer = Vec::new();
        for (gpa, len) in self.device_writes.take() {
            let mut at = gpa;
            while at < gpa + len {
                let piece = (gpa + len - at).min(PIECE);
                buffer.resize(piece as usize, 0);
                if self.real.read(at, &mut buffer).is_ok() {
                    self.mirror(at, &buffer);
                }
                at += piece;
            }
        }
    }

    /// Whether devices wrote since that was last taken, or do so now.
    pub(crate) fn devices_write(&self) -> bool {
        (0..5).any(|_| {
            let pending = self.device_writes.pending();
            if !pending {
                std::thread::sleep(PATIENCE.1);
            }
            pending
        })
    }

    fn read_both(&self, gpa: u64, real: &mut [u8], copy: &mut [u8]) -> bool {
        self.real.read(gpa, real).is_ok() && self.copy.read(gpa, copy).is_ok()
    }

    /// Gives each memory the accessed and dirty bits that the other has in these entries, if that is all they
    /// differ in.
    pub(crate) fn share_marks(&mut self, marks: &[(u64, u64)]) {
        for &(gpa, len) in marks {
            self.tables.insert(gpa & !(PAGE_SIZE - 1), len);
            self.share_mark(gpa, len);
        }
    }

    /// Whether the entries are the same then.
    fn share_mark(&self, gpa: u64, len: u64) -> bool {
        let len = len.min(8) as usize;
        let (mut real, mut copy) = ([0; 8], [0; 8]);
        if !self.read_both(gpa, &mut real[..len], &mut copy[..len]) {
            return false;
        }
        let (a, b) = (u64::from_le_bytes(real), u64::from_le_bytes(copy));
        if (a ^ b) & !USED != 0 {
            return false;
        }
        let both = (a | b).to_le_bytes();
        if a | b != b {
            self.mirror(gpa, &both[..len]);
        }
        if a | b != a {
            let written = self.real.write(gpa, &both[..len]);
            debug_assert!(written.is_ok(), "it was read just now");
        }
        true
    }

    /// Compares what T0 stored.
    pub(crate) fn check_stores(&mut self) -> Result<(), Vec<String>> {
        {
            let mut list = self.stores.list.lock();
            if list.is_empty() {
                return Ok(());
            }
            std::mem::swap(&mut *list, &mut self.spare);
        }
        let mut differences = Vec::new();
        let stores = std::mem::take(&mut self.spare);
        for &(gpa, len) in &stores {
            let mut at = gpa;
            while at < gpa + len {
                let end = (gpa + len).min((at & !(PAGE_SIZE - 1)) + PAGE_SIZE);
                let page = at & !(PAGE_SIZE - 1);
                if page != self.last_touched {
                    self.last_touched = page;
                    self.touched.insert(page);
                }
                self.check_range(at, end, &mut differences);
                at = end;
            }
        }
        self.spare = stores;
        self.spare.clear();
        if differences.is_empty() { Ok(()) } else { Err(differences) }
    }

    /// Compares bytes `start..end`, which lie in one page.
    fn check_range(&self, start: u64, end: u64, differences: &mut Vec<String>) {
        const SHORT: usize = 16;
        let len = (end - start) as usize;
        if len <= SHORT {
            let (mut real, mut copy) = ([0; SHORT], [0; SHORT]);
            if !self.read_both(start, &mut real[..len], &mut copy[..len]) || real == copy {
                return;
            }
        }
        self.describe_range(start, end, differences);
    }

    /// The same, in words.
    fn describe_range(&self, start: u64, end: u64, differences: &mut Vec<String>) {
        let (mut real, mut copy) = ([0; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
        let len = (end - start) as usize;
        if !self.read_both(start, &mut real[..len], &mut copy[..len]) || real[..len] == copy[..len] {
            return;
        }
        let entry = self.tables.get(&(start & !(PAGE_SIZE - 1))).copied();
        let mut at = 0;
        while at < len {
            if real[at] == copy[at] {
                at += 1;
                continue;
            }
            let gpa = start + at as u64;
            if let Some(size) = entry
                && self.share_mark(gpa & !(size - 1), size)
            {
                at += (size - (gpa & (size - 1))) as usize;
                continue;
            }
            let stop = (at + 16).min(len);
            differences.push(format!(
                "memory at {gpa:#x}: T1 {:02x?}, T0 {:02x?}",
                &real[at..stop],
                &copy[at..stop]
            ));
            at = stop;
        }
    }

    /// Compares all of the pages that T0 stored to since that was last done.
    pub(crate) fn check_touched(&mut self) -> Result<(), Vec<String>> {
        let pages: Vec<u64> = self.touched.drain().collect();
        self.last_touched = u64::MAX;
        self.check_pages(&pages)
    }

    /// Compares everything.
    pub(crate) fn check_all(&mut self) -> Result<(), Vec<String>> {
        let pages = self.pages_in_use();
        self.check_pages(&pages)
    }

    fn check_pages(&mut self, pages: &[u64]) -> Result<(), Vec<String>> {
        self.take_device_writes();
        let mut differing = Vec::new();
        let mut differences = Vec::new();
        for &page in pages {
            let before = differences.len();
            self.check_range(page, page + PAGE_SIZE, &mut differences);
            if differences.len() > before {
                differing.push(page);
            }
        }
        // A device that is writing tells when it has done so.
        for _ in 0..PATIENCE.0 {
            if differing.is_empty() {
                return Ok(());
            }
            std::thread::sleep(PATIENCE.1);
            self.take_device_writes();
            differences.clear();
            differing.retain(|&page| {
                let before = differences.len();
                self.check_range(page, page + PAGE_SIZE, &mut differences);
                differences.len() > before
            });
        }
        differences.truncate(40);
        Err(differences)
    }

    /// Pages that either memory holds something in, by ascending address.
    fn pages_in_use(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for memory in [&self.real, &self.copy] {
            // Of what the host does not tell, everything is looked at.
            pages.extend(memory.pages_in_use().unwrap_or_else(|_| all_pages(memory)));
        }
        pages.sort_unstable();
        pages.dedup();
        pages
    }
}

fn all_pages(memory: &GuestMemory) -> Vec<u64> {
    let regions = memory.regions().iter();
    regions.flat_map(|region| (region.gpa..region.gpa + region.len).step_by(PAGE_SIZE as usize)).collect()
}
