//! The stack: PUSH, POP and LEAVE.

use crate::abi::layout::{GUEST_RSP, S0, S1, at, gs, host_register, slot};
use crate::context::address::Access;
use crate::context::translation::Translation;
use crate::guest::mode::Mode;
use crate::guest::operand::has_memory;
use dbt_code::{Enc, Gpr, Mem, Rm, Width};
use x86_core::Seg;

impl Translation<'_> {
    /// Adds to the guest's stack pointer.
    pub(super) fn move_stack(&mut self, by: i32) {
        let width = match self.mode.bits() {
            64 => Width::B64,
            _ if self.mode.has(Mode::STACK16) => Width::B16,
            _ => Width::B32,
        };
        self.advance(GUEST_RSP, by, width);
    }

    /// Adds to a guest register that holds an address of that width. Uses [`S1`] if that is 16 bits.
    pub(super) fn advance(&mut self, register: Gpr, by: i32, width: Width) {
        let sum = Rm::Mem(Mem::base(register, by));
        match width {
            Width::B64 => self.e.op(Enc::one(0x8d).wide(), register.0, sum),
            Width::B32 => self.e.op(Enc::one(0x8d), register.0, sum),
            Width::B8 | Width::B16 => {
                self.held = None;
                self.e.op(Enc::one(0x8d), S1.0, sum);
                self.e.op(Enc::one(0x8b).sized(Width::B16), register.0, Rm::Reg(S1.0));
            }
        }
    }

    /// `mov to, [from]` of an operand of the default size, zero-extended.
    pub(super) fn load_word(&mut self, to: Gpr, from: Mem) {
        match self.word() {
            8 => self.e.load(to, from),
            4 => self.e.load32(to, from),
            _ => self.e.load16(to, from),
        }
    }

    /// Loads a register or memory operand of the default size (the first operand) into a host register, which is
    /// [`S0`] or the guest register's own. What is above the operand counts only in [`S0`].
    pub(super) fn load_operand(&mut self, index: usize) -> Gpr {
        let insn = self.guest[index].insn;
        if has_memory(&insn) {
            if let Some(ea) = self.address_of(&insn) {
                let mem = self.access(&ea, Access::read(self.word()));
                self.load_word(S0, mem);
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
        let (size, width) = (self.word(), self.word_width());
        let ea = self.at_stack(-(size as i32));
        if has_memory(&insn) {
            let value = self.load_operand(index);
            self.e.store(Width::B64, gs(at!(scratch)), value);
            let mem = self.access(&ea, Access::write(size));
            let mem = self.free_scratch(mem);
            self.e.load(S0, gs(at!(scratch)));
            self.e.store(width, mem, S0);
        } else {
            let mem = self.access(&ea, Access::write(size));
            // Only 64-bit code has registers that go through S0, and S0 is free there.
            let value = self.load_operand(index);
            self.e.store(width, mem, value);
        }
        self.move_stack(-(size as i32));
    }

    /// PUSH of a constant.
    pub(crate) fn push_immediate(&mut self, index: usize) {
        let value = self.guest[index].insn.immediate(0) as i32;
        let size = self.word();
        let mem = self.access(&self.at_stack(-(size as i32)), Access::write(size));
        self.store_word(mem, value);
        self.move_stack(-(size as i32));
    }

    /// Stores a constant of the default size, sign-extended.
    pub(super) fn store_word(&mut self, to: Mem, value: i32) {
        match self.word() {
            8 => self.e.store_imm(to, value),
            4 => self.e.store32_imm(to, value as u32),
            _ => {
                self.e.op(Enc::one(0xc7).sized(Width::B16), 0, Rm::Mem(to));
                self.e.bytes(&(value as u16).to_le_bytes());
            }
        }
    }

    /// POP of a register.
    pub(crate) fn pop(&mut self, index: usize) {
        let guest = self.guest[index].insn.op0_register().number() as u8;
        let size = self.word();
        let mem = self.access(&self.at_stack(0), Access::read(size));
        let to = host_register(guest).unwrap_or(S0);
        self.e.op(Enc::one(0x8b).sized(self.word_width()), to.0, Rm::Mem(mem));
        if to != GUEST_RSP {
            self.move_stack(size as i32);
        }
        if to == S0 {
            self.e.store(Width::B64, gs(slot(guest)), S0);
        }
    }

    /// LEAVE.
    pub(crate) fn leave(&mut self) {
        let size = self.word();
        let mem = self.access(&self.at_register(Gpr::RBP.0, 0, Seg::Ss), Access::read(size));
        self.load_word(S0, mem);
        let top = Rm::Mem(Mem::base(Gpr::RBP, size as i32));
        self.e.op(Enc::one(0x8d).sized(self.word_width()), GUEST_RSP.0, top);
        self.e.mov(Gpr::RBP, S0);
    }
}
