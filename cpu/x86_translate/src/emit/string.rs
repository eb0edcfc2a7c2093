//! MOVS and STOS; LODS and SCAS.

use super::access::index_tlb;
use crate::abi::layout::{BANK, S0, S1, TLB_ADDEND, TLB_READ, TLB_WRITE, at, gs};
use crate::context::address::{Access, Ea};
use crate::context::translation::Translation;
use crate::guest::encoding::Raw;
use dbt_code::{Alu, Cond, Enc, Gpr, Mem, Rm, Width};

/// Elements that are copied without the interpreter at most: a bound on the time without a poll, and on what
/// the count may be in the computation of the last address.
const MAX_ELEMENTS: i32 = 4096;

/// The width of an element, and the binary logarithm of its size.
fn element(raw: &Raw) -> (Width, u8) {
    match (raw.opcode & 1, raw.rex & 8, raw.p66) {
        (0, _, _) => (Width::B8, 0),
        (_, 8, _) => (Width::B64, 3),
        (_, _, true) => (Width::B16, 1),
        _ => (Width::B32, 2),
    }
}

impl Translation<'_> {
    /// MOVS or STOS, repeated or not, upwards and within one page on each side; all else is left to the
    /// interpreter.
    pub(crate) fn string(&mut self, index: usize, source: bool) {
        let Some(raw) = self.guest[index].raw else { return };
        let (width, scale) = element(&raw);
        let repeated = raw.rep != 0;
        self.leave_if_downwards();
        if repeated {
            self.e.alu_imm(Alu::Cmp, Width::B64, Rm::Reg(Gpr::RCX.0), MAX_ELEMENTS);
            self.interpret_if(Cond::A);
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
        let Some(raw) = self.guest[index].raw else { return };
        let (width, scale) = element(&raw);
        self.leave_if_downwards();
        let mem = self.access(&Ea::register(Gpr::RSI.0, 0), Access::read(1 << scale));
        self.e.op(Enc::one(0x8a).sized(width), Gpr::RAX.0, Rm::Mem(mem));
        self.e.lea(Gpr::RSI, Mem::base(Gpr::RSI, 1 << scale));
    }

    /// SCAS, not repeated.
    pub(crate) fn scan_string(&mut self, index: usize) {
        let Some(raw) = self.guest[index].raw else { return };
        let (width, scale) = element(&raw);
        self.leave_if_downwards();
        let mem = self.access(&Ea::register(Gpr::RDI.0, 0), Access::read(1 << scale));
        self.e.op(Enc::one(0x3a).sized(width), Gpr::RAX.0, Rm::Mem(mem));
        self.e.lea(Gpr::RDI, Mem::base(Gpr::RDI, 1 << scale));
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
