//! Nested paging: from the physical addresses of a guest to those of its host (AMD APM volume 2, 15.25).

use super::nested_cache::NestedPage;
use super::tlb::PAGE_MASK;
use super::walk::{Access, Format, Mapping, frame, pte};
use crate::svm::{Exit, code};
use crate::{Core, Trap, cr4, efer, page_fault};

/// How often a walk starts over because another processor changed an entry under it.
const ATTEMPTS: usize = 100;

/// EXITINFO1 of a nested page fault: at the address that the guest accesses, or at one of its page tables'.
const FINAL: u64 = 1 << 32;
const TABLE: u64 = 1 << 33;

/// An access to a guest physical address.
#[derive(Debug, Clone, Copy)]
struct NestedAccess {
    write: bool,
    fetch: bool,
    /// A [`FINAL`] or a [`TABLE`].
    stage: u64,
    /// As [`Access::peek`].
    peek: bool,
}

impl Core<'_> {
    /// Whether physical addresses are a guest's, which nested page tables map.
    #[inline]
    pub(super) fn nested_paging(&self) -> bool {
        self.cpu.svm.control.nested_paging
    }

    /// Where the entry at the guest physical address `gpa` of the guest's page tables is. A walk of them is a store,
    /// as it may set accessed and dirty bits.
    pub(super) fn nested_table(&mut self, gpa: u64, peek: bool) -> Result<u64, Trap> {
        let page = self.nested_page(gpa, NestedAccess { write: true, fetch: false, stage: TABLE, peek })?;
        Ok(page.hpa | gpa & !PAGE_MASK)
    }

    /// Where the page that the guest's own tables map `va` to is.
    pub(super) fn nested_mapping(
        &mut self,
        va: u64,
        access: Access,
        mapping: Mapping,
    ) -> Result<Mapping, Trap> {
        let gpa = mapping.gpa | va & !PAGE_MASK;
        let access =
            NestedAccess { write: access.write, fetch: access.fetch, stage: FINAL, peek: access.peek };
        let page = self.nested_page(gpa, access)?;
        Ok(Mapping { gpa: page.hpa, writable: mapping.writable && page.writable, ..mapping })
    }

    fn nested_page(&mut self, gpa: u64, access: NestedAccess) -> Result<NestedPage, Trap> {
        if let Some(page) = self.cpu.tlb.nested.get(gpa & PAGE_MASK)
            && (page.writable || !access.write)
            && !(page.no_execute && access.fetch)
        {
            return Ok(page);
        }
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let (page, settled) = self.nested_walk(gpa, access)?;
            if access.peek {
                return Ok(page);
            }
            if settled {
                self.cpu.tlb.nested.insert(page);
                return Ok(page);
            }
            last = Some(page);
        }
        // As in walks of a processor's own tables: each translation was valid when it was made.
        let mut page = last.unwrap_or(NestedPage::new(gpa & PAGE_MASK, gpa & PAGE_MASK, false, true));
        page.writable = false;
        Ok(page)
    }

    /// One walk of the nested tables, which are of the kind that the host's paging was at VMRUN; whether all accessed
    /// and dirty bits are set.
    fn nested_walk(&mut self, gpa: u64, access: NestedAccess) -> Result<(NestedPage, bool), Trap> {
        let svm = &self.cpu.svm;
        let root = svm.control.ncr3;
        let long = svm.host.efer & efer::LMA != 0;
        let pae = svm.host.cr4 & cr4::PAE != 0;
        let (format, mut table) = match (long, pae) {
            (true, _) => {
                let levels = if svm.host.cr4 & cr4::LA57 == 0 { 4 } else { 5 };
                (Format { entry: 8, bits: 9, levels }, root & pte::ADDRESS)
            }
            (false, true) => (Format { entry: 8, bits: 9, levels: 3 }, root & 0xffff_ffe0),
            (false, false) => (Format { entry: 4, bits: 10, levels: 2 }, root & 0xffff_f000),
        };
        if gpa >> (12 + format.bits * format.levels).min(if long { 57 } else { 32 }) != 0 {
            return Err(self.nested_fault(gpa, access, 0));
        }
        let (mut writable, mut user, mut no_execute) = (true, true, false);
        let mut visited = [(0, 0); 5];
        for (depth, level) in (1..=format.levels).rev().enumerate() {
            let shift = 12 + format.bits * (level - 1);
            let index = gpa >> shift & ((1 << format.bits) - 1);
            let at = table + index * format.entry;
            let entry = self.read_entry(at, format.entry);
            if entry & pte::P == 0 {
                return Err(self.nested_fault(gpa, access, 0));
            }
            let large = level > 1 && self.nested_is_large(entry, level, format);
            if entry & self.nested_reserved(level, large, format) != 0 {
                return Err(self.nested_fault(gpa, access, page_fault::PRESENT | page_fault::RESERVED));
            }
            visited[depth] = (at, entry);
            if !(level == 3 && format.levels == 3) {
                writable &= entry & pte::W != 0;
                user &= entry & pte::U != 0;
                no_execute |= format.entry == 8 && entry & pte::NX != 0;
            }
            if level == 1 || large {
                // Every access is a user's.
                let denied = !user || (access.write && !writable) || (access.fetch && no_execute);
                if denied && !access.peek {
                    return Err(self.nested_fault(gpa, access, page_fault::PRESENT));
                }
                // Page-directory pointers have no accessed bit.
                let first = usize::from(format.levels == 3);
                let settled =
                    access.peek || self.mark_used(&visited[first..=depth], format.entry, access.write);
                let dirty = access.write || entry & pte::D != 0;
                let hpa = frame(entry, shift, format) | gpa & ((1 << shift) - 1) & PAGE_MASK;
                let page = NestedPage::new(gpa & PAGE_MASK, hpa, writable && dirty, no_execute);
                return Ok((page, settled));
            }
            table = entry & if format.entry == 8 { pte::ADDRESS } else { 0xffff_f000 };
        }
        Err(self.nested_fault(gpa, access, 0))
    }

    fn nested_is_large(&self, entry: u64, level: u32, format: Format) -> bool {
        let page_size = entry & pte::PS != 0;
        match (format.entry, level) {
            (4, _) => page_size && self.cpu.svm.host.cr4 & cr4::PSE != 0,
            (_, 2) => page_size,
            (_, 3) if format.levels > 3 => page_size && self.cpu.model.gigabyte_pages(),
            _ => false,
        }
    }

    /// The bits that must be zero in an entry.
    fn nested_reserved(&self, level: u32, large: bool, format: Format) -> u64 {
        if format.entry == 4 {
            return if large { 1 << 21 } else { 0 };
        }
        let svm = &self.cpu.svm;
        let mut mask = pte::ADDRESS & !self.cpu.model.physical_mask();
        if svm.host.efer & efer::NXE == 0 {
            mask |= pte::NX;
        }
        if format.levels == 3 {
            mask |= 0x7ff0_0000_0000_0000;
        }
        match (level, large, format.levels) {
            (3, _, 3) => mask | pte::NX | 0x1e6,
            (2, true, _) => mask | 0x1f_e000,
            (3, true, _) => mask | 0x3fff_e000,
            (4 | 5, ..) => mask | pte::PS | pte::G,
            (3, false, _) => mask | pte::PS,
            _ => mask,
        }
    }

    /// A nested page fault: notes the #VMEXIT.
    fn nested_fault(&mut self, gpa: u64, access: NestedAccess, cause: u32) -> Trap {
        let mut error = cause | page_fault::USER;
        if access.write {
            error |= page_fault::WRITE;
        }
        let host = &self.cpu.svm.host;
        if access.fetch && (host.efer & efer::NXE != 0 || host.cr4 & cr4::SMEP != 0) {
            error |= page_fault::FETCH;
        }
        self.cpu.svm.exit = Exit {
            info1: u64::from(error) | access.stage,
            info2: gpa,
            data_access: !access.fetch,
            ..Exit::plain(code::NPF)
        };
        Trap::Intercepted
    }
}
