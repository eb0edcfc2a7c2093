//! Accesses to linear addresses, with the rights of a TLB bank.

use super::tlb::PAGE_MASK;
use super::{Target, Tlb};
use crate::scalar::SPLIT_LOCK;
use crate::{Core, Cpu, Scalar, Trap};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

impl Cpu {
    /// Where `bytes` bytes at `va` are in this process, if `bank` has them within one page for loads.
    #[inline(always)]
    pub(crate) fn read_hit(&self, bank: u8, va: u64, bytes: usize) -> Option<*const u8> {
        let entry = &self.tlb.entries.get(usize::from(bank))?[Tlb::index(va)];
        // An access across the page's end is in two pages: its last byte's page is not this entry's.
        let page = va.wrapping_add(bytes as u64 - 1) & PAGE_MASK;
        let hit = entry.read.load(Ordering::Relaxed) == page;
        hit.then(|| {
            std::ptr::with_exposed_provenance(entry.addend.load(Ordering::Relaxed).wrapping_add(va) as usize)
        })
    }

    /// The same for stores.
    #[inline(always)]
    pub(crate) fn write_hit(&self, bank: u8, va: u64, bytes: usize) -> Option<*mut u8> {
        let entry = &self.tlb.entries.get(usize::from(bank))?[Tlb::index(va)];
        let page = va.wrapping_add(bytes as u64 - 1) & PAGE_MASK;
        let hit = entry.write.load(Ordering::Relaxed) == page;
        hit.then(|| {
            std::ptr::with_exposed_provenance_mut(
                entry.addend.load(Ordering::Relaxed).wrapping_add(va) as usize
            )
        })
    }
}

/// Whether the access stays within a page.
fn in_one_page(va: u64, bytes: usize) -> bool {
    (va & !PAGE_MASK) as usize + bytes <= 0x1000
}

