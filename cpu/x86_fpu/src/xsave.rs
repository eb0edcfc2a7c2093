//! XSAVE, XRSTOR and their variants (Intel SDM volume 1, chapter 13).

use crate::operand::{check_alignment, long_code};
use crate::save::{MXCSR, XMM, decode_mxcsr, decode_x87, decode_xmm, encode_mxcsr, encode_x87, encode_xmm};
use crate::x87;
use iced_x86::{Code, Instruction};
use x86_core::{Core, Cpu, Seg, Trap, X87Area, cr0, cr4, reg};

/// x87.
const X87: u64 = 1 << 0;
/// XMM registers and MXCSR.
const SSE: u64 = 1 << 1;
/// Upper halves of YMM registers.
const AVX: u64 = 1 << 2;

/// Length of the legacy region.
const LEGACY: usize = 512;
/// Length of legacy region and header.
const FIXED: usize = 576;
/// Longest area.
const MAX: usize = FIXED + 256;
/// XCOMP_BV bit 63: the compacted format.
const COMPACTED: u64 = 1 << 63;
/// MXCSR's initial value.
const MXCSR_INIT: u32 = 0x1f80;

/// A state component in the extended region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XsaveComponent {
    /// Its bit in XCR0.
    pub bit: u32,
    /// Bytes (CPUID leaf 0xd, EAX).
    pub size: u32,
    /// Place in the standard format (EBX).
    pub offset: u32,
}

/// The components that XSAVE can save beyond x87 (bit 0) and SSE (bit 1).
pub const XSAVE_COMPONENTS: [XsaveComponent; 1] =
    [XsaveComponent { bit: 2, size: 256, offset: FIXED as u32 }];

/// Length of an XSAVE area for the components in `mask`, in standard or compacted format (CPUID leaf 0xd).
pub fn xsave_area_size(mask: u64, compacted: bool) -> u32 {
    XSAVE_COMPONENTS.iter().filter(|component| mask >> component.bit & 1 != 0).fold(
        FIXED as u32,
        |end, component| {
            if compacted { end + component.size } else { end.max(component.offset + component.size) }
        },
    )
}

/// Which instruction of the family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Save,
    /// XSAVEOPT.
    SaveOptimized,
    /// XSAVEC.
    SaveCompacted,
    /// XSAVES.
    SaveSupervisor,
    Restore,
    /// XRSTORS.
    RestoreSupervisor,
}

/// The variant, and whether pointers are of 64 bits.
fn variant(code: Code) -> Option<(Variant, bool)> {
    use Variant::*;
    Some(match code {
        Code::Xsave_mem => (Save, false),
        Code::Xsave64_mem => (Save, true),
        Code::Xsaveopt_mem => (SaveOptimized, false),
        Code::Xsaveopt64_mem => (SaveOptimized, true),
        Code::Xsavec_mem => (SaveCompacted, false),
        Code::Xsavec64_mem => (SaveCompacted, true),
        Code::Xsaves_mem => (SaveSupervisor, false),
        Code::Xsaves64_mem => (SaveSupervisor, true),
        Code::Xrstor_mem => (Restore, false),
        Code::Xrstor64_mem => (Restore, true),
        Code::Xrstors_mem => (RestoreSupervisor, false),
        Code::Xrstors64_mem => (RestoreSupervisor, true),
        _ => return None,
    })
}

/// Whether `code` is of the family.
pub(crate) fn handles(code: Code) -> bool {
    variant(code).is_some()
}

/// Executes an instruction of the family.
pub(crate) fn execute(core: &mut Core, insn: &Instruction) -> Result<(), Trap> {
    let (variant, wide) = variant(insn.code()).ok_or(Trap::UD)?;
    if core.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Trap::UD);
    }
    if core.cpu.cr0 & cr0::TS != 0 {
        return Err(Trap::NM);
    }
    let supervisor = matches!(variant, Variant::SaveSupervisor | Variant::RestoreSupervisor);
    if supervisor && core.cpu.cpl != 0 {
        return Err(Trap::gp(0));
    }
    let at = x86_core::effective_address(core.cpu, insn, 0);
    check_alignment(core, at, 64)?;
    let enabled = core.cpu.xcr0 | if supervisor { core.cpu.msrs.xss } else { 0 };
    let asked = core.cpu.regs[reg::RDX] << 32 | core.cpu.regs[reg::RAX] & 0xffff_ffff;
    let area = Area { at, wide, enabled, mask: enabled & asked, count: if long_code(core) { 16 } else { 8 } };
    match variant {
        Variant::Save => area.save(core, false),
        Variant::SaveOptimized => area.save(core, true),
        Variant::SaveCompacted | Variant::SaveSupervisor => area.save_compacted(core),
        Variant::Restore | Variant::RestoreSupervisor => area.restore(core, supervisor),
    }
}

