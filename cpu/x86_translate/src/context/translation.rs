//! The state of a translation.

use super::cold::{Cold, ColdKind};
use super::input::Settings;
use super::insn::{GuestInsn, Plan};
use super::link::NewLink;
use crate::abi::stubs::Stubs;
use crate::guest::flags::{ALL, Flags, live_at};
use crate::guest::mode::Mode;
use dbt_code::{Cond, Emitter, Width};
use iced_x86::Instruction;
use std::sync::atomic::AtomicU32;

/// Where the guest's arithmetic flags are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlagsAt {
    /// In EFLAGS.
    Host,
    /// In [`JitVcpu::flags`](crate::abi::layout::JitVcpu::flags).
    Memory,
    /// In either.
    Both,
}

/// The state of a translation.
pub(crate) struct Translation<'a> {
    /// The code that is executed as a rule, and the rest.
    pub(crate) e: &'a mut Emitter,
    pub(crate) cold_code: &'a mut Emitter,
    /// The page, and 15 bytes of the next if the only instruction crosses.
    pub(crate) page: &'a [u8],
    /// What the page's address is taken as: the real one, or 0 if the code is independent of it.
    pub(crate) page_va: u64,
    pub(crate) mode: Mode,
    /// The base of CS, unless the code is independent of the page's address.
    pub(crate) base: u32,
    pub(crate) settings: &'a Settings,
    pub(crate) stubs: &'a Stubs,
    /// The instructions, and which of them code is written for.
    pub(crate) guest: Vec<GuestInsn>,
    pub(crate) current: usize,
    pub(crate) flags: FlagsAt,
    /// The group slot whose addend is in S1.
    pub(crate) held: Option<u8>,
    /// The guest's x87 state is in the host's unit.
    pub(crate) fpu_ready: bool,
    /// The registers of AVX-512 are in the host's.
    pub(crate) wide_ready: bool,
    /// Jumps are to be calls of the host.
    pub(crate) calls: bool,
    /// What is put off to the end.
    pub(crate) cold: Vec<Cold>,
    pub(crate) links: Vec<NewLink>,
    /// Byte ranges of the page that the code depends on.
    pub(crate) depends: Vec<(u16, u16)>,
    /// Instructions that the code points at.
    pub(crate) kept: Vec<Box<Instruction>>,
    /// Slots of jumps between pages given out.
    pub(crate) slots: &'a AtomicU32,
    /// Offsets in the page where a block ends, ascending: a debugger looks at the processor there.
    pub(crate) stops: &'a [u16],
    /// Accesses of the current instruction that code was written for.
    pub(crate) next_access: usize,
    /// Where the code of each instruction ends.
    pub(crate) ends: Vec<u64>,
}

impl Translation<'_> {
    /// How many instructions of the block there are from that one on.
    pub(crate) fn left(&self, index: usize) -> u8 {
        (self.guest.len() - index) as u8
    }

    /// The page's virtual address, if the code may depend on it.
    pub(crate) fn fixed_page(&self) -> Option<u64> {
        (!self.mode.is_relative()).then_some(self.page_va)
    }

    /// Bytes of an address or operand as CALL and PUSH have them: 8, 4 or 2.
    pub(crate) fn word(&self) -> u32 {
        self.mode.bits() / 8
    }

    /// The same as a width.
    pub(crate) fn word_width(&self) -> Width {
        match self.mode.bits() {
            64 => Width::B64,
            32 => Width::B32,
            _ => Width::B16,
        }
    }

    /// The width of instruction pointers in host registers.
    pub(crate) fn ip_width(&self) -> Width {
        if self.mode.bits() == 64 { Width::B64 } else { Width::B32 }
    }

    /// What jumps to `ip` look for in the table of targets.
    pub(crate) fn tagged(&self, ip: u64) -> u64 {
        ip & self.mode.ip_mask() | u64::from(self.base) << 32
    }

    /// The target of a direct jump, from the beginning of the page.
    pub(crate) fn target(&self, index: usize) -> i64 {
        let target = self.guest[index].insn.near_branch_target().wrapping_sub(self.page_va) as i64;
        if self.mode.bits() == 64 { target } else { i64::from(target as i32) }
    }

    /// The flags that may be live at `target`, from a look at the code there: all if a debugger stops on the way. What
    /// was looked at becomes part of what the block depends on.
    pub(crate) fn peek(&mut self, target: i64) -> Flags {
        if self.settings.strict || !(0..4096).contains(&target) {
            return ALL;
        }
        let start = target as usize;
        let (live, looked_at) = live_at(self.mode.bits(), &self.page[start..4096], target as u64);
        if live == ALL
            || self.stops.iter().any(|stop| (start..start + looked_at).contains(&usize::from(*stop)))
        {
            return ALL;
        }
        self.depends.push((target as u16, (start + looked_at) as u16));
        live
    }

    /// The plan of the current instruction's next access.
    pub(crate) fn next_plan(&mut self) -> Plan {
        let plan = self.guest[self.current].plans.get(self.next_access).copied().unwrap_or(Plan::Single);
        self.next_access += 1;
        plan
    }

    /// Leaves the current instruction to the interpreter if `cond`, before its own checks are made.
    pub(crate) fn interpret_and_leave_if(&mut self, cond: Cond) {
        let field = self.e.jcc(cond);
        self.cold.push(Cold { field, instruction: self.current, kind: ColdKind::InterpretAndLeave });
    }

    /// Leaves the current instruction to the interpreter if `cond`. The flags are dead or in memory.
    pub(crate) fn interpret_if(&mut self, cond: Cond) {
        let field = self.e.jcc(cond);
        self.cold.push(Cold { field, instruction: self.current, kind: ColdKind::Interpret });
    }
}
