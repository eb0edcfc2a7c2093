//! Guest memory accesses: addresses, the TLB check, checks that several accesses share.

use crate::abi::layout::{
    BANK, S0, S1, TLB_ADDEND, TLB_READ, TLB_WRITE, at, gs, host_register, segment_base, segment_top, slot,
};
use crate::context::address::{Access, Ea, Index, Wrap};
use crate::context::cold::{Cold, ColdKind, Miss};
use crate::context::input::Settings;
use crate::context::insn::Plan;
use crate::context::translation::Translation;
use crate::guest::mode::Mode;
use dbt_code::{Alu, Cond, Emitter, Gpr, Mem, Rm, Shift, Width};
use iced_x86::{Instruction, Register};
use x86_core::{Seg, TLB_ENTRIES, segment_index};

impl Translation<'_> {
    /// The address of the memory operand of `insn`. `None` if it is of a kind that is not translated.
    pub(crate) fn address_of(&self, insn: &Instruction) -> Option<Ea> {
        if self.mode.bits() != 64 {
            return self.cut_address_of(insn);
        }
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

    /// The same outside 64-bit mode, where addresses are cut and segments count.
    fn cut_address_of(&self, insn: &Instruction) -> Option<Ea> {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let size = match (base, index) {
            (Register::None, Register::None) => insn.memory_displ_size() as usize,
            (Register::None, index) => index.size(),
            (base, _) => base.size(),
        };
        let mut ea = Ea {
            disp: insn.memory_displacement32() as i32,
            wrap: if size == 2 { Wrap::At64K } else { Wrap::At4G },
            segment: self.checked_segment(segment_index(insn.memory_segment())?),
            ..Ea::default()
        };
        if base != Register::None {
            ea.base = Some(host_of(base)?);
        }
        if index != Register::None {
            let scale = insn.memory_index_scale().trailing_zeros() as u8;
            ea.index = Some(Index { host: Some(host_of(index)?), slot: 0, scale });
        } else if base == Register::None && ea.segment.is_none() {
            let mask = if size == 2 { 0xffff } else { u32::MAX };
            ea.constant = Some(u64::from(ea.disp as u32 & mask));
        }
        Some(ea)
    }

    /// The address that is `disp` bytes from where guest register `guest` points in a segment, with addresses as
    /// wide as they are by default, or as the stack pointer is.
    pub(crate) fn at_register(&self, guest: u8, disp: i32, segment: Seg) -> Ea {
        let mut ea = Ea::register(guest, disp);
        if self.mode.bits() != 64 {
            let short =
                if segment == Seg::Ss { self.mode.has(Mode::STACK16) } else { self.mode.bits() == 16 };
            ea.wrap = if short { Wrap::At64K } else { Wrap::At4G };
            ea.segment = self.checked_segment(segment);
        }
        ea
    }

    /// The address that is `disp` bytes from the top of the stack.
    pub(crate) fn at_stack(&self, disp: i32) -> Ea {
        self.at_register(4, disp, Seg::Ss)
    }

    /// The segment's number if its base and its limit count.
    fn checked_segment(&self, segment: Seg) -> Option<u8> {
        let flat = match segment {
            Seg::Es => self.mode.has(Mode::ES_FLAT),
            Seg::Ss => self.mode.has(Mode::SS_FLAT),
            Seg::Ds => self.mode.has(Mode::DS_FLAT),
            _ => false,
        };
        (!flat).then_some(segment as u8)
    }

    /// The same operand without [`S0`]. Leaves the flags alone.
    pub(crate) fn free_scratch(&mut self, mem: Mem) -> Mem {
        if mem.base != Some(S0) {
            return mem;
        }
        self.e.lea(S1, mem);
        self.held = None;
        Mem::base(S1, 0)
    }

    /// Checks an access of the current instruction and gives the host's operand for it. Both scratch
    /// registers are used; afterwards [`S1`] belongs to the operand, and [`S0`], too, if that has it
    /// ([`Translation::free_scratch`] changes that). The flags are lost (saved first if they are live).
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
                let span = Access { size: (high - low) as u32, write, aligned: false, masked: false };
                self.check(&Ea { index: None, ..*ea }, low, span, true);
                if let Some(slot) = slot {
                    self.e.store(Width::B64, gs(at!(groups) + i32::from(slot) * 8), S1);
                }
                self.held = slot.filter(|_| !ea.consumes());
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
            let crosses = va >> 12 != last >> 12 || access.aligned && va & u64::from(access.size - 1) != 0;
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
        } else if ea.wrap != Wrap::None {
            field = self.check_cut(ea, from, access);
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
                e.alu_imm(Alu::And, Width::B64, Rm::Reg(S0.0), -4096 | (access.size as i32 - 1));
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

    /// The check of an address that is cut; gives the field of the jump for a miss.
    fn check_cut(&mut self, ea: &Ea, from: i32, access: Access) -> u64 {
        let tag = if access.write { TLB_WRITE } else { TLB_READ };
        let last = access.size as i32 - 1;
        ea.offset(self.e, from);
        if let Some(segment) = ea.segment {
            let top = Rm::Mem(gs(segment_top(usize::from(segment), access.write)));
            if last == 0 {
                self.e.alu(Alu::Cmp, Width::B64, S0, top);
            } else {
                // The offset is of 32 bits: the sum is of no more than 33.
                self.e.lea(S1, Mem::base(S0, last));
                self.e.alu(Alu::Cmp, Width::B64, S1, top);
            }
            self.interpret_and_leave_if(Cond::G);
            ea.add_base(self.e);
        }
        let e = &mut *self.e;
        index_tlb(e, self.settings, S0);
        if access.aligned {
            e.alu_imm(Alu::And, Width::B64, Rm::Reg(S0.0), -4096 | last);
        } else {
            if last != 0 {
                e.lea(S0, Mem::base(S0, last));
            }
            e.alu_imm(Alu::And, Width::B64, Rm::Reg(S0.0), -4096);
        }
        e.alu(Alu::Cmp, Width::B64, S0, Rm::Mem(Mem::indexed(BANK, S1, 0, tag)));
        let field = e.jcc(Cond::NE);
        e.load(S1, Mem::indexed(BANK, S1, 0, TLB_ADDEND));
        field
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

/// The host register of a 16- or 32-bit general register outside 64-bit mode.
fn host_of(register: Register) -> Option<Gpr> {
    if register.is_gpr16() || register.is_gpr32() { host_register(register.number() as u8) } else { None }
}

/// The number of a 64-bit general register.
fn number(register: Register) -> Option<u8> {
    register.is_gpr64().then(|| register.number() as u8)
}
