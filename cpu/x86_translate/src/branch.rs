//! The stack and control transfers.

use crate::address::{Access, Ea};
use crate::layout::{GUEST_RSP, LINK_SLOTS, PAGE_CHECKS, S0, S1, at, gs, host_register, slot};
use crate::returns;
use crate::translate::{Cold, ColdKind, FlagsAt, Mode, NewLink, Translation};
use dbt_code::{Alu, Cond, Enc, Gpr, Mem, Rm, Width};
use std::sync::atomic::Ordering;

impl Translation<'_> {
    /// Puts the virtual address `target` bytes from the beginning of the page into [`S0`]. The only place
    /// where an address of the code itself comes to be.
    pub(crate) fn guest_va(&mut self, target: i64) {
        match self.fixed_page() {
            Some(page_va) => self.e.mov_imm(S0, page_va.wrapping_add(target as u64)),
            None => {
                self.e.load(S0, gs(at!(page_va)));
                match i32::try_from(target) {
                    Ok(target) => self.e.lea(S0, Mem::base(S0, target)),
                    Err(_) => {
                        self.e.mov_imm(S1, target as u64);
                        self.e.lea(S0, Mem::indexed(S0, S1, 0, 0));
                        self.held = None;
                    }
                }
            }
        }
    }

    fn move_stack(&mut self, by: i32) {
        self.e.lea(GUEST_RSP, Mem::base(GUEST_RSP, by));
    }

    /// Loads a 64-bit register or memory operand (the first operand) into a host register, which is
    /// [`S0`] or the guest register's own.
    fn load_operand(&mut self, index: usize) -> Gpr {
        let insn = self.guest[index].insn;
        if Self::has_memory(&insn) {
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
        if Self::has_memory(&insn) {
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

    fn push_return(&mut self, index: usize) {
        let next = self.next(index);
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
        let next = self.next(index);
        self.push_frame(next, Some(target).filter(|target| (0..4096).contains(target)));
        self.calls = true;
        self.edge(target, backward);
        self.calls = false;
        self.after_call(next);
    }

    /// Where the next instruction is, from the beginning of the page.
    fn next(&self, index: usize) -> i64 {
        let guest = &self.guest[index];
        i64::from(guest.offset) + guest.insn.len() as i64
    }

    /// CALL of a register or memory.
    pub(crate) fn call_indirect(&mut self, index: usize) {
        self.flags_to_memory();
        let insn = self.guest[index].insn;
        let next = self.next(index);
        if Self::has_memory(&insn) {
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

    /// Goes to the guest address in [`S0`], with the flags in memory.
    pub(crate) fn indirect(&mut self) {
        self.held = None;
        self.poll(ColdKind::Indirect);
        let field = returns::lookup(self.e, self.mode.has(Mode::USER), self.calls);
        self.cold.push(Cold { field, instruction: self.current, kind: ColdKind::Indirect });
    }

    /// Leaves if that was asked for. Clobbers the flags.
    pub(crate) fn poll(&mut self, kind: ColdKind) {
        self.e.alu_imm(Alu::Cmp, Width::B32, Rm::Mem(gs(at!(cpu.exit_request))), 0);
        let field = self.e.jcc(Cond::NE);
        self.cold.push(Cold { field, instruction: self.current, kind });
    }

    fn new_link(&mut self, target: i64, memory: bool) -> usize {
        self.links.push(NewLink {
            field: 0,
            stub: 0,
            target,
            memory,
            check: None,
            slot: None,
            ungrouped: false,
            numbers: vec![],
        });
        self.links.len() - 1
    }

    /// Goes to `target` (from the beginning of the page) for good.
    pub(crate) fn edge(&mut self, target: i64, backward: bool) {
        if (0..4096).contains(&target) {
            let live = self.peek(target);
            if backward && live != 0 {
                self.flags_to_memory();
                self.flags = FlagsAt::Memory;
            }
            let link = self.new_link(target, live != 0 && self.flags == FlagsAt::Memory);
            if backward {
                self.poll(ColdKind::Poll(link));
            }
            return self.jump(link);
        }
        self.flags_to_memory();
        let Some(page_va) = self.fixed_page() else {
            return self.user_edge(target, backward);
        };
        let link = self.new_link(target, true);
        if backward {
            self.poll(ColdKind::Poll(link));
        }
        let va = page_va.wrapping_add(target as u64);
        let check = at!(page_checks) + ((va >> 12) as usize & (PAGE_CHECKS - 1)) as i32 * 4;
        // cmp dword gs:[check], imm32: eight bytes up to the number, which is patched; 0 is never there.
        self.e.align_patch(8);
        self.e.op(Enc::one(0x81), Alu::Cmp as u8, Rm::Mem(gs(check)));
        let number = self.e.address();
        self.e.dword(0);
        self.links[link].check = Some(number);
        let field = self.e.jcc(Cond::NE);
        self.cold.push(Cold { field, instruction: self.current, kind: ColdKind::Link(link) });
        self.jump(link);
    }

    /// Goes to `target` in another page of user code, with the flags in memory. The jump is linked, and taken
    /// if it was verified in this address space from the page that runs.
    fn user_edge(&mut self, target: i64, backward: bool) {
        let slot = self.slots.fetch_add(1, Ordering::Relaxed);
        let Some((slot, by)) = u16::try_from(slot)
            .ok()
            .filter(|slot| usize::from(*slot) < LINK_SLOTS)
            .zip(i32::try_from(target & !0xfff).ok())
        else {
            // So that it does not wrap around.
            self.slots.store(LINK_SLOTS as u32, Ordering::Relaxed);
            self.guest_va(target);
            return self.indirect();
        };
        self.held = None;
        let link = self.new_link(target, true);
        self.links[link].slot = Some(slot);
        if backward {
            self.poll(ColdKind::Poll(link));
        }
        let place = gs(at!(verified) + i32::from(slot) * 8);
        self.e.load(S0, gs(at!(page_va)));
        self.e.alu(Alu::Cmp, Width::B64, S0, Rm::Mem(place));
        let field = self.e.jcc(Cond::NE);
        self.cold.push(Cold { field, instruction: self.current, kind: ColdKind::Link(link) });
        self.e.lea(S0, Mem::base(S0, by));
        self.e.store(Width::B64, gs(at!(page_va)), S0);
        let field = self.patched_jump();
        self.links[link].field = field;
        self.cold.push(Cold { field, instruction: self.current, kind: ColdKind::LinkBack(link, by) });
    }

    /// A jump or call that is patched; gives the field.
    fn patched_jump(&mut self) -> u64 {
        self.e.align_patch(1);
        if self.calls { self.e.call() } else { self.e.jmp() }
    }

    /// The jump that is patched.
    fn jump(&mut self, link: usize) {
        let field = self.patched_jump();
        self.links[link].field = field;
        self.cold.push(Cold { field, instruction: self.current, kind: ColdKind::Link(link) });
    }

    /// Jcc: the block ends here if it is the last instruction.
    pub(crate) fn jcc(&mut self, index: usize, last: bool) {
        self.flags_for(index);
        let guest = &self.guest[index];
        let cond = Cond(guest.raw.map_or(0, |raw| raw.opcode & 15));
        let next = i64::from(guest.offset) + guest.insn.len() as i64;
        let backward = self.target(index) <= i64::from(guest.offset);
        let target = self.target(index);
        if (0..4096).contains(&target) && !backward {
            let link = self.new_link(target, false);
            self.e.align_patch(2);
            let field = self.e.jcc(cond);
            self.links[link].field = field;
            self.cold.push(Cold { field, instruction: index, kind: ColdKind::Link(link) });
        } else {
            let skip = self.e.jcc(cond.not());
            let (flags, held) = (self.flags, self.held);
            self.edge(target, backward);
            (self.flags, self.held) = (flags, held);
            let here = self.e.address();
            self.e.link(skip, here);
        }
        if last {
            self.edge(next, false);
        }
    }
}
