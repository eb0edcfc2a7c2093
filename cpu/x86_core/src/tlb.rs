//! The soft TLB: what generated code and the interpreter look virtual addresses up in.

use std::sync::atomic::{AtomicU64, Ordering};

/// Entries in each bank; the index is the virtual page number's low bits.
pub const TLB_ENTRIES: usize = 512;
/// Banks, by the rights that accesses have: see [`Tlb::bank`].
pub const BANKS: usize = 3;
/// Entries for instruction fetches in each bank.
pub const FETCH_ENTRIES: usize = 128;
/// A tag that no page has, so that the entry never matches.
pub const INVALID_TAG: u64 = 1;

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
    /// The page in this process.
    pub host: *const u8,
}

/// All banks.
#[repr(C, align(64))]
pub struct Tlb {
    /// Data translations by bank.
    pub entries: [[TlbEntry; TLB_ENTRIES]; BANKS],
    /// Fetch translations by bank (user and supervisor; the third is not used).
    pub fetch: [[FetchEntry; FETCH_ENTRIES]; BANKS],
}

impl Tlb {
    /// Bank of supervisor accesses that may not touch user pages under SMAP, and of all without SMAP.
    pub const SUPERVISOR: usize = 0;
    /// Bank of user accesses.
    pub const USER: usize = 1;
    /// Bank of explicit supervisor accesses with EFLAGS.AC set while SMAP is on.
    pub const SUPERVISOR_AC: usize = 2;

    /// The index in a bank for the page of `address`.
    pub fn index(address: u64) -> usize {
        (address >> 12) as usize & (TLB_ENTRIES - 1)
    }

    /// The first entry of `bank`.
    pub fn bank(&self, bank: usize) -> *const TlbEntry {
        self.entries[bank].as_ptr()
    }
}

impl TlbEntry {
    /// Makes the entry match nothing.
    pub fn invalidate(&self) {
        self.read.store(INVALID_TAG, Ordering::Relaxed);
        self.write.store(INVALID_TAG, Ordering::Relaxed);
    }
}
