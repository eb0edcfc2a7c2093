//! XSAVE, XRSTOR and their variants (Intel SDM volume 1, chapter 13).

use crate::operand::{check_alignment, long_code};
use crate::save::{MXCSR, XMM, decode_mxcsr, decode_x87, decode_xmm, encode_mxcsr, encode_x87, encode_xmm};
use iced_x86::{Code, Instruction};
use std::ops::Range;
use x86_core::cpuid::{XSAVE_COMPONENTS, XSAVE_FIXED, XSAVE_MAX};
use x86_core::{Core, Cpu, Seg, Trap, X87Area, cr0, cr4, reg, width};

/// x87.
const X87: u64 = 1 << 0;
/// XMM registers and MXCSR.
const SSE: u64 = 1 << 1;
/// Upper halves of YMM registers.
const AVX: u64 = 1 << 2;
/// Mask registers.
const OPMASK: u64 = 1 << 5;
/// Upper halves of ZMM 0 to 15.
const ZMM_HIGH: u64 = 1 << 6;
/// ZMM 16 to 31.
const HIGH_ZMM: u64 = 1 << 7;
/// PKRU.
const PKRU: u64 = 1 << 9;

/// Length of the legacy region.
const LEGACY: usize = 512;
/// Length of legacy region and header.
const FIXED: usize = XSAVE_FIXED as usize;
/// XCOMP_BV bit 63: the compacted format.
const COMPACTED: u64 = 1 << 63;
/// MXCSR's initial value.
const MXCSR_INIT: u32 = 0x1f80;

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
    bytes: [u8; XSAVE_MAX],
    ranges: [(usize, usize); 12],
    used: usize,
}

