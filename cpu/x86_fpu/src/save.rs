//! FXSAVE and FXRSTOR (Intel SDM volume 1, 10.5), and the legacy region that XSAVE shares with them.

use crate::operand::{check_alignment, long_code};
use crate::simd_exception::MXCSR_MASK;
use crate::x87;
use iced_x86::{Code, Instruction};
use x86_core::{Core, Cpu, Trap, X87Area, cr0, cr4, efer};

/// Where registers lie in the legacy region.
pub(crate) const MXCSR: usize = 24;
pub(crate) const XMM: usize = 160;

/// Fills the x87 part of a legacy region: bytes 0..24 and 32..160. With `wide`, pointers are of 64 bits,
/// else of 32 with selectors, which are always zero. As on AMD's processors (AMD APM volume 5, FXSAVE), the
/// last instruction's opcode and pointers are saved only while an exception is pending, else zeros.
pub(crate) fn encode_x87(area: &X87Area, wide: bool, region: &mut [u8]) {
    region[..24].copy_from_slice(&area.0[..24]);
    region[5] = 0;
    if !x87::pending(area) {
        region[6..24].fill(0);
    }
    if !wide {
        region[12..16].fill(0);
        region[20..24].fill(0);
    }
    region[32..XMM].copy_from_slice(&area.0[32..XMM]);
}

/// Loads the x87 part of a legacy region.
pub(crate) fn decode_x87(area: &mut X87Area, wide: bool, region: &[u8]) {
    let control = u16::from_le_bytes([region[0], region[1]]);
    let mut new = X87Area::default();
    new.0[..24].copy_from_slice(&region[..24]);
    new.0[32..XMM].copy_from_slice(&region[32..XMM]);
    new.0[5] = 0;
    new.0[7] &= 7;
    if !wide {
        new.0[12..16].fill(0);
        new.0[20..24].fill(0);
    }
    for register in new.0[32..XMM].chunks_mut(16) {
        register[10..].fill(0);
    }
    x87::set_control(&mut new, control);
    x87::summarize(&mut new);
    *area = new;
}

/// Fills MXCSR and its mask.
pub(crate) fn encode_mxcsr(cpu: &Cpu, region: &mut [u8]) {
    region[MXCSR..MXCSR + 4].copy_from_slice(&cpu.mxcsr.to_le_bytes());
    region[MXCSR + 4..MXCSR + 8].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

/// MXCSR of a legacy region; #GP(0) if it has bits set that do not exist.
pub(crate) fn decode_mxcsr(region: &[u8]) -> Result<u32, Trap> {
    let value = u32::from_le_bytes([region[24], region[25], region[26], region[27]]);
    if value & !MXCSR_MASK != 0 { Err(Trap::gp(0)) } else { Ok(value) }
}

/// Fills the low parts of `count` vector registers.
pub(crate) fn encode_xmm(cpu: &Cpu, count: usize, region: &mut [u8]) {
    for (place, vector) in region[XMM..].chunks_exact_mut(16).zip(&cpu.vectors[..count]) {
        place.copy_from_slice(&vector.0[..16]);
    }
}

/// Loads them.
pub(crate) fn decode_xmm(cpu: &mut Cpu, count: usize, region: &[u8]) {
    for (place, vector) in region[XMM..].chunks_exact(16).zip(&mut cpu.vectors[..count]) {
        vector.0[..16].copy_from_slice(place);
    }
}

/// XMM registers that the instruction covers.
fn xmm_count(core: &Core) -> usize {
    let long = long_code(core);
    if core.cpu.cr4 & cr4::OSFXSR == 0 {
        0
    } else if long && core.cpu.cpl == 0 && core.cpu.msrs.efer & efer::FFXSR != 0 {
        // AMD APM volume 2, 3.1.7.
        0
    } else if long {
        16
    } else {
        8
    }
}

fn check(core: &Core) -> Result<(), Trap> {
    if core.cpu.cr0 & (cr0::EM | cr0::TS) != 0 { Err(Trap::NM) } else { Ok(()) }
}

/// FXSAVE.
pub(crate) fn fxsave(core: &mut Core, insn: &Instruction) -> Result<(), Trap> {
    check(core)?;
    let (seg, offset) = x86_core::effective_address(core.cpu, insn, 0);
    check_alignment(core, (seg, offset), 16)?;
    core.check_write(seg, offset, 512)?;
    let mut region = [0; 512];
    encode_x87(&core.cpu.x87, insn.code() == Code::Fxsave64_m512byte, &mut region);
    encode_mxcsr(core.cpu, &mut region);
    let count = xmm_count(core);
    encode_xmm(core.cpu, count, &mut region);
    // What comes after the registers is not written.
    core.write_bytes(seg, offset, &region[..XMM + 16 * count])
}

/// FXRSTOR.
pub(crate) fn fxrstor(core: &mut Core, insn: &Instruction) -> Result<(), Trap> {
    check(core)?;
    let (seg, offset) = x86_core::effective_address(core.cpu, insn, 0);
    check_alignment(core, (seg, offset), 16)?;
    let mut region = [0; 512];
    core.read_bytes(seg, offset, &mut region)?;
    if core.cpu.cr4 & cr4::OSFXSR != 0 {
        core.cpu.mxcsr = decode_mxcsr(&region)?;
    }
    decode_x87(&mut core.cpu.x87, insn.code() == Code::Fxrstor64_m512byte, &region);
    let count = xmm_count(core);
    decode_xmm(core.cpu, count, &region);
    Ok(())
}
