//! The soft TLB: what generated code and the interpreter look virtual addresses up in.

use super::nested_cache::NestedCache;
use super::walk_cache::WalkCache;
use std::sync::atomic::{AtomicU64, Ordering};

/// Entries in each bank; the index is the virtual page number's low bits.
pub const TLB_ENTRIES: usize = 512;
/// Banks of each world, by the rights that accesses have: see [`Tlb::bank`].
const RIGHTS: usize = 3;
/// Worlds: the host's, and that of the guest that an SVM host runs (AMD APM volume 2, 15.16).
pub const WORLDS: usize = 2;
/// Banks in all: those of the host, then those of the guest.
pub const BANKS: usize = RIGHTS * WORLDS;
/// Entries for instruction fetches in each bank.
pub const FETCH_ENTRIES: usize = 128;
/// A tag that no page has, so that the entry never matches. Nor has a page's address with any of the low six bits set:
/// that is what generated code compares with to find misaligned accesses of up to 64 bytes.
pub const INVALID_TAG: u64 = 0x800;
/// Large pages remembered one by one in each half of the address space.
const LARGE_PAGES: usize = 24;

/// The bits of an address that are its page.
pub(crate) const PAGE_MASK: u64 = !0xfff;

/// One translation. A tag is the virtual address of the page if the access is allowed and needs no side
/// effect (accessed and dirty bits are set, the page is RAM, writes need not be tracked), else
/// [`INVALID_TAG`]. Only the owning processor fills entries; other threads may invalidate `write` at any
/// time, so that a page that comes to hold code, or is to be logged, is written through the slow path.
#[derive(Debug)]
#[repr(C, align(32))]
pub struct TlbEntry {
    /// Tag for loads.
    pub read: AtomicU64,
    /// Tag for stores.
    pub write: AtomicU64,
    /// Host address of the page less its virtual address (wrapping).
    pub addend: AtomicU64,
    /// Guest physical address of the page; bit 0 set if the mapping is global.
    pub physical: AtomicU64,
}

/// One translation for instruction fetches.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct FetchEntry {
    /// The virtual page, or [`INVALID_TAG`].
    pub tag: u64,
    /// Guest physical address of the page; bit 0 set if the mapping is global.
    pub physical: u64,
    /// The page in this process; null if the page is not RAM (such entries are never cached).
    pub host: *const u8,
}

/// The large pages that entries were filled from. Entries are 4 KiB pieces, and INVLPG of any address in a
/// large page must drop all of them.
#[derive(Debug, Clone, Copy, Default)]
struct LargePages {
    /// Base, with the page's size as a shift count in the low bits and bit 6 if the mapping is global.
    pages: [u64; LARGE_PAGES],
    used: usize,
    /// Pages that found no room: any INVLPG in this half may concern one.
    overflow: bool,
}

impl LargePages {
    const GLOBAL: u64 = 1 << 6;

    fn insert(&mut self, va: u64, shift: u32, global: bool) {
        let key = va >> shift << shift | u64::from(shift) | if global { Self::GLOBAL } else { 0 };
        if self.pages[..self.used].contains(&key) {
            return;
        }
        match self.pages.get_mut(self.used) {
            Some(slot) => {
                *slot = key;
                self.used += 1;
            }
            None => self.overflow = true,
        }
    }

    fn contain(&self, va: u64) -> bool {
        let inside = |key: &u64| {
            let shift = key & 0x3f;
            key >> shift == va >> shift
        };
        self.overflow || self.pages[..self.used].iter().any(inside)
    }

    fn forget(&mut self, keep_global: bool) {
        if !keep_global {
            *self = Self::default();
            return;
        }
        let mut kept = 0;
        for index in 0..self.used {
            if self.pages[index] & Self::GLOBAL != 0 {
                self.pages[kept] = self.pages[index];
                kept += 1;
            }
        }
        self.used = kept;
    }
}

