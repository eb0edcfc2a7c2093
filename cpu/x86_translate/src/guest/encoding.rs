//! Raw encodings of instructions, to be written out again with other registers.

use super::info::CodeInfo;
use dbt_code::{Evex, Map};

/// A guest instruction's encoding, taken apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Raw {
    pub(crate) lock: bool,
    pub(crate) p66: bool,
    pub(crate) p67: bool,
    pub(crate) rep: u8,
    pub(crate) rex: u8,
    pub(crate) map: Map,
    pub(crate) opcode: u8,
    /// VEX.vvvv, W, L and pp.
    pub(crate) vvvv: u8,
    pub(crate) vex_w: bool,
    pub(crate) vex_l: bool,
    pub(crate) pp: u8,
    /// The prefix of an EVEX encoding, with the opcode.
    pub(crate) evex: Option<Evex>,
    /// ModRM.reg and ModRM.rm with their extensions; `rm` only if it is a register.
    pub(crate) reg: u8,
    pub(crate) rm: Option<u8>,
    /// Where the immediate begins; it runs to the end of the instruction.
    pub(crate) imm: usize,
}

impl Raw {
    /// Takes `bytes`, one whole valid instruction of code of `bits` bits, apart. `None` if it ends too early, or
    /// is encoded in a way that is not translated.
    pub(crate) fn parse(bytes: &[u8], info: &CodeInfo, bits: u32) -> Option<Self> {
        let mut raw = Self {
            lock: false,
            p66: false,
            p67: false,
            rep: 0,
            rex: 0,
            map: Map::One,
            opcode: 0,
            vvvv: 0,
            vex_w: false,
            vex_l: false,
            pp: 0,
            evex: None,
            reg: 0,
            rm: None,
            imm: 0,
        };
        let mut at = 0;
        loop {
            let byte = *bytes.get(at)?;
            match byte {
                0xf0 => raw.lock = true,
                0x66 => raw.p66 = true,
                0x67 => raw.p67 = true,
                0xf2 | 0xf3 => raw.rep = byte,
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
                0x40..=0x4f if bits == 64 => {}
                _ => break,
            }
            // REX counts only right before the opcode.
            raw.rex = if byte & 0xf0 == 0x40 { byte } else { 0 };
            at += 1;
        }
        // The fifth bits of ModRM.reg and, of a register, ModRM.rm.
        let (mut high_reg, mut high_rm) = (0, 0);
        if info.evex {
            let p = *bytes.get(at + 1)?;
            (high_reg, high_rm) = ((!p >> 4 & 1) << 4, (!p >> 6 & 1) << 4);
            at = raw.parse_evex(bytes, at)?;
        } else if info.vex {
            at = raw.parse_vex(bytes, at)?;
            if bits != 64 {
                // Eight registers, of 32 bits.
                raw.vvvv &= 7;
                raw.rex = 0;
                raw.vex_w &= info.vector;
            }
        } else {
            if *bytes.get(at)? == 0x0f {
                at += 1;
                raw.map = Map::M0f;
                match *bytes.get(at)? {
                    0x38 => raw.map = Map::M0f38,
                    0x3a => raw.map = Map::M0f3a,
                    _ => at -= 1,
                }
                at += 1;
            }
        }
        raw.opcode = *bytes.get(at)?;
        at += 1;
        if bits != 64 && raw.map == Map::One && raw.opcode == 0x82 {
            // The same as this, which 64-bit mode has.
            raw.opcode = 0x80;
        }
        if let Some(evex) = &mut raw.evex {
            evex.opcode = raw.opcode;
        }
        if info.has_modrm {
            let modrm = *bytes.get(at)?;
            at += 1;
            raw.reg = modrm >> 3 & 7 | (raw.rex & 4) << 1 | high_reg;
            let rm = modrm & 7;
            let mode = modrm >> 6;
            if mode == 3 {
                raw.rm = Some(rm | (raw.rex & 1) << 3 | high_rm);
            } else if bits != 64 && (bits == 16) != raw.p67 {
                at += match mode {
                    0 if rm == 6 => 2,
                    0 => 0,
                    1 => 1,
                    _ => 2,
                };
            } else {
                let mut base = rm;
                if rm == 4 {
                    base = *bytes.get(at)? & 7;
                    at += 1;
                }
                at += match mode {
                    0 if base == 5 => 4,
                    0 => 0,
                    1 => 1,
                    _ => 4,
                };
            }
        }
        raw.imm = at;
        (at <= bytes.len()).then_some(raw)
    }

    /// The bytes 62, P0, P1, P2 (Intel SDM volume 2, 2.7.1).
    fn parse_evex(&mut self, bytes: &[u8], at: usize) -> Option<usize> {
        let [escape, p0, p1, p2] = *bytes.get(at..at + 4)?.first_chunk()?;
        if escape != 0x62 {
            return None;
        }
        self.rex = !p0 >> 5 & 7;
        self.vvvv = !p1 >> 3 & 15 | (!p2 >> 3 & 1) << 4;
        self.evex = Some(Evex {
            map: p0 & 7,
            pp: p1 & 3,
            w: p1 & 0x80 != 0,
            length: p2 >> 5 & 3,
            opcode: 0,
            vvvv: self.vvvv,
            mask: p2 & 7,
            zeroing: p2 & 0x80 != 0,
            broadcast: p2 & 0x10 != 0,
        });
        Some(at + 4)
    }

    fn parse_vex(&mut self, bytes: &[u8], at: usize) -> Option<usize> {
        match *bytes.get(at)? {
            0xc5 => {
                let p = *bytes.get(at + 1)?;
                self.map = Map::M0f;
                self.rex = (!p >> 7 & 1) << 2;
                self.vvvv = !p >> 3 & 15;
                self.vex_l = p & 4 != 0;
                self.pp = p & 3;
                Some(at + 2)
            }
            0xc4 => {
                let (p, q) = (*bytes.get(at + 1)?, *bytes.get(at + 2)?);
                self.map = match p & 31 {
                    1 => Map::M0f,
                    2 => Map::M0f38,
                    3 => Map::M0f3a,
                    _ => return None,
                };
                self.rex = !p >> 5 & 7;
                self.vvvv = !q >> 3 & 15;
                self.vex_w = q & 0x80 != 0;
                self.vex_l = q & 4 != 0;
                self.pp = q & 3;
                Some(at + 3)
            }
            _ => None,
        }
    }
}
