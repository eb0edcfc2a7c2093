//! PUSH, POP, PUSHA, POPA, ENTER and LEAVE.

use crate::operand::{Width, set_numbered, source, store};
use iced_x86::{Instruction, OpKind};
use x86_core::reg::{RBP, RSP};
use x86_core::{Core, Cpu, Flow, Seg, Trap};

/// Sets the stack pointer in the width that `mask` ([`Core::stack_mask`]) gives.
fn set_stack_pointer(cpu: &mut Cpu, mask: u64, value: u64) {
    match mask {
        0xffff => set_numbered::<u16>(cpu, RSP, value),
        _ => cpu.regs[RSP] = value & mask,
    }
}

/// PUSH of a general register, memory or an immediate.
pub(crate) fn push<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 0)?.wide();
    core.push(W::BYTES as u8, value)?;
    Ok(Flow::Next)
}

/// POP to a general register or memory. A memory operand's address is computed with the stack pointer after
/// the pop (Intel SDM volume 2, POP).
pub(crate) fn pop<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let before = core.cpu.regs[RSP];
    let value = W::of(core.pop(W::BYTES as u8)?);
    if insn.op0_kind() == OpKind::Register {
        W::set(core.cpu, insn.op0_register(), value);
    } else {
        store::<W>(core, insn, 0, value).inspect_err(|_| core.cpu.regs[RSP] = before)?;
    }
    Ok(Flow::Next)
}

/// PUSHA and PUSHAD.
pub(crate) fn push_all<W: Width>(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    let mask = core.stack_mask();
    let top = core.cpu.regs[RSP];
    let slot = |number: u64| top.wrapping_sub(W::BYTES as u64 * (number + 1)) & mask;
    for number in 0..8 {
        core.check_write(Seg::Ss, slot(number), W::BYTES as u64)?;
    }
    for number in 0..8 {
        let value = W::of(core.cpu.regs[number as usize]);
        core.write::<W>(Seg::Ss, slot(number), value)?;
    }
    set_stack_pointer(core.cpu, mask, slot(7));
    Ok(Flow::Next)
}

/// POPA and POPAD, which skip the stack pointer's slot.
pub(crate) fn pop_all<W: Width>(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    let mask = core.stack_mask();
    let top = core.cpu.regs[RSP];
    let slot = |number: u64| top.wrapping_add(W::BYTES as u64 * number) & mask;
    let mut values = [0; 8];
    for (number, value) in values.iter_mut().enumerate() {
        *value = core.read::<W>(Seg::Ss, slot(7 - number as u64))?.wide();
    }
    for (number, &value) in values.iter().enumerate() {
        if number != RSP {
            set_numbered::<W>(core.cpu, number, value);
        }
    }
    set_stack_pointer(core.cpu, mask, slot(8));
    Ok(Flow::Next)
}

/// ENTER (Intel SDM volume 2).
pub(crate) fn enter<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let before = core.cpu.regs[RSP];
    enter_frame::<W>(core, insn).inspect_err(|_| core.cpu.regs[RSP] = before)?;
    Ok(Flow::Next)
}

fn enter_frame<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<(), Trap> {
    let size = W::BYTES as u8;
    let allocate = u64::from(insn.immediate16());
    let level = insn.immediate8_2nd() & 31;
    let mask = core.stack_mask();
    let mut link = core.cpu.regs[RBP];
    core.push(size, link & W::MASK)?;
    let frame = core.cpu.regs[RSP];
    for _ in 1..level {
        link = link.wrapping_sub(W::BYTES as u64);
        let value = core.read::<W>(Seg::Ss, link & mask)?;
        core.push(size, value.wide())?;
    }
    if level > 0 {
        core.push(size, frame & W::MASK)?;
    }
    let top = core.cpu.regs[RSP].wrapping_sub(allocate) & mask;
    // The processor faults if the new top could not be written.
    core.check_write(Seg::Ss, top, W::BYTES as u64)?;
    set_stack_pointer(core.cpu, mask, top);
    set_numbered::<W>(core.cpu, RBP, frame);
    Ok(())
}

/// LEAVE.
pub(crate) fn leave<W: Width>(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    let mask = core.stack_mask();
    let frame = core.cpu.regs[RBP] & mask;
    let value = core.read::<W>(Seg::Ss, frame)?;
    set_stack_pointer(core.cpu, mask, frame.wrapping_add(W::BYTES as u64));
    set_numbered::<W>(core.cpu, RBP, value.wide());
    Ok(Flow::Next)
}
