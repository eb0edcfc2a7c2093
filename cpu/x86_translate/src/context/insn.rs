//! Decoded guest instructions of a block, with what was found out about them.

use crate::guest::class::Class;
use crate::guest::encoding::Raw;
use crate::guest::flags::{Effect, Flags};
use crate::guest::info::CodeInfo;
use iced_x86::{FlowControl, Instruction, Mnemonic};

/// How one access is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Alone.
    Single,
    /// With all later ones of its group: the bytes from `low` to `high`, from its own address without the index. The
    /// addend goes to the slot, if there are others.
    Lead { slot: Option<u8>, low: i32, high: i32, write: bool },
    /// Not at all: the addend is in the slot.
    Follow { slot: u8 },
}

/// One guest instruction.
#[derive(Debug, Clone)]
pub(crate) struct GuestInsn {
    pub(crate) insn: Instruction,
    pub(crate) info: &'static CodeInfo,
    /// How it is translated here, which may be less than `info` says.
    pub(crate) class: Class,
    /// Its encoding, if that is of a kind that can be written again.
    pub(crate) raw: Option<Raw>,
    /// Offset in the page.
    pub(crate) offset: u16,
    pub(crate) effect: Effect,
    /// Flags live before it, and after it.
    pub(crate) live: Flags,
    pub(crate) live_after: Flags,
    /// How its accesses are checked, in the order in which code is written for them.
    pub(crate) plans: [Plan; 2],
    /// The x87 instruction before it that FOP and FIP are still to be stored of.
    pub(crate) fpu_last: Option<u16>,
}

impl GuestInsn {
    /// Whether nothing follows in the block.
    pub(crate) fn ends_block(&self) -> bool {
        self.insn.flow_control() != FlowControl::Next || self.insn.mnemonic() == Mnemonic::Hlt
    }

    /// Whether the instruction itself may leave the block, cold code aside.
    pub(crate) fn may_leave(&self) -> bool {
        matches!(self.class, Class::Interpret | Class::Jcc) || self.ends_block()
    }

    /// Where the next instruction is, from the beginning of the page.
    pub(crate) fn next(&self) -> i64 {
        i64::from(self.offset) + self.insn.len() as i64
    }
}
