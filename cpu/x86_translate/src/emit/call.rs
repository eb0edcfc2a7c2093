//! CALL, RET, and JMP to where a register or memory says.

use crate::abi::layout::{S0, at, gs};
use crate::context::address::{Access, Ea};
use crate::context::translation::Translation;
use crate::guest::operand::has_memory;
use dbt_code::Width;

impl Translation<'_> {
    /// Pushes the address of the next instruction in guest memory.
    fn push_return(&mut self, index: usize) {
        let next = self.guest[index].next();
        let mem = self.access(&Ea::register(4, -8), Access::write(8));
        let constant = self.fixed_page().map(|page_va| page_va.wrapping_add(next as u64) as i64);
        match constant.map(i32::try_from) {
            Some(Ok(va)) => self.e.store_imm(mem, va),
            _ => {
                self.guest_va(next);
                self.e.store(Width::B64, mem, S0);
            }
        }
        self.move_stack(-8);
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
            if value != S0 {
                self.e.mov(S0, value);
            }
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
        if value != S0 {
            self.e.mov(S0, value);
        }
        self.indirect();
    }

    /// RET.
    pub(crate) fn ret(&mut self, index: usize) {
        self.flags_to_memory();
        let insn = self.guest[index].insn;
        let release = if insn.op_count() == 1 { i32::from(insn.immediate16()) } else { 0 };
        let mem = self.access(&Ea::register(4, 0), Access::read(8));
        self.e.load(S0, mem);
        self.move_stack(8 + release);
        self.return_to();
    }
}
