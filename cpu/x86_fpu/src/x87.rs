//! x87 state and instructions.

use crate::operand::{self, real_mode};
use crate::run::{Frame, commit_flags};
use crate::stub::Stub;
use iced_x86::{Instruction, Register};
use x86_core::{CodeSize, Core, Cpu, Seg, Trap, X87Area, cr0};

/// Bits of the status word (Intel SDM volume 1, 8.1.3).
pub(crate) mod status {
    /// The six exception flags.
    pub(crate) const EXCEPTIONS: u16 = 0x3f;
    /// Stack fault.
    pub(crate) const SF: u16 = 1 << 6;
    /// Error summary.
    pub(crate) const ES: u16 = 1 << 7;
    /// Top of the stack.
    pub(crate) const TOP: u16 = 7 << 11;
    /// Busy: the same as ES.
    pub(crate) const B: u16 = 1 << 15;
    /// Exceptions that, unmasked, keep a store from writing memory: all but precision.
    pub(crate) const NO_STORE: u16 = 0x1f;
}

/// The control word that FNINIT sets.
pub(crate) const INIT_CONTROL: u16 = 0x37f;

fn word(area: &X87Area, at: usize) -> u16 {
    u16::from_le_bytes([area.0[at], area.0[at + 1]])
}

fn set_word(area: &mut X87Area, at: usize, value: u16) {
    area.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// The control word.
pub(crate) fn control(area: &X87Area) -> u16 {
    word(area, 0)
}

/// Sets the control word, as hardware stores it; [`summarize`] is to follow.
pub(crate) fn set_control(area: &mut X87Area, value: u16) {
    set_word(area, 0, value & 0x1f7f | 0x40);
}

/// The status word.
pub(crate) fn status_word(area: &X87Area) -> u16 {
    word(area, 2)
}

/// Sets the status word.
pub(crate) fn set_status(area: &mut X87Area, value: u16) {
    set_word(area, 2, value);
}

/// The number of the physical register that is ST(0).
pub(crate) fn top(area: &X87Area) -> usize {
    usize::from((status_word(area) & status::TOP) >> 11)
}

/// Whether an exception is raised that is not masked.
pub(crate) fn pending(area: &X87Area) -> bool {
    status_word(area) & !control(area) & status::EXCEPTIONS != 0
}

/// Brings ES and B in line with the exceptions raised and masked.
pub(crate) fn summarize(area: &mut X87Area) {
    let rest = status_word(area) & !(status::ES | status::B);
    set_status(area, if pending(area) { rest | status::ES | status::B } else { rest });
}

/// FNINIT.
pub(crate) fn init(area: &mut X87Area) {
    area.0[..24].fill(0);
    set_word(area, 0, INIT_CONTROL);
}

/// Arranges the registers as MMX instructions see them: the first is physical register 0.
pub(crate) fn enter_mmx(area: &mut X87Area) {
    let top = top(area);
    area.0[32..160].rotate_right(16 * top);
}

/// Stores what an MMX instruction left: the stack is full with TOP 0, and each register written has all
/// ones for sign and exponent (Intel SDM volume 1, 9.5).
pub(crate) fn commit_mmx(area: &mut X87Area, registers: &[u8; 128], written: u8) {
    area.0[32..160].copy_from_slice(registers);
    for register in 0..8 {
        if written >> register & 1 != 0 {
            area.0[40 + 16 * register..][..2].fill(0xff);
        }
    }
    set_status(area, status_word(area) & !status::TOP);
    area.0[4] = 0xff;
}

/// What an MMX instruction does to the x87 unit, registers written aside.
pub(crate) fn switch_to_mmx(area: &mut X87Area) {
    enter_mmx(area);
    set_status(area, status_word(area) & !status::TOP);
    area.0[4] = 0xff;
}

/// EMMS.
pub(crate) fn leave_mmx(area: &mut X87Area) {
    switch_to_mmx(area);
    area.0[4] = 0;
}

/// The full tag word (Intel SDM volume 1, 8.1.7) from the abridged one and the registers.
pub(crate) fn full_tags(area: &X87Area) -> u16 {
    let top = top(area);
    (0..8).fold(0, |tags, physical: usize| {
        let register = &area.0[32 + 16 * (physical.wrapping_sub(top) & 7)..];
        let exponent = u16::from_le_bytes([register[8], register[9]]) & 0x7fff;
        let tag = if area.0[4] >> physical & 1 == 0 {
            3
        } else if exponent == 0 && register[..8].iter().all(|byte| *byte == 0) {
            1
        } else if exponent == 0 || exponent == 0x7fff || register[7] & 0x80 == 0 {
            2
        } else {
            0
        };
        tags | tag << (2 * physical)
    })
}

/// The abridged tag word from the full one.
pub(crate) fn abridged_tags(full: u16) -> u8 {
    (0..8).fold(0, |tags, register| tags | u8::from(full >> (2 * register) & 3 != 3) << register)
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags() {
        let mut area = X87Area::default();
        assert_eq!(full_tags(&area), 0xffff);
        area.0[4] = 0xff;
        set_status(&mut area, 3 << 11);
        // ST(0) = physical 3: valid; ST(1) = 4: zero; ST(2) = 5: infinity; ST(3) = 6: denormal; the rest 0.
        area.0[39] = 0x80;
        area.0[40] = 1;
        area.0[32 + 32 + 8..][..2].copy_from_slice(&0x7fffu16.to_le_bytes());
        area.0[32 + 48] = 1;
        assert_eq!(full_tags(&area), 0b01_10_10_01_00_01_01_01);
        assert_eq!(abridged_tags(full_tags(&area)), 0xff);
        assert_eq!(abridged_tags(0xfffc), 1);
    }

    #[test]
    fn mmx_numbers_are_physical() {
        let mut area = X87Area::default();
        for register in 0..8 {
            area.0[32 + 16 * register] = register as u8;
        }
        set_status(&mut area, 3 << 11);
        let mut image = area;
        enter_mmx(&mut image);
        // ST(0) is physical 3.
        assert_eq!(image.0[32 + 16 * 3], 0);
        assert_eq!(image.0[32 + 16 * 4], 1);
        assert_eq!(image.0[32], 5);
        commit_mmx(&mut area, image.0[32..160].try_into().unwrap(), 2);
        assert_eq!(area.0[4], 0xff);
        assert_eq!(top(&area), 0);
        assert_eq!(area.0[32 + 16 + 8..][..2], [0xff, 0xff]);
        assert_eq!(area.0[32 + 8..][..2], [0, 0]);
    }
}
