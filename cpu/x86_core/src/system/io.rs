//! Port input and output (Intel SDM volume 1, chapter 19).

use crate::segments::kind;
use crate::svm::PortAccess;
use crate::{Core, Flow, Trap, effective_address, flags, reg};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// Iterations of a repeated INS or OUTS before others get a chance.
const CHUNK: u32 = 1024;

/// #GP(0) if the program may not use the ports: IOPL, then the TSS's bitmap.
fn check_ports(core: &mut Core, port: u16, size: u16) -> Result<(), Trap> {
    let free = core.cpu.cpl <= core.cpu.iopl() && !core.vm86();
    if core.cpu.cr0 & crate::cr0::PE == 0 || free {
        return Ok(());
    }
    let tr = core.cpu.tr;
    if tr.attributes & 0xd != kind::TSS || !tr.is_usable() || tr.limit < 0x67 {
        return Err(Trap::gp(0));
    }
    let map = core.system_address(tr.base.wrapping_add(0x66));
    let map: u16 = core.read_linear(map, core.system_bank())?;
    let offset = u32::from(map) + u32::from(port / 8);
    // Two bytes are read always: the ports may straddle.
    if offset + 1 > tr.limit {
        return Err(Trap::gp(0));
    }
    let at = core.system_address(tr.base.wrapping_add(u64::from(offset)));
    let bits: u16 = core.read_linear(at, core.system_bank())?;
    let wanted = ((1 << size) - 1) << (port % 8);
    if bits & wanted != 0 { Err(Trap::gp(0)) } else { Ok(()) }
}

fn port(core: &Core, insn: &Instruction, operand: u32) -> u16 {
    if insn.op_kind(operand) == OpKind::Immediate8 {
        u16::from(insn.immediate8())
    } else {
        core.cpu.regs[reg::RDX] as u16
    }
}

/// IN.
pub(super) fn input(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let size = insn.op0_register().size();
    let port = port(core, insn, 1);
    check_ports(core, port, size as u16)?;
    core.check_port_intercept(insn, PortAccess { port, size: size as u16, input: true, string: false })?;
    let mut data = [0; 4];
    core.platform.pio_read(port, &mut data[..size]);
    let value = u64::from(u32::from_le_bytes(data));
    let rax = &mut core.cpu.regs[reg::RAX];
    *rax = match insn.op0_register() {
        Register::AL => *rax & !0xff | value,
        Register::AX => *rax & !0xffff | value,
        _ => value,
    };
    Ok(Flow::Next)
}

/// OUT.
pub(super) fn output(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let size = insn.op1_register().size();
    let port = port(core, insn, 0);
    check_ports(core, port, size as u16)?;
    core.check_port_intercept(insn, PortAccess { port, size: size as u16, input: false, string: false })?;
    let data = (core.cpu.regs[reg::RAX] as u32).to_le_bytes();
    core.platform.pio_write(port, &data[..size]);
    Ok(Flow::Next)
}

/// INS and OUTS, repeated ones in chunks.
pub(super) fn string(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let (size, input) = match insn.mnemonic() {
        Mnemonic::Insb => (1, true),
        Mnemonic::Insw => (2, true),
        Mnemonic::Insd => (4, true),
        Mnemonic::Outsb => (1, false),
        Mnemonic::Outsw => (2, false),
        _ => (4, false),
    };
    let port = core.cpu.regs[reg::RDX] as u16;
    check_ports(core, port, size as u16)?;
    let operand = u32::from(!input);
    let mask = match insn.op_kind(operand) {
        OpKind::MemoryESDI | OpKind::MemorySegSI => 0xffff,
        OpKind::MemoryESEDI | OpKind::MemorySegESI => 0xffff_ffff,
        _ => u64::MAX,
    };
    let repeated = insn.has_rep_prefix() || insn.has_repne_prefix();
    if !repeated || core.cpu.regs[reg::RCX] & mask != 0 {
        core.check_port_intercept(insn, PortAccess { port, size: size as u16, input, string: true })?;
    }
    if !repeated {
        iterate(core, insn, (port, size), input, mask)?;
        return Ok(Flow::Next);
    }
    for _ in 0..CHUNK {
        if core.cpu.regs[reg::RCX] & mask == 0 {
            return Ok(Flow::Next);
        }
        iterate(core, insn, (port, size), input, mask)?;
        let left = (core.cpu.regs[reg::RCX] & mask).wrapping_sub(1);
        set_masked(&mut core.cpu.regs[reg::RCX], left, mask);
    }
    Ok(if core.cpu.regs[reg::RCX] & mask == 0 { Flow::Next } else { Flow::Again })
}

/// One element; then the pointer moves.
fn iterate(
    core: &mut Core,
    insn: &Instruction,
    (port, size): (u16, usize),
    input: bool,
    mask: u64,
) -> Result<(), Trap> {
    let (seg, offset) = effective_address(core.cpu, insn, u32::from(!input));
    let mut data = [0; 4];
    let pointer = if input {
        // A read of the port cannot be taken back: what would fault must do so before.
        core.check_write(seg, offset, size as u64)?;
        core.platform.pio_read(port, &mut data[..size]);
        core.write_bytes(seg, offset, &data[..size])?;
        reg::RDI
    } else {
        core.read_bytes(seg, offset, &mut data[..size])?;
        core.platform.pio_write(port, &data[..size]);
        reg::RSI
    };
    let down = core.cpu.rflags & flags::DF != 0;
    let step = if down { (size as u64).wrapping_neg() } else { size as u64 };
    let next = core.cpu.regs[pointer].wrapping_add(step);
    set_masked(&mut core.cpu.regs[pointer], next, mask);
    Ok(())
}

/// Writes a register at the address size: 16 bits leave the rest, 32 bits clear it.
fn set_masked(slot: &mut u64, value: u64, mask: u64) {
    let kept = if mask == 0xffff { *slot & !mask } else { 0 };
    *slot = kept | value & mask;
}
