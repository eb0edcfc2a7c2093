//! The soft MMU: from linear addresses to host memory.

mod access;
mod debugger;
mod fetch;
mod linear;
mod nested;
mod nested_cache;
mod tlb;
mod walk;
mod walk_cache;
mod watch;

#[cfg(test)]
mod tests;

pub use debugger::Watch;
pub(crate) use debugger::Watches;
pub use tlb::{BANKS, FETCH_ENTRIES, FetchEntry, INVALID_TAG, TLB_ENTRIES, Tlb, TlbEntry, WORLDS};
pub(crate) use walk::Access;

use crate::cpuid::{CpuModel, feature};
use crate::{Core, Cpu, Scalar, Trap, cr0, cr4, efer, flags};
use std::sync::atomic::{Ordering, fence};
use tlb::{EMPTY_BANK, NewEntry, PAGE_MASK};

/// What [`Core::fill`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// RAM: the entry is in the bank of the current privilege and the access will hit.
    Direct,
    /// MMIO, or a write that must be tracked, or alignment checks or data breakpoints are on, or a debugger watches:
    /// no entry allows the access; interpret the instruction.
    Interpret,
}

/// Where an access within one page goes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// RAM.
    Ram {
        host: *mut u8,
        gpa: u64,
        /// Whether a store must be reported to guest memory.
        tracked: bool,
    },
    /// A store to memory that is only read: loads find it, stores do not change it. (An instruction that loads and
    /// stores translates for the store.)
    Rom { host: *mut u8, gpa: u64 },
    /// No RAM.
    Mmio { gpa: u64 },
}

impl Target {
    /// # Safety
    /// The target must have room for `T` in its page.
    unsafe fn load<T: Scalar>(self, core: &Core) -> T {
        match self {
            // SAFETY: inside a page of guest memory, as the caller says.
            Self::Ram { host, .. } | Self::Rom { host, .. } => unsafe { T::load(host) },
            Self::Mmio { gpa } => {
                let mut data = [0; 16];
                core.mmio_read(gpa, &mut data[..T::BYTES]);
                T::from_bytes(&data)
            }
        }
    }

    /// # Safety
    /// The target must have room for `T` in its page and have been translated for a store.
    unsafe fn store<T: Scalar>(self, core: &Core, value: T) {
        match self {
            Self::Ram { host, gpa, tracked } => {
                // SAFETY: inside a page of guest memory, as the caller says.
                unsafe { T::store(host, value) };
                if tracked {
                    core.memory.written(gpa, T::BYTES as u64);
                }
            }
            Self::Rom { gpa, .. } | Self::Mmio { gpa } => {
                core.mmio_write(gpa, &value.to_bytes()[..T::BYTES]);
            }
        }
    }

    /// # Safety
    /// The target must have room for `data.len()` bytes in its page.
    unsafe fn load_bytes(self, core: &Core, data: &mut [u8]) {
        match self {
            Self::Ram { host, .. } | Self::Rom { host, .. } => {
                let mut at = 0;
                while at + 8 <= data.len() {
                    // SAFETY: inside a page of guest memory, as the caller says.
                    let word = unsafe { u64::load(host.wrapping_add(at)) };
                    data[at..at + 8].copy_from_slice(&word.to_le_bytes());
                    at += 8;
                }
                for (index, byte) in data.iter_mut().enumerate().skip(at) {
                    // SAFETY: as above.
                    *byte = unsafe { u8::load(host.wrapping_add(index)) };
                }
            }
            Self::Mmio { gpa } => core.mmio_read(gpa, data),
        }
    }

    /// # Safety
    /// The target must have room for `data.len()` bytes in its page and have been translated for a store.
    unsafe fn store_bytes(self, core: &Core, data: &[u8]) {
        match self {
            Self::Ram { host, gpa, tracked } => {
                let mut words = data.chunks_exact(8);
                let mut at = 0;
                for word in &mut words {
                    // SAFETY: inside a page of guest memory, as the caller says.
                    unsafe { u64::store(host.wrapping_add(at), u64::from_bytes(word)) };
                    at += 8;
                }
                for &byte in words.remainder() {
                    // SAFETY: as above.
                    unsafe { u8::store(host.wrapping_add(at), byte) };
                    at += 1;
                }
                if tracked {
                    core.memory.written(gpa, data.len() as u64);
                }
            }
            Self::Rom { gpa, .. } | Self::Mmio { gpa } => core.mmio_write(gpa, data),
        }
    }
}

/// The lower `bits` of `va` with the highest of them in all bits above.
#[inline]
fn sign_extended(va: u64, bits: u32) -> u64 {
    let unused = u64::BITS - bits;
    ((va << unused) as i64 >> unused) as u64
}