/// An XSAVE area in guest memory, and what of it is meant.
struct Area {
    at: (Seg, u64),
    wide: bool,
    /// Components that XCR0 (and IA32_XSS) enable.
    enabled: u64,
    /// Those of them asked for: RFBM.
    mask: u64,
    /// Vector registers that the mode has.
    count: usize,
}

/// Pieces of the area to write.
struct Pieces {
    bytes: [u8; MAX],
    ranges: [(usize, usize); 8],
    used: usize,
}

impl Pieces {
    fn new() -> Self {
        Self { bytes: [0; MAX], ranges: [(0, 0); 8], used: 0 }
    }

    /// Marks `start..end` to be written.
    fn add(&mut self, start: usize, end: usize) {
        self.ranges[self.used] = (start, end);
        self.used += 1;
    }

    /// Writes all marked, or nothing.
    fn write(&self, core: &mut Core, (seg, offset): (Seg, u64)) -> Result<(), Trap> {
        let ranges = &self.ranges[..self.used];
        for (start, end) in ranges {
            core.check_write(seg, offset.wrapping_add(*start as u64), (end - start) as u64)?;
        }
        for (start, end) in ranges {
            core.write_bytes(seg, offset.wrapping_add(*start as u64), &self.bytes[*start..*end])?;
        }
        Ok(())
    }
}

/// Components that are not in their initial state: XINUSE.
fn in_use(cpu: &Cpu, count: usize) -> u64 {
    let zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    let mut fresh = X87Area::default();
    x87::init(&mut fresh);
    let x87 = cpu.x87.0[..24] != fresh.0[..24] || !zero(&cpu.x87.0[32..XMM]);
    let sse = cpu.vectors[..count].iter().any(|vector| !zero(&vector.0[..16]));
    let avx = cpu.vectors[..count].iter().any(|vector| !zero(&vector.0[16..32]));
    [(x87, X87), (sse, SSE), (avx, AVX)].iter().filter(|(used, _)| *used).fold(0, |set, (_, bit)| set | bit)
}

fn encode_upper(cpu: &Cpu, count: usize, place: &mut [u8]) {
    for (place, vector) in place.chunks_exact_mut(16).zip(&cpu.vectors[..count]) {
        place.copy_from_slice(&vector.0[16..32]);
    }
}

impl Area {
    /// XSAVE and XSAVEOPT, which leaves out what is in its initial state.
    fn save(&self, core: &mut Core, optimized: bool) -> Result<(), Trap> {
        let (seg, offset) = self.at;
        let used = in_use(core.cpu, self.count);
        let written = if optimized { self.mask & used } else { self.mask };
        let header: u64 = core.read(seg, offset.wrapping_add(LEGACY as u64))?;
        let mut pieces = Pieces::new();
        self.save_legacy(core.cpu, written, self.mask & (SSE | AVX) != 0, &mut pieces);
        pieces.bytes[LEGACY..LEGACY + 8]
            .copy_from_slice(&(header & !self.mask | self.mask & used).to_le_bytes());
        pieces.add(LEGACY, LEGACY + 8);
        if written & AVX != 0 {
            encode_upper(core.cpu, self.count, &mut pieces.bytes[FIXED..]);
            pieces.add(FIXED, FIXED + 16 * self.count);
        }
        pieces.write(core, self.at)
    }

