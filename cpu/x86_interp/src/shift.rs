//! Shifts and rotates (Intel SDM volume 2, SAL/SAR/SHL/SHR, RCL/RCR/ROL/ROR, SHLD, SHRD).
//!
//! Where the manuals leave flags undefined (AF after shifts, OF after counts other than 1), these do what
//! AMD processors do.

use crate::flags::{self, sign_zero_parity, when};
use crate::operand::{Width, modify, source};
use iced_x86::Instruction;
use x86_core::flags::{AF, ARITHMETIC, CF, OF};
use x86_core::{Core, Flow, Trap};

/// A shift or rotate of one operand.
pub(crate) trait Shift {
    /// The result and the new flags for a count that is not zero (1..=31, or ..=63 for 64 bits), and which
    /// flags change. `flags` are the ones before.
    fn apply<W: Width>(a: u64, count: u32, flags: u64) -> Shifted;
}

/// A result, its flags, and the mask of the flags that change.
pub(crate) type Shifted = (u64, u64, u64);

const ROTATE_FLAGS: u64 = CF | OF;

/// A bit of a value.
fn bit(value: u64, n: u32) -> bool {
    value.checked_shr(n).unwrap_or(0) & 1 != 0
}

/// Flags of SHL, SHR, SAR.
fn shifted<W: Width>(result: u64, carry: bool, overflow: bool) -> Shifted {
    let flags = sign_zero_parity::<W>(result) | AF | when(carry, CF) | when(overflow, OF);
    (result & W::MASK, flags, ARITHMETIC)
}

/// Flags of the rotates.
fn rotated(result: u64, carry: bool, overflow: bool) -> Shifted {
    (result, when(carry, CF) | when(overflow, OF), ROTATE_FLAGS)
}

pub(crate) struct Shl;
impl Shift for Shl {
    fn apply<W: Width>(a: u64, count: u32, _: u64) -> Shifted {
        let result = a.checked_shl(count).unwrap_or(0) & W::MASK;
        let carry = count <= W::BITS && bit(a, W::BITS - count);
        shifted::<W>(result, carry, (result & W::SIGN != 0) != carry)
    }
}

pub(crate) struct Shr;
impl Shift for Shr {
    fn apply<W: Width>(a: u64, count: u32, _: u64) -> Shifted {
        let result = a.checked_shr(count).unwrap_or(0);
        let before_last = a.checked_shr(count - 1).unwrap_or(0);
        shifted::<W>(result, before_last & 1 != 0, before_last & W::SIGN != 0)
    }
}

pub(crate) struct Sar;
impl Shift for Sar {
    fn apply<W: Width>(a: u64, count: u32, _: u64) -> Shifted {
        let signed = W::of(a).signed();
        let result = (signed >> count) as u64;
        shifted::<W>(result, signed >> (count - 1) & 1 != 0, false)
    }
}

pub(crate) struct Rol;
impl Shift for Rol {
    fn apply<W: Width>(a: u64, count: u32, _: u64) -> Shifted {
        let count = count % W::BITS;
        let result = if count == 0 { a } else { (a << count | a >> (W::BITS - count)) & W::MASK };
        let carry = result & 1 != 0;
        rotated(result, carry, (result & W::SIGN != 0) != carry)
    }
}

pub(crate) struct Ror;
impl Shift for Ror {
    fn apply<W: Width>(a: u64, count: u32, _: u64) -> Shifted {
        let count = count % W::BITS;
        let result = if count == 0 { a } else { (a >> count | a << (W::BITS - count)) & W::MASK };
        let carry = result & W::SIGN != 0;
        rotated(result, carry, carry != bit(result, W::BITS - 2))
    }
}

/// `value`, of one bit more than the operand, rotated left.
fn rotate_with_carry<W: Width>(a: u64, carry: u64, left: u32) -> (u64, bool) {
    let bits = W::BITS + 1;
    let value = u128::from(carry) << W::BITS | u128::from(a);
    let left = left % bits;
    let value = value << left | value >> (bits - left);
    (value as u64 & W::MASK, value >> W::BITS & 1 != 0)
}

pub(crate) struct Rcl;
impl Shift for Rcl {
    fn apply<W: Width>(a: u64, count: u32, flags: u64) -> Shifted {
        let (result, carry) = rotate_with_carry::<W>(a, flags & CF, count);
        rotated(result, carry, (result & W::SIGN != 0) != carry)
    }
}

pub(crate) struct Rcr;
impl Shift for Rcr {
    fn apply<W: Width>(a: u64, count: u32, flags: u64) -> Shifted {
        let bits = W::BITS + 1;
        let (result, carry) = rotate_with_carry::<W>(a, flags & CF, bits - count % bits);
        rotated(result, carry, (result & W::SIGN != 0) != bit(result, W::BITS - 2))
    }
}

/// The count that the processor shifts by.
fn masked<W: Width>(count: u8) -> u32 {
    u32::from(count) & if W::BITS == 64 { 63 } else { 31 }
}

/// ROL, ROR, RCL, RCR, SHL, SHR, SAR.
pub(crate) fn shift<O: Shift, W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let count = masked::<W>(source::<u8>(core, insn, 1)?);
    let before = core.cpu.rflags;
    let (after, changed) = modify::<W, (u64, u64)>(core, insn, false, |a| {
        if count == 0 {
            // Memory is still written, and a 32-bit register still zero-extended.
            return (Some(a), (0, 0));
        }
        let (result, after, changed) = O::apply::<W>(a, count, before);
        (Some(result), (after, changed))
    })?;
    flags::set(core.cpu, changed, after);
    Ok(Flow::Next)
}

/// SHLD and SHRD.
pub(crate) fn double<W: Width, const RIGHT: bool>(
    core: &mut Core<'_>,
    insn: &Instruction,
) -> Result<Flow, Trap> {
    let count = masked::<W>(source::<u8>(core, insn, 2)?);
    let fill = W::get(core.cpu, insn.op1_register()).wide();
    let (after, changed) = modify::<W, (u64, u64)>(core, insn, false, |a| {
        if count == 0 {
            return (Some(a), (0, 0));
        }
        let (result, carry) = double_shift::<W, RIGHT>(a, fill, count);
        let other = if RIGHT { bit(result, W::BITS - 2) } else { carry };
        // As AMD processors have it when 16 bits are shifted left out of existence.
        let sign = result & W::SIGN != 0 && (RIGHT || count < W::BITS);
        let overflow = sign != other;
        let after = sign_zero_parity::<W>(result) | AF | when(carry, CF) | when(overflow, OF);
        (Some(result), (after, ARITHMETIC))
    })?;
    flags::set(core.cpu, changed, after);
    Ok(Flow::Next)
}

/// The result and the last bit shifted out. Where the manuals leave it undefined, with 16 bits and a count
/// over 16, a second copy of the source follows the first and CF is clear, as on AMD processors.
fn double_shift<W: Width, const RIGHT: bool>(a: u64, fill: u64, count: u32) -> (u64, bool) {
    let (a, fill, bits) = (u128::from(a), u128::from(fill), W::BITS);
    let beyond = count > bits;
    if RIGHT {
        let value = if bits == 16 { fill << 32 | fill << 16 | a } else { fill << bits | a };
        ((value >> count) as u64 & W::MASK, !beyond && value >> (count - 1) & 1 != 0)
    } else {
        let (value, total) = match bits {
            16 => (a << 32 | fill << 16 | fill, 48),
            _ => (a << bits | fill, 2 * bits),
        };
        let result = (value << count >> (total - bits)) as u64 & W::MASK;
        (result, !beyond && value >> (total - count) & 1 != 0)
    }
}
