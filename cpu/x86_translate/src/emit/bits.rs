//! Bit strings in memory.

use crate::abi::layout::{S0, S1, at, gs, host_register, slot};
use crate::context::address::Access;
use crate::context::translation::Translation;
use dbt_code::{Alu, Enc, Rm, Shift, Width};
use iced_x86::Mnemonic;

impl Translation<'_> {
    /// BT, BTS, BTR and BTC of a bit string in memory, with the bit's number in a register: it may be far from
    /// the operand's address.
    pub(crate) fn bit_string(&mut self, index: usize) {
        let guest = self.guest[index].clone();
        let (insn, Some(raw)) = (guest.insn, guest.raw) else { return };
        let Some(mut ea) = self.address_of(&insn) else { return };
        let wide = raw.rex & 8 != 0;
        let size = if wide { 8 } else { 4 };
        self.clobber_flags();
        self.held = None;
        let number = insn.op1_register().full_register().number() as u8;
        let from = host_register(number).map_or(Rm::Mem(gs(slot(number))), |host| Rm::Reg(host.0));
        // MOV, or MOVSXD of 32 bits.
        self.e.op(Enc::one(if wide { 0x8b } else { 0x63 }).wide(), S0.0, from);
        self.e.mov(S1, S0);
        self.e.shift_imm(Shift::Sar, Width::B64, Rm::Reg(S1.0), 3);
        self.e.alu_imm(Alu::And, Width::B64, Rm::Reg(S1.0), -size);
        self.e.store(Width::B64, gs(at!(scratch) + 8), S1);
        self.e.alu_imm(Alu::And, Width::B32, Rm::Reg(S0.0), size * 8 - 1);
        self.e.store(Width::B64, gs(at!(scratch)), S0);
        ea.add_slot(at!(scratch) + 8);
        let write = insn.mnemonic() != Mnemonic::Bt;
        let mem = self.access(&ea, Access { size: size as u32, write, aligned: false, masked: false });
        let mem = self.free_scratch(mem);
        self.flags_lost();
        self.flags_for(index);
        self.e.load(S0, gs(at!(scratch)));
        let lock = raw.lock && self.settings.lock_needed;
        self.e.op(Enc { lock, w: wide, ..Enc::m0f(raw.opcode) }, S0.0, Rm::Mem(mem));
    }
}
