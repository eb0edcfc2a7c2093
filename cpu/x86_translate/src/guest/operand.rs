//! The operands of instructions, as their encodings have them.

use dbt_code::Width;
use iced_x86::{Instruction, OpCodeOperandKind as K, OpKind};

/// The place of a general register in an encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    /// ModRM.reg.
    Reg,
    /// ModRM.rm.
    Rm,
    /// The low three bits of the opcode.
    Opcode,
    /// VEX.vvvv.
    Vvvv,
}

/// A general-register operand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operand {
    pub(crate) field: Field,
    pub(crate) width: Width,
    pub(crate) reads: bool,
    pub(crate) writes: bool,
}

/// The field and the width of a general register, if the operand is one or could be.
pub(crate) fn width_of(kind: K) -> Option<(Field, Width)> {
    Some(match kind {
        K::r8_reg => (Field::Reg, Width::B8),
        K::r16_reg => (Field::Reg, Width::B16),
        K::r32_reg => (Field::Reg, Width::B32),
        K::r64_reg => (Field::Reg, Width::B64),
        K::r8_or_mem => (Field::Rm, Width::B8),
        K::r16_or_mem | K::r16_rm => (Field::Rm, Width::B16),
        K::r32_or_mem | K::r32_rm => (Field::Rm, Width::B32),
        K::r64_or_mem | K::r64_rm => (Field::Rm, Width::B64),
        K::r8_opcode => (Field::Opcode, Width::B8),
        K::r16_opcode => (Field::Opcode, Width::B16),
        K::r32_opcode => (Field::Opcode, Width::B32),
        K::r64_opcode => (Field::Opcode, Width::B64),
        K::r32_vvvv => (Field::Vvvv, Width::B32),
        K::r64_vvvv => (Field::Vvvv, Width::B64),
        _ => return None,
    })
}

/// Whether an operand is a vector or a mask register, or could be one in place of memory.
pub(crate) fn is_vector(kind: K) -> bool {
    matches!(
        kind,
        K::xmm_reg
            | K::xmm_rm
            | K::xmm_or_mem
            | K::xmm_vvvv
            | K::xmm_is4
            | K::ymm_reg
            | K::ymm_rm
            | K::ymm_or_mem
            | K::ymm_vvvv
            | K::ymm_is4
            | K::zmm_reg
            | K::zmm_rm
            | K::zmm_or_mem
            | K::zmm_vvvv
    ) || is_mask(kind)
}

/// Whether an operand is a mask register, or could be one in place of memory.
pub(crate) fn is_mask(kind: K) -> bool {
    matches!(kind, K::k_reg | K::k_rm | K::k_vvvv | K::k_or_mem)
}

/// Whether an operand is an MMX register, or could be one in place of memory.
pub(crate) fn is_mmx(kind: K) -> bool {
    matches!(kind, K::mm_reg | K::mm_rm | K::mm_or_mem)
}

/// Whether an operand is in memory, or could be.
pub(crate) fn is_memory(kind: K) -> bool {
    matches!(
        kind,
        K::mem
            | K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::zmm_or_mem
            | K::k_or_mem
            | K::mm_or_mem
    )
}

/// Whether an operand is written again as it is: memory, a constant, or a register that is where it is in the
/// guest.
pub(crate) fn is_plain(kind: K) -> bool {
    matches!(
        kind,
        K::mem
            | K::al
            | K::cl
            | K::ax
            | K::eax
            | K::rax
            | K::imm8
            | K::imm8_const_1
            | K::imm8sex16
            | K::imm8sex32
            | K::imm8sex64
            | K::imm16
            | K::imm32
            | K::imm32sex64
            | K::imm64
            | K::st0
            | K::sti_opcode
    )
}

/// Whether an operand of the instruction is in memory.
pub(crate) fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|op| insn.op_kind(op) == OpKind::Memory)
}
