//! What a block is translated from.

use crate::guest::mode::Mode;
use iced_x86::Instruction;
use std::sync::atomic::AtomicU32;

/// What translations depend on besides their mode: constant for a VM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    /// All arithmetic flags are exact at all times.
    pub(crate) strict: bool,
    /// The host has BMI2.
    pub(crate) bmi2: bool,
    /// Locked instructions must be atomic for other processors.
    pub(crate) lock_needed: bool,
    /// Instructions in a block at most.
    pub(crate) max_instructions: usize,
    /// Conditional jumps in a block that are passed when not taken.
    pub(crate) side_exits: usize,
    /// Blocks take the number of their instructions from the budget.
    pub(crate) counting: bool,
}

/// What is fixed for a translation.
pub(crate) struct Input<'a> {
    /// The page; and 15 bytes of the next if that is known.
    pub(crate) page: &'a [u8],
    /// The guest physical address of the next page, if the first instruction crosses into it.
    pub(crate) next_page: Option<u64>,
    /// The virtual address of the page, without the base of CS.
    pub(crate) page_va: u64,
    /// The base of CS.
    pub(crate) base: u32,
    /// How many bytes of the page may be executed.
    pub(crate) end: u16,
    /// Where in the page the block begins.
    pub(crate) offset: u16,
    pub(crate) mode: Mode,
    /// Slots of jumps between pages given out.
    pub(crate) slots: &'a AtomicU32,
    /// Offsets in the page where a block ends, ascending.
    pub(crate) stops: &'a [u16],
    /// Whether the guest's processor has the instruction.
    pub(crate) has: &'a dyn Fn(&Instruction) -> bool,
}
