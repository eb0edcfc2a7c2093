//! x86-64 instruction encodings (Intel SDM volume 2, chapter 2).

use crate::Emitter;

/// A general register by its encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gpr(pub u8);

#[allow(missing_docs)]
impl Gpr {
    pub const RAX: Self = Self(0);
    pub const RCX: Self = Self(1);
    pub const RDX: Self = Self(2);
    pub const RBX: Self = Self(3);
    pub const RSP: Self = Self(4);
    pub const RBP: Self = Self(5);
    pub const RSI: Self = Self(6);
    pub const RDI: Self = Self(7);
    pub const R8: Self = Self(8);
    pub const R9: Self = Self(9);
    pub const R10: Self = Self(10);
    pub const R11: Self = Self(11);
    pub const R12: Self = Self(12);
    pub const R13: Self = Self(13);
    pub const R14: Self = Self(14);
    pub const R15: Self = Self(15);
}

/// A memory operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mem {
    /// Base register.
    pub base: Option<Gpr>,
    /// Index register (not RSP) and the binary logarithm of its scale.
    pub index: Option<(Gpr, u8)>,
    /// Displacement.
    pub disp: i32,
    /// Relative to the base of GS.
    pub gs: bool,
}

impl Mem {
    /// `[base + disp]`.
    pub const fn base(base: Gpr, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp, gs: false }
    }

    /// `[base + index * 2^scale + disp]`.
    pub const fn indexed(base: Gpr, index: Gpr, scale: u8, disp: i32) -> Self {
        Self { base: Some(base), index: Some((index, scale)), disp, gs: false }
    }

    /// `gs:[disp]`.
    pub const fn gs(disp: i32) -> Self {
        Self { base: None, index: None, disp, gs: true }
    }

    /// `gs:[index * 2^scale + disp]`.
    pub const fn gs_indexed(index: Gpr, scale: u8, disp: i32) -> Self {
        Self { base: None, index: Some((index, scale)), disp, gs: true }
    }
}

/// The operand that ModRM's `rm` field (with SIB) encodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rm {
    /// A register of whatever kind.
    Reg(u8),
    /// Memory.
    Mem(Mem),
}

/// The opcode map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Map {
    One,
    M0f,
    M0f38,
    M0f3a,
}

/// Operand width of integer instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Width {
    B8,
    B16,
    B32,
    B64,
}

/// Everything of a legacy encoding but operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Enc {
    /// LOCK.
    pub lock: bool,
    /// The 0x66 prefix.
    pub p66: bool,
    /// 0xf2 or 0xf3, or 0 for none.
    pub rep: u8,
    /// REX.W.
    pub w: bool,
    /// Have a REX prefix even if no bit of it is set (SPL, BPL, SIL, DIL).
    pub rex: bool,
    /// Opcode map.
    pub map: Map,
    /// Opcode byte.
    pub opcode: u8,
}

impl Enc {
    /// An opcode of map one with 32-bit operands.
    pub const fn one(opcode: u8) -> Self {
        Self { lock: false, p66: false, rep: 0, w: false, rex: false, map: Map::One, opcode }
    }

    /// An opcode of map 0F with 32-bit operands.
    pub const fn m0f(opcode: u8) -> Self {
        Self { map: Map::M0f, ..Self::one(opcode) }
    }

    /// The same with operand width `width`: sets the prefix or REX.W, and the low opcode bit for all but
    /// bytes.
    pub const fn sized(self, width: Width) -> Self {
        match width {
            Width::B8 => Self { rex: true, ..self },
            Width::B16 => Self { p66: true, opcode: self.opcode | 1, ..self },
            Width::B32 => Self { opcode: self.opcode | 1, ..self },
            Width::B64 => Self { w: true, opcode: self.opcode | 1, ..self },
        }
    }

    /// The same with REX.W.
    pub const fn wide(self) -> Self {
        Self { w: true, ..self }
    }
}

