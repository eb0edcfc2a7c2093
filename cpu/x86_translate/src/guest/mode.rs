//! What the code of blocks depends on besides the guest's bytes: the state of the processor.

use x86_core::{Cpu, X87Area, cr0, cr4};

/// What blocks depend on besides the code's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Mode(pub(crate) u8);

impl Mode {
    /// CPL 3. Such code is independent of the virtual address of its page.
    pub(crate) const USER: u8 = 1;
    /// Vector instructions are left to the interpreter: they would fault, or exceptions are unmasked.
    pub(crate) const NO_VECTOR: u8 = 2;
    /// Accesses share no checks.
    pub(crate) const UNGROUPED: u8 = 4;
    /// CR4.SMAP is set.
    pub(crate) const SMAP: u8 = 8;
    /// x87 and MMX instructions are left to the interpreter, for the same reasons.
    pub(crate) const NO_X87: u8 = 16;

    /// Whether one of these holds.
    pub(crate) fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
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
        if cpu.cr0 & (cr0::EM | cr0::TS) != 0 || unmasked(&cpu.x87) {
            mode |= Self::NO_X87;
        }
        if cpu.cr4 & cr4::SMAP != 0 {
            mode |= Self::SMAP;
        }
        Self(mode)
    }
}

/// Whether a processor with this x87 state has to have its x87 instructions interpreted.
fn unmasked(area: &X87Area) -> bool {
    area.0[0] & 0x3f != 0x3f
}
