//! What generated code addresses through GS: one block for each vCPU, and where in it everything is.

use super::counters::Counters;
use crate::guest::mode::{Mode, top};
use dbt_code::{Gpr, Mem};
use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use x86_core::{Cpu, Platform, Seg, Segment, TlbEntry, Trap, reg};

/// Entries in each table of indirect jump targets; the index is the low 16 bits of the target.
pub(crate) const IBTC_ENTRIES: usize = 1 << 16;
/// Entries in the table of verified pages.
pub(crate) const PAGE_CHECKS: usize = 1024;
/// Direct jumps between pages of user code that can be linked.
pub(crate) const LINK_SLOTS: usize = 1 << 15;
/// Tables of indirect jump targets: of supervisor code and of user code, and the same of a guest's world.
pub(crate) const TABLES: usize = 2 * x86_core::WORLDS;
/// Slots for host addresses of verified pages in a block.
pub(crate) const GROUP_SLOTS: usize = 8;

/// An indirect jump target.
#[repr(C, align(16))]
pub(crate) struct IbtcEntry {
    /// The guest virtual address, or the offset with the base of CS in the upper half. An empty entry holds one that no
    /// lookup brings here.
    pub(crate) va: AtomicU64,
    /// Where the block that begins there is entered with the flags in memory.
    pub(crate) host: AtomicU64,
}

impl IbtcEntry {
    /// An address that no lookup brings to that entry.
    pub(crate) fn empty(index: usize) -> u64 {
        u64::from(index == 0)
    }

    /// Makes the entry of that index an empty one.
    pub(crate) fn clear(&self, index: usize) {
        self.va.store(Self::empty(index), Ordering::Relaxed);
    }
}

/// Why generated code was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum ExitReason {
    /// RIP is where to go on.
    Dispatch = 0,
    /// An indirect jump whose target was not in the table, or a poll; RIP is set.
    Indirect = 1,
    /// A direct jump that is not linked: the argument is the link's number.
    Link = 2,
    /// A poll at a direct jump saw the exit request: the argument is the link's number.
    Poll = 3,
    /// A function that was called stopped with [`JitVcpu::trap`].
    Trap = 4,
    /// The processor executed HLT.
    Halt = 5,
    /// As Dispatch, and the next block is to be translated without shared checks.
    Ungrouped = 6,
    /// RIP is at an instruction for the interpreter.
    Step = 7,
}

/// What is to be done with the frames before generated code goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FrameSwitch {
    /// Nothing.
    Stay = 0,
    /// User code is left for the kernel's.
    ToKernel = 1,
    /// The kernel's code is left for a user's.
    ToUser = 2,
}

/// An image as FXSAVE64 stores it.
#[repr(C, align(64))]
pub(crate) struct FxImage([u8; 512]);

/// The control word of Rust code.
pub(crate) const HOST_CONTROL: u16 = 0x37f;

