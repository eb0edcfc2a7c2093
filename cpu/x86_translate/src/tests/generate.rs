//! Random instructions.

use crate::guest::class::Class;
use crate::guest::info::code_info;
use iced_x86::{
    Decoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};
use x86_interp::DECODER_OPTIONS;

/// A generator of numbers, the same in each run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

/// What a program may do with the registers.
pub(crate) struct Roles {
    /// Hold addresses, and are never written.
    pub(crate) bases: Vec<u8>,
    /// Hold small numbers, and are never written.
    pub(crate) indices: Vec<u8>,
    /// Of the code.
    pub(crate) bits: u32,
}

impl Roles {
    pub(crate) fn new(random: &mut Random, bits: u32) -> Self {
        let registers = if bits == 64 { 16 } else { 8 };
        let mut all: Vec<u8> = (0..registers).filter(|register| *register != 4).collect();
        for index in (1..all.len()).rev() {
            all.swap(index, random.below(index as u64 + 1) as usize);
        }
        match bits {
            64 => Self { bases: all[..4].to_vec(), indices: all[4..6].to_vec(), bits },
            32 => Self { bases: all[..2].to_vec(), indices: all[2..3].to_vec(), bits },
            // BX and DI; SI.
            _ => Self { bases: vec![3, 7], indices: vec![6], bits },
        }
    }
}

/// Which instructions there are many of.
#[derive(Clone, Copy)]
pub(crate) struct Mix {
    /// x87 and MMX.
    pub(crate) x87: bool,
    /// AVX.
    pub(crate) avx: bool,
    /// AVX-512, beside AVX.
    pub(crate) avx512: bool,
}

/// A program and what is undefined when it has run.
pub(crate) struct Program {
    pub(crate) bytes: Vec<u8>,
    pub(crate) undefined: u32,
    /// What is undefined at some time.
    pub(crate) ever: u32,
}

/// Generates about `count` instructions to run at `ip`; HLT ends them.
pub(crate) fn program(random: &mut Random, roles: &Roles, count: usize, ip: u64, mix: Mix) -> Program {
    let mut bytes = vec![];
    let (mut undefined, mut ever) = (0, 0);
    let mut pending: Option<usize> = None;
    let mut factory = InstructionInfoFactory::new();
    for _ in 0..count {
        if random.chance(12) && undefined == 0 && pending.is_none() {
            // A jump ahead, to be aimed later.
            bytes.extend([0x70 | random.below(16) as u8, 0]);
            pending = Some(bytes.len());
            continue;
        }
        let (insn, encoding) =
            instruction(random, roles, ip + bytes.len() as u64, undefined, mix, &mut factory);
        let written = insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set();
        undefined = undefined & !written | insn.rflags_undefined();
        ever |= undefined;
        bytes.extend(encoding);
        if let Some(from) = pending
            && (random.chance(40) || bytes.len() - from > 100)
        {
            bytes[from - 1] = (bytes.len() - from) as u8;
            pending = None;
            undefined = ever;
        }
    }
    if let Some(from) = pending {
        bytes[from - 1] = (bytes.len() - from) as u8;
        undefined = ever;
    }
    bytes.push(0xf4);
    Program { bytes, undefined, ever }
}

fn instruction(
    random: &mut Random,
    roles: &Roles,
    ip: u64,
    undefined: u32,
    mix: Mix,
    factory: &mut InstructionInfoFactory,
) -> (Instruction, Vec<u8>) {
    loop {
        let bytes = if roles.bits == 64 {
            candidate(random, roles, mix)
        } else {
            short_candidate(random, roles, mix)
        };
        let mut decoder = Decoder::with_ip(roles.bits, &bytes, ip, DECODER_OPTIONS);
        let insn = decoder.decode();
        if insn.is_invalid() || !acceptable(&insn, roles, undefined, factory) {
            continue;
        }
        let len = insn.len();
        return (insn, bytes[..len].to_vec());
    }
}

