//! Near control transfers.

use crate::flags;
use crate::operand::{Width, numbered, set_numbered, source};
use iced_x86::Instruction;
use x86_core::flags::ZF;
use x86_core::reg::{RCX, RSP};
use x86_core::{CodeSize, Core, Flow, Seg, Trap, vector};

/// Goes to `target` of the current code segment, which must be canonical in 64-bit mode and within the
/// segment's limit otherwise.
#[inline(always)]
fn go(core: &mut Core<'_>, target: u64) -> Result<Flow, Trap> {
    check(core, target)?;
    core.cpu.rip = target;
    Ok(Flow::Jump)
}

/// The check that [`go`] makes.
#[inline(always)]
fn check(core: &Core<'_>, target: u64) -> Result<(), Trap> {
    let reachable = if core.code_size() == CodeSize::Bits64 {
        core.cpu.is_canonical(target)
    } else {
        target <= u64::from(core.cpu.segments[Seg::Cs as usize].limit)
    };
    if reachable { Ok(()) } else { Err(Trap::gp(0)) }
}

/// JMP rel.
pub(crate) fn jmp(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    go(core, insn.near_branch_target())
}

/// JMP r/m.
pub(crate) fn jmp_indirect<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let target = source::<W>(core, insn, 0)?.wide();
    go(core, target)
}

/// Jcc.
pub(crate) fn jcc<const CONDITION: u8>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    if flags::condition(core.cpu.rflags, CONDITION) {
        go(core, insn.near_branch_target())
    } else {
        Ok(Flow::Next)
    }
}

/// Pushes the return address, in the operand size, and goes to `target`.
fn call_to<W: Width>(core: &mut Core<'_>, insn: &Instruction, target: u64) -> Result<Flow, Trap> {
    check(core, target)?;
    core.push(W::BYTES as u8, insn.next_ip() & W::MASK)?;
    core.cpu.rip = target;
    Ok(Flow::Jump)
}

/// CALL rel.
pub(crate) fn call<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    call_to::<W>(core, insn, insn.near_branch_target())
}

/// CALL r/m.
pub(crate) fn call_indirect<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let target = source::<W>(core, insn, 0)?.wide();
    call_to::<W>(core, insn, target)
}

/// RET, with or without bytes to release.
pub(crate) fn ret<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let before = core.cpu.regs[RSP];
    let target = core.pop(W::BYTES as u8)? & W::MASK;
    check(core, target).inspect_err(|_| core.cpu.regs[RSP] = before)?;
    if insn.op_count() == 1 {
        let top = core.cpu.regs[RSP].wrapping_add(u64::from(insn.immediate16()));
        match core.stack_mask() {
            0xffff => set_numbered::<u16>(core.cpu, RSP, top),
            mask => core.cpu.regs[RSP] = top & mask,
        }
    }
    core.cpu.rip = target;
    Ok(Flow::Jump)
}

/// JCXZ, JECXZ, JRCXZ.
pub(crate) fn jcxz<C: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    if numbered::<C>(core.cpu, RCX) == 0 { go(core, insn.near_branch_target()) } else { Ok(Flow::Next) }
}

/// LOOP's conditions on ZF.
pub(crate) const ALWAYS: u8 = 0;
pub(crate) const WHILE_EQUAL: u8 = 1;
pub(crate) const WHILE_UNEQUAL: u8 = 2;

/// LOOP, LOOPE, LOOPNE with the counter in the size of `C`.
pub(crate) fn repeat<C: Width, const WHEN: u8>(
    core: &mut Core<'_>,
    insn: &Instruction,
) -> Result<Flow, Trap> {
    let count = numbered::<C>(core.cpu, RCX).wrapping_sub(1) & C::MASK;
    let equal = core.cpu.rflags & ZF != 0;
    let taken = count != 0
        && match WHEN {
            WHILE_EQUAL => equal,
            WHILE_UNEQUAL => !equal,
            _ => true,
        };
    let target = insn.near_branch_target();
    if taken {
        check(core, target)?;
        core.cpu.rip = target;
    }
    set_numbered::<C>(core.cpu, RCX, count);
    Ok(if taken { Flow::Jump } else { Flow::Next })
}

/// BOUND: #BR if the signed index is outside the pair of bounds in memory.
pub(crate) fn bound<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let index = W::get(core.cpu, insn.op0_register()).signed();
    let (seg, offset) = x86_core::effective_address(core.cpu, insn, 1);
    let lower = core.read::<W>(seg, offset)?.signed();
    let upper_offset = offset.wrapping_add(W::BYTES as u64) & crate::operand::address_mask(insn);
    let upper = core.read::<W>(seg, upper_offset)?.signed();
    if (lower..=upper).contains(&index) { Ok(Flow::Next) } else { Err(Trap::plain(vector::BR)) }
}
