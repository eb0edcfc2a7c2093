//! MOVS and STOS.

use crate::layout::{BANK, S0, S1, TLB_ADDEND, TLB_READ, TLB_WRITE, at, gs};
use crate::translate::Translation;
use dbt_code::{Alu, Cond, Enc, Gpr, Mem, Rm, Shift, Width};
use x86_core::TLB_ENTRIES;

/// Elements that are copied without the interpreter at most: a bound on the time without a poll, and on what
/// the count may be in the computation of the last address.
const MOST: i32 = 4096;

impl Translation<'_> {
    /// MOVS or STOS, repeated or not, upwards and within one page on each side; all else is left to the
    /// interpreter.
    pub(crate) fn string(&mut self, index: usize, source: bool) {
        let Some(raw) = self.guest[index].raw else { return };
        let (width, scale) = match (raw.opcode & 1, raw.rex & 8, raw.p66) {
            (0, _, _) => (Width::B8, 0),
            (_, 8, _) => (Width::B64, 3),
            (_, _, true) => (Width::B16, 1),
            _ => (Width::B32, 2),
        };
        let repeated = raw.rep != 0;
        self.clobber_flags();
        self.held = None;
        // DF, bit 10 of RFLAGS.
        self.e.op(Enc::one(0xf6), 0, Rm::Mem(gs(at!(cpu.rflags) + 1)));
        self.e.byte(4);
        self.slow_if(Cond::NE);
        if repeated {
            self.e.alu_imm(Alu::Cmp, Width::B64, Rm::Reg(Gpr::RCX.0), MOST);
            self.slow_if(Cond::A);
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
    }

    /// Checks one side: leaves the addend in [`S1`].
    fn string_side(&mut self, register: Gpr, last: Mem, tag: i32) {
        self.e.lea(S0, last);
        if self.options.bmi2 {
            self.e.rorx(S1, register, 7);
        } else {
            self.e.mov(S1, register);
            self.e.shift_imm(Shift::Shr, Width::B64, Rm::Reg(S1.0), 7);
        }
        self.e.alu_imm(Alu::And, Width::B32, Rm::Reg(S1.0), (TLB_ENTRIES as i32 - 1) << 5);
        self.e.alu_imm(Alu::And, Width::B64, Rm::Reg(S0.0), -4096);
        self.e.alu(Alu::Cmp, Width::B64, S0, Rm::Mem(Mem::indexed(BANK, S1, 0, tag)));
        self.slow_if(Cond::NE);
        self.e.load(S1, Mem::indexed(BANK, S1, 0, TLB_ADDEND));
    }
}