fn candidate(random: &mut Random, roles: &Roles, mix: Mix) -> Vec<u8> {
    let Mix { x87, avx, .. } = mix;
    let mut bytes = vec![];
    if random.chance(10) {
        bytes.push(random.pick(&[0x66, 0xf2, 0xf3, 0x66, 0xf3, 0x64, 0x65, 0xf0]));
    }
    if random.chance(5) {
        bytes.push(0x66);
    }
    let mut rex = 0;
    if random.chance(65) {
        rex = 0x40 | random.below(16) as u8;
    }
    let map = random.below(100);
    let opcode = if x87 && map < 45 && random.chance(85) { 0xd8 } else { 0 } | random.below(256) as u8;
    let opcode = if opcode & 0xd8 == 0xd8 && x87 { opcode & 0xdf } else { opcode };
    let memory = random.chance(50);
    let (mut modrm, mut tail) = (random.below(256) as u8 | 0xc0, vec![]);
    if memory {
        let base = random.pick(&roles.bases);
        rex = rex & !3 | base >> 3;
        let disp = random.below(256) as u8;
        if random.chance(30) || base & 7 == 4 {
            let index = if random.chance(70) { random.pick(&roles.indices) } else { 4 };
            rex |= (index >> 3) << 1;
            modrm = modrm & 0x38 | 0x44;
            tail.push((random.below(4) as u8) << 6 | (index & 7) << 3 | base & 7);
        } else {
            modrm = modrm & 0x38 | 0x40 | base & 7;
        }
        if rex != 0 {
            rex |= 0x40;
        }
        tail.push(disp);
    }
    if avx && random.chance(60) {
        let (r, x, b) = (random.below(2) as u8, !rex >> 1 & 1, !rex & 1);
        let b = if memory { b } else { random.below(2) as u8 };
        let x = if memory { x } else { 1 };
        if random.chance(5) {
            bytes.extend([0xc5, 0xf8, 0x77]);
            return bytes;
        }
        if mix.avx512 && random.chance(70) {
            let fifth = random.below(2) as u8;
            let map = random.pick(&[1u8, 1, 2, 2, 3]);
            bytes.extend([0x62, r << 7 | x << 6 | b << 5 | fifth << 4 | map]);
            let fields = random.below(256) as u8 | 4;
            let none = random.chance(30);
            bytes.push(if none { fields | 0x78 } else { fields });
            let last = random.below(256) as u8;
            // 11 is no length, but a way to round.
            let last = if last & 0x60 == 0x60 && random.chance(70) { last & !0x20 } else { last };
            bytes.push(if none { last | 8 } else { last });
            bytes.push(random.below(256) as u8);
            bytes.push(modrm);
            bytes.extend(tail);
            bytes.extend(std::iter::repeat_with(|| random.below(256) as u8).take(8));
            return bytes;
        }
        bytes.extend([0xc4, r << 7 | x << 6 | b << 5 | random.pick(&[1u8, 1, 1, 2, 2, 3])]);
        let fields = random.below(256) as u8;
        // Many instructions have no third operand.
        bytes.push(if random.chance(30) { fields | 0x78 } else { fields });
        bytes.push(random.below(256) as u8);
    } else if map >= 97 {
        // VEX, for BMI.
        let (r, x, b) = (random.below(2) as u8, !rex >> 1 & 1, !rex & 1);
        let b = if memory { b } else { random.below(2) as u8 };
        let x = if memory { x } else { 1 };
        bytes.extend([0xc4, r << 7 | x << 6 | b << 5 | random.pick(&[2u8, 2, 3])]);
        bytes.push(random.below(256) as u8 & 0xfb);
        bytes.push(random.pick(&[0xf2, 0xf3, 0xf5, 0xf6, 0xf7, 0xf0]));
    } else {
        if rex != 0 {
            bytes.push(rex);
        }
        match map {
            0..45 => bytes.push(opcode),
            45..88 => bytes.extend([0x0f, opcode]),
            88..93 => bytes.extend([0x0f, 0x38, opcode]),
            _ => bytes.extend([0x0f, 0x3a, opcode & 0x6f]),
        }
    }
    bytes.push(modrm);
    bytes.extend(tail);
    for _ in 0..8 {
        bytes.push(random.below(256) as u8);
    }
    bytes
}

