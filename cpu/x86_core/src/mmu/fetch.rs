//! Instruction fetches.

use super::Tlb;
use super::tlb::{FetchEntry, NewEntry, PAGE_MASK};
use super::walk::Access;
use crate::{Core, Scalar, Seg, Trap};

/// The longest instruction there is.
const LONGEST: usize = 15;

impl Core<'_> {
    /// The linear address of the byte at `rip` in the code segment.
    fn code_address(&self, rip: u64) -> Result<u64, Trap> {
        if self.cpu.long64 {
            return if self.cpu.is_canonical(rip) { Ok(rip) } else { Err(Trap::gp(0)) };
        }
        let code = &self.cpu.segments[Seg::Cs as usize];
        let offset = rip & 0xffff_ffff;
        if offset > u64::from(code.limit) {
            return Err(Trap::gp(0));
        }
        Ok(code.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Translates the linear address `va` for a fetch. The host pointer is null where there is no RAM.
    #[inline]
    fn translate_fetch(&mut self, va: u64) -> Result<FetchEntry, Trap> {
        let user = self.cpu.cpl == 3;
        let bank = self.cpu.bank_of(if user { Tlb::USER } else { Tlb::SUPERVISOR });
        let entry = self.cpu.tlb.fetch[bank][Tlb::fetch_index(va)];
        if entry.tag == va & PAGE_MASK {
            return Ok(entry);
        }
        let mapping =
            self.walk(va, Access { write: false, fetch: true, user, no_user_pages: false, peek: false })?;
        let physical = mapping.gpa | u64::from(mapping.global);
        let Some(host) = self.memory.host_page(mapping.gpa) else {
            return Ok(FetchEntry { tag: va & PAGE_MASK, physical, host: std::ptr::null() });
        };
        let new = NewEntry {
            va,
            gpa: mapping.gpa,
            host: host.ptr,
            write: false,
            global: mapping.global,
            shift: mapping.shift,
        };
        Ok(self.cpu.tlb.install_fetch(bank, new))
    }

    /// The translation of the page that CS:RIP is in. The host pointer is null where there is no RAM.
    ///
    /// # Errors
    /// The fault that a fetch has.
    pub fn fetch_physical(&mut self) -> Result<FetchEntry, Trap> {
        let va = self.code_address(self.cpu.rip)?;
        self.translate_fetch(va)
    }

    /// The translation of the page that is `distance` bytes of code ahead of CS:RIP, as by
    /// [`Core::fetch_physical`].
    ///
    /// # Errors
    /// The fault that a fetch there has.
    pub fn fetch_physical_ahead(&mut self, distance: u64) -> Result<FetchEntry, Trap> {
        let va = self.code_address(self.cpu.rip.wrapping_add(distance))?;
        self.translate_fetch(va)
    }

    /// The bytes at CS:RIP, as many as an instruction can have and can be fetched without a fault; at least
    /// one. If the instruction turns out longer than that, [`Core::fetch_fault`] says why.
    ///
    /// # Errors
    /// The fault that the fetch of the first byte has.
    pub fn fetch(&mut self, buffer: &mut [u8; 15]) -> Result<usize, Trap> {
        let va = self.code_address(self.cpu.rip)?;
        let entry = self.translate_fetch(va)?;
        let mut wanted = LONGEST;
        if !self.cpu.long64 {
            let left = u64::from(self.cpu.segments[Seg::Cs as usize].limit) - (self.cpu.rip & 0xffff_ffff);
            wanted = wanted.min(left as usize + 1);
        }
        let here = wanted.min(0x1000 - (va & !PAGE_MASK) as usize);
        self.fetch_bytes(&entry, va, &mut buffer[..here]);
        if here < wanted
            && let Ok(next_va) = self.code_address(self.cpu.rip.wrapping_add(here as u64))
            && let Ok(next) = self.translate_fetch(next_va)
        {
            self.fetch_bytes(&next, next_va, &mut buffer[here..wanted]);
            return Ok(wanted);
        }
        Ok(here)
    }

    /// What [`Core::fetch`] gives as a little-endian number (zero beyond the bytes that there are) and its
    /// length in bytes: quicker to come by and to compare.
    ///
    /// # Errors
    /// The fault that the fetch of the first byte has.
    #[inline(always)]
    pub fn fetch_word(&mut self) -> Result<(u128, usize), Trap> {
        let va = self.cpu.rip;
        let bank = self.cpu.bank_of(if self.cpu.cpl == 3 { Tlb::USER } else { Tlb::SUPERVISOR });
        let entry = &self.cpu.tlb.fetch[bank][Tlb::fetch_index(va)];
        let offset = (va & !PAGE_MASK) as usize;
        if self.cpu.long64 && entry.tag == va & PAGE_MASK && offset <= 0x1000 - 16 {
            // SAFETY: entries are of guest memory, and the 16 bytes are in the page.
            let word = unsafe { u128::load(entry.host.add(offset)) };
            return Ok((word & u128::MAX >> 8, LONGEST));
        }
        let mut bytes = [0; 16];
        let window: &mut [u8; LONGEST] = bytes.first_chunk_mut().expect("15 of 16 bytes");
        let length = self.fetch(window)?;
        Ok((u128::from_le_bytes(bytes), length))
    }

    /// Why the byte `length` bytes behind CS:RIP, the first that [`Core::fetch`] did not give, cannot be
    /// fetched; #GP if no instruction is that long. `None`: it can be fetched now, as another processor has
    /// just changed the page tables, so the instruction is to be tried again.
    pub fn fetch_fault(&mut self, length: usize) -> Option<Trap> {
        if length >= LONGEST {
            return Some(Trap::gp(0));
        }
        let code = &self.cpu.segments[Seg::Cs as usize];
        if !self.cpu.long64 && (self.cpu.rip & 0xffff_ffff) + length as u64 > u64::from(code.limit) {
            // Of 4 GiB, too: instructions do not wrap.
            return Some(Trap::gp(0));
        }
        let address = self.code_address(self.cpu.rip.wrapping_add(length as u64));
        address.and_then(|va| self.translate_fetch(va)).err()
    }

    fn fetch_bytes(&self, entry: &FetchEntry, va: u64, data: &mut [u8]) {
        if entry.host.is_null() {
            self.mmio_read(entry.physical & PAGE_MASK | va & !PAGE_MASK, data);
            return;
        }
        let host = entry.host.wrapping_add((va & !PAGE_MASK) as usize);
        if data.len() == LONGEST {
            // SAFETY: the 15 bytes are in the page.
            let (low, high) = unsafe { (u64::load(host), u64::load(host.wrapping_add(7))) };
            data[..8].copy_from_slice(&low.to_bytes()[..8]);
            data[7..].copy_from_slice(&high.to_bytes()[..8]);
            return;
        }
        for (index, byte) in data.iter_mut().enumerate() {
            // SAFETY: the bytes are in the page.
            *byte = unsafe { u8::load(host.wrapping_add(index)) };
        }
    }
}
