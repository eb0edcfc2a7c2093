//! Decimal arithmetic, which 64-bit mode does not have (Intel SDM volume 2, AAA to DAS).

use crate::flags::{self, sign_zero_parity, when};
use crate::operand::{numbered, set_numbered};
use iced_x86::Instruction;
use x86_core::flags::{AF, ARITHMETIC, CF, PF, SF, ZF};
use x86_core::reg::RAX;
use x86_core::{Core, Flow, Trap};

/// AAA, and AAS if `SUBTRACT`.
pub(crate) fn ascii<const SUBTRACT: bool>(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    let ax = numbered::<u16>(core.cpu, RAX);
    let adjust = ax & 15 > 9 || core.cpu.rflags & AF != 0;
    let adjusted = match (adjust, SUBTRACT) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
    };
    let result = adjusted & 0xff0f;
    set_numbered::<u16>(core.cpu, RAX, result);
    let flags = when(adjust, AF | CF) | sign_zero_parity::<u8>(result);
    flags::set(core.cpu, ARITHMETIC, flags);
    Ok(Flow::Next)
}

/// AAD.
pub(crate) fn aad(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let ax = numbered::<u16>(core.cpu, RAX);
    let result = (ax & 0xff).wrapping_add((ax >> 8) * u64::from(insn.immediate8())) & 0xff;
    set_numbered::<u16>(core.cpu, RAX, result);
    flags::set(core.cpu, ARITHMETIC, sign_zero_parity::<u8>(result));
    Ok(Flow::Next)
}

/// AAM.
pub(crate) fn aam(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let al = numbered::<u8>(core.cpu, RAX);
    let base = u64::from(insn.immediate8());
    let high = al.checked_div(base).ok_or(Trap::DE)?;
    let low = al % base;
    set_numbered::<u16>(core.cpu, RAX, high << 8 | low);
    flags::set(core.cpu, ARITHMETIC, sign_zero_parity::<u8>(low));
    Ok(Flow::Next)
}

/// DAA, and DAS if `SUBTRACT`.
pub(crate) fn decimal<const SUBTRACT: bool>(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    let al = numbered::<u8>(core.cpu, RAX);
    let before = core.cpu.rflags;
    let low = al & 15 > 9 || before & AF != 0;
    let high = al > 0x99 || before & CF != 0;
    let correction = when(low, 6) + when(high, 0x60);
    let result = if SUBTRACT { al.wrapping_sub(correction) } else { al.wrapping_add(correction) } & 0xff;
    // DAS also borrows when the low correction alone goes below zero.
    let carry = high || SUBTRACT && low && al < 6;
    set_numbered::<u8>(core.cpu, RAX, result);
    let flags = sign_zero_parity::<u8>(result) & (SF | ZF | PF) | when(low, AF) | when(carry, CF);
    flags::set(core.cpu, ARITHMETIC, flags);
    Ok(Flow::Next)
}
