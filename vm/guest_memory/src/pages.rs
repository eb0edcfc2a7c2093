//! The tracking state of each page: which are dirty, and which hold translated code.

use crate::mapping::Mapping;
use crate::{CodeWriteHook, DeviceWriteHook, PAGE_SIZE};
use std::fmt;
use std::ops::{BitOr, Range};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering, fence};
use std::sync::{Arc, OnceLock};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

/// The tracking state of one page: a set of flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageState(u8);

impl PageState {
    /// Written since the dirty log began.
    pub const DIRTY: Self = Self(1);
    /// Translated code came from this page.
    pub const CODE: Self = Self(2);

    /// No flag.
    pub const fn empty() -> Self {
        Self(0)
    }

    /// Whether all flags of `other` are set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for PageState {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The state of all pages of one region. Owns the region's mapping: whoever can reach the pages holds on to
/// this.
pub(crate) struct PageTable {
    base: u64,
    mapping: Mapping,
    states: Box<[AtomicU8]>,
    dirty_log: AtomicBool,
    /// Processors' stores go elsewhere.
    read_only: AtomicBool,
    hook: OnceLock<Arc<dyn CodeWriteHook>>,
    device_hook: OnceLock<Arc<dyn DeviceWriteHook>>,
}

impl PageTable {
    pub(crate) fn new(base: u64, len: u64, mapping: Mapping) -> Self {
        // Zeroed memory that the host gives when it is touched: most pages never get a state.
        let states = Box::<[AtomicU8]>::new_zeroed_slice((len / PAGE_SIZE) as usize);
        // SAFETY: an atomic byte of zeros is a zero.
        let states = unsafe { states.assume_init() };
        Self {
            base,
            mapping,
            states,
            dirty_log: AtomicBool::new(false),
            read_only: AtomicBool::new(false),
            hook: OnceLock::new(),
            device_hook: OnceLock::new(),
        }
    }

    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    fn slot(&self, gpa: u64) -> Option<&AtomicU8> {
        self.states.get(((gpa - self.base) / PAGE_SIZE) as usize)
    }

    pub(crate) fn state(&self, gpa: u64) -> PageState {
        PageState(self.slot(gpa).map_or(0, |slot| slot.load(Ordering::SeqCst)))
    }

    pub(crate) fn may_write_directly(&self, gpa: u64) -> bool {
        let state = self.state(gpa);
        let clean = !state.contains(PageState::DIRTY) && self.dirty_log.load(Ordering::SeqCst);
        !state.contains(PageState::CODE) && !clean && !self.is_read_only()
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::SeqCst)
    }

    pub(crate) fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Ordering::SeqCst);
    }

    pub(crate) fn insert(&self, gpa: u64, state: PageState) {
        if let Some(slot) = self.slot(gpa) {
            slot.fetch_or(state.0, Ordering::SeqCst);
        }
    }

    pub(crate) fn remove(&self, gpa: u64, state: PageState) {
        if let Some(slot) = self.slot(gpa) {
            slot.fetch_and(!state.0, Ordering::SeqCst);
        }
    }

    pub(crate) fn set_hook(&self, hook: Arc<dyn CodeWriteHook>) {
        let first = self.hook.set(hook).is_ok();
        debug_assert!(first, "the code hook is set once");
    }

    pub(crate) fn set_device_hook(&self, hook: Arc<dyn DeviceWriteHook>) {
        let first = self.device_hook.set(hook).is_ok();
        debug_assert!(first, "the hook of device writes is set once");
    }

    /// A device wrote bytes `gpa..gpa + len` of this region.
    pub(crate) fn tell_device_hook(&self, gpa: u64, len: u64) {
        if let Some(hook) = self.device_hook.get() {
            hook.device_wrote(gpa, len);
        }
    }

    /// Bytes `gpa..gpa + len` of this region were written.
    pub(crate) fn written(&self, gpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        // Either the mark of a page as code is seen here, or who set it reads what was written.
        fence(Ordering::SeqCst);
        let log = self.dirty_log.load(Ordering::Relaxed);
        let end = gpa + len;
        let mut at = gpa;
        while at < end {
            let page_end = (at | (PAGE_SIZE - 1)) + 1;
            let stop = page_end.min(end);
            if let Some(slot) = self.slot(at) {
                let state = PageState(slot.load(Ordering::SeqCst));
                if log && !state.contains(PageState::DIRTY) {
                    slot.fetch_or(PageState::DIRTY.0, Ordering::SeqCst);
                }
                if state.contains(PageState::CODE)
                    && let Some(hook) = self.hook.get()
                {
                    hook.code_written(at, stop - at);
                }
            }
            at = stop;
        }
    }

    pub(crate) fn set_dirty_log(&self, on: bool) {
        self.dirty_log.store(on, Ordering::SeqCst);
        for slot in &self.states {
            slot.fetch_and(!PageState::DIRTY.0, Ordering::SeqCst);
        }
    }

    pub(crate) fn take_dirty(&self, page: &mut impl FnMut(u64)) {
        for (index, slot) in self.states.iter().enumerate() {
            if slot.load(Ordering::Relaxed) & PageState::DIRTY.0 != 0 {
                slot.fetch_and(!PageState::DIRTY.0, Ordering::SeqCst);
                page(self.base + index as u64 * PAGE_SIZE);
            }
        }
    }

    fn range(&self, offset: usize, len: usize) -> Range<u64> {
        let size = self.states.len() as u64 * PAGE_SIZE;
        let start = (offset as u64).min(size);
        let end = start.saturating_add(len as u64).min(size);
        self.base + start..self.base + end
    }
}

impl fmt::Debug for PageTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTable").field("base", &self.base).field("pages", &self.states.len()).finish()
    }
}

/// `vm-memory`'s view of the tracking state of a region, or of the part of it from `offset` on.
#[derive(Debug, Clone)]
pub struct PageBitmap {
    pages: Arc<PageTable>,
    offset: usize,
}

impl PageBitmap {
    pub(crate) fn new(pages: Arc<PageTable>) -> Self {
        Self { pages, offset: 0 }
    }
}

impl<'a> WithBitmapSlice<'a> for PageBitmap {
    type S = PageSlice<'a>;
}

impl Bitmap for PageBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> PageSlice<'_> {
        PageSlice { pages: &self.pages, offset: self.offset.saturating_add(offset) }
    }
}

/// A borrowed part of a [`PageBitmap`].
#[derive(Debug, Clone, Copy)]
pub struct PageSlice<'a> {
    pages: &'a PageTable,
    offset: usize,
}

impl<'a> WithBitmapSlice<'a> for PageSlice<'_> {
    type S = Self;
}

impl BitmapSlice for PageSlice<'_> {}

impl Bitmap for PageSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let range = self.pages.range(self.offset.saturating_add(offset), len);
        let len = range.end - range.start;
        self.pages.written(range.start, len);
        if len > 0 {
            self.pages.tell_device_hook(range.start, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let range = self.pages.range(self.offset.saturating_add(offset), 1);
        self.pages.state(range.start).contains(PageState::DIRTY)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { pages: self.pages, offset: self.offset.saturating_add(offset) }
    }
}
