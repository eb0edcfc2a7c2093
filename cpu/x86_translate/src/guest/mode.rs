//! What the code of blocks depends on besides the guest's bytes: the state of the processor.

use x86_core::svm::{Svm, code};
use x86_core::{CodeSize, Cpu, Seg, Segment, X87Area, cr0, cr4, flags};

/// What blocks depend on besides the code's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Mode(pub(crate) u32);

impl Mode {
    /// CPL 3. Such code is independent of the virtual address of its page, unless `BASED` is set.
    pub(crate) const USER: u32 = 1;
    /// Vector instructions are left to the interpreter: they would fault, or exceptions are unmasked.
    pub(crate) const NO_VECTOR: u32 = 2;
    /// Accesses share no checks.
    pub(crate) const UNGROUPED: u32 = 4;
    /// CR4.SMAP is set.
    pub(crate) const SMAP: u32 = 8;
    /// x87 and MMX instructions are left to the interpreter, for the same reasons.
    pub(crate) const NO_X87: u32 = 16;
    /// AVX instructions are left to the interpreter, for the same reasons.
    pub(crate) const NO_AVX: u32 = 32;
    /// So are those of AVX-512.
    pub(crate) const NO_AVX512: u32 = 64;
    /// A guest of the guest runs: translations of addresses are others, in tables of their own.
    pub(crate) const GUEST: u32 = 1 << 20;
    /// Its host wants to know of instructions that are translated otherwise.
    pub(crate) const INTERCEPTS: u32 = 1 << 21;
    /// 32-bit code, and 16-bit code; neither in 64-bit mode.
    pub(crate) const CODE32: u32 = 1 << 8;
    pub(crate) const CODE16: u32 = 1 << 9;
    /// IP is no linear address, or wraps at 64 KiB: blocks hang on the page's address and on the base of CS.
    pub(crate) const BASED: u32 = 1 << 10;
    /// The stack pointer is SP.
    pub(crate) const STACK16: u32 = 1 << 11;
    /// The segment begins at 0 and allows every access below 4 GiB.
    pub(crate) const ES_FLAT: u32 = 1 << 12;
    pub(crate) const SS_FLAT: u32 = 1 << 13;
    pub(crate) const DS_FLAT: u32 = 1 << 14;
    /// Real or virtual-8086 mode.
    pub(crate) const REAL: u32 = 1 << 15;
    /// Code here is not translated at all.
    pub(crate) const INTERPRETED: u32 = 1 << 16;

    /// Whether one of these holds.
    pub(crate) fn has(self, bits: u32) -> bool {
        self.0 & bits != 0
    }

    /// What the code of a processor in this state depends on.
    pub(crate) fn of(cpu: &Cpu) -> Self {
        let mut mode = 0;
        if cpu.cpl == 3 {
            mode |= Self::USER;
        }
        let off = cpu.cr0 & (cr0::EM | cr0::TS) != 0 || cpu.cr4 & cr4::OSFXSR == 0;
        if off || cpu.mxcsr & 0x1f80 != 0x1f80 {
            mode |= Self::NO_VECTOR;
        }
        // CR0.EM and CR4.OSFXSR do not count; the mode does.
        let off = cpu.cr0 & cr0::TS != 0 || cpu.cr4 & cr4::OSXSAVE == 0 || cpu.xcr0 & 6 != 6;
        let real = cpu.cr0 & cr0::PE == 0 || cpu.rflags & flags::VM != 0;
        if off || real || cpu.mxcsr & 0x1f80 != 0x1f80 {
            mode |= Self::NO_AVX;
        }
        if mode & Self::NO_AVX != 0 || cpu.xcr0 & 0xe0 != 0xe0 {
            mode |= Self::NO_AVX512;
        }
        if cpu.cr0 & (cr0::EM | cr0::TS) != 0 || unmasked(&cpu.x87) {
            mode |= Self::NO_X87;
        }
        if cpu.cr4 & cr4::SMAP != 0 {
            mode |= Self::SMAP;
        }
        if cpu.msrs.records_branches() {
            mode |= Self::INTERPRETED;
        }
        if cpu.svm.guest {
            mode |= Self::GUEST | if intercepts(&cpu.svm) { Self::INTERCEPTS } else { 0 };
        }
        if !cpu.long64 {
            mode |= Self::of_segments(cpu);
        }
        Self(mode)
    }

