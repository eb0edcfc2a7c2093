//! What nested page tables map, page by page: the part of the TLB that a guest's own changes of its page tables leave
//! alone (AMD APM volume 2, 15.25.8).

/// Entries; the index is the low bits of the number of the guest's physical page.
const ENTRIES: usize = 512;
/// What no page's address is.
const NONE: u64 = 1;

/// Where a page of a guest's physical memory is in the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NestedPage {
    /// The guest's page.
    pub(super) gpa: u64,
    /// The host's.
    pub(super) hpa: u64,
    /// Whether stores are allowed and need nothing more: the dirty bit is set.
    pub(super) writable: bool,
    pub(super) no_execute: bool,
    /// The entry is valid while this is the cache's.
    epoch: u64,
}

/// The cache.
#[derive(Debug)]
pub(crate) struct NestedCache {
    entries: Option<Box<[NestedPage; ENTRIES]>>,
    epoch: u64,
}

impl NestedPage {
    const EMPTY: Self = Self { gpa: NONE, hpa: 0, writable: false, no_execute: false, epoch: 0 };

    pub(super) fn new(gpa: u64, hpa: u64, writable: bool, no_execute: bool) -> Self {
        Self { gpa, hpa, writable, no_execute, epoch: 0 }
    }
}

impl NestedCache {
    /// An empty one, which takes no memory.
    pub(crate) const fn new() -> Self {
        Self { entries: None, epoch: 0 }
    }

    pub(crate) fn clear(&mut self) {
        self.epoch += 1;
    }

    fn index(gpa: u64) -> usize {
        (gpa >> 12) as usize % ENTRIES
    }

    #[inline]
    pub(super) fn get(&self, gpa: u64) -> Option<NestedPage> {
        let entry = self.entries.as_ref()?[Self::index(gpa)];
        (entry.gpa == gpa && entry.epoch == self.epoch).then_some(entry)
    }

    pub(super) fn insert(&mut self, page: NestedPage) {
        let epoch = self.epoch;
        let entries = self.entries.get_or_insert_with(|| Box::new([NestedPage::EMPTY; ENTRIES]));
        entries[Self::index(page.gpa)] = NestedPage { epoch, ..page };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_there_until_the_cache_is_cleared() {
        let mut cache = NestedCache::new();
        assert!(cache.get(0).is_none());
        cache.insert(NestedPage::new(0x5000, 0x9000, true, false));
        assert_eq!(cache.get(0x5000).map(|page| (page.hpa, page.writable)), Some((0x9000, true)));
        assert!(cache.get(0x5000 + ((ENTRIES as u64) << 12)).is_none(), "of the same index");
        cache.clear();
        assert!(cache.get(0x5000).is_none());
    }
}
