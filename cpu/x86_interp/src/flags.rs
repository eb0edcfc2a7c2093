//! The arithmetic flags (Intel SDM volume 1, 3.4.3.1).

use crate::operand::Width;
use x86_core::Cpu;
use x86_core::flags::{AF, ARITHMETIC, CF, OF, PF, SF, ZF};

/// Replaces the flags in `mask`.
#[inline(always)]
pub(crate) fn set(cpu: &mut Cpu, mask: u64, value: u64) {
    cpu.rflags = cpu.rflags & !mask | value & mask;
}

/// Replaces all arithmetic flags.
#[inline(always)]
pub(crate) fn set_all(cpu: &mut Cpu, value: u64) {
    set(cpu, ARITHMETIC, value);
}

/// `flag` if `condition`.
#[inline(always)]
pub(crate) fn when(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

/// SF, ZF and PF of a result.
#[inline(always)]
pub(crate) fn sign_zero_parity<W: Width>(result: u64) -> u64 {
    let result = result & W::MASK;
    when(result & W::SIGN != 0, SF) | when(result == 0, ZF) | when((result as u8).count_ones() & 1 == 0, PF)
}

/// All flags from the vector of carries (bit n: carry out of bit n) and the result.
#[inline(always)]
fn from_carries<W: Width>(carries: u64, result: u64) -> u64 {
    let carry = carries >> (W::BITS - 1);
    sign_zero_parity::<W>(result)
        | carry & CF
        | (carries >> 3 & 1) << 4
        | ((carry ^ carries >> (W::BITS - 2)) & 1) << 11
}

/// `a + b + carry` and the flags.
#[inline(always)]
pub(crate) fn add<W: Width>(a: u64, b: u64, carry: u64) -> (u64, u64) {
    let result = a.wrapping_add(b).wrapping_add(carry) & W::MASK;
    (result, from_carries::<W>(a & b | (a | b) & !result, result))
}

/// `a - b - borrow` and the flags.
#[inline(always)]
pub(crate) fn sub<W: Width>(a: u64, b: u64, borrow: u64) -> (u64, u64) {
    let result = a.wrapping_sub(b).wrapping_sub(borrow) & W::MASK;
    (result, from_carries::<W>(!a & b | (!a | b) & result, result))
}

/// Condition `code` as the low four bits of Jcc, SETcc and CMOVcc encode it (Intel SDM volume 1, appendix B).
#[inline(always)]
pub(crate) fn condition(rflags: u64, code: u8) -> bool {
    let less = (rflags & SF != 0) != (rflags & OF != 0);
    let holds = match code >> 1 {
        0 => rflags & OF != 0,
        1 => rflags & CF != 0,
        2 => rflags & ZF != 0,
        3 => rflags & (CF | ZF) != 0,
        4 => rflags & SF != 0,
        5 => rflags & PF != 0,
        6 => less,
        _ => less || rflags & ZF != 0,
    };
    holds != (code & 1 != 0)
}

const _: () = assert!(CF == 1 && AF == 1 << 4 && OF == 1 << 11);