/// Everything of an EVEX encoding but operands (Intel SDM volume 2, 2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evex {
    /// The number of the opcode map, 1 to 7.
    pub map: u8,
    /// 0, 1 (66), 2 (F3) or 3 (F2).
    pub pp: u8,
    /// EVEX.W.
    pub w: bool,
    /// EVEX.L'L: 0 is 128 bits, 1 is 256, 2 is 512; or how to round.
    pub length: u8,
    /// Opcode byte.
    pub opcode: u8,
    /// The register of the vvvv field, 0 to 31; 0 if there is none.
    pub vvvv: u8,
    /// The mask register; 0 is none.
    pub mask: u8,
    /// Elements that are not selected become zeros.
    pub zeroing: bool,
    /// EVEX.b: broadcast, rounding or suppression of exceptions.
    pub broadcast: bool,
}

impl Evex {
    /// A whole-register instruction of map 0F without a third operand.
    pub const fn m0f(pp: u8, w: bool, length: u8, opcode: u8) -> Self {
        Self { map: 1, pp, w, length, opcode, vvvv: 0, mask: 0, zeroing: false, broadcast: false }
    }
}

/// The eight operations of opcodes 00..3F and group 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Alu {
    Add = 0,
    Or = 1,
    Adc = 2,
    Sbb = 3,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// Shifts of group 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Shift {
    Shl = 4,
    Shr = 5,
    Sar = 7,
}

/// A condition, as in the low four bits of Jcc.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cond(pub u8);

#[allow(missing_docs)]
impl Cond {
    pub const O: Self = Self(0);
    pub const B: Self = Self(2);
    pub const AE: Self = Self(3);
    pub const E: Self = Self(4);
    pub const NE: Self = Self(5);
    pub const BE: Self = Self(6);
    pub const A: Self = Self(7);
    pub const S: Self = Self(8);
    pub const P: Self = Self(10);
    pub const G: Self = Self(15);

    /// The opposite.
    pub const fn not(self) -> Self {
        Self(self.0 ^ 1)
    }
}

fn low(register: u8) -> u8 {
    register & 7
}

impl Emitter {
    /// One instruction with a ModRM byte: `reg` is its register field or opcode extension.
    pub fn op(&mut self, enc: Enc, reg: u8, rm: Rm) {
        if let Rm::Mem(Mem { gs: true, .. }) = rm {
            self.byte(0x65);
        }
        if enc.lock {
            self.byte(0xf0);
        }
        if enc.p66 {
            self.byte(0x66);
        }
        if enc.rep != 0 {
            self.byte(enc.rep);
        }
        let (x, b) = extension(rm);
        let rex = u8::from(enc.w) << 3 | reg >> 3 << 2 | x << 1 | b;
        if rex != 0 || enc.rex {
            self.byte(0x40 | rex);
        }
        match enc.map {
            Map::One => {}
            Map::M0f => self.byte(0x0f),
            Map::M0f38 => self.bytes(&[0x0f, 0x38]),
            Map::M0f3a => self.bytes(&[0x0f, 0x3a]),
        }
        self.byte(enc.opcode);
        self.modrm(reg, rm);
    }

    /// One instruction with a three-byte VEX prefix. `pp` is 0, 1 (66), 2 (F3) or 3 (F2).
    #[allow(clippy::too_many_arguments)]
    pub fn vex(&mut self, map: Map, pp: u8, w: bool, l: bool, opcode: u8, reg: u8, vvvv: u8, rm: Rm) {
        if let Rm::Mem(Mem { gs: true, .. }) = rm {
            self.byte(0x65);
        }
        let (x, b) = extension(rm);
        let map = match map {
            Map::One | Map::M0f => 1,
            Map::M0f38 => 2,
            Map::M0f3a => 3,
        };
        let not = |bit: u8| bit ^ 1;
        self.byte(0xc4);
        self.byte(not(reg >> 3 & 1) << 7 | not(x) << 6 | not(b) << 5 | map);
        self.byte(u8::from(w) << 7 | (!vvvv & 15) << 3 | u8::from(l) << 2 | pp);
        self.byte(opcode);
        self.modrm(reg, rm);
    }

