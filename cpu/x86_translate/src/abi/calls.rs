//! The functions that generated code calls, and what it passes to them.

use dbt_code::Emitter;
use iced_x86::Instruction;

/// What follows a call for a TLB miss.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct MissInfo {
    /// Where to try again, and where to go on if the interpreter executed the instruction (0: nowhere), from
    /// this information's own address.
    pub(crate) retry: i32,
    pub(crate) resume: i32,
    /// The page of the instruction, if the code is not independent of it.
    pub(crate) page_va: u64,
    /// Where in the page the instruction is.
    pub(crate) offset: u16,
    /// Bytes that are accessed.
    pub(crate) size: u16,
    /// A sum of the constants here.
    pub(crate) kind: u8,
    /// Instructions of the block from this one on.
    pub(crate) left: u8,
}

impl MissInfo {
    /// A store.
    pub(crate) const WRITE: u8 = 1;
    /// The address must be a multiple of the size.
    pub(crate) const ALIGNED: u8 = 2;
    /// Several accesses share the check.
    pub(crate) const GROUP: u8 = 4;
    /// The code is independent of the page's address.
    pub(crate) const RELATIVE: u8 = 8;
    /// A mask says what is accessed: the interpreter finds out.
    pub(crate) const MASKED: u8 = 16;

    /// Writes it behind the call.
    pub(crate) fn write(&self, e: &mut Emitter) {
        e.dword(self.retry as u32);
        e.dword(self.resume as u32);
        e.qword(self.page_va);
        e.dword(u32::from(self.offset) | u32::from(self.size) << 16);
        e.dword(u32::from(self.kind) | u32::from(self.left) << 8);
    }
}

/// What follows a call to have an instruction interpreted.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct InterpretInfo {
    /// The instruction, which lives as long as the code.
    pub(crate) insn: *const Instruction,
    /// Where to go on (0: nowhere), from this information's own address.
    pub(crate) resume: i32,
    /// Whether the instruction's addresses are relative to the page that runs.
    pub(crate) relative: u16,
    /// Instructions of the block from this one on.
    pub(crate) left: u16,
}

impl InterpretInfo {
    /// Writes it behind the call.
    pub(crate) fn write(&self, e: &mut Emitter) {
        e.qword(self.insn as u64);
        e.dword(self.resume as u32);
        e.dword(u32::from(self.relative) | u32::from(self.left) << 16);
    }
}

/// The addresses of the functions: `extern "C" fn(vcpu, value of S0, information) -> where to go on`, or 0 to
/// leave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entries {
    /// With a [`MissInfo`]: a TLB miss at the guest address that is the value.
    pub(crate) miss: u64,
    /// With an [`InterpretInfo`]: has its instruction interpreted.
    pub(crate) interpret: u64,
}