/// `va` as a base or an entry point that a processor of that model has in a register: of as many bits as it could have,
/// whatever paging is in force.
pub(crate) fn canonical_base(model: &CpuModel, va: u64) -> u64 {
    sign_extended(va, if model.has(feature::LA57) { 57 } else { 48 })
}

impl Cpu {
    /// Whether `va` is a linear address of 64-bit mode: 48 bits, or 57 with 5-level paging (Intel SDM volume 1,
    /// 3.3.7.1).
    #[inline]
    pub fn is_canonical(&self, va: u64) -> bool {
        sign_extended(va, if self.cr4 & cr4::LA57 == 0 { 48 } else { 57 }) == va
    }

    /// Whether a register takes `va` as a base or an entry point.
    pub(crate) fn is_canonical_base(&self, va: u64) -> bool {
        canonical_base(&self.model, va) == va
    }

    /// The bank of explicit accesses with the rights of privilege level `cpl`.
    pub(crate) fn bank_for(&self, cpl: u8) -> usize {
        let rights = if cpl == 3 {
            Tlb::USER
        } else if self.cr4 & cr4::SMAP != 0 && self.rflags & flags::AC != 0 {
            Tlb::SUPERVISOR_AC
        } else {
            Tlb::SUPERVISOR
        };
        self.bank_of(rights)
    }

    /// The bank of that number, of the world that runs.
    #[inline]
    pub(crate) fn bank_of(&self, rights: usize) -> usize {
        if self.svm.guest { rights + Tlb::GUEST } else { rights }
    }

    /// Drops all translations, those of the guest's world too.
    pub(crate) fn flush_all_tlbs(&mut self) {
        for world in 0..WORLDS {
            self.tlb.flush(world, false);
            self.code_mapping_changed(world, true);
        }
        self.tlb.nested.clear();
    }

    fn code_mapping_changed(&mut self, world: usize, global: bool) {
        self.generations[world].all += 1;
        self.generations[world].global += u64::from(global);
        self.tlb.forget_evicted(world, global);
    }
}

