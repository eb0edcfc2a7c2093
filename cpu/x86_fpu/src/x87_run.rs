//! Running the stubs of x87 instructions.

use crate::frame::{Frame, commit_flags};
use crate::operand::{self, real_mode};
use crate::stub::Stub;
use crate::x87::{pending, set_status, set_word, status, status_word, summarize};
use iced_x86::{Instruction, Register};
use x86_core::{CodeSize, Core, Cpu, Seg, Trap, cr0};

/// Executes an x87 instruction through its stub. The checks are done.
pub(crate) fn run(
    core: &mut Core,
    insn: &Instruction,
    stub: &Stub,
    address: Option<(Seg, u64)>,
) -> Result<(), Trap> {
    let mut frame = Frame::new();
    let mut store = None;
    if let (Some(memory), Some(address)) = (stub.memory, address) {
        let size = usize::from(memory.size).min(16);
        if memory.write {
            store = Some((address, size));
            // A store that does not happen leaves the buffer as it is.
            frame.set_memory(&[0; 16]);
        } else {
            frame.read_memory(core, address, size)?;
        }
    }
    if stub.flags {
        frame.set_flags(core.cpu.rflags);
    }
    let before = status_word(&core.cpu.x87);
    // Exceptions may be pending here only if they are ignored; the host must not take them.
    let mut ignored = 0;
    if core.cpu.cr0 & cr0::NE == 0 && pending(&core.cpu.x87) {
        ignored = before & status::EXCEPTIONS;
        set_status(&mut core.cpu.x87, before & !status::EXCEPTIONS);
    }
    summarize(&mut core.cpu.x87);
    frame.set_x87(&mut core.cpu.x87);
    // SAFETY: all that x87 stubs use is set: state, memory, flags. No unmasked exception is pending in the
    // state, so the host takes none.
    unsafe { frame.run(stub) };
    set_status(&mut core.cpu.x87, before);
    // SAFETY: the stub has run.
    let image = unsafe { frame.x87() };
    if let Some((address, len)) = store {
        let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        if word(2) & !word(0) & status::NO_STORE == 0 {
            // SAFETY: set above.
            operand::write(core, address, unsafe { frame.memory(len) })?;
        }
    }
    let area = &mut core.cpu.x87;
    area.0[..6].copy_from_slice(&image[..6]);
    area.0[32..160].copy_from_slice(&image[32..160]);
    if ignored != 0 {
        let status = status_word(area);
        set_status(area, status | ignored);
        summarize(area);
    }
    record_instruction(core, insn, stub.fop, address);
    if stub.flags {
        // SAFETY: set above.
        commit_flags(core.cpu, unsafe { frame.flags() });
    }
    Ok(())
}

/// Sets FOP, FIP and, of instructions with a memory operand, FDP (Intel SDM volume 1, 8.1.8 and 8.1.9).
/// Selectors are not kept.
fn record_instruction(core: &mut Core, insn: &Instruction, fop: u16, address: Option<(Seg, u64)>) {
    let linear = real_mode(core);
    let pointer = |cpu: &Cpu, seg: Seg, offset: u64| {
        if linear { cpu.segments[seg as usize].base.wrapping_add(offset) & 0xffff_ffff } else { offset }
    };
    let fop = match address {
        Some(_) => fop & 0x738 | addressing(core.code_size(), insn),
        None => fop,
    };
    let cpu = &mut *core.cpu;
    let instruction = pointer(cpu, Seg::Cs, cpu.rip);
    set_word(&mut cpu.x87, 6, fop & 0x7ff);
    cpu.x87.0[8..16].copy_from_slice(&instruction.to_le_bytes());
    if let Some((seg, offset)) = address {
        let data = pointer(cpu, seg, offset);
        cpu.x87.0[16..24].copy_from_slice(&data.to_le_bytes());
    }
}

/// The mod and rm fields that encode the memory operand.
pub(crate) fn addressing(size: CodeSize, insn: &Instruction) -> u16 {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let displacement = insn.memory_displ_size();
    let wide = |register: Register| register.is_gpr32() || register.is_gpr64();
    let sixteen = if base == Register::None && index == Register::None {
        displacement == 2
    } else {
        !wide(base) && !wide(index) && base != Register::RIP && base != Register::EIP
    };
    let rm = if sixteen {
        match (base, index) {
            (Register::BX, Register::SI) => 0,
            (Register::BX, Register::DI) => 1,
            (Register::BP, Register::SI) => 2,
            (Register::BP, Register::DI) => 3,
            (Register::SI, _) => 4,
            (Register::DI, _) => 5,
            (Register::BX, _) => 7,
            _ => 6,
        }
    } else if base == Register::RIP || base == Register::EIP {
        5
    } else if index != Register::None {
        4
    } else if base == Register::None {
        // Without base, 64-bit code needs a SIB byte.
        if size == CodeSize::Bits64 { 4 } else { 5 }
    } else {
        (base.number() & 7) as u16
    };
    let mode = match (base, displacement) {
        (Register::None | Register::RIP | Register::EIP, _) | (_, 0) => 0,
        (_, 1) => 1,
        _ => 2,
    };
    mode << 6 | rm
}
