//! What a debugger asks of a processor, and what it is told.
//!
//! All addresses are linear: in 64-bit mode the guest's virtual addresses, elsewhere with the segment's base added.
//! The guest notices nothing of it as far as the accelerator can hide it.

/// What a debugger watches memory for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WatchKind {
    /// Stores.
    Write,
    /// Loads. Not every accelerator has it: see [`DebugLimits::read_watchpoints`].
    Read,
    /// Both.
    Access,
}

/// Memory whose use stops a processor, after the instruction that used it. What the processor does of itself (page
/// table walks, the delivery of exceptions) may go unnoticed, and what devices do goes unnoticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Watchpoint {
    /// The linear address of its first byte.
    pub address: u64,
    /// Its length in bytes, from 1 on.
    pub len: u64,
    /// What it is watched for.
    pub kind: WatchKind,
}

/// How a processor is debugged. The default is: not at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DebugSettings {
    /// Stop after one instruction (of a repeated string instruction after a part of it), or on the first of a handler
    /// that an exception led to.
    pub single_step: bool,
    /// Deliver no interrupts while single-stepping, unless the processor is halted. Without it a step may lead
    /// into the handler of an interrupt.
    pub hold_interrupts: bool,
    /// Where to stop before the instruction: linear addresses, any number of them. For what is beyond its hardware
    /// breakpoints the accelerator may change the guest's code while processors run, and only then.
    pub breakpoints: Vec<u64>,
    /// The same without a change of the guest's code, and so at addresses that nothing is mapped at yet.
    pub hardware_breakpoints: Vec<u64>,
    /// Memory that is watched.
    pub watchpoints: Vec<Watchpoint>,
}

impl DebugSettings {
    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        let Self { single_step, hold_interrupts: _, breakpoints, hardware_breakpoints, watchpoints } = self;
        !single_step && breakpoints.is_empty() && hardware_breakpoints.is_empty() && watchpoints.is_empty()
    }
}

/// What of debugging an accelerator is able to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebugLimits {
    /// How many hardware breakpoints and watchpoints there are together; a watchpoint takes one for each naturally
    /// aligned 1, 2, 4 or 8 bytes that it is made of. `None`: any number of any length.
    pub hardware: Option<u32>,
    /// Whether loads can be watched for without stores.
    pub read_watchpoints: bool,
    /// Whether [`DebugSettings::hold_interrupts`] does something.
    pub hold_interrupts: bool,
    /// Whether the guest's own debug registers have their effect while there are breakpoints or watchpoints.
    pub guest_registers: bool,
}

/// Why a processor that is debugged stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DebugStop {
    /// The next instruction is at this linear address, where there is a breakpoint. It stops there again if it is let
    /// run with the breakpoint in place: whoever goes on from it steps first, without it.
    Breakpoint {
        /// The address.
        address: u64,
    },
    /// The step is done.
    Step,
    /// The last instruction used watched memory.
    Watchpoint(Watchpoint),
}
