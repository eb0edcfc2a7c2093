//! Translation of one block: the code for each instruction.

use super::sharing::plan_checks;
use crate::abi::layout::{S0, S1, at, fetch_entries, gs};
use crate::abi::stubs::Stubs;
use crate::context::cold::{Cold, ColdKind};
use crate::context::input::{Input, Settings};
use crate::context::link::NewLink;
use crate::context::translation::{FlagsAt, Translation};
use crate::emit::flags::{restore_flags, save_flags};
use crate::emit::fpu::plan_records;
use crate::guest::class::Class;
use crate::guest::mode::Mode;
use dbt_code::{Alu, Cond, Emitter, Mem, Rm, Shift, Width};
use iced_x86::Instruction;
use x86_core::{FETCH_ENTRIES, Tlb};

/// A block as it was written.
pub(crate) struct Output {
    /// Where it is entered with the flags in memory, and with those that it needs in EFLAGS.
    pub(crate) entry_mem: u64,
    pub(crate) entry_hot: u64,
    pub(crate) links: Vec<NewLink>,
    /// Byte ranges of the page that the code depends on.
    pub(crate) depends: Vec<(u16, u16)>,
    /// Guest instructions in the block.
    pub(crate) instructions: usize,
    /// Instructions that the code points at.
    pub(crate) kept: Vec<Box<Instruction>>,
}

/// Translates the block at `input.offset`. `None` if its first instruction crosses the page's end.
pub(crate) fn translate(
    input: &Input<'_>,
    e: &mut Emitter,
    cold_code: &mut Emitter,
    settings: &Settings,
    stubs: &Stubs,
) -> Option<Output> {
    let page_va = if input.mode.is_relative() { 0 } else { input.page_va };
    let mut translation = Translation {
        e,
        cold_code,
        page: input.page,
        page_va,
        mode: input.mode,
        base: if input.mode.has(Mode::BASED) { input.base } else { 0 },
        settings,
        stubs,
        guest: Vec::with_capacity(16),
        current: 0,
        flags: FlagsAt::Host,
        held: None,
        fpu_ready: false,
        wide_ready: false,
        calls: false,
        cold: vec![],
        links: vec![],
        depends: vec![],
        kept: vec![],
        slots: input.slots,
        stops: input.stops,
        next_access: 0,
        ends: vec![],
    };
    let end = translation.decode(input)?;
    translation.liveness(end);
    plan_records(&mut translation.guest);
    if !input.mode.has(Mode::UNGROUPED) {
        plan_checks(&mut translation.guest, input.mode);
    }
    Some(translation.emit(input.next_page, end))
}