    /// One instruction with an EVEX prefix. Displacements are written in 32 bits, as those of 8 have a unit of their
    /// own in each instruction.
    pub fn evex(&mut self, evex: Evex, reg: u8, rm: Rm) {
        if let Rm::Mem(Mem { gs: true, .. }) = rm {
            self.byte(0x65);
        }
        let (mut x, b) = extension(rm);
        if let Rm::Reg(rm) = rm {
            x = rm >> 4 & 1;
        }
        let not = |bit: u8| bit & 1 ^ 1;
        self.byte(0x62);
        self.byte(not(reg >> 3) << 7 | not(x) << 6 | not(b) << 5 | not(reg >> 4) << 4 | evex.map);
        self.byte(u8::from(evex.w) << 7 | (!evex.vvvv & 15) << 3 | 4 | evex.pp);
        let flags = u8::from(evex.zeroing) << 7 | evex.length << 5 | u8::from(evex.broadcast) << 4;
        self.byte(flags | not(evex.vvvv >> 4) << 3 | evex.mask);
        self.byte(evex.opcode);
        self.modrm_of(reg, rm, false);
    }

    fn modrm(&mut self, reg: u8, rm: Rm) {
        self.modrm_of(reg, rm, true);
    }

    /// ModRM, SIB and displacement; `narrow` if displacements of 8 bits count bytes.
    fn modrm_of(&mut self, reg: u8, rm: Rm, narrow: bool) {
        let reg = low(reg) << 3;
        let mem = match rm {
            Rm::Reg(rm) => return self.byte(0xc0 | reg | low(rm)),
            Rm::Mem(mem) => mem,
        };
        let Some(base) = mem.base else {
            // SIB without a base: mod 00, base 101, and always 32 bits of displacement.
            let (index, scale) = mem.index.map_or((4, 0), |(index, scale)| (low(index.0), scale));
            self.byte(reg | 4);
            self.byte(scale << 6 | index << 3 | 5);
            return self.dword(mem.disp as u32);
        };
        let short = i8::try_from(mem.disp);
        let mode = match short {
            Ok(0) if low(base.0) != 5 => 0,
            Ok(_) if narrow => 0x40,
            _ => 0x80,
        };
        match mem.index {
            Some((index, scale)) => {
                self.byte(mode | reg | 4);
                self.byte(scale << 6 | low(index.0) << 3 | low(base.0));
            }
            None if low(base.0) == 4 => {
                self.byte(mode | reg | 4);
                self.byte(0x24);
            }
            None => self.byte(mode | reg | low(base.0)),
        }
        match (mode, short) {
            (0, _) => {}
            (0x40, Ok(short)) => self.byte(short as u8),
            _ => self.dword(mem.disp as u32),
        }
    }

    /// `mov to, from`, 64 bits.
    pub fn mov(&mut self, to: Gpr, from: Gpr) {
        self.op(Enc::one(0x8b).wide(), to.0, Rm::Reg(from.0));
    }

    /// `mov to, [from]`, 64 bits.
    pub fn load(&mut self, to: Gpr, from: Mem) {
        self.op(Enc::one(0x8b).wide(), to.0, Rm::Mem(from));
    }

    /// `mov to, [from]`, 32 bits.
    pub fn load32(&mut self, to: Gpr, from: Mem) {
        self.op(Enc::one(0x8b), to.0, Rm::Mem(from));
    }

    /// `movzx to, word [from]`.
    pub fn load16(&mut self, to: Gpr, from: Mem) {
        self.op(Enc::m0f(0xb7), to.0, Rm::Mem(from));
    }

    /// `movzx to, byte [from]`.
    pub fn load8(&mut self, to: Gpr, from: Mem) {
        self.op(Enc::m0f(0xb6), to.0, Rm::Mem(from));
    }

    /// `mov [to], from`, of `width`.
    pub fn store(&mut self, width: Width, to: Mem, from: Gpr) {
        self.op(Enc::one(0x88).sized(width), from.0, Rm::Mem(to));
    }

