//! What a debugger on the host wants of the MMU. The guest notices nothing of it.
//!
//! Pages that a debugger watches have no entries in the TLB, so that every access takes the slow path, where it is
//! compared; those to other pages cost translated code nothing.

use super::Cpu;
use super::tlb::PAGE_MASK;
use super::walk::Access;
use crate::{Core, efer};

/// Memory that a debugger watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watch {
    /// The linear address of its first byte.
    pub address: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Whether loads are watched for.
    pub reads: bool,
    /// Whether stores are.
    pub writes: bool,
}

impl Watch {
    /// Whether the bytes of an access overlap.
    fn overlaps(&self, va: u64, bytes: u64) -> bool {
        va.wrapping_sub(self.address) < self.len || self.address.wrapping_sub(va) < bytes
    }
}

/// Everything that a debugger watches, and what of it was met.
#[derive(Debug)]
pub(crate) struct Watches {
    list: Vec<Watch>,
    met: Option<usize>,
}

impl Cpu {
    /// Whether a debugger watches a part of the page of `va`.
    #[inline]
    pub(super) fn is_page_watched(&self, va: u64) -> bool {
        self.watches
            .as_ref()
            .is_some_and(|watches| watches.list.iter().any(|watch| watch.overlaps(va & PAGE_MASK, 0x1000)))
    }

    /// Whether an access has met what a debugger watches: the processor is to stop after the instruction.
    #[inline]
    pub fn is_watch_met(&self) -> bool {
        self.watches.as_ref().is_some_and(|watches| watches.met.is_some())
    }

    /// What an access has met first since this was last called: an index into the list of [`Core::set_watches`].
    #[inline]
    pub fn take_watch_met(&mut self) -> Option<usize> {
        self.watches.as_mut()?.met.take()
    }

    /// The linear address of the next instruction.
    pub fn code_address(&self) -> u64 {
        if self.long64 {
            return self.rip;
        }
        self.segments[crate::Seg::Cs as usize].base.wrapping_add(self.rip & 0xffff_ffff) & 0xffff_ffff
    }
}

impl Core<'_> {
    /// Watches memory for a debugger, instead of what was watched until now. Resets leave it.
    pub fn set_watches(&mut self, list: Vec<Watch>) {
        self.cpu.watches = if list.is_empty() { None } else { Some(Box::new(Watches { list, met: None })) };
        // Entries of pages that are watched from now on go.
        self.flush_all_tlbs();
        self.mode_changed();
    }

    /// Notes an access of `bytes` bytes at the linear address `va` if a debugger watches for it.
    #[inline]
    pub(super) fn note_watches(&mut self, va: u64, bytes: u64, write: bool) {
        let Some(watches) = &mut self.cpu.watches else { return };
        if watches.met.is_none() {
            let wanted = |watch: &Watch| if write { watch.writes } else { watch.reads };
            watches.met = watches.list.iter().position(|watch| wanted(watch) && watch.overlaps(va, bytes));
        }
    }

    /// The guest physical address that the linear address `va` is mapped to, whatever the rights. Nothing is marked as
    /// used.
    pub fn peek_translation(&mut self, va: u64) -> Option<u64> {
        let long = self.cpu.msrs.efer & efer::LMA != 0;
        if long && !self.cpu.is_canonical(va) || !long && va >> 32 != 0 {
            return None;
        }
        let access = Access { write: false, fetch: false, user: false, no_user_pages: false, peek: true };
        let mapping = self.walk(va, access).ok()?;
        Some(mapping.gpa | va & !PAGE_MASK)
    }
}
