//! The parts of a block that are seldom executed, and written after the rest.

use super::address::{Access, Ea};

/// Code that is written at the end, away from the hot path.
pub(crate) struct Cold {
    /// The displacement that leads to it.
    pub(crate) field: u64,
    /// The instruction that it belongs to.
    pub(crate) instruction: usize,
    pub(crate) kind: ColdKind,
}

/// What such code does.
pub(crate) enum ColdKind {
    /// The TLB entry is filled and the check done again, or the instruction is left to the interpreter.
    Miss(Miss),
    /// The exit of the link of that number.
    Link(usize),
    /// The same after the page that runs was changed by so much.
    LinkBack(usize, i32),
    /// The exit of a poll before that link.
    Poll(usize),
    /// The target of an indirect jump is in S0.
    Indirect,
    /// The current instruction is left to the interpreter.
    Interpret,
    /// The same, and the block is left.
    InterpretAndLeave,
    /// The block, which has one instruction, is left to the interpreter.
    Step,
    /// The block has more instructions than the budget: the first is left to the interpreter.
    OverBudget,
    /// The guest's x87 state is loaded; then the code goes on there.
    LoadFpu(u64),
    /// The registers of AVX-512 begin as zeros; then the code goes on there.
    BeginWide(u64),
    /// Frames of calls are forgotten, as there are too many; then the code goes on there.
    DropFrames(u64),
}

impl ColdKind {
    /// Whether the code goes on behind the instruction with what the interpreter made of it.
    pub(crate) fn may_resume(&self) -> bool {
        matches!(self, Self::Interpret | Self::Miss(Miss { group: false, .. }))
    }
}

/// The check of an access, or of several, failed.
pub(crate) struct Miss {
    pub(crate) ea: Ea,
    /// The bytes that were checked begin so far after the address.
    pub(crate) from: i32,
    pub(crate) access: Access,
    /// Where the check is.
    pub(crate) retry: u64,
    /// Several accesses share the check.
    pub(crate) group: bool,
}
