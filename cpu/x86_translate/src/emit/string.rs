//! MOVS and STOS; LODS and SCAS.

use super::access::index_tlb;
use crate::abi::layout::{BANK, S0, S1, TLB_ADDEND, TLB_READ, TLB_WRITE, at, gs};
use crate::context::address::Access;
use crate::context::translation::Translation;
use dbt_code::{Alu, Cond, Enc, Gpr, Mem, Rm, Width};
use iced_x86::Instruction;
use x86_core::{Seg, segment_index};

/// Elements that are copied without the interpreter at most: a bound on the time without a poll, and on what
/// the count may be in the computation of the last address.
const MAX_ELEMENTS: i32 = 4096;

/// The width of an element, and the binary logarithm of its size.
fn element(insn: &Instruction) -> (Width, u8) {
    match insn.memory_size().size() {
        1 => (Width::B8, 0),
        2 => (Width::B16, 1),
        4 => (Width::B32, 2),
        _ => (Width::B64, 3),
    }
}

impl Translation<'_> {
    /// MOVS or STOS, repeated or not, upwards and within one page on each side; all else is left to the
    /// interpreter.
    pub(crate) fn string(&mut self, index: usize, source: bool) {
        let Some(raw) = self.guest[index].raw else { return };
        let (width, scale) = element(&self.guest[index].insn);
        let repeated = raw.rep != 0;
        let cut = self.mode.bits() != 64;
        self.leave_if_downwards();
        if repeated {
            if cut {
                // With a count of 0, too: nothing is to be written then, registers included.
                self.e.op(Enc::one(0x8d), S0.0, Rm::Mem(Mem::base(Gpr::RCX, -1)));
                self.e.alu_imm(Alu::Cmp, Width::B32, Rm::Reg(S0.0), MAX_ELEMENTS - 1);
            } else {
                self.e.alu_imm(Alu::Cmp, Width::B64, Rm::Reg(Gpr::RCX.0), MAX_ELEMENTS);
            }
            self.interpret_if(Cond::A);
        }
        if cut {
            // What is above does not count, and is lost with the first element in any case.
            self.cut_string_registers(source, repeated);
        }
        let last = |register| {
            let count = repeated.then_some((Gpr::RCX, scale));
            let disp = if repeated { -1 } else { (1 << scale) - 1 };
            Mem { base: Some(register), index: count, disp, gs: false }
        };
        if source {
            self.string_side(Gpr::RSI, last(Gpr::RSI), TLB_READ);
            self.e.store(Width::B64, gs(at!(scratch)), S1);
        }
        self.string_side(Gpr::RDI, last(Gpr::RDI), TLB_WRITE);
        if source {
            self.e.load(S0, gs(at!(scratch)));
            self.e.lea(Gpr::RSI, Mem::indexed(Gpr::RSI, S0, 0, 0));
        }
        self.e.lea(Gpr::RDI, Mem::indexed(Gpr::RDI, S1, 0, 0));
        if width == Width::B16 {
            self.e.byte(0x66);
        }
        if repeated {
            self.e.byte(0xf3);
        }
        if width == Width::B64 {
            self.e.byte(0x48);
        }
        self.e.byte(raw.opcode);
        if source {
            self.e.alu(Alu::Sub, Width::B64, Gpr::RSI, Rm::Reg(S0.0));
        }
        self.e.alu(Alu::Sub, Width::B64, Gpr::RDI, Rm::Reg(S1.0));
        if cut {
            self.cut_string_registers(source, repeated);
        }
    }

    /// Cuts the registers that a string instruction of 32-bit code changes to 32 bits.
    fn cut_string_registers(&mut self, source: bool, repeated: bool) {
        let used = [(Gpr::RDI, true), (Gpr::RSI, source), (Gpr::RCX, repeated)];
        for (register, _) in used.into_iter().filter(|(_, used)| *used) {
            self.e.op(Enc::one(0x8b), register.0, Rm::Reg(register.0)); // mov edi, edi
        }
    }

    /// Leaves the instruction to the interpreter if DF is set.
    fn leave_if_downwards(&mut self) {
        self.clobber_flags();
        self.held = None;
        // DF, bit 10 of RFLAGS.
        self.e.op(Enc::one(0xf6), 0, Rm::Mem(gs(at!(cpu.rflags) + 1)));
        self.e.byte(4);
        self.interpret_if(Cond::NE);
        self.flags_lost();
    }

    /// LODS, not repeated.
    pub(crate) fn load_string(&mut self, index: usize) {
        let insn = self.guest[index].insn;
        let (width, scale) = element(&insn);
        self.leave_if_downwards();
        let segment = segment_index(insn.memory_segment()).unwrap_or(Seg::Ds);
        let ea = self.at_register(Gpr::RSI.0, 0, segment);
        let mem = self.access(&ea, Access::read(1 << scale));
        self.e.op(Enc::one(0x8a).sized(width), Gpr::RAX.0, Rm::Mem(mem));
        self.advance(Gpr::RSI, 1 << scale, self.word_width());
    }

    /// SCAS, not repeated.
    pub(crate) fn scan_string(&mut self, index: usize) {
        let (width, scale) = element(&self.guest[index].insn);
        self.leave_if_downwards();
        let ea = self.at_register(Gpr::RDI.0, 0, Seg::Es);
        let mem = self.access(&ea, Access::read(1 << scale));
        self.e.op(Enc::one(0x3a).sized(width), Gpr::RAX.0, Rm::Mem(mem));
        self.advance(Gpr::RDI, 1 << scale, self.word_width());
    }

    /// Checks one side: leaves the addend in [`S1`].
    fn string_side(&mut self, register: Gpr, last: Mem, tag: i32) {
        self.e.lea(S0, last);
        index_tlb(self.e, self.settings, register);
        self.e.alu_imm(Alu::And, Width::B64, Rm::Reg(S0.0), -4096);
        self.e.alu(Alu::Cmp, Width::B64, S0, Rm::Mem(Mem::indexed(BANK, S1, 0, tag)));
        self.interpret_if(Cond::NE);
        self.e.load(S1, Mem::indexed(BANK, S1, 0, TLB_ADDEND));
    }
}