    /// `mov qword [to], imm` (sign-extended).
    pub fn store_imm(&mut self, to: Mem, imm: i32) {
        self.op(Enc::one(0xc7).wide(), 0, Rm::Mem(to));
        self.dword(imm as u32);
    }

    /// `mov dword [to], imm`.
    pub fn store32_imm(&mut self, to: Mem, imm: u32) {
        self.op(Enc::one(0xc7), 0, Rm::Mem(to));
        self.dword(imm);
    }

    /// Loads a constant, in the shortest encoding; leaves the flags alone.
    pub fn mov_imm(&mut self, to: Gpr, imm: u64) {
        if let Ok(imm) = u32::try_from(imm) {
            if to.0 >= 8 {
                self.byte(0x41);
            }
            self.byte(0xb8 | low(to.0));
            self.dword(imm);
        } else if let Ok(imm) = i32::try_from(imm as i64) {
            self.op(Enc::one(0xc7).wide(), 0, Rm::Reg(to.0));
            self.dword(imm as u32);
        } else {
            self.byte(0x48 | to.0 >> 3);
            self.byte(0xb8 | low(to.0));
            self.qword(imm);
        }
    }

    /// `lea to, [from]`, 64 bits.
    pub fn lea(&mut self, to: Gpr, from: Mem) {
        self.op(Enc::one(0x8d).wide(), to.0, Rm::Mem(Mem { gs: false, ..from }));
    }

    /// `op to, from`.
    pub fn alu(&mut self, op: Alu, width: Width, to: Gpr, from: Rm) {
        self.op(Enc::one((op as u8) << 3 | 2).sized(width), to.0, from);
    }

    /// `op rm, imm` (sign-extended), for all widths but bytes.
    pub fn alu_imm(&mut self, op: Alu, width: Width, rm: Rm, imm: i32) {
        match i8::try_from(imm) {
            Ok(imm) => {
                self.op(Enc::one(0x83).sized(width), op as u8, rm);
                self.byte(imm as u8);
            }
            Err(_) => {
                self.op(Enc::one(0x81).sized(width), op as u8, rm);
                self.dword(imm as u32);
            }
        }
    }

    /// A shift by a constant.
    pub fn shift_imm(&mut self, op: Shift, width: Width, rm: Rm, count: u8) {
        self.op(Enc::one(0xc0).sized(width), op as u8, rm);
        self.byte(count);
    }

    /// `rorx to, from, count`, 64 bits (BMI2): rotates without touching the flags.
    pub fn rorx(&mut self, to: Gpr, from: Gpr, count: u8) {
        self.vex(Map::M0f3a, 3, true, false, 0xf0, to.0, 0, Rm::Reg(from.0));
        self.byte(count);
    }

    /// `jcc` with 32 bits of displacement, to be filled in; gives the field's address.
    pub fn jcc(&mut self, cond: Cond) -> u64 {
        self.bytes(&[0x0f, 0x80 | cond.0]);
        let field = self.address();
        self.dword(0);
        field
    }

    /// `jmp` with 32 bits of displacement, to be filled in; gives the field's address.
    pub fn jmp(&mut self) -> u64 {
        self.byte(0xe9);
        let field = self.address();
        self.dword(0);
        field
    }

    /// `call` with 32 bits of displacement, to be filled in; gives the field's address.
    pub fn call(&mut self) -> u64 {
        self.byte(0xe8);
        let field = self.address();
        self.dword(0);
        field
    }

    /// `jcc target`.
    pub fn jcc_to(&mut self, cond: Cond, target: u64) {
        let field = self.jcc(cond);
        self.link(field, target);
    }

    /// `jmp target`.
    pub fn jmp_to(&mut self, target: u64) {
        let field = self.jmp();
        self.link(field, target);
    }

    /// `call target`.
    pub fn call_to(&mut self, target: u64) {
        let field = self.call();
        self.link(field, target);
    }

