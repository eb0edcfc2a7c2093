//! Guest physical memory: where it comes from, the dirty bitmap and the code-page hook.
//!
//! One type, [`GuestMemory`], our own face on `vm-memory`. Whoever writes guest memory through it, a
//! device's DMA included, marks the pages dirty, and a write to a page that translated code came from
//! reaches the translator through [`CodeWriteHook`]. A processor that writes through a
//! [`HostPage`] pointer of its own keeps those rules itself; [`PageState`] tells it when it must.

#![allow(unsafe_code)] // guest memory is handed out as raw pointers

mod backing;
mod create;
mod error;
mod host;
mod host_pages;
mod mapping;
mod options;
mod pages;
mod prealloc;

pub use error::MemoryError;
pub use host::huge_page_sizes;
pub use options::{Lock, MemoryOptions, MemorySource, NodeBinding, NodePolicy, PreallocProgress};
pub use pages::{PageBitmap, PageState};

use backing::Backing;
use pages::PageTable;
use std::fmt;
use std::fs::File;
use std::sync::Arc;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Bytes in a page of guest memory, the granularity of dirty tracking and code tracking.
pub const PAGE_SIZE: u64 = 4096;

/// Guest memory as `vm-memory` and `virtio-queue` know it.
pub type Backend = GuestMemoryMmap<PageBitmap>;

/// Told of writes to pages that were marked as holding translated code.
pub trait CodeWriteHook: Send + Sync {
    /// Bytes `gpa..gpa + len`, all in one page that holds code, were just written.
    fn code_written(&self, gpa: u64, len: u64);
}

/// Told of all writes that processors do not make themselves.
pub trait DeviceWriteHook: Send + Sync {
    /// Bytes `gpa..gpa + len` were just written through the [`GuestMemory::backend`] or
    /// [`GuestMemory::write`].
    fn device_wrote(&self, gpa: u64, len: u64);
}

/// One region of guest memory.
#[derive(Debug, Clone)]
pub struct Region {
    /// First guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where it stands in this process.
    host: *mut u8,
    pages: Arc<PageTable>,
}

impl Region {
    /// Whether processors only read it: see [`GuestMemory::set_read_only`].
    pub fn is_read_only(&self) -> bool {
        self.pages.is_read_only()
    }
}

// SAFETY: the pointer is only handed out; the mapping behind it lives as long as `pages`, and is never used
// as a Rust reference.
unsafe impl Send for Region {}
// SAFETY: as for `Send`.
unsafe impl Sync for Region {}

/// A page of guest memory in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPage {
    /// The first byte of the page. Valid for [`PAGE_SIZE`] bytes while the [`GuestMemory`] lives; other
    /// threads may write to it at any time, so no Rust reference into it may be made.
    pub ptr: *mut u8,
}

/// A VM's memory. Clones share it.
#[derive(Clone)]
pub struct GuestMemory {
    backend: Backend,
    regions: Arc<[Region]>,
    backing: Backing,
    /// Whether it stays in RAM.
    locked: bool,
}

impl GuestMemory {
    /// The memory as `vm-memory` and `virtio-queue` take it. Writes through it keep all rules.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }

    /// The regions, by ascending address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The file behind all regions, in their order, without gaps, through which other processes can map
    /// this memory; private memory has none.
    pub fn file(&self) -> Option<&File> {
        self.backing.file.as_deref().filter(|_| self.backing.shared)
    }

    /// Bytes of memory in all.
    pub fn len(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    /// Whether there is no memory at all.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    fn region_of(&self, gpa: u64) -> Option<&Region> {
        let index = self.regions.partition_point(|region| region.gpa <= gpa);
        let region = &self.regions[index.checked_sub(1)?];
        (gpa - region.gpa < region.len).then_some(region)
    }

    /// The page that contains `gpa`, if that is memory.
    pub fn host_page(&self, gpa: u64) -> Option<HostPage> {
        let region = self.region_of(gpa)?;
        let offset = (gpa - region.gpa) & !(PAGE_SIZE - 1);
        Some(HostPage { ptr: region.host.wrapping_add(offset as usize) })
    }

