//! The page walk: 5- and 4-level, PAE and 32-bit paging (Intel SDM volume 3, chapter 4).

use super::tlb::PAGE_MASK;
use super::walk_cache::{LastLevel, Rights};
use crate::{Core, Scalar, Trap, cr0, cr4, efer, page_fault};

/// How often a walk starts over because another processor changed an entry under it.
const ATTEMPTS: usize = 100;

/// Bits of entries.
pub(super) mod pte {
    pub(in crate::mmu) const P: u64 = 1 << 0;
    pub(in crate::mmu) const W: u64 = 1 << 1;
    pub(in crate::mmu) const U: u64 = 1 << 2;
    pub(in crate::mmu) const A: u64 = 1 << 5;
    pub(in crate::mmu) const D: u64 = 1 << 6;
    pub(in crate::mmu) const PS: u64 = 1 << 7;
    pub(in crate::mmu) const G: u64 = 1 << 8;
    pub(in crate::mmu) const NX: u64 = 1 << 63;
    /// Where the protection key is.
    pub(in crate::mmu) const KEY_SHIFT: u32 = 59;
    /// Address bits of an 8-byte entry.
    pub(in crate::mmu) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// An access to translate for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) write: bool,
    pub(crate) fetch: bool,
    /// With user rights.
    pub(crate) user: bool,
    /// A supervisor access that may not touch user pages (SMAP).
    pub(crate) no_user_pages: bool,
    /// Nobody's access: rights do not count, and nothing is marked as used.
    pub(crate) peek: bool,
}

/// What a walk found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// The 4 KiB page.
    pub(crate) gpa: u64,
    /// log2 of the size of the guest's page.
    pub(crate) shift: u32,
    /// Whether a store with the same rights needs nothing more: it is allowed and the dirty bit is set.
    pub(crate) writable: bool,
    pub(crate) global: bool,
}

/// The kind of paging in force, with what differs.
#[derive(Clone, Copy)]
pub(super) struct Format {
    /// Bytes of an entry: 4 or 8.
    pub(super) entry: u64,
    /// Address bits that a level translates.
    pub(super) bits: u32,
    pub(super) levels: u32,
}