impl Core<'_> {
    /// Recomputes what depends on CPL, CR0, CR4, EFER, CS, RFLAGS and DR7. To be called after any of them was
    /// changed other than through a method of [`Core`].
    pub fn mode_changed(&mut self) {
        let cpu = &mut *self.cpu;
        cpu.long64 = cpu.msrs.efer & efer::LMA != 0 && cpu.segments[1].attributes & crate::Segment::LONG != 0;
        let bank = cpu.bank_for(cpu.cpl);
        cpu.data_bank = bank as u8;
        cpu.align_check = cpu.cpl == 3 && cpu.rflags & flags::AC != 0 && cpu.cr0 & cr0::AM != 0;
        cpu.watched = watch::watches_data(cpu.dr[7]);
        let checked = cpu.align_check || cpu.watched;
        cpu.fast_bank = if cpu.long64 && !checked && cpu.watches.is_none() { cpu.data_bank } else { u8::MAX };
        cpu.tlb_bank = if checked { EMPTY_BANK.as_ptr() } else { cpu.tlb.bank(bank) };
    }

    /// The bank of the processor's own accesses, to descriptor tables and the like.
    #[inline]
    pub(crate) fn system_bank(&self) -> usize {
        self.cpu.bank_of(Tlb::SUPERVISOR)
    }

    /// Drops cached translations: all, or all but global ones. Those of the other world stay.
    pub fn flush_tlb(&mut self, keep_global: bool) {
        let world = self.cpu.world();
        self.cpu.tlb.flush(world, keep_global);
        self.cpu.code_mapping_changed(world, !keep_global);
    }

    /// Drops the cached translations of the world that does not run, if that bit of CR4 is set there.
    pub(crate) fn flush_other_world(&mut self, bit: u64) {
        if self.cpu.svm.other_cr4() & bit != 0 {
            let world = 1 - self.cpu.world();
            self.cpu.tlb.flush(world, false);
            self.cpu.code_mapping_changed(world, true);
        }
    }

    /// Drops all cached translations of both worlds, as when the VM's memory has changed.
    pub fn flush_all_tlbs(&mut self) {
        self.cpu.flush_all_tlbs();
    }

    /// INVLPG: drops cached translations of the page that contains `va`.
    pub fn invlpg(&mut self, va: u64) {
        self.invalidate_page(self.cpu.world(), va);
    }

    /// Drops a world's cached translations of the page that contains `va`.
    pub(crate) fn invalidate_page(&mut self, world: usize, va: u64) {
        // The page may be part of a large one; all entries go then.
        let all = self.cpu.tlb.in_large_page(world, va);
        if self.cpu.tlb.invalidate(world, va) {
            self.cpu.code_mapping_changed(world, all || va >> 63 != 0);
        }
    }

    /// Walks the page tables for an access to the linear address `va` at the current privilege, and installs
    /// the translation. Said of one page: an access that crosses into another needs a second call.
    ///
    /// # Errors
    /// The fault that the access has.
    pub fn fill(&mut self, va: u64, write: bool) -> Result<Fill, Trap> {
        let bank = usize::from(self.cpu.data_bank);
        if self.cpu.long64 && !self.cpu.is_canonical(va) {
            // Which exception that is depends on the segment.
            return Ok(Fill::Interpret);
        }
        let target = self.translate(va, write, bank)?;
        let direct = match target {
            Target::Ram { tracked, .. } => {
                let checked = self.cpu.align_check || self.cpu.watched || self.cpu.is_page_watched(va);
                !(checked || write && tracked)
            }
            Target::Rom { .. } | Target::Mmio { .. } => false,
        };
        Ok(if direct { Fill::Direct } else { Fill::Interpret })
    }

    /// Translates a data access within one page with the rights of `bank`.
    pub(crate) fn translate(&mut self, va: u64, write: bool, bank: usize) -> Result<Target, Trap> {
        let page = va & PAGE_MASK;
        let entry = &self.cpu.tlb.entries[bank][Tlb::index(va)];
        let tag = if write { &entry.write } else { &entry.read };
        if tag.load(Ordering::Relaxed) == page {
            let host = std::ptr::with_exposed_provenance_mut(
                entry.addend.load(Ordering::Relaxed).wrapping_add(va) as usize,
            );
            let gpa = entry.physical.load(Ordering::Relaxed) & PAGE_MASK | va & !PAGE_MASK;
            return Ok(Target::Ram { host, gpa, tracked: false });
        }
        if self.cpu.msrs.efer & efer::LMA != 0 && !self.cpu.is_canonical(va) {
            return Err(Trap::gp(0));
        }
        let access = Access {
            write,
            fetch: false,
            user: bank == self.cpu.bank_of(Tlb::USER),
            no_user_pages: bank == self.cpu.bank_of(Tlb::SUPERVISOR) && self.cpu.cr4 & cr4::SMAP != 0,
            peek: false,
        };
        let mapping = self.walk(va, access)?;
        let gpa = mapping.gpa | va & !PAGE_MASK;
        let Some(host) = self.memory.host_page(gpa) else { return Ok(Target::Mmio { gpa }) };
        host.ptr.expose_provenance();
        let direct = self.memory.may_write_directly(gpa);
        if self.cpu.is_page_watched(va) {
            let host = host.ptr.wrapping_add((va & !PAGE_MASK) as usize);
            let rom = write && !direct && self.memory.is_read_only(gpa);
            // Without an entry nobody could say that the page has become code since it was looked at.
            return Ok(if rom {
                Target::Rom { host, gpa }
            } else {
                Target::Ram { host, gpa, tracked: true }
            });
        }
        let new = NewEntry {
            va,
            gpa,
            host: host.ptr,
            write: mapping.writable && direct,
            global: mapping.global,
            shift: mapping.shift,
        };
        let entry = self.cpu.tlb.install(bank, new);
        let mut tracked = !direct;
        if new.write {
            // The page may have become code, or the dirty log have begun, since it was looked at: either
            // that is seen here, or whoever did it sees the entry.
            fence(Ordering::SeqCst);
            if !self.memory.may_write_directly(gpa) {
                entry.write.store(INVALID_TAG, Ordering::SeqCst);
                tracked = true;
            }
        }
        let host = host.ptr.wrapping_add((va & !PAGE_MASK) as usize);
        if write && tracked && self.memory.is_read_only(gpa) {
            return Ok(Target::Rom { host, gpa });
        }
        Ok(Target::Ram { host, gpa, tracked })
    }

    /// The page after that of `va`.
    pub(crate) fn next_page(&self, va: u64) -> u64 {
        let next = (va & PAGE_MASK).wrapping_add(0x1000);
        if !self.cpu.long64 && va >> 32 == 0 { next & 0xffff_ffff } else { next }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        let mut at = 0;
        while at < data.len() {
            let size = mmio_piece(gpa + at as u64, data.len() - at);
            self.platform.mmio_read(gpa + at as u64, &mut data[at..at + size]);
            at += size;
        }
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        let mut at = 0;
        while at < data.len() {
            let size = mmio_piece(gpa + at as u64, data.len() - at);
            self.platform.mmio_write(gpa + at as u64, &data[at..at + size]);
            at += size;
        }
    }
}

/// The size of the next MMIO access of `left` bytes at `gpa`: 1, 2, 4 or 8. An access of such a size is not
/// split, even if it is unaligned.
fn mmio_piece(gpa: u64, left: usize) -> usize {
    match left {
        1 | 2 | 4 | 8 => left,
        _ => {
            let aligned = 1 << gpa.trailing_zeros().min(3);
            aligned.min(1 << left.ilog2())
        }
    }
}