/// The same for code of 32 or 16 bits.
fn short_candidate(random: &mut Random, roles: &Roles, mix: Mix) -> Vec<u8> {
    let Mix { x87, avx, .. } = mix;
    let mut bytes = vec![];
    if random.chance(12) {
        bytes.push(random.pick(&[0x66, 0xf2, 0xf3, 0x2e, 0x3e, 0x64, 0x65, 0xf0, 0x26, 0x36]));
    }
    if random.chance(10) {
        bytes.push(0x66);
    }
    let other_addresses = roles.bits == 16 && random.chance(25);
    if other_addresses {
        bytes.push(0x67);
    }
    let map = random.below(100);
    let opcode = if x87 && map < 45 && random.chance(85) { 0xd8 } else { 0 } | random.below(256) as u8;
    let opcode = if opcode & 0xd8 == 0xd8 && x87 { opcode & 0xdf } else { opcode };
    match map {
        _ if avx && random.chance(50) => {
            bytes.extend([0xc4, 0xc0 | random.below(64) as u8 & 0x20 | random.pick(&[1u8, 1, 2, 3])]);
            let fields = random.below(256) as u8;
            bytes.push(if random.chance(30) { fields | 0x78 } else { fields });
            bytes.push(random.below(256) as u8);
        }
        0..55 => bytes.push(opcode),
        55..92 => bytes.extend([0x0f, opcode]),
        92..95 => bytes.extend([0x0f, 0x38, opcode]),
        95..97 => bytes.extend([0x0f, 0x3a, opcode & 0x6f]),
        // VEX, for BMI.
        _ => {
            bytes.extend([0xc4, 0xe0 | random.pick(&[2u8, 2, 3]), random.below(256) as u8 & 0xfb]);
            bytes.push(random.pick(&[0xf2, 0xf3, 0xf5, 0xf6, 0xf7, 0xf0]));
        }
    }
    let modrm = random.below(256) as u8 | 0xc0;
    let displacement = random.below(256) as u8;
    if random.chance(45) {
        bytes.push(modrm);
    } else if roles.bits == 16 && !other_addresses {
        // [bx+si], [di], [bx]; mostly with a displacement.
        bytes.extend([modrm & 0x38 | 0x40 | random.pick(&[0, 5, 7]), displacement]);
    } else {
        let base = random.pick(&roles.bases);
        if random.chance(30) {
            let index = if random.chance(70) { random.pick(&roles.indices) } else { 4 };
            bytes.extend([modrm & 0x38 | 0x44, (random.below(4) as u8) << 6 | index << 3 | base]);
        } else {
            bytes.push(modrm & 0x38 | 0x40 | base);
        }
        bytes.push(displacement);
    }
    for _ in 0..8 {
        bytes.push(random.below(256) as u8);
    }
    bytes
}

fn acceptable(
    insn: &Instruction,
    roles: &Roles,
    undefined: u32,
    factory: &mut InstructionInfoFactory,
) -> bool {
    use Mnemonic as M;
    if insn.flow_control() != FlowControl::Next || insn.is_privileged() {
        return false;
    }
    let class = code_info(insn).class;
    let plain = matches!(
        insn.mnemonic(),
        M::Lodsb
            | M::Lodsq
            | M::Stosb
            | M::Stosd
            | M::Movsb
            | M::Movsq
            | M::Xlatb
            | M::Enter
            | M::Pop
            | M::Push
            | M::Fnstenv
            | M::Fnsave
            | M::Fldenv
            | M::Pushad
            | M::Pusha
            | M::Daa
            | M::Aaa
            | M::Salc
    );
    if class == Class::Interpret && !plain || insn.has_rep_prefix() || insn.has_repne_prefix() {
        return false;
    }
    // Results that the manuals leave open; or too slow; or without end.
    let open = matches!(
        insn.mnemonic(),
        M::Shld | M::Shrd | M::Bsf | M::Bsr | M::Pause | M::Std | M::Enter | M::Div | M::Idiv | M::Leave
    );
    if open || insn.rflags_read() & undefined != 0 || matches!(insn.mnemonic(), M::Xlatb) {
        return false;
    }
    // Shifts by CL keep the flags now and then, undefined ones included.
    if undefined != 0
        && insn.rflags_modified() != 0
        && insn.op_count() == 2
        && insn.op1_kind() == OpKind::Register
        && insn.op1_register() == Register::CL
    {
        return false;
    }
    if matches!(insn.segment_prefix(), Register::FS | Register::GS) && insn.memory_base() == Register::None {
        return false;
    }
    let info = factory.info(insn);
    let held = |register: Register| {
        let number = register.full_register().number() as u8;
        register.is_gpr() && (number == 4 || roles.bases.contains(&number) || roles.indices.contains(&number))
    };
    let writes = |access: OpAccess| {
        !matches!(access, OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
    };
    if info
        .used_registers()
        .iter()
        .any(|used| writes(used.access()) && held(used.register()) && !stack(insn, used.register()))
    {
        return false;
    }
    // Displacements are not extended beyond the address size.
    let distance = |value: u64| match roles.bits {
        64 => value as i64,
        _ if value >> 16 == 0 && value & 0x8000 != 0 => i64::from(value as i16),
        _ => i64::from(value as i32),
    };
    info.used_memory().iter().all(|memory| {
        let base = memory.base();
        let number = base.full_register().number() as u8;
        base.is_gpr()
            && (base.is_gpr64() || roles.bits != 64)
            && (roles.bases.contains(&number) || base.full_register() == Register::RSP)
            && (memory.index() == Register::None
                || roles.indices.contains(&(memory.index().full_register().number() as u8)))
            && distance(memory.displacement()).abs() <= 512
    })
}

/// RSP may be moved by what moves it by a little.
fn stack(insn: &Instruction, register: Register) -> bool {
    register.full_register() == Register::RSP
        && insn.is_stack_instruction()
        && insn.op0_register().full_register() != Register::RSP
}
