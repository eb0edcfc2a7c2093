//! The mode of operation: what CR0, EFER, RFLAGS and the code segment make of each other.

use crate::{CodeSize, Core, Cpu, Seg, Segment, cr0, efer, flags};

impl Cpu {
    /// How code is decoded now.
    #[inline]
    pub fn code_size(&self) -> CodeSize {
        if self.long64 {
            CodeSize::Bits64
        } else if self.segments[Seg::Cs as usize].attributes & Segment::BIG != 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        }
    }

    /// Whether this is protected mode and not virtual-8086 mode: selectors name descriptors.
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0 && self.rflags & flags::VM == 0
    }

    /// Whether IA-32e mode is active (64-bit or compatibility mode).
    pub fn long_mode(&self) -> bool {
        self.msrs.efer & efer::LMA != 0
    }

    /// The I/O privilege level.
    pub fn iopl(&self) -> u8 {
        (self.rflags >> 12 & 3) as u8
    }
}

impl Core<'_> {
    /// How code is decoded now.
    #[inline]
    pub fn code_size(&self) -> CodeSize {
        self.cpu.code_size()
    }

    pub(crate) fn protected(&self) -> bool {
        self.cpu.protected()
    }

    pub(crate) fn vm86(&self) -> bool {
        self.cpu.rflags & flags::VM != 0
    }

    /// Writes all of RFLAGS that exists, and what hangs on it.
    pub fn set_rflags(&mut self, value: u64) {
        let old = self.cpu.rflags;
        self.cpu.rflags = value & flags::EXIST | flags::FIXED;
        if (old ^ value) & (flags::AC | flags::VM) != 0 {
            self.mode_changed();
        }
    }
}
