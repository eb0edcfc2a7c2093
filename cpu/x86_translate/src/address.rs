//! Guest memory accesses in generated code: addresses, the TLB check, checks that several accesses share.

use crate::layout::{
    BANK, S0, S1, TLB_ADDEND, TLB_READ, TLB_WRITE, at, gs, host_register, segment_base, slot,
};
use crate::plan::Plan;
use crate::translate::{Cold, ColdKind, FlagsAt, Miss, Translation};
use dbt_code::{Alu, Cond, Emitter, Gpr, Mem, Rm, Shift, Width};
use iced_x86::{Instruction, Register};
use x86_core::{Seg, TLB_ENTRIES};

/// A guest address as a sum: slots in memory, registers and a displacement; or a constant.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ea {
    /// Displacements from GS of 64-bit terms.
    pub(crate) slots: [Option<i32>; 2],
    pub(crate) base: Option<Gpr>,
    pub(crate) index: Option<Index>,
    pub(crate) disp: i32,
    /// The whole address, if it is known.
    pub(crate) constant: Option<u64>,
}

/// A scaled index: a host register or a slot, and the scale's binary logarithm.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Index {
    pub(crate) host: Option<Gpr>,
    pub(crate) slot: i32,
    pub(crate) scale: u8,
}

/// What an access needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    pub(crate) size: u32,
    pub(crate) write: bool,
    /// A multiple of 16, or the slow path.
    pub(crate) aligned: bool,
}

impl Access {
    pub(crate) fn read(size: u32) -> Self {
        Self { size, write: false, aligned: false }
    }

    pub(crate) fn write(size: u32) -> Self {
        Self { size, write: true, aligned: false }
    }
}

impl Ea {
    /// `[register + disp]` for a guest register.
    pub(crate) fn register(guest: u8, disp: i32) -> Self {
        let mut ea = Self { disp, ..Self::default() };
        ea.add_register(guest);
        ea
    }

    fn add_register(&mut self, guest: u8) {
        match host_register(guest) {
            Some(host) => self.base = Some(host),
            None => self.add_slot(slot(guest)),
        }
    }

    pub(crate) fn add_slot(&mut self, at: i32) {
        let free = if self.slots[0].is_none() { 0 } else { 1 };
        self.slots[free] = Some(at);
    }

    /// Whether the host register at the end is the only thing besides the displacement.
    fn plain_base(&self) -> Option<Gpr> {
        match self {
            Self { slots: [None, None], base: Some(base), index: None, constant: None, .. } => Some(*base),
            _ => None,
        }
    }

    /// Puts the address plus `add` into [`S0`]; leaves the flags alone; may use [`S1`].
    pub(crate) fn compute(&self, e: &mut Emitter, add: i32) {
        if let Some(constant) = self.constant {
            return e.mov_imm(S0, constant.wrapping_add(add as i64 as u64));
        }
        let disp = self.disp.wrapping_add(add);
        let mut base = self.base;
        for at in self.slots.into_iter().flatten() {
            match base {
                None => {
                    e.load(S0, gs(at));
                }
                Some(register) => {
                    e.load(S1, gs(at));
                    e.lea(S0, Mem::indexed(S1, register, 0, 0));
                }
            }
            base = Some(S0);
        }
        match (base, self.index) {
            (None, None) => e.mov_imm(S0, disp as i64 as u64),
            (Some(base), None) => {
                if base != S0 || disp != 0 {
                    e.lea(S0, Mem::base(base, disp));
                }
            }
            (base, Some(index)) => {
                let register = index.host.unwrap_or_else(|| {
                    let to = if base == Some(S0) { S1 } else { S0 };
                    e.load(to, gs(index.slot));
                    to
                });
                e.lea(S0, Mem { base, index: Some((register, index.scale)), disp, gs: false });
            }
        }
    }

    /// The operand, with the page's addend in [`S1`]. Uses [`S0`] but leaves it free; leaves the flags alone.
    fn operand(&self, e: &mut Emitter) -> Mem {
        if let Some(constant) = self.constant {
            if let Ok(disp) = i32::try_from(constant as i64) {
                return Mem::base(S1, disp);
            }
            e.mov_imm(S0, constant);
            e.lea(S1, Mem::indexed(S1, S0, 0, 0));
            return Mem::base(S1, 0);
        }
        for at in self.slots.into_iter().flatten() {
            e.load(S0, gs(at));
            e.lea(S1, Mem::indexed(S1, S0, 0, 0));
        }
        let index = self.index.map(|index| {
            let register = index.host.unwrap_or_else(|| {
                e.load(S0, gs(index.slot));
                S0
            });
            (register, index.scale)
        });
        match (self.base, index) {
            (None, None) => Mem::base(S1, self.disp),
            (Some(base), None) => Mem::indexed(base, S1, 0, self.disp),
            (base, Some((register, scale))) => {
                if let Some(base) = base {
                    e.lea(S1, Mem::indexed(S1, base, 0, 0));
                }
                if register == S0 {
                    e.lea(S1, Mem::indexed(S1, S0, scale, 0));
                    return Mem::base(S1, self.disp);
                }
                Mem::indexed(S1, register, scale, self.disp)
            }
        }
    }

    /// Whether [`Ea::operand`] changes [`S1`].
    fn consumes(&self) -> bool {
        self.slots[0].is_some()
            || self.index.is_some()
            || self.constant.is_some_and(|c| i32::try_from(c as i64).is_err())
    }
}

/// The number of a 64-bit general register.
pub(crate) fn number(register: Register) -> Option<u8> {
    register.is_gpr64().then(|| register.number() as u8)
}

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
                    ea.disp = i32::try_from(va as i64).ok()?;
                } else {
                    ea.add_slot(at!(page_va));
                    ea.disp = i32::try_from(offset).ok()?;
                }
                return Some(ea);
            }
            Register::None => {}
            register => ea.add_register(number(register)?),
        }
        ea.disp = i32::try_from(disp as i64).ok()?;
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
            Plan::Lead { slot, low, high, write, store } => {
                self.clobber_flags();
                let span = Access { size: (high - low) as u32, write, aligned: false };
                self.check(ea, low, span, true);
                if store {
                    self.e.store(Width::B64, gs(at!(groups) + slot as i32 * 8), S1);
                }
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
            if self.options.bmi2 {
                e.rorx(S1, address, 7);
            } else {
                e.mov(S1, address);
                e.shift_imm(Shift::Shr, Width::B64, Rm::Reg(S1.0), 7);
            }
            e.alu_imm(Alu::And, Width::B32, Rm::Reg(S1.0), (TLB_ENTRIES as i32 - 1) << 5);
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

    /// To be called before code is written that changes EFLAGS: saves the guest's if they are live.
    pub(crate) fn clobber_flags(&mut self) {
        let live = self.guest[self.current].live;
        if live != 0 && self.flags == FlagsAt::Host {
            crate::stubs::save_flags(self.e, S0);
        }
        if live != 0 {
            self.flags = FlagsAt::Memory;
        }
    }
}
