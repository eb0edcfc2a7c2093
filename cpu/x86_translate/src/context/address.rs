//! Guest addresses of memory operands.

use crate::abi::layout::{S0, S1, gs, host_register, segment_base, slot};
use dbt_code::{Alu, Emitter, Enc, Gpr, Mem, Rm, Width};

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
    /// What the sum is cut to. If it is cut, all registers are in the host's, and there is one slot at most.
    pub(crate) wrap: Wrap,
    /// The segment whose base is added to the sum, after a look at its limit. Only if the sum is cut.
    pub(crate) segment: Option<u8>,
}

/// What offsets are cut to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Wrap {
    #[default]
    None,
    /// 32 bits.
    At4G,
    /// 16 bits.
    At64K,
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
    /// In bytes.
    pub(crate) size: u32,
    pub(crate) write: bool,
    /// A multiple of the size, or the slow path.
    pub(crate) aligned: bool,
    /// A mask says what is accessed, which may be nothing.
    pub(crate) masked: bool,
}

impl Access {
    /// A load of `size` bytes.
    pub(crate) fn read(size: u32) -> Self {
        Self { size, write: false, aligned: false, masked: false }
    }

    /// A store of `size` bytes.
    pub(crate) fn write(size: u32) -> Self {
        Self { size, write: true, aligned: false, masked: false }
    }
}

impl Ea {
    /// `[register + disp]` for a guest register.
    pub(crate) fn register(guest: u8, disp: i32) -> Self {
        let mut ea = Self { disp, ..Self::default() };
        ea.add_register(guest);
        ea
    }

    /// Adds a guest register, of which there is at most one without a scale.
    pub(crate) fn add_register(&mut self, guest: u8) {
        match host_register(guest) {
            Some(host) => self.base = Some(host),
            None => self.add_slot(slot(guest)),
        }
    }

    /// Adds what is in memory at that displacement from GS. There is room for two of these.
    pub(crate) fn add_slot(&mut self, at: i32) {
        let free = if self.slots[0].is_none() { 0 } else { 1 };
        self.slots[free] = Some(at);
    }

    /// Whether the host register at the end is the only thing besides the displacement.
    pub(crate) fn plain_base(&self) -> Option<Gpr> {
        match self {
            Self { wrap: Wrap::At4G | Wrap::At64K, .. } => None,
            Self { slots: [None, None], base: Some(base), index: None, constant: None, .. } => Some(*base),
            _ => None,
        }
    }

    /// Puts the sum plus `add`, cut, into [`S0`]; uses nothing else and leaves the flags alone.
    pub(crate) fn offset(&self, e: &mut Emitter, add: i32) {
        let disp = self.disp.wrapping_add(add);
        let mut base = self.base;
        if let Some(at) = self.slots[0] {
            e.load(S0, gs(at));
            if let Some(register) = base {
                e.lea(S0, Mem::indexed(S0, register, 0, 0));
            }
            base = Some(S0);
        }
        let index = self.index.and_then(|index| Some((index.host?, index.scale)));
        match (base, index) {
            (None, None) => {
                let mask = if self.wrap == Wrap::At64K { 0xffff } else { u32::MAX };
                return e.mov_imm(S0, u64::from(disp as u32 & mask));
            }
            (Some(base), None) if disp == 0 && self.wrap == Wrap::At4G => {
                e.op(Enc::one(0x8b), S0.0, Rm::Reg(base.0));
            }
            _ => e.op(Enc::one(0x8d), S0.0, Rm::Mem(Mem { base, index, disp, gs: false })),
        }
        if self.wrap == Wrap::At64K {
            e.op(Enc::m0f(0xb7), S0.0, Rm::Reg(S0.0)); // movzx r9d, r9w
        }
    }

    /// Adds the base of the segment, if there is one, to the offset in [`S0`]. The flags are lost then.
    pub(crate) fn add_base(&self, e: &mut Emitter) {
        if let Some(segment) = self.segment {
            e.alu(Alu::Add, Width::B32, S0, Rm::Mem(gs(segment_base(usize::from(segment)))));
        }
    }

    /// Puts the address plus `add` into [`S0`]; leaves the flags alone, unless there is a segment; may use
    /// [`S1`].
    pub(crate) fn compute(&self, e: &mut Emitter, add: i32) {
        if let Some(constant) = self.constant {
            return e.mov_imm(S0, constant.wrapping_add(add as i64 as u64));
        }
        if self.wrap != Wrap::None {
            self.offset(e, add);
            return self.add_base(e);
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

    /// The operand, with the page's addend in [`S1`]. If the address is cut, [`S0`] belongs to the operand, else it
    /// is used but left free. Leaves the flags alone, unless there is a segment.
    pub(crate) fn operand(&self, e: &mut Emitter) -> Mem {
        if let Some(constant) = self.constant {
            if let Ok(disp) = i32::try_from(constant as i64) {
                return Mem::base(S1, disp);
            }
            e.mov_imm(S0, constant);
            e.lea(S1, Mem::indexed(S1, S0, 0, 0));
            return Mem::base(S1, 0);
        }
        if self.wrap != Wrap::None {
            self.offset(e, 0);
            self.add_base(e);
            return Mem::indexed(S0, S1, 0, 0);
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
    pub(crate) fn consumes(&self) -> bool {
        self.wrap == Wrap::None && (self.slots[0].is_some() || self.index.is_some())
            || self.constant.is_some_and(|c| i32::try_from(c as i64).is_err())
    }
}
