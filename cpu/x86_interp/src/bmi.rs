//! BMI1 and BMI2 (Intel SDM volume 2) but for ANDN and the counts.

use crate::flags::{self, sign_zero_parity, when};
use crate::operand::{Width, numbered, source};
use iced_x86::Instruction;
use x86_core::flags::{AF, ARITHMETIC, CF, SF};
use x86_core::reg::RDX;
use x86_core::{Core, Flow, Trap};

/// Stores a result in operand 0, with SF, ZF and PF of it, CF as given, and AF and OF clear.
fn finish<W: Width>(core: &mut Core<'_>, insn: &Instruction, result: u64, carry: bool) -> Result<Flow, Trap> {
    W::set(core.cpu, insn.op0_register(), W::of(result));
    flags::set(core.cpu, ARITHMETIC, sign_zero_parity::<W>(result) | when(carry, CF));
    Ok(Flow::Next)
}

/// BEXTR. SF, AF and PF are undefined; AMD processors clear SF, set AF, and PF by the result.
pub(crate) fn bextr<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?.wide();
    let control = source::<W>(core, insn, 2)?.wide();
    let (start, len) = (control as u8, (control >> 8) as u8);
    let mask = 1u64.checked_shl(len.into()).map_or(u64::MAX, |limit| limit - 1);
    let result = value.checked_shr(start.into()).unwrap_or(0) & mask;
    W::set(core.cpu, insn.op0_register(), W::of(result));
    flags::set(core.cpu, ARITHMETIC, sign_zero_parity::<W>(result) & !SF | AF);
    Ok(Flow::Next)
}

/// BLSI.
pub(crate) fn blsi<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?.wide();
    finish::<W>(core, insn, value & value.wrapping_neg(), value != 0)
}

/// BLSMSK.
pub(crate) fn blsmsk<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?.wide();
    finish::<W>(core, insn, (value ^ value.wrapping_sub(1)) & W::MASK, value == 0)
}

/// BLSR.
pub(crate) fn blsr<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?.wide();
    finish::<W>(core, insn, value & value.wrapping_sub(1), value == 0)
}

/// BZHI.
pub(crate) fn bzhi<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?.wide();
    let index = source::<W>(core, insn, 2)?.wide() as u8;
    let beyond = u32::from(index) >= W::BITS;
    let result = if beyond { value } else { value & ((1 << index) - 1) };
    finish::<W>(core, insn, result, beyond)
}

/// MULX: no flags. If both destinations are one register the upper half stays.
pub(crate) fn mulx<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let b = source::<W>(core, insn, 2)?.wide();
    let product = u128::from(numbered::<W>(core.cpu, RDX)) * u128::from(b);
    W::set(core.cpu, insn.op1_register(), W::of(product as u64));
    W::set(core.cpu, insn.op0_register(), W::of((product >> W::BITS) as u64));
    Ok(Flow::Next)
}

/// PDEP.
pub(crate) fn pdep<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let mut value = source::<W>(core, insn, 1)?.wide();
    let mut mask = source::<W>(core, insn, 2)?.wide();
    let mut result = 0;
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        if value & 1 != 0 {
            result |= lowest;
        }
        value >>= 1;
        mask ^= lowest;
    }
    W::set(core.cpu, insn.op0_register(), W::of(result));
    Ok(Flow::Next)
}

/// PEXT.
pub(crate) fn pext<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?.wide();
    let mut mask = source::<W>(core, insn, 2)?.wide();
    let mut result = 0u64;
    let mut position = 0;
    while mask != 0 {
        let lowest = mask & mask.wrapping_neg();
        result |= u64::from(value & lowest != 0) << position;
        position += 1;
        mask ^= lowest;
    }
    W::set(core.cpu, insn.op0_register(), W::of(result));
    Ok(Flow::Next)
}

/// RORX.
pub(crate) fn rorx<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?.wide();
    let count = u32::from(insn.immediate8()) & (W::BITS - 1);
    let result = if count == 0 { value } else { value >> count | value << (W::BITS - count) };
    W::set(core.cpu, insn.op0_register(), W::of(result));
    Ok(Flow::Next)
}

/// How SARX, SHLX and SHRX shift.
pub(crate) const LEFT: u8 = 0;
pub(crate) const RIGHT: u8 = 1;
pub(crate) const ARITHMETIC_RIGHT: u8 = 2;

/// SARX, SHLX, SHRX: no flags.
pub(crate) fn shift<W: Width, const HOW: u8>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?;
    let count = source::<W>(core, insn, 2)?.wide() as u32 & (W::BITS - 1);
    let result = match HOW {
        LEFT => value.wide() << count,
        RIGHT => value.wide() >> count,
        _ => (value.signed() >> count) as u64,
    };
    W::set(core.cpu, insn.op0_register(), W::of(result));
    Ok(Flow::Next)
}