    /// `jmp [rm]`.
    pub fn jmp_rm(&mut self, rm: Rm) {
        self.op(Enc::one(0xff), 4, rm);
    }

    /// `call rm`.
    pub fn call_rm(&mut self, rm: Rm) {
        self.op(Enc::one(0xff), 2, rm);
    }

    /// `ret`.
    pub fn ret(&mut self) {
        self.byte(0xc3);
    }

    /// `push reg`.
    pub fn push(&mut self, register: Gpr) {
        if register.0 >= 8 {
            self.byte(0x41);
        }
        self.byte(0x50 | low(register.0));
    }

    /// `pop reg`.
    pub fn pop(&mut self, register: Gpr) {
        if register.0 >= 8 {
            self.byte(0x41);
        }
        self.byte(0x58 | low(register.0));
    }

    /// `lahf`.
    pub fn lahf(&mut self) {
        self.byte(0x9f);
    }

    /// `sahf`.
    pub fn sahf(&mut self) {
        self.byte(0x9e);
    }

    /// `setcc` of a byte register.
    pub fn setcc(&mut self, cond: Cond, register: Gpr) {
        self.op(Enc { rex: register.0 >= 4, ..Enc::m0f(0x90 | cond.0) }, 0, Rm::Reg(register.0));
    }

    /// `movaps xmm, [from]` (aligned).
    pub fn load_xmm(&mut self, to: u8, from: Mem) {
        self.op(Enc::m0f(0x28), to, Rm::Mem(from));
    }

    /// `movaps [to], xmm` (aligned).
    pub fn store_xmm(&mut self, to: Mem, from: u8) {
        self.op(Enc::m0f(0x29), from, Rm::Mem(to));
    }

    /// `vmovaps ymm, [from]` (aligned).
    pub fn load_ymm(&mut self, to: u8, from: Mem) {
        self.vex(Map::M0f, 0, false, true, 0x28, to, 0, Rm::Mem(from));
    }

    /// `vmovaps [to], ymm` (aligned).
    pub fn store_ymm(&mut self, to: Mem, from: u8) {
        self.vex(Map::M0f, 0, false, true, 0x29, from, 0, Rm::Mem(to));
    }

    /// `vmovaps zmm, [from]` (aligned).
    pub fn load_zmm(&mut self, to: u8, from: Mem) {
        self.evex(Evex::m0f(0, false, 2, 0x28), to, Rm::Mem(from));
    }

    /// `vmovaps [to], zmm` (aligned).
    pub fn store_zmm(&mut self, to: Mem, from: u8) {
        self.evex(Evex::m0f(0, false, 2, 0x29), from, Rm::Mem(to));
    }

    /// `kmovq k, [from]`.
    pub fn load_mask(&mut self, to: u8, from: Mem) {
        self.vex(Map::M0f, 0, true, false, 0x90, to, 0, Rm::Mem(from));
    }

    /// `kmovq [to], k`.
    pub fn store_mask(&mut self, to: Mem, from: u8) {
        self.vex(Map::M0f, 0, true, false, 0x91, from, 0, Rm::Mem(to));
    }

    /// `vzeroupper`.
    pub fn vzeroupper(&mut self) {
        self.bytes(&[0xc5, 0xf8, 0x77]);
    }

    /// `ldmxcsr [from]`.
    pub fn ldmxcsr(&mut self, from: Mem) {
        self.op(Enc::m0f(0xae), 2, Rm::Mem(from));
    }

    /// `stmxcsr [to]`.
    pub fn stmxcsr(&mut self, to: Mem) {
        self.op(Enc::m0f(0xae), 3, Rm::Mem(to));
    }
}

/// REX.X and REX.B of an operand.
fn extension(rm: Rm) -> (u8, u8) {
    match rm {
        Rm::Reg(rm) => (0, rm >> 3 & 1),
        Rm::Mem(mem) => {
            (mem.index.map_or(0, |(index, _)| index.0 >> 3), mem.base.map_or(0, |base| base.0 >> 3))
        }
    }
}

#[cfg(test)]
mod tests;
