//! Operands of system instructions: general registers and memory.

use crate::cpuid::Vendor;
use crate::{Core, Cpu, Seg, Trap, effective_address};
use iced_x86::{Instruction, OpKind, Register};

/// A 16-, 32- or 64-bit general register, zero-extended; 0 for any other.
pub(super) fn register(cpu: &Cpu, register: Register) -> u64 {
    let value = if register.is_gpr() { cpu.regs[register.number()] } else { 0 };
    match register.size() {
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

/// Writes a 16-, 32- or 64-bit general register; a 32-bit value clears the upper half.
pub(super) fn set_register(cpu: &mut Cpu, register: Register, value: u64) {
    if !register.is_gpr() {
        return;
    }
    let slot = &mut cpu.regs[register.number()];
    *slot = match register.size() {
        2 => *slot & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
}

/// Segment and offset of the memory operand.
pub(super) fn address(core: &Core, insn: &Instruction) -> (Seg, u64) {
    let operand = (0..insn.op_count()).find(|&operand| insn.op_kind(operand) == OpKind::Memory);
    effective_address(core.cpu, insn, operand.unwrap_or(0))
}

/// The offset `distance` bytes behind `offset`, at the instruction's address size.
pub(super) fn ahead(core: &Core, insn: &Instruction, offset: u64, distance: u64) -> u64 {
    let sum = offset.wrapping_add(distance);
    if core.cpu.long64 && insn.memory_base().size() != 4 {
        sum
    } else if offset >> 16 == 0 && insn.memory_base().size() == 2 {
        sum & 0xffff
    } else {
        sum & 0xffff_ffff
    }
}

/// Selector and offset of a far pointer in memory, for an instruction with operands of `size` bytes. With 64-bit
/// operands the offset has 64 bits on Intel's processors, and 32 on AMD's (APM volume 3, CALL (far) and LSS).
pub(super) fn far_pointer(
    core: &mut Core,
    insn: &Instruction,
    seg: Seg,
    at: u64,
    size: u8,
) -> Result<(u16, u64), Trap> {
    let size = if core.cpu.model.vendor() == Vendor::Amd { size.min(4) } else { size };
    let offset = match size {
        2 => u64::from(core.read::<u16>(seg, at)?),
        4 => u64::from(core.read::<u32>(seg, at)?),
        _ => core.read::<u64>(seg, at)?,
    };
    let behind = ahead(core, insn, at, u64::from(size));
    Ok((core.read::<u16>(seg, behind)?, offset))
}

/// A 16-bit operand in a register or memory.
pub(super) fn load16(core: &mut Core, insn: &Instruction, operand: u32) -> Result<u16, Trap> {
    if insn.op_kind(operand) == OpKind::Register {
        return Ok(register(core.cpu, insn.op_register(operand)) as u16);
    }
    let (seg, offset) = effective_address(core.cpu, insn, operand);
    core.read(seg, offset)
}

/// Stores 16 bits to memory, or zero-extended to a register of any size.
pub(super) fn store16(core: &mut Core, insn: &Instruction, operand: u32, value: u16) -> Result<(), Trap> {
    if insn.op_kind(operand) == OpKind::Register {
        set_register(core.cpu, insn.op_register(operand), u64::from(value));
        return Ok(());
    }
    let (seg, offset) = effective_address(core.cpu, insn, operand);
    core.write(seg, offset, value)
}
