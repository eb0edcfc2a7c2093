//! Vector registers between the host's and memory, when generated code is entered and left.
//!
//! While generated code runs they are all in the host's own registers, at their full length. How much of that is
//! moved is told by [`x86_core::Cpu::vector_width`]: guests that use no more than XMM registers have the upper parts
//! clean, as processors call it, so that their SSE instructions wait for nothing; so has Rust code. Code that uses
//! more raises the width, and what is found when generated code is left lowers it.

use crate::abi::layout::{at, gs, mask_slot, vector_slot};
use crate::context::cold::{Cold, ColdKind};
use crate::context::translation::Translation;
use crate::guest::class::Class;
use dbt_code::{Alu, Cond, Emitter, Enc, Evex, Map, Rm};
use x86_core::width;

const REGISTERS: u8 = 16;
/// With AVX-512.
const ALL_REGISTERS: u8 = 32;
const MASKS: u8 = 8;

impl Translation<'_> {
    /// What is due before the code of an instruction that needs the registers of AVX-512. (Once they are in use they
    /// stay so while generated code runs.)
    pub(crate) fn prepare_wide(&mut self, index: usize) {
        let guest = &self.guest[index];
        if !guest.info.wide || guest.class == Class::Interpret || self.wide_ready {
            return;
        }
        self.wide_ready = true;
        self.clobber_flags();
        compare_width(self.e, width::ZMM);
        let field = self.e.jcc(Cond::NE);
        let resume = self.e.address();
        self.cold.push(Cold { field, instruction: index, kind: ColdKind::BeginWide(resume) });
    }
}

/// Shared code that is called while less than ZMM registers are in use: what they have more is in the host's registers
/// whatever Rust code left there, but for the upper parts of those that YMM registers are in; all are zeros.
pub(super) fn begin_wide(e: &mut Emitter) {
    for register in REGISTERS..ALL_REGISTERS {
        let xor = Evex { vvvv: register, ..Evex::m0f(1, false, 2, 0xef) };
        e.evex(xor, register, Rm::Reg(register)); // vpxord
    }
    for mask in 0..MASKS {
        e.vex(Map::M0f, 0, true, true, 0x47, mask, mask, Rm::Reg(mask)); // kxorq
    }
    e.op(Enc::one(0xc6), 0, Rm::Mem(gs(at!(cpu.vector_width))));
    e.byte(width::ZMM);
    e.ret();
}

/// In shared code: stores all, and leaves upper parts clean. Uses the flags and the registers.
pub(super) fn store(e: &mut Emitter, avx: bool) {
    if !avx {
        return (0..REGISTERS).for_each(|register| e.store_xmm(gs(vector_slot(register)), register));
    }
    compare_width(e, width::ZMM);
    let wide = e.jcc(Cond::E);
    for register in 0..REGISTERS {
        e.store_ymm(gs(vector_slot(register)), register);
    }
    // Is any upper half not zero?
    for step in [1, 2, 4, 8] {
        for register in (0..REGISTERS).step_by(2 * step) {
            let other = Rm::Reg(register + step as u8);
            e.vex(Map::M0f, 0, false, true, 0x56, register, register, other); // vorps
        }
    }
    e.vex(Map::M0f3a, 1, false, true, 0x19, 0, 0, Rm::Reg(1)); // vextractf128 xmm1, ymm0, 1
    e.byte(1);
    e.vex(Map::M0f38, 1, false, false, 0x17, 1, 0, Rm::Reg(1)); // vptest xmm1, xmm1
    e.op(Enc::m0f(0x90 | Cond::NE.0), 0, Rm::Mem(gs(at!(cpu.vector_width))));
    let done = e.jmp();
    let here = e.address();
    e.link(wide, here);
    for register in 0..ALL_REGISTERS {
        e.store_zmm(gs(vector_slot(register)), register);
    }
    for mask in 0..MASKS {
        e.store_mask(gs(mask_slot(mask)), mask);
    }
    let here = e.address();
    e.link(done, here);
    e.vzeroupper();
}

/// In shared code: loads all. Uses the flags.
pub(super) fn load(e: &mut Emitter, avx: bool) {
    let xmm = |e: &mut Emitter| {
        (0..REGISTERS).for_each(|register| e.load_xmm(register, gs(vector_slot(register))));
    };
    if !avx {
        return xmm(e);
    }
    e.vzeroupper();
    compare_width(e, width::YMM);
    let narrow = e.jcc(Cond::B);
    let wide = e.jcc(Cond::A);
    for register in 0..REGISTERS {
        e.load_ymm(register, gs(vector_slot(register)));
    }
    let done = e.jmp();
    let here = e.address();
    e.link(wide, here);
    for register in 0..ALL_REGISTERS {
        e.load_zmm(register, gs(vector_slot(register)));
    }
    for mask in 0..MASKS {
        e.load_mask(mask, gs(mask_slot(mask)));
    }
    let all = e.jmp();
    let here = e.address();
    e.link(narrow, here);
    xmm(e);
    let here = e.address();
    e.link(done, here);
    e.link(all, here);
}

fn compare_width(e: &mut Emitter, width: u8) {
    e.op(Enc::one(0x80), Alu::Cmp as u8, Rm::Mem(gs(at!(cpu.vector_width))));
    e.byte(width);
}
