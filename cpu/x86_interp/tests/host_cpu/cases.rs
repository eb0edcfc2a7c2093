//! Encodings and operands to test: every opcode of every map, with the prefixes that matter, and random
//! ModRM bytes, immediates, registers and memory.

use iced_x86::{Code, CodeSize, Decoder, Instruction, Mnemonic, OpKind, Register};
use native_oracle::{Mode, NativeState, SCRATCH_LEN};
use x86_interp::DECODER_OPTIONS;

/// One instruction and the state it starts from.
pub(crate) struct Case {
    pub(crate) bytes: Vec<u8>,
    pub(crate) insn: Instruction,
    pub(crate) state: NativeState,
    pub(crate) mode: Mode,
}

impl Case {
    /// The RFLAGS bits that the manuals leave undefined.
    pub(crate) fn undefined_flags(&self) -> u64 {
        use iced_x86::RflagsBits as R;
        use x86_core::flags::{AF, CF, OF, PF, SF, ZF};
        let undefined = self.insn.rflags_undefined();
        [(R::CF, CF), (R::PF, PF), (R::AF, AF), (R::ZF, ZF), (R::SF, SF), (R::OF, OF)]
            .iter()
            .filter(|(bit, _)| undefined & bit != 0)
            .map(|(_, flag)| flag)
            .sum()
    }
}