/// All banks, and what is needed to flush them in the time that their filled entries take.
#[repr(C, align(64))]
pub struct Tlb {
    /// Data translations by bank.
    pub entries: [[TlbEntry; TLB_ENTRIES]; BANKS],
    /// Fetch translations by bank (user and supervisor; the third of each world is not used).
    pub fetch: [[FetchEntry; FETCH_ENTRIES]; BANKS],
    /// A bit for each entry that may be valid.
    filled: [[u64; TLB_ENTRIES / 64]; BANKS],
    /// A bit for each of those that hold mappings that are not global.
    local: [[u64; TLB_ENTRIES / 64]; BANKS],
    fetch_filled: [[u64; FETCH_ENTRIES / 64]; BANKS],
    fetch_local: [[u64; FETCH_ENTRIES / 64]; BANKS],
    worlds: [World; WORLDS],
    /// What the nested page tables of the guest's world map.
    pub(crate) nested: NestedCache,
}

/// What is kept of each world besides the entries.
struct World {
    /// A Bloom set of the pages whose fetch entries were replaced since the code generation last changed.
    evicted: u64,
    /// The same of global mappings, since the global code generation last changed.
    evicted_global: [u64; GLOBAL_BLOOM / 64],
    large: [LargePages; 2],
    walks: WalkCache,
}

impl World {
    const EMPTY: Self = Self {
        evicted: 0,
        evicted_global: [0; GLOBAL_BLOOM / 64],
        large: [LargePages { pages: [0; LARGE_PAGES], used: 0, overflow: false }; 2],
        walks: WalkCache::new(),
    };
}

/// What generated code uses as its bank while every access must take the slow path. It stays invalid.
pub(crate) static EMPTY_BANK: [TlbEntry; TLB_ENTRIES] = [const { TlbEntry::invalid() }; TLB_ENTRIES];

/// A translation to install.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewEntry {
    pub(crate) va: u64,
    pub(crate) gpa: u64,
    pub(crate) host: *mut u8,
    pub(crate) write: bool,
    pub(crate) global: bool,
    /// log2 of the size of the page that the guest mapped.
    pub(crate) shift: u32,
}

fn half(va: u64) -> usize {
    (va >> 63) as usize
}