    /// XSAVEC and XSAVES.
    fn save_compacted(&self, core: &mut Core) -> Result<(), Trap> {
        let mut used = in_use(core.cpu, self.count);
        if core.cpu.mxcsr != MXCSR_INIT {
            used |= SSE;
        }
        let written = self.mask & used;
        let mut pieces = Pieces::new();
        self.save_legacy(core.cpu, written, written & SSE != 0, &mut pieces);
        pieces.bytes[LEGACY..LEGACY + 8].copy_from_slice(&written.to_le_bytes());
        pieces.bytes[LEGACY + 8..LEGACY + 16].copy_from_slice(&(self.mask | COMPACTED).to_le_bytes());
        pieces.add(LEGACY, LEGACY + 16);
        // There is one component, so its place is the same in both formats.
        if written & AVX != 0 {
            encode_upper(core.cpu, self.count, &mut pieces.bytes[FIXED..]);
            pieces.add(FIXED, FIXED + 16 * self.count);
        }
        pieces.write(core, self.at)
    }

    fn save_legacy(&self, cpu: &Cpu, written: u64, mxcsr: bool, pieces: &mut Pieces) {
        if written & X87 != 0 {
            encode_x87(&cpu.x87, self.wide, &mut pieces.bytes);
            pieces.add(0, MXCSR);
            pieces.add(32, XMM);
        }
        if mxcsr {
            encode_mxcsr(cpu, &mut pieces.bytes);
            pieces.add(MXCSR, MXCSR + 8);
        }
        if written & SSE != 0 {
            encode_xmm(cpu, self.count, &mut pieces.bytes);
            pieces.add(XMM, XMM + 16 * self.count);
        }
    }

    /// XRSTOR and XRSTORS.
    fn restore(&self, core: &mut Core, supervisor: bool) -> Result<(), Trap> {
        let (seg, offset) = self.at;
        let mut bytes = [0; MAX];
        core.read_bytes(seg, offset, &mut bytes[..FIXED])?;
        let field = |at: usize| {
            let mut value = [0; 8];
            value.copy_from_slice(&bytes[LEGACY + at..LEGACY + at + 8]);
            u64::from_le_bytes(value)
        };
        let (present, layout) = (field(0), field(8));
        let compacted = layout & COMPACTED != 0;
        let bad = if compacted {
            layout & !COMPACTED & !self.enabled != 0
                || present & !layout != 0
                || present & COMPACTED != 0
                || bytes[LEGACY + 16..FIXED].iter().any(|byte| *byte != 0)
        } else {
            supervisor || present & !self.enabled != 0 || layout != 0 || field(16) != 0
        };
        if bad {
            return Err(Trap::gp(0));
        }
        let loaded = self.mask & present;
        if loaded & AVX != 0 {
            let end = FIXED + 16 * self.count;
            core.read_bytes(seg, offset.wrapping_add(FIXED as u64), &mut bytes[FIXED..end])?;
        }
        let mxcsr = if !compacted && self.mask & (SSE | AVX) != 0 || compacted && loaded & SSE != 0 {
            Some(decode_mxcsr(&bytes)?)
        } else if compacted && self.mask & SSE != 0 {
            Some(MXCSR_INIT)
        } else {
            None
        };
        self.load(core.cpu, loaded, &bytes);
        if let Some(mxcsr) = mxcsr {
            core.cpu.mxcsr = mxcsr;
        }
        Ok(())
    }

    /// Loads the components in `loaded`, and initializes the others that are asked for.
    fn load(&self, cpu: &mut Cpu, loaded: u64, bytes: &[u8; MAX]) {
        if loaded & X87 != 0 {
            decode_x87(&mut cpu.x87, self.wide, bytes);
        } else if self.mask & X87 != 0 {
            cpu.x87.0.fill(0);
            x87::init(&mut cpu.x87);
        }
        if loaded & SSE != 0 {
            decode_xmm(cpu, self.count, bytes);
        } else if self.mask & SSE != 0 {
            cpu.vectors[..self.count].iter_mut().for_each(|vector| vector.0[..16].fill(0));
        }
        if loaded & AVX != 0 {
            for (place, vector) in bytes[FIXED..].chunks_exact(16).zip(&mut cpu.vectors[..self.count]) {
                vector.0[16..32].copy_from_slice(place);
            }
        } else if self.mask & AVX != 0 {
            cpu.vectors[..self.count].iter_mut().for_each(|vector| vector.0[16..32].fill(0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn area_sizes() {
        assert_eq!(xsave_area_size(3, false), 576);
        assert_eq!(xsave_area_size(7, false), 832);
        assert_eq!(xsave_area_size(7, true), 832);
        assert_eq!(xsave_area_size(!0, true), 832);
    }
}
