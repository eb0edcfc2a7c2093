//! The paging-structure cache: where the last level of a walk is, so that the levels above it need not be
//! read again (Intel SDM volume 3, 4.10.3). Like that of a processor it is emptied by every INVLPG and MOV
//! to CR3.

/// Entries; the index is the low bits of the virtual address's 2 MiB frame.
const ENTRIES: usize = 64;

/// The rights that the levels of a walk add up to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rights {
    pub(super) user: bool,
    pub(super) write: bool,
    pub(super) no_execute: bool,
}

/// What a walk of 4-level paging comes to when 12 + 9 bits of the address are left.
#[derive(Debug, Clone, Copy)]
pub(super) enum LastLevel {
    /// A page table, the page of guest memory that it is in, and the rights of the levels above.
    Table { gpa: u64, host: *mut u8, rights: Rights },
    /// A 2 MiB page: its entry and all rights.
    Page { entry: u64, rights: Rights },
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    frame: u64,
    /// The entry is valid while this is the cache's.
    epoch: u64,
    level: LastLevel,
}

/// The cache.
#[derive(Debug)]
pub(crate) struct WalkCache {
    entries: [Option<Entry>; ENTRIES],
    epoch: u64,
}

impl WalkCache {
    pub(crate) const fn new() -> Self {
        Self { entries: [None; ENTRIES], epoch: 0 }
    }

    pub(super) fn clear(&mut self) {
        self.epoch += 1;
    }

    pub(super) fn get(&self, va: u64) -> Option<LastLevel> {
        let frame = va >> 21;
        let entry = self.entries[frame as usize % ENTRIES]?;
        (entry.frame == frame && entry.epoch == self.epoch).then_some(entry.level)
    }

    pub(super) fn insert(&mut self, va: u64, level: LastLevel) {
        let frame = va >> 21;
        self.entries[frame as usize % ENTRIES] = Some(Entry { frame, epoch: self.epoch, level });
    }
}
