//! Where the code is that all blocks share.

use super::layout::TABLES;
use x86_core::WORLDS;

/// Addresses of the shared code.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stubs {
    /// `extern "C" fn(target)`: enters generated code at `target`, with the flags in memory.
    pub(crate) enter: u64,
    /// Leaves for an unlinked direct jump; the link's number is in `S0`, the flags in EFLAGS.
    pub(crate) link_hot: u64,
    /// The same with the flags in memory.
    pub(crate) link_mem: u64,
    /// Leaves because a poll at a direct jump said so; the same registers, flags in memory.
    pub(crate) poll: u64,
    /// Leaves with RIP set and the flags in memory.
    pub(crate) indirect: u64,
    /// Leaves with RIP set to an instruction for the interpreter, and the flags in memory.
    pub(crate) step: u64,
    /// Called: a TLB miss at the address in `S0`; a `MissInfo` follows the call.
    pub(crate) miss: u64,
    /// Called: has an instruction interpreted; an `InterpretInfo` follows the call.
    pub(crate) interpret: u64,
    /// Leaves for the guest address in `S0`, with the flags in memory.
    pub(crate) frames_end: u64,
    /// Goes to the guest address in `S0`, with the flags in memory and no frames: by
    /// [`Mode::table`](crate::guest::mode::Mode::table).
    pub(crate) return_missed: [u64; TABLES],
    /// SYSCALL with the address of the next instruction in `S0`, and SYSRET, with the flags in memory, in each world.
    pub(crate) syscall: [u64; WORLDS],
    pub(crate) sysret: [u64; WORLDS],
    /// Called: loads the guest's x87 state.
    pub(crate) load_fpu: u64,
    /// Called: has the registers of AVX-512 that were not in use begin as zeros.
    pub(crate) begin_wide: u64,
}
