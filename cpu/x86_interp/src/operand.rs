//! Operand sizes, the register file as instructions see it, and operands.

use iced_x86::{Instruction, OpKind, Register};
use x86_core::{Core, Cpu, Scalar, Seg, Trap, effective_address};

/// An operand size of integer instructions: `u8`, `u16`, `u32` or `u64`. Arithmetic is done on `u64`.
pub(crate) trait Width: Scalar {
    /// Its bits.
    const BITS: u32;
    /// All bits of the operand.
    const MASK: u64 = u64::MAX >> (64 - Self::BITS);
    /// The operand's sign bit.
    const SIGN: u64 = 1 << (Self::BITS - 1);
    /// The accumulator of this size.
    const ACCUMULATOR: Register;

    /// The low bits of `value`.
    fn of(value: u64) -> Self;
    /// Zero-extended.
    fn wide(self) -> u64;
    /// Sign-extended.
    fn signed(self) -> i64;
    /// Reads a general register of this size.
    fn get(cpu: &Cpu, register: Register) -> Self;
    /// Writes one: 32 bits are zero-extended, 8 and 16 leave the other bits.
    fn set(cpu: &mut Cpu, register: Register, value: Self);
}

macro_rules! width {
    ($type:ident, $signed:ident, $bits:literal, $accumulator:ident, $get:expr, $set:expr) => {
        impl Width for $type {
            const BITS: u32 = $bits;
            const ACCUMULATOR: Register = Register::$accumulator;
            #[inline(always)]
            fn of(value: u64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn wide(self) -> u64 {
                u64::from(self)
            }
            #[inline(always)]
            fn signed(self) -> i64 {
                i64::from(self as $signed)
            }
            #[inline(always)]
            fn get(cpu: &Cpu, register: Register) -> Self {
                $get(cpu, register)
            }
            #[inline(always)]
            fn set(cpu: &mut Cpu, register: Register, value: Self) {
                $set(cpu, register, value)
            }
        }
    };
}

/// The index in [`Cpu::regs`] of a register whose class begins with `first`. The mask only tells the compiler
/// that the index is in range: the decoder gives registers of the class that the instruction has.
#[inline(always)]
fn index(register: Register, first: Register) -> usize {
    (register as usize).wrapping_sub(first as usize) & 15
}

/// The register and shift of an 8-bit register: AL..BL, AH..BH, SPL..DIL, R8B..R15B.
#[inline(always)]
fn byte(register: Register) -> (usize, u32) {
    match (register as usize).wrapping_sub(Register::AL as usize) {
        n @ 0..4 => (n, 0),
        n @ 4..8 => (n - 4, 8),
        n => (n.wrapping_sub(4) & 15, 0),
    }
}

width!(
    u8,
    i8,
    8,
    AL,
    |cpu: &Cpu, register| {
        let (index, shift) = byte(register);
        (cpu.regs[index] >> shift) as u8
    },
    |cpu: &mut Cpu, register, value: u8| {
        let (index, shift) = byte(register);
        cpu.regs[index] = cpu.regs[index] & !(0xff << shift) | u64::from(value) << shift;
    }
);
width!(
    u16,
    i16,
    16,
    AX,
    |cpu: &Cpu, register| cpu.regs[index(register, Register::AX)] as u16,
    |cpu: &mut Cpu, register, value: u16| {
        let whole = &mut cpu.regs[index(register, Register::AX)];
        *whole = *whole & !0xffff | u64::from(value);
    }
);
width!(
    u32,
    i32,
    32,
    EAX,
    |cpu: &Cpu, register| cpu.regs[index(register, Register::EAX)] as u32,
    |cpu: &mut Cpu, register, value: u32| cpu.regs[index(register, Register::EAX)] = u64::from(value)
);
width!(
    u64,
    i64,
    64,
    RAX,
    |cpu: &Cpu, register| cpu.regs[index(register, Register::RAX)],
    |cpu: &mut Cpu, register, value: u64| cpu.regs[index(register, Register::RAX)] = value
);

/// Reads a register that is part of general register `number` in the operand's size (never AH..BH).
pub(crate) fn numbered<W: Width>(cpu: &Cpu, number: usize) -> u64 {
    cpu.regs[number] & W::MASK
}

/// Writes general register `number` in the operand's size.
pub(crate) fn set_numbered<W: Width>(cpu: &mut Cpu, number: usize, value: u64) {
    let whole = &mut cpu.regs[number];
    *whole = match W::BITS {
        8 | 16 => *whole & !W::MASK | value & W::MASK,
        _ => value & W::MASK,
    };
}

/// The size in bytes of operand `operand`, a general register or memory.
pub(crate) fn size(insn: &Instruction, operand: u32) -> usize {
    match insn.op_kind(operand) {
        OpKind::Register => insn.op_register(operand).size(),
        _ => insn.memory_size().size(),
    }
}

/// The value of operand `operand`.
#[inline(always)]
pub(crate) fn source<W: Width>(core: &mut Core<'_>, insn: &Instruction, operand: u32) -> Result<W, Trap> {
    match insn.op_kind(operand) {
        OpKind::Register => Ok(W::get(core.cpu, insn.op_register(operand))),
        OpKind::Memory => {
            let (seg, offset) = effective_address(core.cpu, insn, operand);
            core.read::<W>(seg, offset)
        }
        _ => Ok(W::of(insn.immediate(operand))),
    }
}

/// Writes operand `operand`, a general register or memory.
#[inline(always)]
pub(crate) fn store<W: Width>(
    core: &mut Core<'_>,
    insn: &Instruction,
    operand: u32,
    value: W,
) -> Result<(), Trap> {
    if insn.op_kind(operand) == OpKind::Register {
        W::set(core.cpu, insn.op_register(operand), value);
        return Ok(());
    }
    let (seg, offset) = effective_address(core.cpu, insn, operand);
    core.write::<W>(seg, offset, value)
}

/// Replaces operand 0 by what `f` makes of it and hands on what else `f` gives. For memory `f` may run more
/// than once, and the operand keeps its value if `f` gives `None`.
#[inline(always)]
pub(crate) fn modify<W: Width, R: Default>(
    core: &mut Core<'_>,
    insn: &Instruction,
    locked: bool,
    mut f: impl FnMut(u64) -> (Option<u64>, R),
) -> Result<R, Trap> {
    if insn.op0_kind() == OpKind::Register {
        let register = insn.op0_register();
        let (new, rest) = f(W::get(core.cpu, register).wide());
        if let Some(new) = new {
            W::set(core.cpu, register, W::of(new));
        }
        return Ok(rest);
    }
    let (seg, offset) = effective_address(core.cpu, insn, 0);
    let mut rest = R::default();
    core.update::<W>(seg, offset, locked, |old| {
        let (new, r) = f(old.wide());
        rest = r;
        new.map(W::of)
    })?;
    Ok(rest)
}

/// The bits of an address that the instruction's address size leaves.
pub(crate) fn address_mask(insn: &Instruction) -> u64 {
    let bytes = match (insn.memory_base(), insn.memory_index()) {
        (Register::None, Register::None) => insn.memory_displ_size() as usize,
        (Register::None, index) => index.size(),
        (base, _) => base.size(),
    };
    match bytes {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// The segment that a segment register of the decoder is.
pub(crate) fn segment(register: Register) -> Seg {
    match register {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => Seg::Ds,
    }
}
