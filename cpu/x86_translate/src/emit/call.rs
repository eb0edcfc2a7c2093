//! CALL, RET, and JMP to where a register or memory says.

use crate::abi::layout::{S0, at, gs};
use crate::context::address::Access;
use crate::context::translation::Translation;
use crate::guest::operand::has_memory;
use dbt_code::{Enc, Gpr, Rm, Width};

impl Translation<'_> {
    /// Pushes the address of the next instruction in guest memory.
    fn push_return(&mut self, index: usize) {
        let next = self.guest[index].next();
        let size = self.word();
        let mem = self.access(&self.at_stack(-(size as i32)), Access::write(size));
        let constant = self.fixed_page().map(|page_va| page_va.wrapping_add(next as u64) as i64);
        match constant {
            Some(va) if size < 8 => self.store_word(mem, va as i32),
            Some(va) if i32::try_from(va).is_ok() => self.store_word(mem, va as i32),
            _ => {
                let mem = self.free_scratch(mem);
                self.guest_va(next);
                self.e.store(self.word_width(), mem, S0);
            }
        }
        self.move_stack(-(size as i32));
    }

    /// CALL of a direct target.
    pub(crate) fn call(&mut self, index: usize) {
        self.push_return(index);
        let target = self.target(index);
        let backward = target <= i64::from(self.guest[index].offset);
        let next = self.guest[index].next();
        self.push_frame(next, Some(target).filter(|target| (0..4096).contains(target)));
        self.calls = true;
        self.edge(target, backward);
        self.calls = false;
        self.after_call(next);
    }

    /// CALL of a register or memory.
    pub(crate) fn call_indirect(&mut self, index: usize) {
        self.flags_to_memory();
        let insn = self.guest[index].insn;
        let next = self.guest[index].next();
        if has_memory(&insn) {
            let value = self.load_operand(index);
            self.e.store(Width::B64, gs(at!(scratch)), value);
            self.push_return(index);
            self.push_frame(next, None);
            self.e.load(S0, gs(at!(scratch)));
        } else {
            self.push_return(index);
            self.push_frame(next, None);
            let value = self.load_operand(index);
            self.mov_target(value);
        }
        self.calls = true;
        self.indirect();
        self.calls = false;
        self.after_call(next);
    }

    /// JMP to a register or memory.
    pub(crate) fn jmp_indirect(&mut self, index: usize) {
        self.flags_to_memory();
        let value = self.load_operand(index);
        self.mov_target(value);
        self.indirect();
    }

    /// Puts a target of the default size, which is in `value`, into [`S0`].
    fn mov_target(&mut self, value: Gpr) {
        if value == S0 {
            return;
        }
        match self.word() {
            8 => self.e.mov(S0, value),
            4 => self.e.op(Enc::one(0x8b), S0.0, Rm::Reg(value.0)),
            _ => self.e.op(Enc::m0f(0xb7), S0.0, Rm::Reg(value.0)), // movzx
        }
    }

    /// RET.
    pub(crate) fn ret(&mut self, index: usize) {
        self.flags_to_memory();
        let insn = self.guest[index].insn;
        let release = if insn.op_count() == 1 { i32::from(insn.immediate16()) } else { 0 };
        let size = self.word();
        let mem = self.access(&self.at_stack(0), Access::read(size));
        self.load_word(S0, mem);
        self.move_stack(size as i32 + release);
        self.return_to();
    }
}
