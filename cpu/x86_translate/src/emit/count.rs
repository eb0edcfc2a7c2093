//! Counting instructions: a block takes the number of its instructions from a budget when it is entered, and what leaves
//! it before its end gives back the rest.

use crate::abi::layout::{S0, at, gs};
use crate::context::cold::{Cold, ColdKind};
use crate::context::translation::{FlagsAt, Translation};
use crate::emit::flags::{restore_flags, save_flags};
use dbt_code::{Alu, Cond, Emitter, Mem, Rm, Width};

/// Gives back `count` instructions. The flags are lost.
pub(crate) fn refund(e: &mut Emitter, count: u8) {
    e.alu_imm(Alu::Add, Width::B64, Rm::Mem(gs(at!(budget))), count.into());
}

impl Translation<'_> {
    /// The entries of a block that counts: with the flags in memory, and with them in EFLAGS.
    pub(crate) fn counted_entries(&mut self) -> (u64, u64) {
        let hot = self.e.address();
        save_flags(self.e, S0);
        (self.e.address(), hot)
    }

    /// Takes the block's instructions from the budget, or leaves the first to the interpreter if there are too many.
    /// The flags are in memory, and afterwards where they were if they were in both places.
    pub(crate) fn take_from_budget(&mut self) {
        let count = i32::from(self.left(0));
        self.e.alu_imm(Alu::Sub, Width::B64, Rm::Mem(gs(at!(budget))), count);
        let field = self.e.jcc(Cond::S);
        self.cold.push(Cold { field, instruction: 0, kind: ColdKind::OverBudget });
        if self.guest[0].live != 0 {
            restore_flags(self.e, S0);
            self.flags = FlagsAt::Both;
        } else {
            self.flags = FlagsAt::Memory;
        }
    }

    /// Where a jump leaves the block behind the instruction `index`: gives back the rest. Leaves the flags alone.
    pub(crate) fn refund_rest(&mut self, index: usize) {
        let rest = i32::from(self.left(index)) - 1;
        if self.settings.counting && rest != 0 {
            self.e.load(S0, gs(at!(budget)));
            self.e.lea(S0, Mem::base(S0, rest));
            self.e.store(Width::B64, gs(at!(budget)), S0);
        }
    }
}