/// One vCPU's block: the processor first, then what belongs to generated code alone.
#[repr(C, align(64))]
pub(crate) struct JitVcpu {
    pub(crate) cpu: Cpu,
    /// This block's own address.
    pub(crate) this: *mut JitVcpu,
    /// The stack pointer of Rust code.
    pub(crate) host_rsp: u64,
    /// Where generated code is entered when the guest's registers are loaded.
    pub(crate) jump_target: u64,
    /// For use within one instruction.
    pub(crate) scratch: [u64; 4],
    /// The addends of checks that several accesses share.
    pub(crate) groups: [u64; GROUP_SLOTS],
    /// Where FXSAVE stores to.
    pub(crate) fx: FxImage,
    /// The virtual address of the page that runs, for code that is translated independently of it.
    pub(crate) page_va: u64,
    /// What the entries of the tables of jump targets are for: a mode's bits.
    pub(crate) table_modes: [u32; TABLES],
    /// The highest offset that loads, and stores, may reach in each segment without a further look, or -1: outside
    /// 64-bit mode.
    pub(crate) tops: [[i64; 2]; 6],
    /// Why generated code was left, an [`ExitReason`], and what belongs to that.
    pub(crate) exit_argument: u64,
    pub(crate) exit_reason: u32,
    /// MXCSR of Rust code.
    pub(crate) host_mxcsr: u32,
    /// The x87 control word of Rust code.
    pub(crate) host_control: u16,
    /// The guest's x87 state is in the host's unit.
    pub(crate) fpu_loaded: bool,
    /// It was when generated code called, and is to be again when that goes on.
    pub(crate) fpu_resume: bool,
    /// The host's time-stamp counter plus `tsc_base` is [`Platform::tsc`].
    pub(crate) tsc_direct: bool,
    /// A [`FrameSwitch`].
    pub(crate) frames_switch: u8,
    /// RSP without any frames of this privilege, under the user's frames while the kernel's code runs, without
    /// any at all, and at which no more are made.
    pub(crate) frames: u64,
    pub(crate) user_frames: u64,
    pub(crate) frames_bottom: u64,
    pub(crate) frames_limit: u64,
    /// See `tsc_direct`.
    pub(crate) tsc_base: u64,
    /// The arithmetic flags in memory: LAHF's byte in the high half, OF in the low.
    pub(crate) flags: u16,
    /// Leave when interrupts become enabled.
    pub(crate) interrupt_window: bool,
    /// A repeated instruction paused, with RIP at it.
    pub(crate) paused: bool,
    /// Instructions are counted: blocks take theirs from `budget` when they are entered.
    pub(crate) counting: bool,
    /// Instructions that may be executed yet, and what the count is when there are no more.
    pub(crate) budget: i64,
    pub(crate) count_end: u64,
    /// Numbers of verified (virtual page, guest physical page) pairs, by virtual page, of each world.
    pub(crate) page_checks: [[u32; PAGE_CHECKS]; x86_core::WORLDS],
    /// For each such jump the page that it was verified from in the address space that is loaded, or 1.
    pub(crate) verified: [u64; LINK_SLOTS],
    /// What an instruction stopped with.
    pub(crate) trap: Option<Trap>,
    /// The VM's memory; and the surroundings while the vCPU runs.
    pub(crate) memory: *const guest_memory::GuestMemory,
    pub(crate) platform: Option<NonNull<dyn Platform>>,
    /// Changes when blocks of the VM are dropped.
    pub(crate) invalidations: Arc<AtomicU64>,
    /// What was done so far.
    pub(crate) counters: Counters,
    /// Filled entries of the tables, to clear them by; and slots of each world.
    pub(crate) filled: [Vec<u16>; TABLES],
    pub(crate) filled_slots: [Vec<u16>; x86_core::WORLDS],
    /// Odd while the vCPU may be in the middle of an instruction: between the check of a store and the store.
    pub(crate) spells: AtomicU64,
    /// By [`Mode::table`](crate::guest::mode::Mode::table).
    pub(crate) ibtc: [[IbtcEntry; IBTC_ENTRIES]; TABLES],
}

impl JitVcpu {
    /// What the arithmetic flags in memory are as RFLAGS bits.
    pub(crate) fn arithmetic_flags(&self) -> u64 {
        let flags = u64::from(self.flags);
        (flags >> 8 & 0xd5) | (flags & 1) << 11
    }

    /// Sets the flags in memory from RFLAGS.
    pub(crate) fn flags_from_rflags(&mut self) {
        let rflags = self.cpu.rflags;
        self.flags = ((rflags & 0xd5 | 2) << 8 | (rflags >> 11 & 1)) as u16;
    }

    /// Brings what is known of segments up to date.
    pub(crate) fn segments_changed(&mut self) {
        if self.cpu.long64 {
            return;
        }
        for (tops, segment) in self.tops.iter_mut().zip(&self.cpu.segments) {
            *tops = [top(&self.cpu, segment, false), top(&self.cpu, segment, true)];
        }
    }

    /// What the table of jump targets has RIP as, in `mode`.
    pub(crate) fn tag(&self, mode: Mode) -> u64 {
        let base = if mode.has(Mode::BASED) { self.cpu.segments[Seg::Cs as usize].base << 32 } else { 0 };
        self.cpu.rip | base
    }

    /// Brings RFLAGS up to date with the flags in memory.
    pub(crate) fn flags_to_rflags(&mut self) {
        let arithmetic = x86_core::flags::ARITHMETIC;
        self.cpu.rflags = self.cpu.rflags & !arithmetic | self.arithmetic_flags();
    }
}

