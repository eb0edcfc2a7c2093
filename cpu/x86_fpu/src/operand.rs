//! Memory operands, and what must hold before an instruction may execute.

use crate::stub::Class;
use crate::x87;
use x86_core::{CodeSize, Core, Seg, Trap, cr0, cr4, efer, flags, vector};

/// Reads `data.len()` bytes; powers of two up to 16 in one access.
pub(crate) fn read(core: &mut Core, (seg, offset): (Seg, u64), data: &mut [u8]) -> Result<(), Trap> {
    match data.len() {
        1 => data.copy_from_slice(&[core.read::<u8>(seg, offset)?]),
        2 => data.copy_from_slice(&core.read::<u16>(seg, offset)?.to_le_bytes()),
        4 => data.copy_from_slice(&core.read::<u32>(seg, offset)?.to_le_bytes()),
        8 => data.copy_from_slice(&core.read::<u64>(seg, offset)?.to_le_bytes()),
        16 => data.copy_from_slice(&core.read::<u128>(seg, offset)?.to_le_bytes()),
        _ => core.read_bytes(seg, offset, data)?,
    }
    Ok(())
}

/// Stores 16 bytes at once: an instruction that loads them right after, as stubs do, would wait for two
/// halves to get to the cache.
#[inline(always)]
pub(crate) fn set_wide(place: &mut [u8; 16], value: u128) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_set_epi64x, _mm_storeu_si128};
        // SAFETY: SSE2 is part of the architecture; `place` is 16 bytes, of any alignment.
        unsafe {
            let value = _mm_set_epi64x((value >> 64) as i64, value as i64);
            _mm_storeu_si128(place.as_mut_ptr().cast(), value);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    place.copy_from_slice(&value.to_le_bytes());
}

/// Writes `data`, as [`read`] reads.
pub(crate) fn write(core: &mut Core, (seg, offset): (Seg, u64), data: &[u8]) -> Result<(), Trap> {
    fn array<const N: usize>(data: &[u8]) -> [u8; N] {
        let mut array = [0; N];
        array.copy_from_slice(data);
        array
    }
    match data.len() {
        1 => core.write(seg, offset, data[0]),
        2 => core.write(seg, offset, u16::from_le_bytes(array(data))),
        4 => core.write(seg, offset, u32::from_le_bytes(array(data))),
        8 => core.write(seg, offset, u64::from_le_bytes(array(data))),
        16 => core.write(seg, offset, u128::from_le_bytes(array(data))),
        _ => core.write_bytes(seg, offset, data),
    }
}

/// #GP(0) if the linear address is not a multiple of `align`, a power of two.
pub(crate) fn check_alignment(core: &Core, (seg, offset): (Seg, u64), align: u64) -> Result<(), Trap> {
    let base = match (core.code_size(), seg) {
        (CodeSize::Bits64, Seg::Es | Seg::Cs | Seg::Ss | Seg::Ds) => 0,
        _ => core.cpu.segments[seg as usize].base,
    };
    if base.wrapping_add(offset) & (align - 1) != 0 { Err(Trap::gp(0)) } else { Ok(()) }
}

/// Whether the processor is in real or virtual-8086 mode.
pub(crate) fn real_mode(core: &Core) -> bool {
    core.cpu.cr0 & cr0::PE == 0 || core.cpu.rflags & flags::VM != 0
}

/// Whether code runs in 64-bit mode.
pub(crate) fn long_code(core: &Core) -> bool {
    core.cpu.msrs.efer & efer::LMA != 0 && core.code_size() == CodeSize::Bits64
}

/// Whether the unit may be used now: #UD and #NM by control registers (Intel SDM volume 3, 2.5 and table
/// 14-1).
pub(crate) fn check_available(core: &Core, class: Class) -> Result<(), Trap> {
    let cpu = &core.cpu;
    let usable = match class {
        Class::X87 => {
            return if cpu.cr0 & (cr0::EM | cr0::TS) != 0 { Err(Trap::NM) } else { Ok(()) };
        }
        Class::Mmx => cpu.cr0 & cr0::EM == 0,
        Class::Sse => cpu.cr0 & cr0::EM == 0 && cpu.cr4 & cr4::OSFXSR != 0,
        Class::Avx => cpu.cr4 & cr4::OSXSAVE != 0 && cpu.xcr0 & 6 == 6 && !real_mode(core),
        Class::Avx512 => cpu.cr4 & cr4::OSXSAVE != 0 && cpu.xcr0 & 0xe6 == 0xe6 && !real_mode(core),
    };
    if !usable {
        Err(Trap::UD)
    } else if cpu.cr0 & cr0::TS != 0 {
        Err(Trap::NM)
    } else {
        Ok(())
    }
}

/// #MF if an x87 exception waits to be taken. With CR0.NE clear it would be signalled by FERR# instead; no
/// interrupt controller is wired to that, so it is ignored, as if IGNNE# was asserted.
pub(crate) fn check_pending(core: &Core) -> Result<(), Trap> {
    if core.cpu.cr0 & cr0::NE != 0 && x87::pending(&core.cpu.x87) {
        Err(Trap::plain(vector::MF))
    } else {
        Ok(())
    }
}