    /// The guest physical address of the byte at `host` in this process, if it is guest memory.
    pub fn gpa_of(&self, host: *const u8) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = (host as u64).wrapping_sub(region.host as u64);
            (offset < region.len).then(|| region.gpa + offset)
        })
    }

    /// The tracking state of the page that contains `gpa`. Pages that are no memory have none.
    pub fn page_state(&self, gpa: u64) -> PageState {
        self.region_of(gpa).map_or(PageState::empty(), |region| region.pages.state(gpa))
    }

    /// Makes the region that begins at `gpa` one that processors only read, as ROM is, or ends that. Their stores
    /// there then go where stores to no memory go, and so do not change it; devices and the host may write it still.
    /// Who executes guests is to be told of the change.
    ///
    /// # Errors
    /// [`MemoryError::NoRegion`] if no region begins there.
    pub fn set_read_only(&self, gpa: u64, read_only: bool) -> Result<(), MemoryError> {
        let region = self.region_of(gpa).filter(|region| region.gpa == gpa);
        region.ok_or(MemoryError::NoRegion { gpa })?.pages.set_read_only(read_only);
        Ok(())
    }

    /// Whether processors only read the page that contains `gpa`: their stores go where stores to no memory go.
    pub fn is_read_only(&self, gpa: u64) -> bool {
        self.region_of(gpa).is_some_and(Region::is_read_only)
    }

    /// Whether a processor may write the page that contains `gpa` through its [`HostPage`] without a word
    /// to anybody: no code came from it, it is dirty already or the dirty log is off, and it is not one that
    /// processors only read.
    pub fn may_write_directly(&self, gpa: u64) -> bool {
        self.region_of(gpa).is_some_and(|region| region.pages.may_write_directly(gpa))
    }

    /// Reads `data.len()` bytes at `gpa`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] if not all of it is memory.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let len = data.len() as u64;
        self.backend.read_slice(data, GuestAddress(gpa)).map_err(|_| MemoryError::OutOfRange { gpa, len })
    }

    /// Writes `data` at `gpa`, marks the pages dirty and tells the hook about code.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] if not all of it is memory; part of it may then have been written.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        let len = data.len() as u64;
        self.backend.write_slice(data, GuestAddress(gpa)).map_err(|_| MemoryError::OutOfRange { gpa, len })
    }

    /// Whether `gpa..gpa + len` is all memory.
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        usize::try_from(len)
            .is_ok_and(|len| GuestMemoryBackend::check_range(&self.backend, GuestAddress(gpa), len))
    }

    /// Says that bytes `gpa..gpa + len` were written through a [`HostPage`]: marks them dirty and tells the
    /// hook if code came from there.
    pub fn written(&self, gpa: u64, len: u64) {
        let mut gpa = gpa;
        let mut left = len;
        while left > 0 {
            let Some(region) = self.region_of(gpa) else { return };
            let here = left.min(region.gpa + region.len - gpa);
            region.pages.written(gpa, here);
            gpa += here;
            left -= here;
        }
    }

    /// Says that a device changed bytes `gpa..gpa + len` other than through the backend: as
    /// [`GuestMemory::written`], and the hook of devices' writes is told.
    pub fn changed(&self, gpa: u64, len: u64) {
        self.written(gpa, len);
        for region in self.regions.iter() {
            let start = gpa.max(region.gpa);
            let end = gpa.saturating_add(len).min(region.gpa + region.len);
            if start < end {
                region.pages.tell_device_hook(start, end - start);
            }
        }
    }

    /// Sets who is told of writes to code pages. To be called once, before the VM runs.
    pub fn set_code_hook(&self, hook: Arc<dyn CodeWriteHook>) {
        for region in self.regions.iter() {
            region.pages.set_hook(hook.clone());
        }
    }

    /// Sets who is told of writes through the backend: devices', and those of whoever loads or restores a
    /// VM. To be called once.
    pub fn set_device_write_hook(&self, hook: Arc<dyn DeviceWriteHook>) {
        for region in self.regions.iter() {
            region.pages.set_device_hook(hook.clone());
        }
    }

    /// Marks the page that contains `gpa` as one that translated code came from.
    pub fn mark_code(&self, gpa: u64) {
        if let Some(region) = self.region_of(gpa) {
            region.pages.insert(gpa, PageState::CODE);
        }
    }

    /// Says that no translated code is left of the page that contains `gpa`.
    pub fn unmark_code(&self, gpa: u64) {
        if let Some(region) = self.region_of(gpa) {
            region.pages.remove(gpa, PageState::CODE);
        }
    }

    /// Begins or ends dirty logging. When it begins no page is dirty; processors must then drop every
    /// permission to write directly that they cached.
    pub fn set_dirty_log(&self, on: bool) {
        for region in self.regions.iter() {
            region.pages.set_dirty_log(on);
        }
    }

    /// Takes the dirty log: calls `page` with the address of each page written since the log began or was
    /// last taken, and forgets them. Processors must drop cached write permissions as in
    /// [`GuestMemory::set_dirty_log`].
    pub fn take_dirty(&self, mut page: impl FnMut(u64)) {
        for region in self.regions.iter() {
            region.pages.take_dirty(&mut page);
        }
    }

    /// Whether the page that contains `gpa` was written since the dirty log began.
    pub fn is_dirty(&self, gpa: u64) -> bool {
        self.backend
            .find_region(GuestAddress(gpa))
            .is_some_and(|region| region.bitmap().dirty_at((gpa - region.start_addr().0) as usize))
    }
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.regions.iter().map(|region| region.gpa..region.gpa + region.len);
        f.debug_tuple("GuestMemory").field(&ranges.collect::<Vec<_>>()).finish()
    }
}

#[cfg(test)]
mod tests;