/// The displacement of a field from GS.
macro_rules! at {
    ($($field:tt)+) => { std::mem::offset_of!(crate::abi::layout::JitVcpu, $($field)+) as i32 };
}
pub(crate) use at;

/// Where guest registers are while generated code runs.
pub(crate) const fn host_register(guest: u8) -> Option<Gpr> {
    match guest {
        4 => Some(Gpr::R11),
        9 | 10 | 11 | 15 => None,
        _ => Some(Gpr(guest)),
    }
}

/// The TLB bank.
pub(crate) const BANK: Gpr = Gpr::R15;
/// Scratch registers.
pub(crate) const S0: Gpr = Gpr::R9;
pub(crate) const S1: Gpr = Gpr::R10;
/// The guest's stack pointer.
pub(crate) const GUEST_RSP: Gpr = Gpr::R11;

/// A guest register's place in memory: its only one if it has no host register.
pub(crate) const fn slot(guest: u8) -> i32 {
    (offset_of!(JitVcpu, cpu) + offset_of!(Cpu, regs) + guest as usize * 8) as i32
}

/// A vector register's place in memory.
pub(crate) const fn vector_slot(register: u8) -> i32 {
    let size = size_of::<x86_core::VecReg>();
    (offset_of!(JitVcpu, cpu) + offset_of!(Cpu, vectors) + register as usize * size) as i32
}

/// A mask register's place in memory.
pub(crate) const fn mask_slot(register: u8) -> i32 {
    (offset_of!(JitVcpu, cpu) + offset_of!(Cpu, opmask) + register as usize * 8) as i32
}

/// The place of a segment's base.
pub(crate) const fn segment_base(segment: usize) -> i32 {
    (offset_of!(JitVcpu, cpu)
        + offset_of!(Cpu, segments)
        + segment * size_of::<Segment>()
        + offset_of!(Segment, base)) as i32
}

/// The place of the highest offset for loads from a segment, or stores to it.
pub(crate) const fn segment_top(segment: usize, write: bool) -> i32 {
    (offset_of!(JitVcpu, tops) + segment * 16 + write as usize * 8) as i32
}

/// The TLB's bank of those rights in a world.
pub(crate) const fn bank_of(rights: usize, world: usize) -> usize {
    rights + world * x86_core::Tlb::GUEST
}

/// The place of the entries for fetches of a privilege in a world.
pub(crate) const fn fetch_entries(user: bool, world: usize) -> i32 {
    let bank = bank_of(if user { x86_core::Tlb::USER } else { x86_core::Tlb::SUPERVISOR }, world);
    let entries = offset_of!(JitVcpu, cpu) + offset_of!(Cpu, tlb) + offset_of!(x86_core::Tlb, fetch);
    (entries + bank * x86_core::FETCH_ENTRIES * size_of::<x86_core::FetchEntry>()) as i32
}

/// Offsets in a TLB entry.
pub(crate) const TLB_READ: i32 = offset_of!(TlbEntry, read) as i32;
pub(crate) const TLB_WRITE: i32 = offset_of!(TlbEntry, write) as i32;
pub(crate) const TLB_ADDEND: i32 = offset_of!(TlbEntry, addend) as i32;

/// A slot of the block as an operand.
pub(crate) const fn gs(offset: i32) -> Mem {
    Mem::gs(offset)
}

const _: () = {
    assert!(offset_of!(JitVcpu, cpu) == 0);
    assert!(size_of::<TlbEntry>() == 32);
    assert!(size_of::<IbtcEntry>() == 16);
    assert!(size_of::<x86_core::FetchEntry>() == 24);
    assert!(offset_of!(x86_core::FetchEntry, tag) == 0 && offset_of!(x86_core::FetchEntry, physical) == 8);
    assert!(slot(4) == slot(0) + 32 && reg::RSP == 4);
    assert!(vector_slot(0) % 64 == 0);
    // Whatever bits a misaligned address keeps, it is no tag.
    assert!(x86_core::INVALID_TAG & 0xfff > 63 && x86_core::INVALID_TAG & 63 == 0);
    // FXSAVE and FXRSTOR want it.
    assert!(offset_of!(JitVcpu, fx) % 16 == 0);
    assert!((offset_of!(JitVcpu, cpu) + offset_of!(Cpu, x87)) % 16 == 0);
};
