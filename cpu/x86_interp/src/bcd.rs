//! Decimal arithmetic, which 64-bit mode does not have (Intel SDM volume 2, AAA to DAS). Flags that are
//! undefined come out as on AMD processors: those of the addition or subtraction that was made.

use crate::flags::{self, add, sign_zero_parity, sub, when};
use crate::operand::{numbered, set_numbered};
use iced_x86::Instruction;
use x86_core::flags::{AF, CF};
use x86_core::reg::RAX;
use x86_core::{Core, Flow, Trap};

/// AAA, and AAS if `SUBTRACT`.
pub(crate) fn ascii<const SUBTRACT: bool>(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    let ax = numbered::<u16>(core.cpu, RAX);
    let adjust = ax & 15 > 9 || core.cpu.rflags & AF != 0;
    let (adjusted, after) = match (adjust, SUBTRACT) {
        (false, _) => (ax, sign_zero_parity::<u16>(ax)),
        (true, false) => add::<u16>(ax, 0x106, 0),
        (true, true) => sub::<u16>(ax, 0x106, 0),
    };
    set_numbered::<u16>(core.cpu, RAX, adjusted & 0xff0f);
    flags::set_all(core.cpu, after & !(AF | CF) | when(adjust, AF | CF));
    Ok(Flow::Next)
}

/// AAD.
pub(crate) fn aad(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let ax = numbered::<u16>(core.cpu, RAX);
    let tens = ((ax >> 8) * u64::from(insn.immediate8())) & 0xff;
    let (result, after) = add::<u8>(ax & 0xff, tens, 0);
    set_numbered::<u16>(core.cpu, RAX, result);
    flags::set_all(core.cpu, after);
    Ok(Flow::Next)
}

/// AAM.
pub(crate) fn aam(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let al = numbered::<u8>(core.cpu, RAX);
    let base = u64::from(insn.immediate8());
    let high = al.checked_div(base).ok_or(Trap::DE)?;
    let low = al % base;
    set_numbered::<u16>(core.cpu, RAX, high << 8 | low);
    flags::set_all(core.cpu, sign_zero_parity::<u8>(low));
    Ok(Flow::Next)
}

/// DAA, and DAS if `SUBTRACT`.
pub(crate) fn decimal<const SUBTRACT: bool>(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    let al = numbered::<u8>(core.cpu, RAX);
    let before = core.cpu.rflags;
    let low = al & 15 > 9 || before & AF != 0;
    let high = al > 0x99 || before & CF != 0;
    let correction = when(low, 6) + when(high, 0x60);
    let (result, after) = if SUBTRACT { sub::<u8>(al, correction, 0) } else { add::<u8>(al, correction, 0) };
    // DAS also borrows when the low correction alone goes below zero.
    let carry = high || SUBTRACT && low && al < 6;
    set_numbered::<u8>(core.cpu, RAX, result);
    flags::set_all(core.cpu, after & !(AF | CF) | when(low, AF) | when(carry, CF));
    Ok(Flow::Next)
}