impl Pieces {
    fn new() -> Self {
        Self { bytes: [0; XSAVE_MAX], ranges: [(0, 0); 12], used: 0 }
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

/// The registers of a component in the extended region, and which of their bytes; `None` of mask registers and PKRU.
/// Outside 64-bit mode there are 8 registers, and no ZMM 16 to 31.
fn registers(component: u64, count: usize) -> Option<(Range<usize>, Range<usize>)> {
    match component {
        AVX => Some((0..count, 16..32)),
        ZMM_HIGH => Some((0..count, 32..64)),
        HIGH_ZMM => Some((16..if count == 16 { 32 } else { 16 }, 0..64)),
        _ => None,
    }
}

/// Bytes of a component that are saved and restored in this mode.
fn len(component: u64, count: usize) -> usize {
    match registers(component, count) {
        Some((registers, bytes)) => registers.len() * bytes.len(),
        None if component == PKRU => 8,
        None => 64,
    }
}

fn encode(cpu: &Cpu, component: u64, count: usize, place: &mut [u8]) {
    match registers(component, count) {
        Some((registers, bytes)) => {
            for (place, vector) in place.chunks_exact_mut(bytes.len()).zip(&cpu.vectors[registers]) {
                place.copy_from_slice(&vector.0[bytes.clone()]);
            }
        }
        None if component == PKRU => place.copy_from_slice(&u64::from(cpu.pkru).to_le_bytes()),
        None => {
            for (place, mask) in place.chunks_exact_mut(8).zip(&cpu.opmask) {
                place.copy_from_slice(&mask.to_le_bytes());
            }
        }
    }
}

fn decode(cpu: &mut Cpu, component: u64, count: usize, bytes: &[u8]) {
    match registers(component, count) {
        Some((registers, range)) => {
            for (from, vector) in bytes.chunks_exact(range.len()).zip(&mut cpu.vectors[registers]) {
                vector.0[range.clone()].copy_from_slice(from);
            }
        }
        // What hangs on it is more than a register: the caller sets it.
        None if component == PKRU => {}
        None => {
            for (from, mask) in bytes.chunks_exact(8).zip(&mut cpu.opmask) {
                *mask = u64::from_le_bytes(std::array::from_fn(|byte| from[byte]));
            }
        }
    }
}

fn initialize(cpu: &mut Cpu, component: u64, count: usize) {
    match registers(component, count) {
        Some((registers, bytes)) => {
            cpu.vectors[registers].iter_mut().for_each(|vector| vector.0[bytes.clone()].fill(0));
        }
        None if component == PKRU => {}
        None => cpu.opmask = [0; 8],
    }
}

/// The components of the extended region in `mask`, with their places: those of the standard format, or of the
/// compacted one of an area that has the components in `layout`.
fn places(mask: u64, layout: Option<u64>) -> impl Iterator<Item = (u64, usize)> {
    let mut end = FIXED;
    XSAVE_COMPONENTS.iter().filter_map(move |component| {
        let at = match layout {
            None => component.offset as usize,
            Some(_) => end,
        };
        if layout.is_some_and(|layout| layout & component.mask() != 0) {
            end += component.size as usize;
        }
        (mask & component.mask() != 0).then_some((component.mask(), at))
    })
}

impl Area {
    /// XSAVE and XSAVEOPT, which leaves out what is in its initial state.
    fn save(&self, core: &mut Core, optimized: bool) -> Result<(), Trap> {
        let (seg, offset) = self.at;
        let used = core.cpu.components_in_use();
        let written = if optimized { self.mask & used } else { self.mask };
        let header: u64 = core.read(seg, offset.wrapping_add(LEGACY as u64))?;
        let mut pieces = Pieces::new();
        self.save_legacy(core.cpu, written, self.mask & (SSE | AVX) != 0, &mut pieces);
        pieces.bytes[LEGACY..LEGACY + 8]
            .copy_from_slice(&(header & !self.mask | self.mask & used).to_le_bytes());
        pieces.add(LEGACY, LEGACY + 8);
        self.save_extended(core.cpu, places(written, None), &mut pieces);
        pieces.write(core, self.at)
    }

    /// XSAVEC and XSAVES.
    fn save_compacted(&self, core: &mut Core) -> Result<(), Trap> {
        let mut used = core.cpu.components_in_use();
        if core.cpu.mxcsr != MXCSR_INIT {
            used |= SSE;
        }
        let written = self.mask & used;
        let mut pieces = Pieces::new();
        self.save_legacy(core.cpu, written, written & SSE != 0, &mut pieces);
        pieces.bytes[LEGACY..LEGACY + 8].copy_from_slice(&written.to_le_bytes());
        pieces.bytes[LEGACY + 8..LEGACY + 16].copy_from_slice(&(self.mask | COMPACTED).to_le_bytes());
        pieces.add(LEGACY, LEGACY + 16);
        self.save_extended(core.cpu, places(written, Some(self.mask)), &mut pieces);
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

    fn save_extended(&self, cpu: &Cpu, places: impl Iterator<Item = (u64, usize)>, pieces: &mut Pieces) {
        for (component, at) in places {
            let end = at + len(component, self.count);
            encode(cpu, component, self.count, &mut pieces.bytes[at..end]);
            pieces.add(at, end);
        }
    }

    /// XRSTOR and XRSTORS.
    fn restore(&self, core: &mut Core, supervisor: bool) -> Result<(), Trap> {
        let (seg, offset) = self.at;
        let mut bytes = [0; XSAVE_MAX];
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
        let format = compacted.then_some(layout);
        for (component, at) in places(loaded, format) {
            let end = at + len(component, self.count);
            core.read_bytes(seg, offset.wrapping_add(at as u64), &mut bytes[at..end])?;
        }
        let mxcsr = if !compacted && self.mask & (SSE | AVX) != 0 || compacted && loaded & SSE != 0 {
            Some(decode_mxcsr(&bytes)?)
        } else if compacted && self.mask & SSE != 0 {
            Some(MXCSR_INIT)
        } else {
            None
        };
        self.load(core.cpu, loaded, format, &bytes);
        if self.mask & PKRU != 0 {
            let place = places(loaded & PKRU, format).next();
            let value = place.map_or([0; 4], |(_, at)| std::array::from_fn(|byte| bytes[at + byte]));
            core.set_pkru(u32::from_le_bytes(value));
        }
        if let Some(mxcsr) = mxcsr {
            core.cpu.mxcsr = mxcsr;
        }
        Ok(())
    }

    /// Loads the components in `loaded`, and initializes the others that are asked for.
    fn load(&self, cpu: &mut Cpu, loaded: u64, format: Option<u64>, bytes: &[u8; XSAVE_MAX]) {
        if loaded & X87 != 0 {
            decode_x87(&mut cpu.x87, self.wide, bytes);
        } else if self.mask & X87 != 0 {
            cpu.x87 = X87Area::default();
        }
        if loaded & SSE != 0 {
            decode_xmm(cpu, self.count, bytes);
        } else if self.mask & SSE != 0 {
            cpu.vectors[..self.count].iter_mut().for_each(|vector| vector.0[..16].fill(0));
        }
        for (component, _) in places(self.mask & !loaded, None) {
            initialize(cpu, component, self.count);
        }
        for (component, at) in places(loaded, format) {
            decode(cpu, component, self.count, &bytes[at..at + len(component, self.count)]);
        }
        // (Generated code relies on the width not to fall.)
        let now = match loaded {
            _ if loaded & (OPMASK | ZMM_HIGH | HIGH_ZMM) != 0 => width::ZMM,
            _ if loaded & AVX != 0 => width::YMM,
            _ => width::XMM,
        };
        cpu.vector_width = cpu.vector_width.max(now);
    }
}
