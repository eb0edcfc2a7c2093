//! What a stub works on.

use x86_core::{VecReg, X87Area};

/// What a stub works on; RDI points to it.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Context {
    /// What x87 stubs leave, as an FXSAVE64 image; of MMX stubs the registers, before and after.
    pub(crate) fx: [u8; 512],
    /// The memory operand.
    pub(crate) memory: [u8; 64],
    /// The guest's vector registers.
    pub(crate) vectors: *mut VecReg,
    /// The guest's mask registers.
    pub(crate) masks: *mut u64,
    /// The guest's x87 state, which x87 stubs load.
    pub(crate) x87: *const X87Area,
    /// The general register operand.
    pub(crate) operand: u64,
    /// Registers that the instruction uses without naming them.
    pub(crate) rax: u64,
    pub(crate) rcx: u64,
    pub(crate) rdx: u64,
    /// RFLAGS.
    pub(crate) flags: u64,
    /// MXCSR to run under, then what it has become.
    pub(crate) mxcsr: u32,
    /// MXCSR of Rust code.
    pub(crate) host_mxcsr: u32,
    /// The x87 control word of Rust code.
    pub(crate) host_control: u16,
}
