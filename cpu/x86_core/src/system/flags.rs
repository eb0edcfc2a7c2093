//! Instructions on the flags that are not arithmetic.

use super::{Flow, Trap};
use crate::cpuid::feature;
use crate::{Core, flags, shadow};
use iced_x86::{Instruction, Mnemonic};

/// CLI and STI.
pub(super) fn interrupt_flag(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    if core.cpu.cpl > core.cpu.iopl() {
        return Err(Trap::gp(0));
    }
    if insn.mnemonic() == Mnemonic::Cli {
        core.cpu.rflags &= !flags::IF;
    } else if core.cpu.rflags & flags::IF == 0 {
        core.cpu.rflags |= flags::IF;
        core.cpu.interrupt_shadow |= shadow::STI;
    }
    Ok(Flow::Next)
}

/// Virtual-8086 code needs IOPL 3 for PUSHF and POPF.
fn check_vm86(core: &Core) -> Result<(), Trap> {
    if core.vm86() && core.cpu.iopl() < 3 { Err(Trap::gp(0)) } else { Ok(()) }
}

/// PUSHF.
pub(super) fn push(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    check_vm86(core)?;
    let image = core.cpu.rflags & !(flags::VM | flags::RF);
    core.push(insn.stack_pointer_increment().unsigned_abs() as u8, image)?;
    Ok(Flow::Next)
}

/// POPF.
pub(super) fn pop(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    check_vm86(core)?;
    let size = insn.stack_pointer_increment() as u8;
    let image = core.pop(size)?;
    let kept = core.cpu.rflags & (flags::VIF | flags::VIP);
    let merged = core.merged_flags(image, size, core.cpu.cpl);
    core.set_rflags(merged & !(flags::RF | flags::VIF | flags::VIP) | kept);
    Ok(Flow::Next)
}

/// CLAC and STAC.
pub(super) fn access_check(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    if core.cpu.cpl != 0 || !core.cpu.model.has(feature::SMAP) {
        return Err(Trap::UD);
    }
    let set = insn.mnemonic() == Mnemonic::Stac;
    let flags = core.cpu.rflags & !flags::AC | if set { flags::AC } else { 0 };
    core.set_rflags(flags);
    Ok(Flow::Next)
}
