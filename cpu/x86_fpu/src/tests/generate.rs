//! Random instructions of a code, and random states to execute them in.

use iced_x86::{
    Code, Encoder, EncodingKind, Instruction, OpCodeOperandKind, OpKind, Register, RoundingControl,
};
use native_oracle::{NativeState, SCRATCH, SCRATCH_LEN};

/// A small generator of reproducible random numbers (xorshift64*).
pub(super) struct Random(u64);

impl Random {
    /// The numbers of one test, which differ with the environment's seed.
    pub(super) fn new(test: u64) -> Self {
        let seed = test.wrapping_add(native_oracle::seed().wrapping_sub(1).wrapping_mul(1000));
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }

    pub(super) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// What the generated instruction is to be like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Form {
    /// A memory operand where there is a choice.
    pub(super) memory: bool,
    /// Only the first eight registers.
    pub(super) low_registers: bool,
    /// 16, 32 or 64.
    pub(super) bitness: u32,
}

/// Where the memory operand of generated instructions points: base register RBX (3) holds it.
pub(super) const BASE: usize = 3;

/// A random instruction of `code`, or `None` if it cannot be encoded in this form.
pub(super) fn instruction(code: Code, form: Form, random: &mut Random) -> Option<Vec<u8>> {
    use OpCodeOperandKind::*;
    let op_code = code.op_code();
    let mut insn = Instruction::default();
    insn.set_code(code);
    let evex = op_code.encoding() == EncodingKind::EVEX;
    let registers = match (form.low_registers, evex) {
        (true, _) => 8,
        (false, false) => 16,
        (false, true) => 32,
    };
    let mut immediates = 0;
    let xmm = |random: &mut Random| Register::XMM0 + random.below(registers) as u32;
    let ymm = |random: &mut Random| Register::YMM0 + random.below(registers) as u32;
    let zmm = |random: &mut Random| Register::ZMM0 + random.below(registers) as u32;
    let k = |random: &mut Random| Register::K0 + random.below(8) as u32;
    let mm = |random: &mut Random| Register::MM0 + random.below(8) as u32;
    let general = |random: &mut Random, first: Register| {
        // Not RSP, which is the test's; not the base.
        let number = random.pick(&[0u32, 1, 2, 5, 6, 7, 8, 9, 12, 13, 14, 15]);
        first + if form.low_registers { number & 7 & !4 | u32::from(number & 7 == 4) } else { number }
    };
    for operand in 0..op_code.op_count() {
        let kind = op_code.op_kind(operand);
        let register = match kind {
            xmm_reg | xmm_rm | xmm_vvvv | xmm_is4 => Some(xmm(random)),
            ymm_reg | ymm_rm | ymm_vvvv | ymm_is4 => Some(ymm(random)),
            zmm_reg | zmm_rm | zmm_vvvv => Some(zmm(random)),
            k_reg | k_rm | k_vvvv => Some(k(random)),
            mm_reg | mm_rm => Some(mm(random)),
            r32_reg | r32_rm | r32_vvvv => Some(general(random, Register::EAX)),
            r64_reg | r64_rm | r64_vvvv => Some(general(random, Register::RAX)),
            st0 => Some(Register::ST0),
            sti_opcode => Some(Register::ST0 + random.below(8) as u32),
            ax => Some(Register::AX),
            xmm_or_mem if !form.memory => Some(xmm(random)),
            ymm_or_mem if !form.memory => Some(ymm(random)),
            zmm_or_mem if !form.memory => Some(zmm(random)),
            k_or_mem if !form.memory => Some(k(random)),
            r8_or_mem if !form.memory => Some(general(random, Register::EAX)),
            r16_or_mem if !form.memory => Some(general(random, Register::AX)),
            mm_or_mem if !form.memory => Some(mm(random)),
            r32_or_mem if !form.memory => Some(general(random, Register::EAX)),
            r64_or_mem if !form.memory => Some(general(random, Register::RAX)),
            _ => Option::None,
        };
        if let Some(register) = register {
            insn.set_op_kind(operand, OpKind::Register);
            insn.set_op_register(operand, register);
            continue;
        }
        match kind {
            imm8 | imm4_m2z => {
                let kind = if immediates == 0 { OpKind::Immediate8 } else { OpKind::Immediate8_2nd };
                insn.set_op_kind(operand, kind);
                let value = random.next() as u8;
                if immediates == 0 {
                    insn.set_immediate8(value)
                } else {
                    insn.set_immediate8_2nd(value)
                }
                immediates += 1;
            }
            seg_rDI => {
                let kind = match form.bitness {
                    64 => OpKind::MemorySegRDI,
                    32 => OpKind::MemorySegEDI,
                    _ => OpKind::MemorySegDI,
                };
                insn.set_op_kind(operand, kind);
            }
            mem | xmm_or_mem | ymm_or_mem | zmm_or_mem | k_or_mem | mm_or_mem | r8_or_mem | r16_or_mem
            | r32_or_mem | r64_or_mem | mem_vsib32x | mem_vsib32y | mem_vsib32z | mem_vsib64x
            | mem_vsib64y | mem_vsib64z => {
                insn.set_op_kind(operand, OpKind::Memory);
                let vsib = !matches!(kind, mem | xmm_or_mem | ymm_or_mem | zmm_or_mem | k_or_mem | mm_or_mem)
                    && !matches!(kind, r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem);
                insn.set_memory_base(match form.bitness {
                    64 => Register::RBX,
                    16 if !vsib => Register::BX,
                    _ => Register::EBX,
                });
                match kind {
                    mem_vsib32x | mem_vsib64x => insn.set_memory_index(xmm(random)),
                    mem_vsib32y | mem_vsib64y => insn.set_memory_index(ymm(random)),
                    mem_vsib32z | mem_vsib64z => insn.set_memory_index(zmm(random)),
                    _ => {}
                }
                if random.one_in(2) {
                    insn.set_memory_displacement64(random.pick(&[0x10, 0x40, 0xffff_ffff_ffff_fff0]));
                    insn.set_memory_displ_size(1);
                }
            }
            _ => return Option::None,
        }
    }
    if evex {
        decorate(&mut insn, random);
    }
    let mut encoder = Encoder::new(form.bitness);
    encoder.encode(&insn, native_oracle::CODE).ok()?;
    Some(encoder.take_buffer())
}

