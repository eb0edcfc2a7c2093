//! The stack: PUSH, POP and LEAVE.

use crate::abi::layout::{GUEST_RSP, S0, at, gs, host_register, slot};
use crate::context::address::{Access, Ea};
use crate::context::translation::Translation;
use crate::guest::operand::has_memory;
use dbt_code::{Gpr, Mem, Width};

impl Translation<'_> {
    /// Adds to the guest's stack pointer.
    pub(super) fn move_stack(&mut self, by: i32) {
        self.e.lea(GUEST_RSP, Mem::base(GUEST_RSP, by));
    }

    /// Loads a 64-bit register or memory operand (the first operand) into a host register, which is
    /// [`S0`] or the guest register's own.
    pub(super) fn load_operand(&mut self, index: usize) -> Gpr {
        let insn = self.guest[index].insn;
        if has_memory(&insn) {
            if let Some(ea) = self.address_of(&insn) {
                let mem = self.access(&ea, Access::read(8));
                self.e.load(S0, mem);
            }
            return S0;
        }
        let guest = insn.op0_register().number() as u8;
        host_register(guest).unwrap_or_else(|| {
            self.e.load(S0, gs(slot(guest)));
            S0
        })
    }

    /// PUSH of a register or memory.
    pub(crate) fn push(&mut self, index: usize) {
        let insn = self.guest[index].insn;
        let ea = Ea::register(4, -8);
        if has_memory(&insn) {
            let value = self.load_operand(index);
            self.e.store(Width::B64, gs(at!(scratch)), value);
            let mem = self.access(&ea, Access::write(8));
            self.e.load(S0, gs(at!(scratch)));
            self.e.store(Width::B64, mem, S0);
        } else {
            let mem = self.access(&ea, Access::write(8));
            let value = self.load_operand(index);
            self.e.store(Width::B64, mem, value);
        }
        self.move_stack(-8);
    }

    /// PUSH of a constant.
    pub(crate) fn push_immediate(&mut self, index: usize) {
        let value = self.guest[index].insn.immediate(0) as i32;
        let mem = self.access(&Ea::register(4, -8), Access::write(8));
        self.e.store_imm(mem, value);
        self.move_stack(-8);
    }

    /// POP of a register.
    pub(crate) fn pop(&mut self, index: usize) {
        let guest = self.guest[index].insn.op0_register().number() as u8;
        let mem = self.access(&Ea::register(4, 0), Access::read(8));
        let to = host_register(guest).unwrap_or(S0);
        self.e.load(to, mem);
        if to != GUEST_RSP {
            self.move_stack(8);
        }
        if to == S0 {
            self.e.store(Width::B64, gs(slot(guest)), S0);
        }
    }

    /// LEAVE.
    pub(crate) fn leave(&mut self) {
        let mem = self.access(&Ea::register(5, 0), Access::read(8));
        self.e.load(S0, mem);
        self.e.lea(GUEST_RSP, Mem::base(Gpr::RBP, 8));
        self.e.mov(Gpr::RBP, S0);
    }
}