    /// What hangs on segments, outside 64-bit mode.
    fn of_segments(cpu: &Cpu) -> u32 {
        let code = &cpu.segments[Seg::Cs as usize];
        let mut mode = match cpu.code_size() {
            CodeSize::Bits16 => Self::CODE16 | Self::BASED,
            _ if code.base != 0 => Self::CODE32 | Self::BASED,
            _ => Self::CODE32,
        };
        let reach = if mode & Self::CODE16 != 0 { 0xffff } else { u32::MAX };
        if code.limit < reach || code.base >> 32 != 0 {
            // Where code ends would have to be looked at everywhere.
            mode |= Self::INTERPRETED;
        }
        if cpu.segments[Seg::Ss as usize].attributes & Segment::BIG == 0 {
            mode |= Self::STACK16;
        }
        for (seg, bit) in [(Seg::Es, Self::ES_FLAT), (Seg::Ss, Self::SS_FLAT), (Seg::Ds, Self::DS_FLAT)] {
            let segment = &cpu.segments[seg as usize];
            let whole = segment.base == 0 && segment.limit == u32::MAX;
            if whole && top(cpu, segment, true) == i64::from(u32::MAX) {
                mode |= bit;
            }
        }
        if !cpu.protected() {
            mode |= Self::REAL;
        }
        mode
    }

    /// Bits of the code's operands and addresses by default.
    pub(crate) fn bits(self) -> u32 {
        match self.0 & (Self::CODE32 | Self::CODE16) {
            0 => 64,
            Self::CODE32 => 32,
            _ => 16,
        }
    }

    /// Whether code is independent of the virtual address of its page.
    pub(crate) fn is_relative(self) -> bool {
        self.has(Self::USER) && !self.has(Self::BASED)
    }

    /// The world that it is of: 0 for the host's, 1 for a guest's.
    pub(crate) fn world(self) -> usize {
        usize::from(self.has(Self::GUEST))
    }

    /// The number of the table of jump targets: supervisor, user, and the same of a guest's world.
    pub(crate) fn table(self) -> usize {
        usize::from(self.has(Self::USER)) + 2 * self.world()
    }

    /// The highest instruction pointer that there can be code at.
    pub(crate) fn last_ip(self) -> u64 {
        if self.bits() == 16 { 0xffff } else { self.ip_mask() }
    }

    /// Bits of the instruction pointer.
    pub(crate) fn ip_mask(self) -> u64 {
        if self.bits() == 64 { u64::MAX } else { 0xffff_ffff }
    }
}

/// The highest offset that loads of a segment, or stores to it, may reach outside 64-bit mode; -1 if none, or if
/// that is not all that is to be said of it.
pub(crate) fn top(cpu: &Cpu, segment: &Segment, write: bool) -> i64 {
    let limit = i64::from(segment.limit);
    if !cpu.protected() {
        return limit;
    }
    // Usable; code or data; of data "writable" and "expands downwards", of code "readable" and "conforming".
    let kind = segment.attributes;
    let (code, granted, other) = (kind & 8 != 0, kind & 2 != 0, kind & 4 != 0);
    let allowed = if code { granted && !write } else { !other && (granted || !write) };
    if kind & Segment::UNUSABLE == 0 && allowed { limit } else { -1 }
}

/// Whether instructions are intercepted that are translated otherwise.
fn intercepts(svm: &Svm) -> bool {
    [code::PUSHF, code::POPF, code::IRET, code::RDTSC, code::RDTSCP].iter().any(|code| svm.intercepts(*code))
}

/// Whether a processor with this x87 state has to have its x87 instructions interpreted.
fn unmasked(area: &X87Area) -> bool {
    area.0[0] & 0x3f != 0x3f
}