/// Adds what only EVEX encodes: mask, zeroing, broadcast, rounding.
fn decorate(insn: &mut Instruction, random: &mut Random) {
    let op_code = insn.code().op_code();
    let memory = (0..insn.op_count()).find(|operand| insn.op_kind(*operand) == OpKind::Memory);
    if op_code.require_op_mask_register() || op_code.can_use_op_mask_register() && !random.one_in(3) {
        insn.set_op_mask(Register::K1 + random.below(7) as u32);
        let zeroing = op_code.can_use_zeroing_masking() && memory != Some(0);
        insn.set_zeroing_masking(zeroing && random.one_in(2));
    }
    if memory.is_some() {
        insn.set_is_broadcast(op_code.can_broadcast() && random.one_in(2));
    } else if op_code.can_use_rounding_control() && random.one_in(3) {
        let modes = [
            RoundingControl::RoundToNearest,
            RoundingControl::RoundDown,
            RoundingControl::RoundUp,
            RoundingControl::RoundTowardZero,
        ];
        insn.set_rounding_control(random.pick(&modes));
    } else if op_code.can_suppress_all_exceptions() && random.one_in(3) {
        insn.set_suppress_all_exceptions(true);
    }
}

fn float32(random: &mut Random) -> u32 {
    match random.below(12) {
        0 => random.pick(&[0, 0x8000_0000, 0x3f80_0000, 0xbf80_0000, 0x7f80_0000, 0xff80_0000]),
        1 => random.pick(&[0x7fc0_0000, 0x7f80_0001, 0xffc0_1234, 0xffa0_0000, 1, 0x807f_ffff]),
        2 => random.pick(&[0x0080_0000, 0x7f7f_ffff, 0x4f00_0000, 0xcf00_0000, 0x5f00_0000, 0x4b00_0001]),
        3..=5 => (random.below(2000) as f32 / 7.0 - 100.0).to_bits(),
        6 => (random.below(2000) as f32 - 1000.0).to_bits(),
        7 => random.next() as u32 & 0x807f_ffff | 0x0080_0000,
        _ => random.next() as u32,
    }
}

fn float64(random: &mut Random) -> u64 {
    match random.below(12) {
        0 => random.pick(&[0, 1 << 63, 0x3ff0 << 48, 0xbff0 << 48, 0x7ff0 << 48, 0xfff0 << 48]),
        1 => random.pick(&[0x7ff8 << 48, 0x7ff0 << 48 | 1, 0xfff8 << 48 | 77, 0xfff4 << 48, 1, 1 << 63 | 5]),
        2 => random.pick(&[0x0010 << 48, 0x7fef_ffff_ffff_ffff, 0x41e0 << 48, 0xc3e0 << 48, 0x36a0 << 48]),
        3..=5 => (random.below(2000) as f64 / 7.0 - 100.0).to_bits(),
        6 => (random.below(2000) as f64 - 1000.0).to_bits(),
        7 => random.next() & 0x800f_ffff_ffff_ffff | 0x0010 << 48,
        _ => random.next(),
    }
}

/// Bytes that are interesting as integers or floats of various lengths.
fn bytes(random: &mut Random, place: &mut [u8]) {
    for chunk in place.chunks_mut(8) {
        let value = match random.below(6) {
            0 | 1 => u64::from(float32(random)) << 32 | u64::from(float32(random)),
            2 | 3 => float64(random),
            4 => random.pick(&[0, !0, 0x8000_7fff_8000_7fff, 0x0080_00ff_7f80_ff01, 0x6162_6300_6100_6263]),
            _ => random.next(),
        };
        chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
    }
}

