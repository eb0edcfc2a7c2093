//! For tests: runs single instructions on the host's own processor and reports the state they leave.
//!
//! The host is a perfect oracle for everything that user mode can execute. [`run`] loads all registers
//! from a [`NativeState`], executes the given bytes at [`CODE`], and gives back the registers, the scratch
//! memory and how the instruction ended: it went on, it jumped, or it faulted. Faults are caught by signal
//! handlers in this process; a tested instruction must therefore address nothing but the scratch memory
//! (which has unmapped guard space of at least 32 KiB on both sides) and addresses that surely fault.
//!
//! Instructions that change what the process is (system calls, segment loads) must not be run.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]
#![allow(unsafe_code)] // executing arbitrary instructions is this crate's purpose

mod stub;
mod tally;

pub use tally::{Tally, rounds, seed};

/// Where the tested instruction lies (the middle of its page, so that short jumps in both directions stay
/// in it).
pub const CODE: u64 = 0x4000_0800;
/// The 4 KiB of memory that tested instructions may access; unmapped space lies on both sides.
pub const SCRATCH: u64 = 0x2000_0000;
/// Length of the scratch memory.
pub const SCRATCH_LEN: usize = 4096;
/// The flags that [`NativeState::rflags`] may set: the arithmetic ones and DF.
pub const LOADABLE_FLAGS: u64 = 0xcd5;

/// What an instruction reads and writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NativeState {
    /// General registers in encoding order. RSP is the tested code's own.
    pub regs: [u64; 16],
    /// RFLAGS; of the input only [`LOADABLE_FLAGS`] count.
    pub rflags: u64,
    /// MXCSR.
    pub mxcsr: u32,
    /// ZMM registers; XMM and YMM are their low parts. What the host lacks stays as it is: without AVX that is all
    /// but XMM registers, without AVX-512 all but 16 YMM registers.
    pub vectors: [[u8; 64]; 32],
    /// Mask registers of AVX-512; without it they stay as they are.
    pub opmask: [u64; 8],
    /// x87 state as in an FXSAVE64 image; bytes 24..32 (MXCSR and its mask) and those from 160 on (XMM) are
    /// neither used nor changed.
    pub x87: [u8; 512],
    /// The memory at [`SCRATCH`].
    pub scratch: [u8; SCRATCH_LEN],
}

impl Default for NativeState {
    /// Zeroes; x87 and MXCSR as after FNINIT and power-up.
    fn default() -> Self {
        let mut x87 = [0; 512];
        x87[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        Self {
            regs: [0; 16],
            rflags: 2,
            mxcsr: 0x1f80,
            vectors: [[0; 64]; 32],
            opmask: [0; 8],
            x87,
            scratch: [0; SCRATCH_LEN],
        }
    }
}

/// How the tested instruction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It completed, and execution went on behind it.
    Next,
    /// It completed and went to this address (an offset in CS), in the page of [`CODE`].
    Jumped(u64),
    /// It faulted. (A jump out of the page of [`CODE`] is a fault with `rip` at the target.)
    Fault {
        /// The signal, as `libc::SIGSEGV`.
        signal: i32,
        /// The exception's vector, as the kernel reports it.
        vector: u8,
        /// The exception's error code.
        error: u64,
        /// The signal's address: for page faults the address accessed.
        address: u64,
        /// The instruction pointer in the fault.
        rip: u64,
    },
}

/// What [`run`] gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The state afterwards (in a fault).
    pub state: NativeState,
    /// How it ended.
    pub end: End,
}

/// In which mode to execute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit mode.
    Bits64,
    /// Compatibility mode with flat 32-bit segments; only the low halves of the first eight registers are
    /// meaningful.
    Bits32,
    /// 16-bit protected mode: CS is based at the page of [`CODE`], so that IP starts at `CODE & 0xfff`, with a
    /// limit of 0xffff; DS, ES and SS are 16-bit segments of just the scratch memory.
    Bits16,
}

impl Mode {
    /// The instruction pointer at the tested instruction.
    pub fn start(self) -> u64 {
        if self == Self::Bits16 { CODE & 0xfff } else { CODE }
    }

    /// The offset of the scratch memory in the data segments.
    pub fn scratch(self) -> u64 {
        if self == Self::Bits16 { 0 } else { SCRATCH }
    }
}

/// Executes `bytes` (one instruction, or a few) in 64-bit mode.
///
/// # Panics
/// If the host lacks XSAVE, does not let the fixed addresses be mapped, or `bytes` is over 256 bytes.
pub fn run(bytes: &[u8], state: &NativeState) -> Outcome {
    stub::run(bytes, state, Mode::Bits64)
}

/// Executes `bytes` in 32-bit mode.
///
/// # Panics
/// As [`run`]; also if the kernel has no 32-bit code segment.
pub fn run32(bytes: &[u8], state: &NativeState) -> Outcome {
    stub::run(bytes, state, Mode::Bits32)
}

/// Executes `bytes` in 16-bit protected mode.
///
/// # Panics
/// As [`run`]; also if the kernel lets no 16-bit segments be made ([`has_16_bit`]).
pub fn run16(bytes: &[u8], state: &NativeState) -> Outcome {
    stub::run(bytes, state, Mode::Bits16)
}

/// Whether the kernel lets 16-bit segments be made.
pub fn has_16_bit() -> bool {
    stub::has_16_bit()
}

/// Whether the host has AVX-512, and its mask and ZMM registers are loaded and reported.
pub fn has_avx512() -> bool {
    stub::components().mask & stub::AVX512 == stub::AVX512
}

/// Whether the host is an AMD processor (or a licensee's): where the manuals leave results undefined,
/// processors of a vendor agree with one another.
pub fn host_is_amd() -> bool {
    // Once only: hypervisors intercept CPUID.
    static AMD: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let id = std::arch::x86_64::__cpuid(0);
        (id.ebx, id.edx, id.ecx) == (0x6874_7541, 0x6974_6e65, 0x444d_4163)
    });
    *AMD
}