fn bloom(va: u64) -> u64 {
    1 << ((va >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58)
}

/// Bits of the Bloom set of global pages.
const GLOBAL_BLOOM: usize = 1024;

fn global_bloom(va: u64) -> usize {
    ((va >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54) as usize
}

fn set(bits: &mut [u64], index: usize, value: bool) {
    let mask = 1 << (index % 64);
    if value {
        bits[index / 64] |= mask;
    } else {
        bits[index / 64] &= !mask;
    }
}

/// Calls `each` with the index of every bit set in `bits`.
fn for_each_bit(bits: &[u64], mut each: impl FnMut(usize)) {
    for (word, &bits) in bits.iter().enumerate() {
        let mut left = bits;
        while left != 0 {
            each(word * 64 + left.trailing_zeros() as usize);
            left &= left - 1;
        }
    }
}

impl Tlb {
    /// Bank of supervisor accesses that may not touch user pages under SMAP, and of all without SMAP.
    pub const SUPERVISOR: usize = 0;
    /// Bank of user accesses.
    pub const USER: usize = 1;
    /// Bank of explicit supervisor accesses with EFLAGS.AC set while SMAP is on.
    pub const SUPERVISOR_AC: usize = 2;
    /// What a bank of the guest's world has in addition to the number of the same bank of the host's.
    pub const GUEST: usize = RIGHTS;

    /// The index in a bank for the page of `address`.
    #[inline(always)]
    pub fn index(address: u64) -> usize {
        (address >> 12) as usize & (TLB_ENTRIES - 1)
    }

    /// The index in a bank of fetch entries for the page of `address`.
    #[inline(always)]
    pub fn fetch_index(address: u64) -> usize {
        (address >> 12) as usize & (FETCH_ENTRIES - 1)
    }

    /// The first entry of `bank`.
    pub fn bank(&self, bank: usize) -> *const TlbEntry {
        self.entries[bank].as_ptr()
    }

    /// Makes stores to the page at `host_page` take the slow path, whatever virtual addresses it is mapped
    /// at. For any thread: to be called after `GuestMemory` was told that the page is code or to be
    /// logged. A store of the owning processor that is already past its lookup may still come.
    pub fn invalidate_writes(&self, host_page: u64) {
        // Pairs with the fence after an entry is filled: either the owner sees the page's new state there,
        // or its entry is seen here.
        std::sync::atomic::fence(Ordering::SeqCst);
        for entry in self.entries.iter().flatten() {
            let tag = entry.write.load(Ordering::Acquire);
            if tag != INVALID_TAG && tag.wrapping_add(entry.addend.load(Ordering::Relaxed)) == host_page {
                let _ = entry.write.compare_exchange(tag, INVALID_TAG, Ordering::SeqCst, Ordering::Relaxed);
            }
        }
    }

    /// Makes all stores take the slow path once more, as when the dirty log begins or was taken. For any
    /// thread.
    pub fn invalidate_all_writes(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
        for entry in self.entries.iter().flatten() {
            entry.write.store(INVALID_TAG, Ordering::SeqCst);
        }
    }

    /// Empties everything; for a TLB whose memory was never initialized.
    pub(crate) fn reset(&mut self) {
        for entry in self.entries.iter().flatten() {
            entry.invalidate();
        }
        for entry in self.fetch.iter_mut().flatten() {
            *entry = FetchEntry::INVALID;
        }
        self.filled = Default::default();
        self.local = Default::default();
        self.fetch_filled = Default::default();
        self.fetch_local = Default::default();
        self.worlds = [World::EMPTY; WORLDS];
        self.nested = NestedCache::new();
    }

    /// A TLB in memory of which nothing but zeros is known to be there: what is not valid so.
    ///
    /// # Safety
    /// `at` must point to memory for a TLB that holds zeros.
    pub(crate) unsafe fn write_parts(at: *mut Self) {
        // SAFETY: as the caller says; nothing is read or dropped.
        unsafe {
            (&raw mut (*at).worlds).write([World::EMPTY; WORLDS]);
            (&raw mut (*at).nested).write(NestedCache::new());
        }
    }

    /// The paging-structure cache of a world.
    pub(crate) fn walks(&mut self, world: usize) -> &mut WalkCache {
        &mut self.worlds[world].walks
    }

    /// Fills an entry for data. The caller re-checks the rights to write afterwards, see
    /// [`Tlb::invalidate_writes`].
    pub(crate) fn install(&mut self, bank: usize, new: NewEntry) -> &TlbEntry {
        let index = Self::index(new.va);
        let page = new.va & PAGE_MASK;
        set(&mut self.filled[bank], index, true);
        set(&mut self.local[bank], index, !new.global);
        if new.shift > 12 {
            self.worlds[bank / RIGHTS].large[half(page)].insert(page, new.shift, new.global);
        }
        let entry = &self.entries[bank][index];
        entry.invalidate();
        entry.addend.store((new.host as u64).wrapping_sub(page), Ordering::Relaxed);
        entry.physical.store(new.gpa & PAGE_MASK | u64::from(new.global), Ordering::Relaxed);
        entry.read.store(page, Ordering::Relaxed);
        if new.write {
            entry.write.store(page, Ordering::Release);
        }
        entry
    }

    pub(crate) fn install_fetch(&mut self, bank: usize, new: NewEntry) -> FetchEntry {
        let index = Self::fetch_index(new.va);
        let page = new.va & PAGE_MASK;
        let world = &mut self.worlds[bank / RIGHTS];
        let old = self.fetch[bank][index].tag;
        if old != INVALID_TAG {
            world.evicted |= bloom(old);
            if self.fetch[bank][index].physical & 1 != 0 {
                set(&mut world.evicted_global, global_bloom(old), true);
            }
        }
        if new.shift > 12 {
            world.large[half(page)].insert(page, new.shift, new.global);
        }
        set(&mut self.fetch_filled[bank], index, true);
        set(&mut self.fetch_local[bank], index, !new.global);
        let entry = FetchEntry {
            tag: page,
            physical: new.gpa & PAGE_MASK | u64::from(new.global),
            host: new.host.cast_const(),
        };
        self.fetch[bank][index] = entry;
        entry
    }

    /// Drops all entries of a world, or all but those of global mappings.
    pub(crate) fn flush(&mut self, world: usize, keep_global: bool) {
        self.worlds[world].walks.clear();
        for bank in world * RIGHTS..(world + 1) * RIGHTS {
            let entries = &self.entries[bank];
            let bits = if keep_global { &self.local[bank] } else { &self.filled[bank] };
            for_each_bit(bits, |index| entries[index].invalidate());
            for (filled, local) in self.filled[bank].iter_mut().zip(&mut self.local[bank]) {
                *filled = if keep_global { *filled & !*local } else { 0 };
                *local = 0;
            }
            let entries = &mut self.fetch[bank];
            let bits = if keep_global { &self.fetch_local[bank] } else { &self.fetch_filled[bank] };
            for_each_bit(bits, |index| entries[index] = FetchEntry::INVALID);
            for (filled, local) in self.fetch_filled[bank].iter_mut().zip(&mut self.fetch_local[bank]) {
                *filled = if keep_global { *filled & !*local } else { 0 };
                *local = 0;
            }
        }
        for large in &mut self.worlds[world].large {
            large.forget(keep_global);
        }
    }

    /// Drops a world's entries of the page that contains `va`. Whether code may have been fetched through it.
    pub(crate) fn invalidate(&mut self, world: usize, va: u64) -> bool {
        let page = va & PAGE_MASK;
        let kept = &mut self.worlds[world];
        kept.walks.clear();
        if kept.large[half(page)].contain(page) {
            self.flush(world, false);
            return true;
        }
        let bit = global_bloom(page);
        let mut fetched =
            kept.evicted & bloom(page) != 0 || kept.evicted_global[bit / 64] >> (bit % 64) & 1 != 0;
        for bank in world * RIGHTS..(world + 1) * RIGHTS {
            let entry = &self.entries[bank][Self::index(page)];
            if entry.read.load(Ordering::Relaxed) == page || entry.write.load(Ordering::Relaxed) == page {
                entry.invalidate();
            }
            let entry = &mut self.fetch[bank][Self::fetch_index(page)];
            if entry.tag == page {
                *entry = FetchEntry::INVALID;
                fetched = true;
            }
        }
        fetched
    }

    /// A world's code generation changed: what was evicted before is of no interest any more.
    pub(crate) fn forget_evicted(&mut self, world: usize, global: bool) {
        self.worlds[world].evicted = 0;
        if global {
            self.worlds[world].evicted_global = Default::default();
        }
    }

    /// Whether `va` may be in a large page that a world's entries were filled from.
    pub(crate) fn in_large_page(&self, world: usize, va: u64) -> bool {
        self.worlds[world].large[half(va)].contain(va & PAGE_MASK)
    }
}

impl TlbEntry {
    /// An entry that matches nothing.
    pub const fn invalid() -> Self {
        Self {
            read: AtomicU64::new(INVALID_TAG),
            write: AtomicU64::new(INVALID_TAG),
            addend: AtomicU64::new(0),
            physical: AtomicU64::new(0),
        }
    }

    /// Makes the entry match nothing.
    pub fn invalidate(&self) {
        self.read.store(INVALID_TAG, Ordering::Relaxed);
        self.write.store(INVALID_TAG, Ordering::Relaxed);
    }
}

impl FetchEntry {
    /// An entry that matches nothing.
    pub const INVALID: Self = Self { tag: INVALID_TAG, physical: 0, host: std::ptr::null() };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tlb() -> Box<Tlb> {
        let mut tlb = Box::<Tlb>::new_uninit();
        let at = tlb.as_mut_ptr();
        // SAFETY: all fields but those written are integers and raw pointers, for which zero is valid.
        let mut tlb = unsafe {
            at.write_bytes(0, 1);
            Tlb::write_parts(at);
            tlb.assume_init()
        };
        tlb.reset();
        tlb
    }

    fn new(va: u64, global: bool, shift: u32) -> NewEntry {
        let host = std::ptr::without_provenance_mut(0x7000_0000_0000 + (va & 0xffff_f000) as usize);
        NewEntry { va, gpa: va & 0xffff_f000, host, write: true, global, shift }
    }

    fn hits(tlb: &Tlb, bank: usize, va: u64) -> bool {
        tlb.entries[bank][Tlb::index(va)].read.load(Ordering::Relaxed) == va & PAGE_MASK
    }

    #[test]
    fn flushes_keep_global_entries_when_told() {
        let mut tlb = tlb();
        tlb.install(0, new(0x1000, true, 12));
        tlb.install(1, new(0x2000, false, 12));
        tlb.install_fetch(0, new(0x3000, true, 12));
        tlb.install_fetch(1, new(0x4000, false, 12));
        tlb.flush(0, true);
        assert!(hits(&tlb, 0, 0x1000) && !hits(&tlb, 1, 0x2000));
        assert_eq!(tlb.fetch[0][3].tag, 0x3000);
        assert_eq!(tlb.fetch[1][4].tag, INVALID_TAG);
        tlb.flush(0, false);
        assert!(!hits(&tlb, 0, 0x1000));
        assert_eq!(tlb.fetch[0][3].tag, INVALID_TAG);
    }

    #[test]
    fn invalidating_an_address_in_a_large_page_drops_all_of_it() {
        let mut tlb = tlb();
        tlb.install(0, new(0x20_1000, true, 21));
        tlb.install(0, new(0x9000, true, 12));
        assert!(!tlb.invalidate(0, 0x50_0000));
        assert!(hits(&tlb, 0, 0x20_1000));
        assert!(tlb.invalidate(0, 0x3f_f000));
        assert!(!hits(&tlb, 0, 0x20_1000));
        for page in 0..2 * LARGE_PAGES as u64 {
            tlb.install(1, new(page << 21, false, 21));
        }
        tlb.install(1, new(0x7000_0000, false, 12));
        assert!(tlb.invalidate(0, 0x47_0000_0000), "too many to remember");
        assert!(!hits(&tlb, 1, 0x7000_0000));
    }

    #[test]
    fn a_page_once_fetched_from_is_never_forgotten() {
        let mut tlb = tlb();
        let page = 0x1000;
        tlb.install_fetch(0, new(page, false, 12));
        tlb.install_fetch(0, new(page + ((FETCH_ENTRIES as u64) << 12), false, 12));
        assert!(tlb.invalidate(0, page), "evicted, but remembered");
        tlb.forget_evicted(0, false);
        assert!(!tlb.invalidate(0, page));
    }

    #[test]
    fn worlds_are_flushed_apart() {
        let mut tlb = tlb();
        tlb.install(0, new(0x1000, false, 12));
        tlb.install(Tlb::GUEST, new(0x1000, false, 12));
        tlb.install_fetch(Tlb::GUEST + 1, new(0x20_0000, false, 21));
        assert!(!tlb.invalidate(0, 0x20_0000), "the large page is the guest's");
        tlb.flush(1, false);
        assert!(hits(&tlb, 0, 0x1000) && !hits(&tlb, Tlb::GUEST, 0x1000));
        assert_eq!(tlb.fetch[Tlb::GUEST + 1][0].tag, INVALID_TAG);
        tlb.install(Tlb::GUEST, new(0x1000, false, 12));
        tlb.flush(0, false);
        assert!(!hits(&tlb, 0, 0x1000) && hits(&tlb, Tlb::GUEST, 0x1000));
    }

    #[test]
    fn writes_are_invalidated_through_every_alias() {
        let mut tlb = tlb();
        let mut alias = new(0x5000, false, 12);
        let host = alias.host as u64;
        tlb.install(0, alias);
        alias.va = 0xffff_8000_0000_6000;
        tlb.install(2, alias);
        tlb.install(1, new(0x8000, false, 12));
        tlb.invalidate_writes(host);
        let write = |bank: usize, va| tlb.entries[bank][Tlb::index(va)].write.load(Ordering::Relaxed);
        assert_eq!(write(0, 0x5000), INVALID_TAG);
        assert_eq!(write(2, 0xffff_8000_0000_6000), INVALID_TAG);
        assert_eq!(write(1, 0x8000), 0x8000);
        assert!(hits(&tlb, 0, 0x5000), "reads stay");
    }
}