/// A small random generator with a fixed seed (failures repeat), or the one that the environment gives.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        Self(native_oracle::seed())
    }

    pub(crate) fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn chance(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    /// A value of the kind that instructions trip over.
    pub(crate) fn value(&mut self) -> u64 {
        const EDGES: [u64; 14] = [
            0,
            1,
            2,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
        ];
        match self.below(8) {
            0 => EDGES[self.below(14) as usize],
            1 => !EDGES[self.below(14) as usize],
            2 => 1 << self.below(64),
            3 => self.below(256),
            4 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Map {
    Legacy(&'static [u8]),
    /// VEX with this map number.
    Vex(u8),
}

const MAPS: [Map; 7] = [
    Map::Legacy(&[]),
    Map::Legacy(&[0x0f]),
    Map::Legacy(&[0x0f, 0x38]),
    Map::Legacy(&[0x0f, 0x3a]),
    Map::Vex(1),
    Map::Vex(2),
    Map::Vex(3),
];

const PREFIXES: [&[u8]; 17] = [
    &[],
    &[],
    &[0x66],
    &[0xf2],
    &[0xf3],
    &[0xf0],
    &[0x67],
    &[0x48],
    &[0x40],
    &[0x45],
    &[0x4f],
    &[0x66, 0x48],
    &[0xf3, 0x48],
    &[0xf2, 0x48],
    &[0x66, 0xf0],
    &[0x66, 0xf3],
    &[0xf0, 0x48],
];

/// Gives cases map by map, opcode by opcode.
pub(crate) struct Generator {
    random: Random,
    mode: Mode,
    repeats: u64,
    position: u64,
}

impl Generator {
    /// `repeats` random variants of each prefix and opcode.
    pub(crate) fn new(mode: Mode, repeats: u64) -> Self {
        Self { random: Random::new(), mode, repeats: repeats * native_oracle::rounds(), position: 0 }
    }

    pub(crate) fn next_case(&mut self) -> Option<Case> {
        loop {
            let position = self.position;
            self.position += 1;
            let prefixes = PREFIXES.len() as u64;
            let (form, opcode) = (position / self.repeats, position / self.repeats / prefixes);
            let map = *MAPS.get((opcode / 256) as usize)?;
            if let Some(case) = self.case(map, opcode as u8, PREFIXES[(form % prefixes) as usize]) {
                return Some(case);
            }
        }
    }

    fn case(&mut self, map: Map, opcode: u8, prefixes: &[u8]) -> Option<Case> {
        let mut bytes = self.encode(map, opcode, prefixes);
        let bits = match self.mode {
            Mode::Bits64 => 64,
            Mode::Bits32 => 32,
            Mode::Bits16 => 16,
        };
        let start = self.mode.start();
        let mut decoder = Decoder::with_ip(bits, &bytes, start, DECODER_OPTIONS);
        let mut insn = decoder.decode();
        if insn.is_invalid() {
            return None;
        }
        // A 16-bit code segment holds code alone, which is not the same on both sides.
        let reads_code = self.mode == Mode::Bits16 && insn.memory_segment() == Register::CS;
        if reads_code || !is_tested(&insn) {
            return None;
        }
        let offsets = decoder.get_constant_offsets(&insn);
        bytes.truncate(insn.len());
        let target = self.mode.scratch() + 256 + self.random.below(SCRATCH_LEN as u64 - 512);
        if offsets.has_displacement() && has_fixed_address(&insn) {
            let displacement = match insn.memory_base() {
                Register::RIP | Register::EIP => target.wrapping_sub(insn.next_ip()),
                _ => target,
            };
            let size = offsets.displacement_size().min(8);
            bytes[offsets.displacement_offset()..][..size]
                .copy_from_slice(&displacement.to_le_bytes()[..size]);
        }
        if is_relative(&insn) && offsets.immediate_size() > 1 {
            // Far enough to miss what follows the instruction, near enough to stay in the page.
            let distance = 0x40 + self.random.below(0x400);
            let distance = if self.random.chance(2) { distance } else { distance.wrapping_neg() - 0x40 };
            let size = offsets.immediate_size();
            bytes[offsets.immediate_offset()..][..size].copy_from_slice(&distance.to_le_bytes()[..size]);
        }
        if matches!(insn.mnemonic(), Mnemonic::Enter) {
            let at = offsets.immediate_offset();
            bytes[at + 1] &= 3;
            bytes[at + 2] &= 0xf;
        }
        insn = Decoder::with_ip(bits, &bytes, start, DECODER_OPTIONS).decode();
        if is_relative(&insn) && insn.near_branch_target().wrapping_sub(start).wrapping_add(0x20) < 0x50 {
            return None;
        }
        if !comparable(&insn) {
            return None;
        }
        let state = self.state(&insn, target);
        Some(Case { bytes, insn, state, mode: self.mode })
    }

    fn encode(&mut self, map: Map, opcode: u8, prefixes: &[u8]) -> Vec<u8> {
        let random = &mut self.random;
        let mut bytes = Vec::with_capacity(32);
        match map {
            Map::Legacy(escape) => {
                bytes.extend(prefixes);
                if self.mode != Mode::Bits64 {
                    bytes.retain(|byte| !(0x40..0x50).contains(byte));
                }
                bytes.extend(escape);
            }
            Map::Vex(map) => {
                let r = random.next() as u8;
                // In 32-bit mode the upper bits must be set, or it is LES.
                let inverted = if self.mode == Mode::Bits64 { r & 0xe0 } else { 0xe0 };
                let v = if self.mode == Mode::Bits64 { r << 3 & 0x78 } else { 0x40 | r << 3 & 0x38 };
                let w = if self.mode == Mode::Bits64 { r & 0x80 } else { 0 };
                bytes.extend([0xc4, inverted | map, w | v | random.below(4) as u8]);
            }
        }
        bytes.push(opcode);
        let modrm = match random.below(4) {
            0 | 1 => random.next() as u8 | 0xc0,
            _ => random.next() as u8 & 0xbf,
        };
        bytes.push(modrm);
        for _ in 0..12 {
            let byte = random.value() as u8;
            bytes.push(byte);
        }
        bytes
    }

    fn state(&mut self, insn: &Instruction, target: u64) -> NativeState {
        let (random, mode) = (&mut self.random, self.mode);
        let mut state = NativeState::default();
        for register in &mut state.regs {
            *register = random.value();
        }
        state.rflags = random.next() & native_oracle::LOADABLE_FLAGS;
        let values: [u64; 32] = std::array::from_fn(|_| random.value());
        for chunk in state.scratch.chunks_mut(8) {
            let n = random.next();
            let value = if n & 32 == 0 { values[n as usize & 31] } else { n };
            chunk.copy_from_slice(&value.to_le_bytes());
        }
        let pointer = mode.scratch() + 1024 + random.below(2048);
        state.regs[4] = pointer & if random.chance(2) { !7 } else { !0 };
        set_up(random, insn, &mut state, mode);
        if (0..insn.op_count()).any(|operand| insn.op_kind(operand) == OpKind::Memory) {
            aim(random, insn, &mut state, target);
            fill_operand(random, insn, &mut state, mode);
        }
        state
    }
}

/// The address that a memory operand has with these registers.
fn address(insn: &Instruction, state: &NativeState) -> u64 {
    let register = |register: Register| match register {
        Register::None | Register::RIP | Register::EIP => 0,
        Register::AL => state.regs[0] & 0xff,
        register => state.regs[register.number()],
    };
    let scale = u64::from(insn.memory_index_scale());
    let sum = insn
        .memory_displacement64()
        .wrapping_add(register(insn.memory_base()))
        .wrapping_add(register(insn.memory_index()).wrapping_mul(scale));
    match insn.memory_base().size().max(insn.memory_index().size()) {
        4 => sum & 0xffff_ffff,
        2 => sum & 0xffff,
        _ => sum,
    }
}

fn has_fixed_address(insn: &Instruction) -> bool {
    matches!(insn.memory_base(), Register::None | Register::RIP | Register::EIP)
        && insn.memory_index() == Register::None
}

fn is_relative(insn: &Instruction) -> bool {
    insn.op_count() == 1
        && matches!(insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
}

/// Sets base and index so that the memory operand is near `target`.
fn aim(random: &mut Random, insn: &Instruction, state: &mut NativeState, target: u64) {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let scale = i64::from(insn.memory_index_scale());
    let wanted = target.wrapping_sub(insn.memory_displacement64()) as i64;
    // Xlat's index is AL.
    let index_value = if index == Register::AL { state.regs[0] & 0xff } else { 0 };
    let mut set = |random: &mut Random, register: Register, value: i64| {
        let bits = register.size() as u32 * 8;
        let high = random.next().checked_shl(bits).unwrap_or(0);
        state.regs[register.number()] = value as u64 & u64::MAX >> (64 - bits) | high;
    };
    match (base, index) {
        (Register::RIP | Register::EIP, _) | (Register::None, Register::None) => {}
        (base, Register::None) => set(random, base, wanted),
        (base, Register::AL) => set(random, base, wanted.wrapping_sub(index_value as i64)),
        (Register::None, index) => set(random, index, wanted.div_euclid(scale)),
        (base, index) if base.number() == index.number() => {
            set(random, base, wanted.div_euclid(scale + 1));
        }
        (base, index) => {
            let value = random.value() as i64;
            set(random, index, value);
            set(random, base, wanted.wrapping_sub(value.wrapping_mul(scale)));
        }
    }
}

/// Gives the memory operand contents that lead further than chance would.
fn fill_operand(random: &mut Random, insn: &Instruction, state: &mut NativeState, mode: Mode) {
    let at = address(insn, state).wrapping_sub(mode.scratch());
    let Some(memory) = usize::try_from(at).ok().and_then(|at| state.scratch.get_mut(at..at + 16)) else {
        return;
    };
    match insn.mnemonic() {
        Mnemonic::Jmp | Mnemonic::Call => {
            let target = mode.start() + 0x40 + random.below(0x400);
            memory[..8].copy_from_slice(&target.to_le_bytes());
        }
        Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b if random.chance(2) => {
            memory[..8].copy_from_slice(&state.regs[0].to_le_bytes());
            if insn.mnemonic() == Mnemonic::Cmpxchg8b {
                memory[4..8].copy_from_slice(&state.regs[2].to_le_bytes()[..4]);
            }
        }
        Mnemonic::Cmpxchg16b if random.chance(2) => {
            memory[..8].copy_from_slice(&state.regs[0].to_le_bytes());
            memory[8..].copy_from_slice(&state.regs[2].to_le_bytes());
        }
        _ => {}
    }
}

/// Gives registers that the instruction uses implicitly values that lead further than chance would.
fn set_up(random: &mut Random, insn: &Instruction, state: &mut NativeState, mode: Mode) {
    let (code, scratch) = (mode.start(), mode.scratch());
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Jmp | M::Call if insn.op0_kind() == OpKind::Register && insn.op0_register().number() != 4 => {
            state.regs[insn.op0_register().number()] = code + 0x40 + random.below(0x400);
        }
        M::Ret => {
            let at = (state.regs[4] - scratch) as usize;
            let target = code + 0x40 + random.below(0x400);
            state.scratch[at..at + 8].copy_from_slice(&target.to_le_bytes());
        }
        M::Leave | M::Enter => state.regs[5] = scratch + 1024 + random.below(2048),
        M::Div | M::Idiv if random.chance(2) => {
            state.regs[2] =
                if random.chance(2) { random.below(4) } else { (state.regs[0] as i64 >> 63) as u64 };
            if insn.op0_kind() == OpKind::Register && random.chance(2) {
                state.regs[0] &= 0xffff;
            }
        }
        M::Bt | M::Bts | M::Btr | M::Btc if insn.op1_kind() == OpKind::Register && !random.chance(8) => {
            let register = insn.op1_register();
            let offset = random.below(2000) as i64 - 1000;
            state.regs[register.number()] = offset as u64;
        }
        _ if is_string(insn) => {
            state.regs[6] = scratch + 512 + random.below(3000);
            // Often overlapping, closely.
            state.regs[7] = match random.below(3) {
                0 => state.regs[6] + random.below(16),
                _ => scratch + 512 + random.below(3000),
            };
            state.regs[1] = if random.chance(8) { random.value() } else { random.below(24) };
            if insn.has_rep_prefix() || insn.has_repne_prefix() {
                // Runs of equal elements.
                if random.chance(2) {
                    let byte = random.next() as u8;
                    state.scratch.fill(byte);
                    state.regs[0] =
                        if random.chance(2) { u64::from_le_bytes([byte; 8]) } else { state.regs[0] };
                    let odd = random.below(4096) as usize;
                    state.scratch[odd] ^= 1;
                }
            }
        }
        _ => {}
    }
}

fn is_string(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|operand| {
        !matches!(insn.op_kind(operand), OpKind::Register | OpKind::Memory)
            && insn.op_kind(operand) as u32 >= OpKind::MemorySegSI as u32
    }) && !insn.mnemonic_is_port()
}

trait Port {
    fn mnemonic_is_port(&self) -> bool;
}

impl Port for Instruction {
    fn mnemonic_is_port(&self) -> bool {
        use Mnemonic as M;
        matches!(self.mnemonic(), M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd)
    }
}

/// Whether the instruction is one of T0's own, and harmless to the host.
#[rustfmt::skip]
fn is_tested(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let general = (0..insn.op_count()).all(|operand| {
        insn.op_kind(operand) != OpKind::Register || insn.op_register(operand).is_gpr()
    });
    let far = matches!(insn.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
        || format!("{:?}", insn.memory_size()).starts_with("SegPtr");
    if !general || far || insn.has_xacquire_prefix() || insn.has_xrelease_prefix() {
        return false;
    }
    // Segments with a base of their own on the host.
    if matches!(insn.memory_segment(), Register::FS | Register::GS) {
        return false;
    }
    // Prefixes that have no meaning there, but do something on some processors.
    let repeated = insn.has_rep_prefix() || insn.has_repne_prefix();
    if repeated && matches!(insn.mnemonic(), M::Loop | M::Loope | M::Loopne) {
        return false;
    }
    // With REX.B it is XCHG to some processors.
    if insn.mnemonic() == M::Pause && insn.len() > 2 {
        return false;
    }
    if insn.is_jcc_short_or_near() {
        return true;
    }
    matches!(insn.mnemonic(),
        M::Mov | M::Add | M::Adc | M::Sub | M::Sbb | M::Cmp | M::And | M::Or | M::Xor | M::Test | M::Inc | M::Dec
        | M::Neg | M::Not | M::Adcx | M::Adox | M::Clc | M::Stc | M::Cmc | M::Cld | M::Std | M::Lea | M::Xchg
        | M::Movzx | M::Movsx | M::Movsxd | M::Movbe | M::Movnti | M::Bswap | M::Xlatb | M::Cbw | M::Cwde
        | M::Cdqe | M::Cwd | M::Cdq | M::Cqo | M::Lahf | M::Sahf | M::Salc | M::Push | M::Pop | M::Pusha
        | M::Pushad | M::Popa | M::Popad | M::Enter | M::Leave | M::Shl | M::Sal | M::Shr | M::Sar | M::Rol
        | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd | M::Mul | M::Imul | M::Div | M::Idiv | M::Bt | M::Bts
        | M::Btr | M::Btc | M::Bsf | M::Bsr | M::Tzcnt | M::Lzcnt | M::Popcnt | M::Crc32 | M::Xadd | M::Cmpxchg
        | M::Cmpxchg8b | M::Cmpxchg16b | M::Aaa | M::Aas | M::Aad | M::Aam | M::Daa | M::Das | M::Nop | M::Pause
        | M::Reservednop | M::Endbr32 | M::Endbr64 | M::Prefetchw | M::Prefetchnta | M::Prefetcht0
        | M::Prefetcht1 | M::Prefetcht2 | M::Prefetch | M::Lfence | M::Sfence | M::Mfence | M::Clflush | M::Clflushopt | M::Clwb
        | M::Ud0 | M::Ud1 | M::Ud2 | M::Andn | M::Bextr | M::Blsi | M::Blsmsk | M::Blsr | M::Bzhi | M::Mulx
        | M::Pdep | M::Pext | M::Rorx | M::Sarx | M::Shlx | M::Shrx | M::Jmp | M::Call | M::Ret | M::Jcxz
        | M::Jecxz | M::Jrcxz | M::Loop | M::Loope | M::Loopne | M::Bound | M::Arpl
        | M::Cmova | M::Cmovae | M::Cmovb | M::Cmovbe | M::Cmove | M::Cmovg | M::Cmovge | M::Cmovl | M::Cmovle
        | M::Cmovne | M::Cmovno | M::Cmovnp | M::Cmovns | M::Cmovo | M::Cmovp | M::Cmovs
        | M::Seta | M::Setae | M::Setb | M::Setbe | M::Sete | M::Setg | M::Setge | M::Setl | M::Setle
        | M::Setne | M::Setno | M::Setnp | M::Setns | M::Seto | M::Setp | M::Sets
        | M::Movsb | M::Movsw | M::Movsq | M::Stosb | M::Stosw | M::Stosd | M::Stosq | M::Lodsb | M::Lodsw
        | M::Lodsd | M::Lodsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq | M::Cmpsb | M::Cmpsw | M::Cmpsq)
        || matches!(insn.code(), Code::Movsd_m32_m32 | Code::Cmpsd_m32_m32)
}

/// Whether the host has the feature at that bit of EBX of leaf 7.
fn leaf_7(bit: u32) -> bool {
    std::arch::x86_64::__cpuid_count(7, 0).ebx >> bit & 1 != 0
}

/// Whether this host has the instruction, and does with it what T0 does: what the manuals leave open, T0 does
/// as AMD processors do.
fn comparable(insn: &Instruction) -> bool {
    use Mnemonic as M;
    use std::arch::is_x86_feature_detected as has;
    let announced = match insn.mnemonic() {
        M::Movbe => has!("movbe"),
        M::Popcnt => has!("popcnt"),
        M::Crc32 => has!("sse4.2"),
        M::Cmpxchg16b => has!("cmpxchg16b"),
        M::Lzcnt => has!("lzcnt"),
        M::Tzcnt | M::Andn | M::Bextr | M::Blsi | M::Blsmsk | M::Blsr => has!("bmi1"),
        M::Bzhi | M::Mulx | M::Pdep | M::Pext | M::Rorx | M::Sarx | M::Shlx | M::Shrx => has!("bmi2"),
        M::Adcx | M::Adox => has!("adx"),
        M::Clflushopt => leaf_7(23),
        M::Clwb => leaf_7(24),
        _ => true,
    };
    if native_oracle::host_is_amd() {
        return announced;
    }
    // Near branches with an operand-size prefix, double shifts of more bits than there are, prefetches of
    // registers, and which operand of CMPS faults first.
    let long = insn.code_size() == CodeSize::Code64;
    let short = long && insn.op0_kind() == OpKind::NearBranch16
        || matches!(insn.code(), Code::Jmp_rm16 | Code::Call_rm16 | Code::Retnw | Code::Retnw_imm16);
    let odd = match insn.mnemonic() {
        M::Shld | M::Shrd => insn.op1_register().is_gpr16(),
        M::Reservednop | M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => true,
        _ => short,
    };
    announced && !odd
}