impl Translation<'_> {
    /// Writes the code of the decoded block, which ends at `end`.
    fn emit(mut self, next_page: Option<u64>, end: u16) -> Output {
        self.e.align(16);
        let (entry_mem, entry_hot) = match next_page {
            Some(gpa) => self.check_next_page(gpa),
            None if self.settings.counting => self.counted_entries(),
            None => {
                let memory = self.e.address();
                if self.guest[0].live != 0 {
                    restore_flags(self.e, S0);
                }
                (memory, self.e.address())
            }
        };
        if self.settings.counting {
            self.take_from_budget();
        }
        for index in 0..self.guest.len() {
            self.current = index;
            self.next_access = 0;
            let last = index + 1 == self.guest.len();
            self.prepare_fpu(index);
            self.prepare_wide(index);
            let cold = self.cold.len();
            self.instruction(index, last);
            if self.cold[cold..].iter().any(|cold| cold.kind.may_resume()) {
                // Who comes back from the interpreter to the next instruction holds nothing.
                self.held = None;
            }
            let sets = !matches!(self.guest[index].class, Class::Interpret | Class::Popf | Class::Iret);
            if self.guest[index].effect.writes != 0 && sets {
                self.flags = FlagsAt::Host;
            }
            let here = self.e.address();
            self.ends.push(here);
        }
        let last = self.guest.len() - 1;
        if !self.guest[last].ends_block() {
            self.finish_fpu();
            self.edge(i64::from(end), false);
        }
        self.emit_cold();
        Output {
            entry_mem,
            entry_hot,
            links: self.links,
            depends: self.depends,
            instructions: self.guest.len(),
            kept: self.kept,
        }
    }

    /// Writes the code of one instruction.
    fn instruction(&mut self, index: usize, last: bool) {
        match self.guest[index].class {
            Class::Nop => {}
            Class::Verbatim => self.verbatim(index),
            Class::IncDec => self.inc_dec(index),
            Class::Moffs => self.constant_move(index),
            Class::Generic => self.generic(index),
            Class::Lea => self.lea(index),
            Class::Push => self.push(index),
            Class::PushImm => self.push_immediate(index),
            Class::Pop => self.pop(index),
            Class::Leave => self.leave(),
            Class::Call => self.call(index),
            Class::CallIndirect => self.call_indirect(index),
            Class::Jmp => {
                let target = self.target(index);
                let backward = target <= i64::from(self.guest[index].offset);
                self.edge(target, backward);
            }
            Class::JmpIndirect => self.jmp_indirect(index),
            Class::Jcc => self.jcc(index, last),
            Class::Ret => self.ret(index),
            Class::Div => self.divide(index, false),
            Class::Idiv => self.divide(index, true),
            Class::Cld => self.direction(false),
            Class::Std => self.direction(true),
            Class::Movs => self.string(index, true),
            Class::Stos => self.string(index, false),
            Class::Cli => self.cli(),
            Class::Sti => self.sti(),
            Class::Pushf => self.pushf(),
            Class::Popf => self.popf(),
            Class::Iret => self.iret(),
            Class::MovSeg => self.mov_from_segment(index),
            Class::Swapgs => self.swapgs(),
            Class::Stac => self.access_flag(true),
            Class::Clac => self.access_flag(false),
            Class::BitString => self.bit_string(index),
            Class::Fldcw => self.fldcw(index),
            Class::Fninit => self.fninit(),
            Class::Syscall | Class::Sysret => self.system_call(index),
            Class::Rdtsc => self.time_stamp(index),
            Class::Lods => self.load_string(index),
            Class::Scas => self.scan_string(index),
            Class::Interpret => self.interpret(index, last),
        }
    }

    /// The entries of a block whose instruction crosses into the page at `gpa`: they check that it is the one
    /// that is mapped next.
    fn check_next_page(&mut self, gpa: u64) -> (u64, u64) {
        let hot = self.e.address();
        save_flags(self.e, S0);
        let memory = self.e.address();
        self.flags = FlagsAt::Memory;
        let table = fetch_entries(self.mode.has(Mode::USER), self.mode.world());
        let (tag, physical) = match self.fixed_page() {
            Some(page_va) => {
                let linear = page_va.wrapping_add(u64::from(self.base)).wrapping_add(4096);
                let va = linear & self.mode.ip_mask();
                self.e.mov_imm(S0, va);
                let at = table + (Tlb::fetch_index(va) * 24) as i32;
                (gs(at), gs(at + 8))
            }
            None => {
                self.e.load(S0, gs(at!(page_va)));
                self.lea_ip(S0, Mem::base(S0, 4096));
                self.e.mov(S1, S0);
                self.e.shift_imm(Shift::Shr, Width::B64, Rm::Reg(S1.0), 12);
                self.e.alu_imm(Alu::And, Width::B32, Rm::Reg(S1.0), FETCH_ENTRIES as i32 - 1);
                self.e.lea(S1, Mem::indexed(S1, S1, 1, 0));
                (Mem::gs_indexed(S1, 3, table), Mem::gs_indexed(S1, 3, table + 8))
            }
        };
        self.e.alu(Alu::Cmp, Width::B64, S0, Rm::Mem(tag));
        let field = self.e.jcc(Cond::NE);
        self.cold.push(Cold { field, instruction: 0, kind: ColdKind::Step });
        self.e.load(S0, physical);
        self.e.alu_imm(Alu::And, Width::B64, Rm::Reg(S0.0), -4096);
        self.e.mov_imm(S1, gpa);
        self.e.alu(Alu::Cmp, Width::B64, S0, Rm::Reg(S1.0));
        let field = self.e.jcc(Cond::NE);
        self.cold.push(Cold { field, instruction: 0, kind: ColdKind::Step });
        (memory, hot)
    }
}
