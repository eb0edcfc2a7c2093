//! Where the guest's arithmetic flags are: in EFLAGS, in memory, or in both.

use crate::abi::layout::{S0, at, gs};
use crate::context::translation::{FlagsAt, Translation};
use dbt_code::{Cond, Emitter, Gpr, Width};

/// Puts the arithmetic flags into memory; uses `scratch`.
pub(crate) fn save_flags(e: &mut Emitter, scratch: Gpr) {
    e.mov(scratch, Gpr::RAX);
    e.lahf();
    e.setcc(Cond::O, Gpr::RAX);
    e.store(Width::B16, gs(at!(flags)), Gpr::RAX);
    e.mov(Gpr::RAX, scratch);
}

/// Takes the arithmetic flags from memory; uses `scratch`.
pub(crate) fn restore_flags(e: &mut Emitter, scratch: Gpr) {
    e.mov(scratch, Gpr::RAX);
    restore_flags_from_rax(e);
    e.mov(Gpr::RAX, scratch);
}

/// The same through RAX, which is lost.
pub(super) fn restore_flags_from_rax(e: &mut Emitter) {
    e.load16(Gpr::RAX, gs(at!(flags)));
    e.bytes(&[0x04, 0x7f]); // add al, 0x7f: OF again
    e.sahf();
}

impl Translation<'_> {
    /// To be called before code is written that changes EFLAGS: saves the guest's if they are live.
    pub(crate) fn clobber_flags(&mut self) {
        let live = self.guest[self.current].live;
        if live != 0 && self.flags == FlagsAt::Host {
            save_flags(self.e, S0);
        }
        if live != 0 {
            self.flags = FlagsAt::Memory;
        }
    }

    /// Whether the instruction needs the flags in the host, where they are not.
    pub(super) fn needs_flags(&self, index: usize) -> bool {
        let guest = &self.guest[index];
        self.flags == FlagsAt::Memory && guest.effect.needs_host(guest.live_after)
    }

    /// Brings the flags to the host if the instruction needs them there.
    pub(crate) fn flags_for(&mut self, index: usize) {
        if self.needs_flags(index) {
            restore_flags(self.e, S0);
            self.flags = FlagsAt::Both;
        }
    }

    /// Has the flags in memory, live or not.
    pub(crate) fn flags_to_memory(&mut self) {
        if self.flags == FlagsAt::Host {
            save_flags(self.e, S0);
            self.flags = FlagsAt::Both;
        }
    }

    /// The flags are in memory only, as those of the host were just lost.
    pub(crate) fn flags_lost(&mut self) {
        if self.flags == FlagsAt::Both {
            self.flags = FlagsAt::Memory;
        }
    }
}