fn extended(random: &mut Random) -> [u8; 10] {
    let (sign_exponent, mantissa): (u16, u64) = match random.below(12) {
        0 => random.pick(&[(0, 0), (0x8000, 0), (0x3fff, 1 << 63), (0xbfff, 1 << 63)]),
        1 => random.pick(&[(0x7fff, 1 << 63), (0xffff, 1 << 63), (0x7fff, 3 << 62), (0xffff, 0xa5 << 56)]),
        2 => random.pick(&[(0, 1), (0, 1 << 63), (0x8000, 1 << 62), (1, 1 << 63), (0x7ffe, !0)]),
        // Unsupported: pseudo-infinity, unnormal.
        3 if random.one_in(3) => random.pick(&[(0x7fff, 0), (0x4000, 1 << 62)]),
        4..=8 => {
            let sign = (random.next() as u16) << 15;
            (sign | (0x3fe0 + random.below(0x48) as u16), random.next() | 1 << 63)
        }
        9 => (0x4000 | (random.next() as u16) << 15, random.next() & 0xffff << 48 | 1 << 63),
        _ => (random.next() as u16 & 0xbfff, random.next() | 1 << 63),
    };
    let mut value = [0; 10];
    value[..8].copy_from_slice(&mantissa.to_le_bytes());
    value[8..].copy_from_slice(&sign_exponent.to_le_bytes());
    value
}

/// How exceptions are set up in a random state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Masks {
    /// All masked.
    All,
    /// Any combination, x87 and SSE; none pending.
    Some,
    /// As before, and x87 exceptions may be pending.
    Pending,
}

/// Makes addresses in a random state offsets in segments of just the scratch memory. Of addresses of 16 bits the
/// registers' upper halves don't matter.
pub(super) fn within_segments(random: &mut Random, state: &mut NativeState, any_high: bool) {
    for register in [4, BASE, 7] {
        let offset = state.regs[register].wrapping_sub(SCRATCH) & 0xffff;
        let high = if any_high && register != 4 { random.next() & 0xffff_0000 } else { 0 };
        state.regs[register] = offset | high;
    }
}

/// A random state. RBX points into the scratch memory, at `offset` from a multiple of 64.
pub(super) fn state(random: &mut Random, masks: Masks, offset: u64) -> NativeState {
    let mut state = NativeState::default();
    for register in &mut state.regs {
        *register = match random.below(3) {
            0 => random.below(40),
            1 => random.next(),
            _ => u64::from(float32(random)),
        };
    }
    state.regs[4] = SCRATCH + SCRATCH_LEN as u64 - 256;
    state.regs[BASE] = SCRATCH + 1024 + 64 * random.below(8) + offset;
    state.regs[7] = SCRATCH + 2048 + random.below(64);
    state.rflags = random.next() & native_oracle::LOADABLE_FLAGS & !0x400 | 2;
    let wide = native_oracle::has_avx512();
    for vector in &mut state.vectors[..if wide { 32 } else { 16 }] {
        bytes(random, &mut vector[..if wide { 64 } else { 32 }]);
    }
    for mask in &mut state.opmask {
        *mask = match random.below(4) {
            _ if !wide => 0,
            0 => 0,
            1 => !0,
            _ => random.next(),
        };
    }
    bytes(random, &mut state.scratch);
    state.mxcsr = (random.next() as u32 & 0xe07f) | 0x1f80;
    if random.one_in(2) {
        state.mxcsr &= !0x8040;
    }
    if masks != Masks::All {
        state.mxcsr &= !(random.next() as u32 & random.next() as u32 & 0x1f80);
    }
    x87(random, masks, &mut state);
    state
}

fn x87(random: &mut Random, masks: Masks, state: &mut NativeState) {
    let mut control =
        0x7f | random.pick(&[0x300u16, 0x300, 0x200, 0]) | random.pick(&[0, 0x400, 0x800, 0xc00]);
    let mut status = random.next() as u16 & 0x7f7f;
    if masks != Masks::All {
        control &= !(random.next() as u16 & random.next() as u16 & 0x3f);
        if masks == Masks::Some {
            status &= !(!control & 0x3f);
        } else if status & !control & 0x3f != 0 {
            status |= 0x8080;
        }
    }
    state.x87[..2].copy_from_slice(&control.to_le_bytes());
    state.x87[2..4].copy_from_slice(&status.to_le_bytes());
    let tags = random.next() as u8 | random.next() as u8;
    state.x87[4] = random.pick(&[0xff, 0xff, 0, tags]);
    state.x87[6..8].copy_from_slice(&(random.next() as u16 & 0x7ff).to_le_bytes());
    state.x87[8..16].copy_from_slice(&(random.next() & 0xffff_ffff).to_le_bytes());
    state.x87[16..24].copy_from_slice(&(random.next() & 0xffff_ffff).to_le_bytes());
    for register in 0..8 {
        state.x87[32 + 16 * register..][..10].copy_from_slice(&extended(random));
    }
}
