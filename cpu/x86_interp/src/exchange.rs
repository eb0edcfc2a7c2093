//! XADD, CMPXCHG, CMPXCHG8B and CMPXCHG16B.

use crate::flags::{self, add, sub};
use crate::operand::{Width, modify};
use iced_x86::{Instruction, OpKind};
use x86_core::flags::ZF;
use x86_core::reg::{RAX, RBX, RCX, RDX};
use x86_core::{Core, Flow, Trap, effective_address};

/// XADD.
pub(crate) fn xadd<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let register = insn.op1_register();
    let b = W::get(core.cpu, register).wide();
    let (old, after) = modify::<W, (u64, u64)>(core, insn, insn.has_lock_prefix(), |a| {
        let (sum, flags) = add::<W>(a, b, 0);
        (Some(sum), (a, flags))
    })?;
    // Of twice the same register the sum stays.
    if insn.op0_kind() != OpKind::Register || insn.op0_register() != register {
        W::set(core.cpu, register, W::of(old));
    }
    flags::set_all(core.cpu, after);
    Ok(Flow::Next)
}

/// CMPXCHG.
pub(crate) fn cmpxchg<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let new = W::get(core.cpu, insn.op1_register()).wide();
    let accumulator = W::get(core.cpu, W::ACCUMULATOR).wide();
    let old =
        modify::<W, u64>(core, insn, insn.has_lock_prefix(), |a| ((a == accumulator).then_some(new), a))?;
    if old != accumulator {
        W::set(core.cpu, W::ACCUMULATOR, W::of(old));
    }
    flags::set_all(core.cpu, sub::<W>(accumulator, old, 0).1);
    Ok(Flow::Next)
}

/// CMPXCHG8B.
pub(crate) fn cmpxchg8b(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let pair = |high: u64, low: u64| high << 32 | low & 0xffff_ffff;
    let regs = &core.cpu.regs;
    let (expected, new) = (pair(regs[RDX], regs[RAX]), pair(regs[RCX], regs[RBX]));
    let (seg, offset) = effective_address(core.cpu, insn, 0);
    let old =
        core.update::<u64>(seg, offset, insn.has_lock_prefix(), |old| (old == expected).then_some(new))?;
    if old != expected {
        core.cpu.regs[RAX] = old & 0xffff_ffff;
        core.cpu.regs[RDX] = old >> 32;
    }
    flags::set(core.cpu, ZF, flags::when(old == expected, ZF));
    Ok(Flow::Next)
}

/// CMPXCHG16B.
pub(crate) fn cmpxchg16b(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let regs = &core.cpu.regs;
    let (expected, new) = (pair(regs[RDX], regs[RAX]), pair(regs[RCX], regs[RBX]));
    let (seg, offset) = effective_address(core.cpu, insn, 0);
    let linear = core.cpu.segments[seg as usize].base.wrapping_add(offset);
    if linear & 15 != 0 {
        return Err(Trap::gp(0));
    }
    let old =
        core.update::<u128>(seg, offset, insn.has_lock_prefix(), |old| (old == expected).then_some(new))?;
    if old != expected {
        core.cpu.regs[RAX] = old as u64;
        core.cpu.regs[RDX] = (old >> 64) as u64;
    }
    flags::set(core.cpu, ZF, flags::when(old == expected, ZF));
    Ok(Flow::Next)
}
