//! Control transfers, as instructions.

use super::operand;
use crate::exceptions::Source;
use crate::{Core, Flow, Trap, flags, vector};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// Far JMP and CALL.
pub(super) fn far_branch(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let (selector, offset, size) = match insn.op0_kind() {
        OpKind::FarBranch16 => (insn.far_branch_selector(), u64::from(insn.far_branch16()), 2),
        OpKind::FarBranch32 => (insn.far_branch_selector(), u64::from(insn.far_branch32()), 4),
        OpKind::Memory => {
            let (seg, at) = operand::address(core, insn);
            let size = match insn.code() {
                Code::Jmp_m1616 | Code::Call_m1616 => 2u8,
                Code::Jmp_m1632 | Code::Call_m1632 => 4,
                Code::Jmp_m1664 | Code::Call_m1664 => 8,
                _ => return Err(Trap::UD),
            };
            let (selector, offset) = operand::far_pointer(core, insn, seg, at, size)?;
            (selector, offset, size)
        }
        _ => return Err(Trap::UD),
    };
    if insn.mnemonic() == Mnemonic::Call {
        core.far_call(selector, offset, size, insn.next_ip())?;
    } else {
        core.far_jump(selector, offset, size, insn.next_ip())?;
    }
    Ok(Flow::Jump)
}

/// Far RET.
pub(super) fn far_return(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let (size, pop) = match insn.code() {
        Code::Retfw => (2, 0),
        Code::Retfd => (4, 0),
        Code::Retfq => (8, 0),
        Code::Retfw_imm16 => (2, insn.immediate16()),
        Code::Retfd_imm16 => (4, insn.immediate16()),
        _ => (8, insn.immediate16()),
    };
    core.far_return(size, pop)?;
    Ok(Flow::Jump)
}

/// IRET.
pub(super) fn iret(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let size = match insn.mnemonic() {
        Mnemonic::Iret => 2,
        Mnemonic::Iretd => 4,
        _ => 8,
    };
    core.iret(size, insn.next_ip())?;
    Ok(Flow::Jump)
}

/// INT n, INT1, INT3 and INTO.
pub(super) fn interrupt(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let next = insn.next_ip();
    match insn.mnemonic() {
        Mnemonic::Int => core.software_interrupt(insn.immediate8(), next)?,
        Mnemonic::Int1 => core.instruction_interrupt(vector::DB, next, Source::Privileged)?,
        Mnemonic::Int3 => core.instruction_interrupt(vector::BP, next, Source::Software)?,
        _ if core.cpu.rflags & flags::OF == 0 => return Ok(Flow::Next),
        _ => core.instruction_interrupt(vector::OF, next, Source::Software)?,
    }
    Ok(Flow::Jump)
}

/// SYSCALL, SYSRET, SYSENTER and SYSEXIT.
pub(super) fn fast(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let stepping = core.cpu.rflags & flags::TF != 0;
    match insn.mnemonic() {
        Mnemonic::Syscall => core.syscall(insn.next_ip())?,
        Mnemonic::Sysret => core.sysret(4)?,
        Mnemonic::Sysretq => core.sysret(8)?,
        Mnemonic::Sysenter => core.sysenter()?,
        Mnemonic::Sysexit => core.sysexit(4)?,
        _ => core.sysexit(8)?,
    }
    if !stepping && core.cpu.rflags & flags::TF != 0 {
        // SYSRET that sets TF is stepped itself. Whoever executes instructions knows only of those that
        // began with TF set, so that the trap is raised here, after the instruction.
        core.cpu.dr[6] |= 1 << 14;
        return Err(Trap::plain(vector::DB));
    }
    Ok(Flow::Jump)
}
