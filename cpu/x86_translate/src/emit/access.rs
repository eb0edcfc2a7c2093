//! Guest memory accesses: addresses, the TLB check, checks that several accesses share.

use crate::abi::layout::{
    BANK, S0, S1, TLB_ADDEND, TLB_READ, TLB_WRITE, at, gs, host_register, segment_base, slot,
};
use crate::context::address::{Access, Ea, Index};
use crate::context::cold::{Cold, ColdKind, Miss};
use crate::context::input::Settings;
use crate::context::insn::Plan;
use crate::context::translation::Translation;
use dbt_code::{Alu, Cond, Emitter, Gpr, Mem, Rm, Shift, Width};
use iced_x86::{Instruction, Register};
use x86_core::{Seg, TLB_ENTRIES};

impl Translation<'_> {
    /// The address of the memory operand of `insn`. `None` if it is of a kind that is not translated.
    pub(crate) fn address_of(&self, insn: &Instruction) -> Option<Ea> {
        let mut ea = Ea::default();
        match insn.segment_prefix() {
            Register::FS => ea.add_slot(segment_base(Seg::Fs as usize)),
            Register::GS => ea.add_slot(segment_base(Seg::Gs as usize)),
            _ => {}
        }
        let disp = insn.memory_displacement64();
        match insn.memory_base() {
            Register::RIP => {
                let offset = disp.wrapping_sub(self.page_va) as i64;
                if let Some(page_va) = self.fixed_page() {
                    let va = page_va.wrapping_add(offset as u64);
                    if ea.slots[0].is_none() {
                        ea.constant = Some(va);
                        return Some(ea);
                    }
                    ea.disp = displacement(va as i64)?;
                } else {
                    ea.add_slot(at!(page_va));
                    ea.disp = displacement(offset)?;
                }
                return Some(ea);
            }
            Register::None => {}
            register => ea.add_register(number(register)?),
        }
        ea.disp = displacement(disp as i64)?;
        if insn.memory_index() != Register::None {
            let guest = number(insn.memory_index())?;
            let scale = insn.memory_index_scale().trailing_zeros() as u8;
            ea.index = Some(Index { host: host_register(guest), slot: slot(guest), scale });
        } else if insn.memory_base() == Register::None && ea.slots[0].is_none() {
            ea.constant = Some(ea.disp as i64 as u64);
        }
        Some(ea)
    }

    /// Checks an access of the current instruction and gives the host's operand for it. Both scratch
    /// registers are used; afterwards [`S0`] is free and [`S1`] belongs to the operand. The flags are lost
    /// (saved first if they are live).
    pub(crate) fn access(&mut self, ea: &Ea, access: Access) -> Mem {
        let plan = self.next_plan();
        match plan {
            Plan::Follow { slot } => {
                if self.held != Some(slot) {
                    self.e.load(S1, gs(at!(groups) + slot as i32 * 8));
                }
                self.held = (!ea.consumes()).then_some(slot);
                ea.operand(self.e)
            }
            Plan::Lead { slot, low, high, write } => {
                self.clobber_flags();
                let span = Access { size: (high - low) as u32, write, aligned: false };
                self.check(ea, low, span, true);
                self.e.store(Width::B64, gs(at!(groups) + slot as i32 * 8), S1);
                self.held = (!ea.consumes()).then_some(slot);
                ea.operand(self.e)
            }
            Plan::Single => {
                self.clobber_flags();
                self.check(ea, 0, access, false);
                self.held = None;
                ea.operand(self.e)
            }
        }
    }

    /// The check: leaves the addend in [`S1`]. The range checked begins `from` bytes after the address.
    fn check(&mut self, ea: &Ea, from: i32, access: Access, group: bool) {
        let retry = self.e.address();
        let tag = if access.write { TLB_WRITE } else { TLB_READ };
        let e = &mut *self.e;
        let field;
        let constant = ea.constant.map(|constant| constant.wrapping_add(from as i64 as u64));
        if let Some(va) = constant {
            let last = va.wrapping_add(u64::from(access.size - 1));
            let crosses = va >> 12 != last >> 12 || access.aligned && va & 15 != 0;
            let entry = (va >> 12) as i32 & (TLB_ENTRIES as i32 - 1);
            if crosses {
                field = e.jmp();
            } else if let Ok(page) = i32::try_from((va & !0xfff) as i64) {
                e.alu_imm(Alu::Cmp, Width::B64, Rm::Mem(Mem::base(BANK, entry * 32 + tag)), page);
                field = e.jcc(Cond::NE);
            } else {
                e.mov_imm(S0, va & !0xfff);
                e.alu(Alu::Cmp, Width::B64, S0, Rm::Mem(Mem::base(BANK, entry * 32 + tag)));
                field = e.jcc(Cond::NE);
            }
            e.load(S1, Mem::base(BANK, entry * 32 + TLB_ADDEND));
        } else {
            let base = ea.plain_base();
            let disp = ea.disp.wrapping_add(from);
            let address = match base {
                Some(base) if disp == 0 => base,
                _ => {
                    ea.compute(e, from);
                    S0
                }
            };
            index_tlb(e, self.settings, address);
            if access.aligned {
                if address != S0 {
                    e.mov(S0, address);
                }
                // Misaligned addresses keep a low bit and match no tag.
                e.alu_imm(Alu::And, Width::B64, Rm::Reg(S0.0), -4096 | 15);
            } else {
                let last = access.size as i32 - 1;
                if last != 0 {
                    let (register, add) =
                        if let Some(base) = base { (base, disp + last) } else { (S0, last) };
                    e.lea(S0, Mem::base(register, add));
                } else if address != S0 {
                    e.mov(S0, address);
                }
                e.alu_imm(Alu::And, Width::B64, Rm::Reg(S0.0), -4096);
            }
            e.alu(Alu::Cmp, Width::B64, S0, Rm::Mem(Mem::indexed(BANK, S1, 0, tag)));
            field = e.jcc(Cond::NE);
            e.load(S1, Mem::indexed(BANK, S1, 0, TLB_ADDEND));
        }
        let miss = Miss { ea: *ea, from, access, retry, group };
        self.cold.push(Cold { field, instruction: self.current, kind: ColdKind::Miss(miss) });
    }
}

/// Puts the offset of the TLB's entry for an address into [`S1`]. The flags are lost.
pub(super) fn index_tlb(e: &mut Emitter, settings: &Settings, address: Gpr) {
    if settings.bmi2 {
        e.rorx(S1, address, 7);
    } else {
        e.mov(S1, address);
        e.shift_imm(Shift::Shr, Width::B64, Rm::Reg(S1.0), 7);
    }
    e.alu_imm(Alu::And, Width::B32, Rm::Reg(S1.0), (TLB_ENTRIES as i32 - 1) << 5);
}

/// A displacement as host instructions have it, if those nearby are such, too: a check can begin before the access
/// and reaches beyond it, and what is checked must not be 4 GiB from what is accessed.
fn displacement(value: i64) -> Option<i32> {
    const NEAR: i32 = 0x1000;
    i32::try_from(value).ok().filter(|value| (i32::MIN + NEAR..=i32::MAX - NEAR).contains(value))
}

/// The number of a 64-bit general register.
fn number(register: Register) -> Option<u8> {
    register.is_gpr64().then(|| register.number() as u8)
}