impl Core<'_> {
    pub(crate) fn read_linear<T: Scalar>(&mut self, va: u64, bank: usize) -> Result<T, Trap> {
        if let Some(host) = self.cpu.read_hit(bank as u8, va, T::BYTES) {
            // SAFETY: the TLB says that this is guest memory.
            return Ok(unsafe { T::load(host) });
        }
        if in_one_page(va, T::BYTES) {
            let target = self.translate(va, false, bank)?;
            // SAFETY: it does not cross the page's end.
            return Ok(unsafe { target.load(self) });
        }
        let mut data = [0; 16];
        self.read_linear_bytes(va, &mut data[..T::BYTES], bank)?;
        Ok(T::from_bytes(&data))
    }

    pub(crate) fn write_linear<T: Scalar>(&mut self, va: u64, value: T, bank: usize) -> Result<(), Trap> {
        if let Some(host) = self.cpu.write_hit(bank as u8, va, T::BYTES) {
            // SAFETY: the TLB says that this is guest memory, and may be written directly.
            unsafe { T::store(host, value) };
            return Ok(());
        }
        if in_one_page(va, T::BYTES) {
            let target = self.translate(va, true, bank)?;
            // SAFETY: it does not cross the page's end.
            unsafe { target.store(self, value) };
            return Ok(());
        }
        self.write_linear_bytes(va, &value.to_bytes()[..T::BYTES], bank)
    }

    /// Reads at most 4096 bytes.
    pub(crate) fn read_linear_bytes(&mut self, va: u64, data: &mut [u8], bank: usize) -> Result<(), Trap> {
        if data.is_empty() {
            return Ok(());
        }
        let room = 0x1000 - (va & !PAGE_MASK) as usize;
        let split = data.len().min(room);
        let first = self.translate(va, false, bank)?;
        if split == data.len() {
            // SAFETY: up to the page's end at most.
            unsafe { first.load_bytes(self, data) };
            return Ok(());
        }
        let second = self.translate(self.next_page(va), false, bank)?;
        let (low, high) = data.split_at_mut(split);
        assert!(high.len() <= 0x1000, "at most 4096 bytes at once");
        // SAFETY: up to the page's end, and from the second page's start.
        unsafe {
            first.load_bytes(self, low);
            second.load_bytes(self, high);
        }
        Ok(())
    }

    /// Writes at most 4096 bytes: all, or none if one of them faults.
    pub(crate) fn write_linear_bytes(&mut self, va: u64, data: &[u8], bank: usize) -> Result<(), Trap> {
        if data.is_empty() {
            return Ok(());
        }
        let room = 0x1000 - (va & !PAGE_MASK) as usize;
        let split = data.len().min(room);
        let first = self.translate(va, true, bank)?;
        if split == data.len() {
            // SAFETY: up to the page's end at most.
            unsafe { first.store_bytes(self, data) };
            return Ok(());
        }
        let second = self.translate(self.next_page(va), true, bank)?;
        let (low, high) = data.split_at(split);
        assert!(high.len() <= 0x1000, "at most 4096 bytes at once");
        // SAFETY: up to the page's end, and from the second page's start.
        unsafe {
            first.store_bytes(self, low);
            second.store_bytes(self, high);
        }
        Ok(())
    }

    /// Writes up to 512 words from `va` upwards: all, or none if one of them faults.
    pub(crate) fn write_linear_words(&mut self, va: u64, words: &[u64], bank: usize) -> Result<(), Trap> {
        let len = 8 * words.len();
        let Some(host) = self.cpu.write_hit(bank as u8, va, len) else {
            self.check_linear_write(va, len as u64, bank)?;
            for (index, &word) in words.iter().enumerate() {
                self.write_linear(va.wrapping_add(8 * index as u64), word, bank)?;
            }
            return Ok(());
        };
        for (index, &word) in words.iter().enumerate() {
            // SAFETY: the TLB says that this is guest memory, and may be written directly.
            unsafe { u64::store(host.wrapping_add(8 * index), word) };
        }
        Ok(())
    }

    /// The faults that a store of `len` bytes would have.
    pub(crate) fn check_linear_write(&mut self, va: u64, len: u64, bank: usize) -> Result<(), Trap> {
        let mut at = va;
        let mut left = len;
        while left > 0 {
            self.translate(at, true, bank)?;
            left = left.saturating_sub(0x1000 - (at & !PAGE_MASK));
            at = self.next_page(at);
        }
        Ok(())
    }

    pub(crate) fn update_linear<T: Scalar>(
        &mut self,
        va: u64,
        bank: usize,
        locked: bool,
        mut f: impl FnMut(T) -> Option<T>,
    ) -> Result<T, Trap> {
        let atomic = locked && self.cpu.lock_needed;
        if !in_one_page(va, T::BYTES) {
            self.check_linear_write(va, T::BYTES as u64, bank)?;
            let guard = atomic.then(|| SPLIT_LOCK.lock().unwrap_or_else(PoisonError::into_inner));
            let old = self.read_linear::<T>(va, bank)?;
            if let Some(new) = f(old) {
                self.write_linear(va, new, bank)?;
            }
            drop(guard);
            return Ok(old);
        }
        let target = self.translate(va, true, bank)?;
        if let (Target::Ram { host, gpa, tracked }, true) = (target, atomic) {
            // SAFETY: within a page of guest memory.
            let mut old = unsafe { T::load(host) };
            loop {
                let Some(new) = f(old) else {
                    // A locked comparison that fails is a locked access all the same: if the value was torn
                    // or stale, the exchange of it for itself tells.
                    // SAFETY: as above.
                    match unsafe { T::compare_exchange(host, old, old) } {
                        Some(found) if found != old => {
                            old = found;
                            continue;
                        }
                        _ => return Ok(old),
                    }
                };
                // SAFETY: as above.
                match unsafe { T::compare_exchange(host, old, new) } {
                    Some(found) if found == old => {
                        if tracked {
                            self.memory.written(gpa, T::BYTES as u64);
                        }
                        return Ok(old);
                    }
                    Some(found) => old = found,
                    None => break,
                }
            }
        }
        let guard = atomic.then(|| SPLIT_LOCK.lock().unwrap_or_else(PoisonError::into_inner));
        // SAFETY: within a page.
        let old: T = unsafe { target.load(self) };
        if let Some(new) = f(old) {
            // SAFETY: within a page, and translated for a store.
            unsafe { target.store(self, new) };
        }
        drop(guard);
        Ok(old)
    }
}
