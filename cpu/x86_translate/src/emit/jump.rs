//! Jumps: direct ones, which are linked to other blocks, and indirect ones, which are looked up.

use crate::abi::layout::{IBTC_ENTRIES, LINK_SLOTS, PAGE_CHECKS, S0, S1, at, gs};
use crate::context::cold::{Cold, ColdKind};
use crate::context::link::NewLink;
use crate::context::translation::{FlagsAt, Translation};
use dbt_code::{Alu, Cond, Emitter, Enc, Gpr, Mem, Rm, Width};
use std::sync::atomic::Ordering;

/// The inline lookup of an indirect jump's target, which is in [`S0`], in the table of that number: leads to the block,
/// or to the address that is to be filled in at the field given.
pub(super) fn lookup(e: &mut Emitter, table: usize, call: bool) -> u64 {
    let user = !table.is_multiple_of(2);
    if user {
        e.mov(S1, S0);
        e.alu_imm(Alu::And, Width::B64, Rm::Reg(S1.0), -4096);
        e.store(Width::B64, gs(at!(page_va)), S1);
    }
    let table = at!(ibtc) + (table * IBTC_ENTRIES * 16) as i32;
    e.op(Enc::m0f(0xb7), S1.0, Rm::Reg(S0.0)); // movzx r10d, r9w
    e.alu(Alu::Add, Width::B32, S1, Rm::Reg(S1.0));
    e.alu(Alu::Cmp, Width::B64, S0, Rm::Mem(Mem::gs_indexed(S1, 3, table)));
    let field = e.jcc(Cond::NE);
    let target = Rm::Mem(Mem::gs_indexed(S1, 3, table + 8));
    if call {
        e.call_rm(target);
    } else {
        e.jmp_rm(target);
    }
    field
}

impl Translation<'_> {
    /// Puts the virtual address `target` bytes from the beginning of the page into [`S0`]. The only place
    /// where an address of the code itself comes to be.
    pub(crate) fn guest_va(&mut self, target: i64) {
        match self.fixed_page() {
            Some(page_va) => {
                let va = page_va.wrapping_add(target as u64) & self.mode.ip_mask();
                self.e.mov_imm(S0, va);
            }
            None => {
                self.e.load(S0, gs(at!(page_va)));
                match i32::try_from(target) {
                    Ok(target) => self.lea_ip(S0, Mem::base(S0, target)),
                    Err(_) => {
                        self.e.mov_imm(S1, target as u64);
                        self.e.lea(S0, Mem::indexed(S0, S1, 0, 0));
                        self.held = None;
                    }
                }
            }
        }
    }

    /// `lea to, [sum]` of instruction pointers, which outside 64-bit mode are of 32 bits.
    pub(crate) fn lea_ip(&mut self, to: Gpr, sum: Mem) {
        self.e.op(Enc::one(0x8d).sized(self.ip_width()), to.0, Rm::Mem(sum));
    }

    /// Makes the address in [`S0`] what the table of targets has. The flags are lost.
    pub(crate) fn tag_target(&mut self) {
        if self.base != 0 {
            self.e.mov_imm(S1, u64::from(self.base) << 32);
            self.e.alu(Alu::Or, Width::B64, S0, Rm::Reg(S1.0));
        }
    }

    /// Leaves if that was asked for. Clobbers the flags.
    pub(crate) fn poll(&mut self, kind: ColdKind) {
        self.e.alu_imm(Alu::Cmp, Width::B32, Rm::Mem(gs(at!(cpu.exit_request))), 0);
        let field = self.e.jcc(Cond::NE);
        self.cold.push(Cold { field, instruction: self.current, kind });
    }

    /// Goes to the guest address in [`S0`], with the flags in memory.
    pub(crate) fn indirect(&mut self) {
        self.held = None;
        self.poll(ColdKind::Indirect);
        self.tag_target();
        let field = lookup(self.e, self.mode.table(), self.calls);
        self.cold.push(Cold { field, instruction: self.current, kind: ColdKind::Indirect });
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
        let linear = page_va.wrapping_add(target as u64).wrapping_add(u64::from(self.base));
        let va = linear & self.mode.ip_mask();
        let index = self.mode.world() * PAGE_CHECKS + ((va >> 12) as usize & (PAGE_CHECKS - 1));
        let check = at!(page_checks) + index as i32 * 4;
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
            .zip(i32::try_from(target & !0xfff).ok().filter(|by| *by != i32::MIN))
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
        self.lea_ip(S0, Mem::base(S0, by));
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
        let next = guest.next();
        let backward = self.target(index) <= i64::from(guest.offset);
        let target = self.target(index);
        let whole = last || !self.settings.counting;
        if (0..4096).contains(&target) && !backward && whole {
            let link = self.new_link(target, false);
            self.e.align_patch(2);
            let field = self.e.jcc(cond);
            self.links[link].field = field;
            self.cold.push(Cold { field, instruction: index, kind: ColdKind::Link(link) });
        } else {
            let skip = self.e.jcc(cond.not());
            let (flags, held) = (self.flags, self.held);
            self.refund_rest(index);
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