impl Core<'_> {
    /// Translates `va`, which is canonical, and sets accessed and dirty bits.
    pub(crate) fn walk(&mut self, va: u64, access: Access) -> Result<Mapping, Trap> {
        let mapping = self.walk_tables(va, access)?;
        if self.nested_paging() { self.nested_mapping(va, access, mapping) } else { Ok(mapping) }
    }

    /// The same as far as the processor's own tables go.
    fn walk_tables(&mut self, va: u64, access: Access) -> Result<Mapping, Trap> {
        if self.cpu.cr0 & cr0::PG == 0 {
            return Ok(Mapping {
                gpa: va & PAGE_MASK & 0xffff_ffff,
                shift: 12,
                writable: true,
                global: false,
            });
        }
        let mut last = None;
        if !access.peek
            && let Some(level) = self.cpu.tlb.walks(self.cpu.svm.guest.into()).get(va)
            && let Some(mapping) = self.walk_last_level(va, access, level)?
        {
            return Ok(mapping);
        }
        for _ in 0..ATTEMPTS {
            let (mapping, settled) = self.walk_once(va, access)?;
            if settled {
                return Ok(mapping);
            }
            last = Some(mapping);
        }
        // Another processor keeps changing the entries. Each translation was valid when it was made; all
        // that is missing are accessed and dirty bits, so the result must not be kept.
        Ok(Mapping { writable: false, ..last.unwrap_or_default() })
    }

    fn page_fault(&self, va: u64, access: Access, cause: u32) -> Trap {
        let mut error = cause;
        if access.write {
            error |= page_fault::WRITE;
        }
        if access.user {
            error |= page_fault::USER;
        }
        let reports_fetch = (self.cpu.msrs.efer & efer::NXE != 0 && self.cpu.cr4 & cr4::PAE != 0)
            || self.cpu.cr4 & cr4::SMEP != 0;
        if access.fetch && reports_fetch {
            error |= page_fault::FETCH;
        }
        Trap::pf(va, error)
    }

    /// The end of a walk in 4-level paging whose beginning is known. Nothing if it has to be done in full:
    /// another processor is at the entry, or a large page's is to be made dirty.
    fn walk_last_level(&self, va: u64, access: Access, level: LastLevel) -> Result<Option<Mapping>, Trap> {
        let format = Format { entry: 8, bits: 9, levels: 4 };
        let (entry, shift, rights) = match level {
            LastLevel::Page { entry, rights } => {
                if access.write && entry & pte::D == 0 {
                    return Ok(None);
                }
                (entry, 21, rights)
            }
            LastLevel::Table { gpa, host, mut rights } => {
                let offset = va >> 9 & 0xff8;
                // SAFETY: a page of guest memory, in which the entry is.
                let entry = unsafe { u64::load(host.wrapping_add(offset as usize)) };
                if entry & pte::P == 0 {
                    return Err(self.page_fault(va, access, 0));
                }
                if entry & self.reserved(1, false, format) != 0 {
                    return Err(self.page_fault(va, access, page_fault::PRESENT | page_fault::RESERVED));
                }
                rights.add(entry, format);
                // Rights first: an access that faults leaves no mark.
                self.check_rights(va, access, &rights, entry)?;
                if !self.mark_used(&[(gpa + offset, entry)], 8, access.write) {
                    return Ok(None);
                }
                (entry, 12, rights)
            }
        };
        let may_write = self.check_rights(va, access, &rights, entry)?;
        Ok(Some(self.mapping(va, access, entry, (shift, format), may_write)))
    }

    /// What a leaf entry, whose accessed and dirty bits are settled, maps `va` to.
    fn mapping(
        &self,
        va: u64,
        access: Access,
        entry: u64,
        (shift, format): (u32, Format),
        may_write: bool,
    ) -> Mapping {
        Mapping {
            gpa: frame(entry, shift, format) | va & ((1 << shift) - 1) & PAGE_MASK,
            shift,
            writable: may_write && (access.write || entry & pte::D != 0),
            global: entry & pte::G != 0 && self.cpu.cr4 & cr4::PGE != 0,
        }
    }

    /// One attempt; whether all accessed and dirty bits are set.
    fn walk_once(&mut self, va: u64, access: Access) -> Result<(Mapping, bool), Trap> {
        let long = self.cpu.long_mode();
        let cr3 = self.cpu.cr3;
        let (format, mut table) = if long {
            let levels = if self.cpu.cr4 & cr4::LA57 == 0 { 4 } else { 5 };
            (Format { entry: 8, bits: 9, levels }, cr3 & pte::ADDRESS)
        } else if self.cpu.cr4 & cr4::PAE != 0 {
            let pointer = self.page_directory_pointer(va, access.peek)?;
            if pointer & pte::P == 0 {
                return Err(self.page_fault(va, access, 0));
            }
            // That which was loaded with CR3 was looked at then.
            if !self.is_page_directory_pointer(pointer) {
                return Err(self.page_fault(va, access, page_fault::PRESENT | page_fault::RESERVED));
            }
            (Format { entry: 8, bits: 9, levels: 2 }, pointer & pte::ADDRESS)
        } else {
            (Format { entry: 4, bits: 10, levels: 2 }, cr3 & 0xffff_f000)
        };
        let mut rights = Rights { user: true, write: true, no_execute: false };
        let mut visited = [(0, 0); 5];
        for (depth, level) in (1..=format.levels).rev().enumerate() {
            let shift = 12 + format.bits * (level - 1);
            let index = va >> shift & ((1 << format.bits) - 1);
            let mut at = table + index * format.entry;
            if self.nested_paging() {
                at = self.nested_table(at, access.peek)?;
            }
            let entry = self.read_entry(at, format.entry);
            if entry & pte::P == 0 {
                return Err(self.page_fault(va, access, 0));
            }
            let large = level > 1 && self.is_large(entry, level, format);
            if entry & self.reserved(level, large, format) != 0 {
                return Err(self.page_fault(va, access, page_fault::PRESENT | page_fault::RESERVED));
            }
            visited[depth] = (at, entry);
            let above = rights;
            rights.add(entry, format);
            if level == 1 || large {
                let may_write = self.check_rights(va, access, &rights, entry)?;
                let settled = access.peek || self.mark_used(&visited[..=depth], format.entry, access.write);
                let mapping = self.mapping(va, access, entry, (shift, format), may_write);
                if long && settled && !access.peek {
                    self.remember_walk(
                        va,
                        entry | if access.write { pte::D } else { 0 },
                        level,
                        at & PAGE_MASK,
                        (above, rights),
                    );
                }
                return Ok((mapping, settled));
            }
            table = entry & if format.entry == 8 { pte::ADDRESS } else { 0xffff_f000 };
        }
        Err(self.page_fault(va, access, 0))
    }

    /// The page-directory pointer of PAE paging for `va`: that loaded with CR3, or with nested paging the one in
    /// memory (AMD APM volume 2, 15.25.10).
    fn page_directory_pointer(&mut self, va: u64, peek: bool) -> Result<u64, Trap> {
        let index = va >> 30 & 3;
        if !self.nested_paging() {
            return Ok(self.cpu.pdpte[index as usize]);
        }
        let at = self.nested_table((self.cpu.cr3 & 0xffff_ffe0) + 8 * index, peek)?;
        Ok(self.read_entry(at, 8))
    }

    /// Keeps the last level of a walk that succeeded.
    fn remember_walk(&mut self, va: u64, entry: u64, level: u32, table: u64, (above, all): (Rights, Rights)) {
        let last = match level {
            1 => {
                let Some(page) = self.memory.host_page(table) else { return };
                LastLevel::Table { gpa: table, host: page.ptr, rights: above }
            }
            2 => LastLevel::Page { entry, rights: all },
            _ => return,
        };
        self.cpu.tlb.walks(self.cpu.svm.guest.into()).insert(va, last);
    }

    fn is_large(&self, entry: u64, level: u32, format: Format) -> bool {
        let page_size = entry & pte::PS != 0;
        match (format.entry, level) {
            (4, _) => page_size && self.cpu.cr4 & cr4::PSE != 0,
            (_, 2) => page_size,
            (_, 3) => page_size && self.cpu.model.gigabyte_pages(),
            _ => false,
        }
    }

    /// The bits that must be zero in an entry.
    fn reserved(&self, level: u32, large: bool, format: Format) -> u64 {
        if format.entry == 4 {
            // PSE-36: bits 13..=20 are address bits 32..=39, bit 21 must be zero.
            return if large { 1 << 21 } else { 0 };
        }
        let mut mask = pte::ADDRESS & !self.cpu.model.physical_mask();
        if self.cpu.msrs.efer & efer::NXE == 0 {
            mask |= pte::NX;
        }
        if self.cpu.msrs.efer & efer::LMA == 0 {
            mask |= 0x7ff0_0000_0000_0000;
        }
        match (level, large) {
            (2, true) => mask | 0x1f_e000,
            (3, true) => mask | 0x3fff_e000,
            (4 | 5, _) | (3, false) => mask | pte::PS,
            _ => mask,
        }
    }

    /// What the protection key of a leaf entry forbids: all data accesses, and stores (Intel SDM volume 3, 4.6.2).
    fn key_forbids(&self, access: Access, rights: &Rights, leaf: u64) -> (bool, bool) {
        let cpu = &*self.cpu;
        let (on, registers) =
            if rights.user { (cr4::PKE, cpu.pkru) } else { (cr4::PKS, cpu.msrs.pkrs as u32) };
        if cpu.cr4 & on == 0 || !cpu.long_mode() {
            return (false, false);
        }
        let denied = registers >> (2 * (leaf >> pte::KEY_SHIFT & 0xf));
        let protects = access.user || cpu.cr0 & cr0::WP != 0;
        (denied & 1 != 0, denied & 1 != 0 || (denied & 2 != 0 && protects))
    }

    /// Whether the access is allowed (Intel SDM volume 3, 4.6.1) by the rights that all levels grant and the leaf
    /// entry's protection key; and if it is, whether stores are.
    fn check_rights(&self, va: u64, access: Access, rights: &Rights, leaf: u64) -> Result<bool, Trap> {
        let cpu = &*self.cpu;
        let (no_data, no_stores) = self.key_forbids(access, rights, leaf);
        let key_denied = !access.fetch && if access.write { no_stores } else { no_data };
        let may_write = rights.write || (!access.user && cpu.cr0 & cr0::WP == 0);
        let fetch_denied =
            access.fetch && (rights.no_execute || (!access.user && rights.user && cpu.cr4 & cr4::SMEP != 0));
        let denied = (access.user && !rights.user)
            || (access.no_user_pages && rights.user && !access.fetch)
            || (access.write && !may_write)
            || fetch_denied;
        if access.peek || !denied && !key_denied {
            return Ok(may_write && !no_stores);
        }
        let cause = if key_denied { page_fault::PRESENT | page_fault::KEY } else { page_fault::PRESENT };
        Err(self.page_fault(va, access, cause))
    }

    /// A paging-structure entry. Where there is no RAM all bits are set, as on a floating bus.
    pub(crate) fn read_entry(&self, gpa: u64, size: u64) -> u64 {
        let Some(page) = self.memory.host_page(gpa) else {
            return if size == 8 { u64::MAX } else { u64::from(u32::MAX) };
        };
        let ptr = page.ptr.wrapping_add((gpa & 0xfff) as usize);
        // SAFETY: inside a page of guest memory, as entries are aligned.
        unsafe { if size == 8 { u64::load(ptr) } else { u64::from(u32::load(ptr)) } }
    }

    /// Sets the accessed bits of all entries and the dirty bit of the last if the access is a store.
    /// Whether that could be done: not if an entry has changed since it was read.
    pub(super) fn mark_used(&self, entries: &[(u64, u64)], size: u64, write: bool) -> bool {
        for (index, &(gpa, entry)) in entries.iter().enumerate() {
            let leaf = index + 1 == entries.len();
            let wanted = entry | pte::A | if leaf && write { pte::D } else { 0 };
            if wanted != entry && !self.replace_entry(gpa, size, entry, wanted) {
                return false;
            }
        }
        true
    }

    fn replace_entry(&self, gpa: u64, size: u64, old: u64, new: u64) -> bool {
        let Some(page) = self.memory.host_page(gpa) else { return true };
        if self.memory.is_read_only(gpa) {
            return true;
        }
        let ptr = page.ptr.wrapping_add((gpa & 0xfff) as usize);
        // SAFETY: inside a page of guest memory, as entries are aligned.
        let done = unsafe {
            if size == 8 {
                u64::compare_exchange(ptr, old, new) == Some(old)
            } else {
                u32::compare_exchange(ptr, old as u32, new as u32) == Some(old as u32)
            }
        };
        if done {
            self.platform.entry_marked(gpa, size);
            if !self.memory.may_write_directly(gpa) {
                self.memory.written(gpa, size);
            }
        }
        done
    }
}

impl Rights {
    /// Takes away what an entry does not grant.
    fn add(&mut self, entry: u64, format: Format) {
        self.user &= entry & pte::U != 0;
        self.write &= entry & pte::W != 0;
        self.no_execute |= format.entry == 8 && entry & pte::NX != 0;
    }
}

impl Default for Mapping {
    fn default() -> Self {
        Self { gpa: 0, shift: 12, writable: false, global: false }
    }
}

/// The first address of the page that a leaf entry maps.
pub(super) fn frame(entry: u64, shift: u32, format: Format) -> u64 {
    if format.entry == 4 && shift > 12 {
        return entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32;
    }
    let mask = if format.entry == 8 { pte::ADDRESS } else { 0xffff_f000 };
    entry & mask & !((1 << shift) - 1)
}
