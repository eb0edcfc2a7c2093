//! Random programs, run by the interpreter and translated.

use super::generate::{Mix, Program, Random, Roles, program};
use super::{State, Translated, options, rflags};
use crate::{Exit, Options};
use iced_x86::{Decoder, Formatter, Instruction, IntelFormatter};
use std::sync::{Arc, LazyLock};
use x86_core::cpuid::{AVX512, CpuModel};
use x86_core::testing::{CODE, DATA, HANDLERS, IDT, MMIO, Machine, STACK, selector};
use x86_core::{Cpu, Flow, Seg, Segment, TableRegister, Trap, cr4, flags, reg};

pub(super) fn listing(bits: u32, bytes: &[u8], ip: u64) -> String {
    let mut decoder = Decoder::with_ip(bits, bytes, ip, x86_interp::DECODER_OPTIONS);
    let mut formatter = IntelFormatter::new();
    let (mut text, mut insn) = (String::new(), Instruction::default());
    while decoder.can_decode() {
        decoder.decode_out(&mut insn);
        let mut line = String::new();
        formatter.format(&insn, &mut line);
        text += &format!("{:x}: {line}\n", insn.ip());
    }
    text
}

/// What the processor is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Mode {
    /// 64-bit mode.
    #[default]
    Long,
    User,
    /// 32-bit code of a 64-bit kernel.
    Compatibility,
    /// 32-bit protected mode: flat segments, or with bases and limits.
    Protected,
    Segmented,
    /// 16-bit code: in real, virtual-8086 and protected mode.
    Real,
    Virtual,
    Protected16,
}

impl Mode {
    pub(super) fn bits(self) -> u32 {
        match self {
            Self::Long | Self::User => 64,
            Self::Compatibility | Self::Protected | Self::Segmented => 32,
            Self::Real | Self::Virtual | Self::Protected16 => 16,
        }
    }

    fn is_user(self) -> bool {
        matches!(self, Self::User | Self::Compatibility | Self::Virtual)
    }

    /// Whether SS has another base than 0.
    pub(super) fn has_based_stack(self) -> bool {
        matches!(self, Self::Segmented | Self::Real | Self::Virtual | Self::Protected16)
    }

    /// A machine of that kind, with code at `CODE` and the stack pointer in the middle of a stack; and what is to
    /// be added to offsets in DS to get linear addresses.
    pub(super) fn machine(self) -> Machine {
        let mut machine = match self {
            Self::Long => Machine::long(),
            Self::User | Self::Compatibility => Machine::user(),
            Self::Protected | Self::Segmented | Self::Virtual | Self::Protected16 => Machine::protected(),
            Self::Real => Machine::real(),
        };
        let cpu = &mut *machine.cpu;
        cpu.cr4 |= cr4::OSFXSR;
        let data = |base, limit, attributes| Segment { base, limit, attributes, selector: selector::DATA };
        let stack = STACK - 0x8000;
        match self {
            Self::Compatibility => {
                let (attributes, selector) = (0xc0fb, selector::USER_CODE32);
                let limit = u32::MAX;
                cpu.segments[Seg::Cs as usize] = Segment { base: 0, limit, attributes, selector };
            }
            Self::Segmented => {
                cpu.segments[Seg::Ds as usize] = data(DATA - 0x1000, 0x8fff, 0xc093);
                cpu.segments[Seg::Es as usize] = data(DATA - 0x1000, 0x1fff, 0xc091);
                cpu.segments[Seg::Ss as usize] = data(stack, 0xbfff, 0xc093);
                cpu.segments[Seg::Cs as usize].base = CODE - 0x2345;
                cpu.rip = 0x2345;
            }
            Self::Real | Self::Virtual | Self::Protected16 => {
                let attributes = if self == Self::Virtual { 0xf3 } else { 0x93 };
                for seg in [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
                    cpu.segments[seg as usize] = data(DATA - 0x1000, 0xffff, attributes);
                }
                cpu.segments[Seg::Ss as usize] = data(stack, 0xffff, attributes);
                let attributes = if self == Self::Virtual { 0xf3 } else { 0x9b };
                let code =
                    Segment { base: CODE - 0x2345, limit: 0xffff, attributes, selector: selector::CODE16 };
                cpu.segments[Seg::Cs as usize] = code;
                cpu.rip = 0x2345;
            }
            _ => {}
        }
        match self {
            Self::Real => {
                cpu.idtr = TableRegister { base: IDT, limit: 0x3ff };
                for vector in 0..256 {
                    let handler = HANDLERS + 16 * vector;
                    machine.memory.write(IDT + 4 * vector, &(handler as u32).to_le_bytes()).expect("RAM");
                    machine.memory.write(handler, &[0xf4]).expect("RAM");
                }
            }
            Self::Virtual => {
                cpu.cpl = 3;
                cpu.rflags |= flags::VM;
            }
            _ => {}
        }
        machine.core().mode_changed();
        machine
    }
}

/// How a kind of program differs from the usual.
#[derive(Clone, Copy, Default)]
pub(super) struct Kind {
    pub(super) mode: Mode,
    pub(super) strict: bool,
    /// Data at page boundaries, in MMIO and in unmapped pages now and then.
    pub(super) unusual: bool,
    /// Many x87 and MMX instructions.
    pub(super) x87: bool,
    /// Many AVX instructions.
    pub(super) avx: bool,
    /// Most of them of AVX-512.
    pub(super) avx512: bool,
}

pub(super) fn prepare(kind: Kind, seed: u64) -> (Machine, Program) {
    let mut random = Random::new(seed);
    let mut machine = kind.mode.machine();
    let bits = kind.mode.bits();
    let roles = Roles::new(&mut random, bits);
    let count = 1 + random.below(14) as usize;
    let mix = Mix { x87: kind.x87, avx: kind.avx, avx512: kind.avx512 };
    let mut program = program(&mut random, &roles, count, machine.cpu.rip, mix);
    if kind.mode.is_user() {
        // UD2: HLT is for the kernel.
        program.bytes.pop();
        program.bytes.extend([0x0f, 0x0b]);
    }
    machine.load(&program.bytes);
    let cpu = &mut *machine.cpu;
    for register in 0..16 {
        cpu.regs[register] = if random.chance(50) { random.next() } else { random.below(256) };
        // Upper halves are in use now and then.
        let len = match kind {
            Kind { avx512: true, .. } if seed % 3 == 1 => 64,
            Kind { avx: true, .. } if !seed.is_multiple_of(3) => 32,
            _ => 16,
        };
        for byte in &mut cpu.vectors[register].0[..len] {
            *byte = random.next() as u8;
        }
        if random.chance(50) {
            // Numbers as programs have them.
            let number = random.below(1000) as f64 / 8.0;
            cpu.vectors[register].0[..8].copy_from_slice(&number.to_le_bytes());
        }
    }
    let offset =
        |linear: u64, base: u64| linear.wrapping_sub(base) & if bits == 64 { u64::MAX } else { 0xffff_ffff };
    let (data, stack) = (cpu.segments[Seg::Ds as usize].base, cpu.segments[Seg::Ss as usize].base);
    // What 64-bit code left there does not count.
    let high = if bits == 64 { 0 } else { random.next() & random.next() << 32 & !0xffff_ffff };
    for base in &roles.bases {
        let near = random.below(64) * if random.chance(50) { 16 } else { 1 };
        let place = match random.below(100) {
            0..15 if kind.unusual => 0x1000 - 64 + random.below(128),
            15..20 if kind.unusual => MMIO - DATA + 0x800,
            20..22 if kind.unusual && bits == 64 => 0x8000_0000_0000,
            20..24 if kind.unusual => 0u64.wrapping_sub(DATA + random.below(64)),
            24..28 if kind.unusual => 0x9000 - random.below(0x40),
            28..32 if kind.unusual => 0xf000 - random.below(0x40),
            _ => 0x2000 * random.below(3) + 0x800 + near,
        };
        cpu.regs[usize::from(*base)] = offset(DATA.wrapping_add(place), data) | high;
    }
    for index in &roles.indices {
        cpu.regs[usize::from(*index)] = random.below(32) | high;
    }
    let mut top = STACK - 0x800 - 8 * random.below(8);
    if kind.unusual && random.chance(20) {
        top = STACK + 8 * random.below(8);
    } else if kind.unusual && bits != 64 && random.chance(10) {
        // Around offset 0, and around the limit.
        top = stack + if random.chance(50) { random.below(12) } else { 0xc000 - random.below(12) };
    }
    cpu.regs[reg::RSP] = offset(top, stack) | high;
    cpu.rflags = cpu.rflags & flags::VM | flags::FIXED | random.next() & flags::ARITHMETIC;
    cpu.mxcsr = 0x1f80;
    if kind.avx {
        // Off now and then.
        cpu.cr4 |= if random.chance(95) { cr4::OSXSAVE } else { 0 };
        let all = if kind.avx512 { 0xe7 } else { 7 };
        cpu.xcr0 = if random.chance(95) { all } else { 3 };
    }
    if kind.avx512 {
        cpu.model = wide_model();
    }
    if kind.avx512 && seed % 3 == 1 {
        cpu.opmask = std::array::from_fn(|_| random.next() & random.next());
        for vector in &mut cpu.vectors[16..] {
            vector.0.fill_with(|| random.next() as u8);
        }
    }
    cpu.find_vector_width();
    set_x87(cpu, &mut random);
    if matches!(bits, 64) || !matches!(kind.mode, Mode::Segmented) {
        cpu.segments[4].base = cpu.segments[4].base.wrapping_add(0x40);
        cpu.segments[5].base = cpu.segments[5].base.wrapping_add(0x100);
    }
    let data: Vec<u8> = (0..0x8000).map(|_| random.next() as u8).collect();
    machine.memory.write(DATA, &data).expect("RAM");
    (machine, program)
}

/// `max` with all of AVX-512 that there is.
pub(super) fn wide_model() -> Arc<CpuModel> {
    static MODEL: LazyLock<Arc<CpuModel>> = LazyLock::new(|| {
        let mut model = CpuModel::by_name("max").expect("the model exists");
        let there = AVX512.iter().filter(|feature| CpuModel::available(**feature));
        let changes: Vec<_> = there.filter_map(|feature| Some((feature.name()?.to_owned(), true))).collect();
        model.change_features(&changes).expect("they are available");
        Arc::new(model)
    });
    MODEL.clone()
}

/// x87 state as it may be: all exceptions masked, with few exceptions.
fn set_x87(cpu: &mut Cpu, random: &mut Random) {
    let image = &mut cpu.x87.0;
    let control = 0x7f | (random.next() as u16 & 0xf00);
    let unmasked = if random.chance(10) { random.next() as u16 & 0x3f } else { 0 };
    let raised = random.next() as u16 & if unmasked == 0 { 0x7f } else { 0 };
    image[0..2].copy_from_slice(&(control & !unmasked).to_le_bytes());
    image[2..4].copy_from_slice(&(random.next() as u16 & 0x7f00 | raised).to_le_bytes());
    image[4] = random.next() as u8;
    for register in 0..8 {
        let mantissa = if random.chance(80) { random.next() | 1 << 63 } else { random.next() };
        let exponent = match random.below(10) {
            0 => random.next() as u16,
            1 => 0x7fff,
            2 => 0,
            _ => (0x3ff8 + random.below(16) as u16) | (random.next() as u16 & 0x8000),
        };
        let mantissa = if random.chance(10) { mantissa & 1 << 63 } else { mantissa };
        image[32 + 16 * register..][..8].copy_from_slice(&mantissa.to_le_bytes());
        image[40 + 16 * register..][..2].copy_from_slice(&exponent.to_le_bytes());
    }
}

/// Runs the interpreter until HLT. `None` if that does not come.
pub(super) fn interpret(machine: &mut Machine, steps: usize) -> Option<Result<(), Trap>> {
    for _ in 0..steps {
        match x86_interp::step(&mut machine.core()) {
            Ok(Flow::Halt) => return Some(Ok(())),
            Ok(_) => {}
            Err(Trap::Exception(exception)) => {
                if let Err(trap) = machine.core().deliver(exception) {
                    return Some(Err(trap));
                }
            }
            Err(trap) => return Some(Err(trap)),
        }
    }
    None
}

fn compare(kind: Kind, seed: u64, options: &Options) {
    let (mut expected, program) = prepare(kind, seed);
    let (machine, _) = prepare(kind, seed);
    let mut actual = Translated::new(machine, options);
    let end = interpret(&mut expected, 1000).unwrap_or_else(|| panic!("no HLT, at {:#x}", expected.cpu.rip));
    match actual.vcpu.run(&actual.platform) {
        Ok(Exit::Halt) => assert_eq!(end, Ok(()), "seed {seed}"),
        Err(trap) => {
            // Where the stack of exceptions is bad, too: what is left then does not count.
            assert_eq!(end, Err(trap), "seed {seed}");
            return;
        }
        Ok(exit) => panic!("{exit:?}, seed {seed}"),
    }
    let mut ignored = 0;
    let linear = expected.cpu.segments[Seg::Cs as usize].base.wrapping_add(expected.cpu.rip);
    let faulted = linear < CODE;
    let mask = expected.core().stack_mask();
    let top = expected.cpu.segments[Seg::Ss as usize].base + (expected.cpu.regs[reg::RSP] & mask);
    let undefined = if faulted { program.ever } else { program.undefined };
    ignored |= rflags(undefined);
    if !kind.strict {
        // Flags that are dead are not exact when an instruction faults.
        ignored |= if faulted { flags::ARITHMETIC } else { 0 };
    }
    let (want, got) = (State::of(&expected.cpu), State::of(actual.vcpu.cpu()));
    let mut differences = want.differences(&got, ignored);
    let ranges =
        [(DATA, 0x8000usize), (STACK - 0x1000, 0x2000), (x86_core::testing::KERNEL_STACK - 0x100, 0x100)];
    for (start, len) in ranges {
        let (mut a, mut b) = (vec![0; len], vec![0; len]);
        expected.memory.read(start, &mut a).expect("RAM");
        actual.memory.read(start, &mut b).expect("RAM");
        for at in 0..len {
            if a[at] != b[at] {
                // The flags of a fault's frame are as inexact as the flags.
                let frame = faulted && top + 0x28 > start + at as u64;
                let in_frame = frame && start + at as u64 >= top;
                if in_frame && (!kind.strict || ignored != 0) {
                    continue;
                }
                differences.push(format!("[{:#x}]: {:#x} is {:#x}", start + at as u64, a[at], b[at]));
            }
        }
    }
    if expected.platform.log != actual.platform.log {
        differences.push(format!("MMIO: {:?} is {:?}", expected.platform.log, actual.platform.log));
    }
    assert!(
        differences.is_empty(),
        "seed {seed}:\n{}\nmust be:\n{}",
        listing(kind.mode.bits(), &program.bytes, prepare(kind, seed).0.cpu.rip),
        differences.join("\n")
    );
}

fn run(kind: Kind, seeds: std::ops::Range<u64>) {
    let options = Options { strict: kind.strict, ..options() };
    for seed in seeds {
        compare(kind, seed, &options);
    }
}

const CASES: u64 = 1500;

#[test]
fn plain_programs() {
    run(Kind::default(), 0..CASES);
}

#[test]
fn user_programs() {
    run(Kind { mode: Mode::User, ..Kind::default() }, 100_000..100_000 + CASES);
}

#[test]
fn programs_with_exact_flags() {
    run(Kind { strict: true, unusual: true, ..Kind::default() }, 200_000..200_000 + CASES);
}

#[test]
fn programs_that_meet_devices_boundaries_and_faults() {
    run(Kind { unusual: true, ..Kind::default() }, 300_000..300_000 + CASES);
}

#[test]
fn x87_programs() {
    run(Kind { x87: true, ..Kind::default() }, 400_000..400_000 + CASES);
    run(Kind { x87: true, mode: Mode::User, ..Kind::default() }, 500_000..500_000 + CASES);
}

#[test]
fn avx_programs() {
    if !is_x86_feature_detected!("avx2") {
        return println!("this host lacks AVX2");
    }
    run(Kind { avx: true, ..Kind::default() }, 800_000..800_000 + 2 * CASES);
    run(Kind { avx: true, mode: Mode::User, ..Kind::default() }, 810_000..810_000 + 2 * CASES);
    run(Kind { avx: true, x87: true, strict: true, ..Kind::default() }, 820_000..820_000 + CASES);
}

#[test]
fn avx_programs_that_meet_devices_boundaries_and_faults() {
    if !is_x86_feature_detected!("avx2") {
        return println!("this host lacks AVX2");
    }
    run(Kind { avx: true, unusual: true, ..Kind::default() }, 830_000..830_000 + 2 * CASES);
    run(
        Kind { avx: true, unusual: true, mode: Mode::User, strict: true, ..Kind::default() },
        840_000..840_000 + CASES,
    );
}

#[test]
fn avx_programs_of_32_and_16_bits() {
    if !is_x86_feature_detected!("avx2") {
        return println!("this host lacks AVX2");
    }
    let modes = [Mode::Compatibility, Mode::Protected, Mode::Segmented, Mode::Real, Mode::Protected16];
    for (number, mode) in (0..).zip(modes) {
        let first = 900_000 + 10_000 * number;
        run(Kind { avx: true, mode, unusual: number % 2 == 1, ..Kind::default() }, first..first + CASES);
    }
}

#[test]
fn avx512_programs() {
    if !x86_core::cpuid::host_has_avx512() {
        return println!("this host lacks AVX-512");
    }
    let kind = Kind { avx: true, avx512: true, ..Kind::default() };
    run(kind, 850_000..850_000 + 3 * CASES);
    run(Kind { mode: Mode::User, ..kind }, 860_000..860_000 + 2 * CASES);
    run(Kind { x87: true, strict: true, ..kind }, 870_000..870_000 + CASES);
    run(Kind { unusual: true, ..kind }, 880_000..880_000 + 2 * CASES);
    run(Kind { unusual: true, mode: Mode::User, strict: true, ..kind }, 890_000..890_000 + CASES);
}

#[test]
fn x87_programs_that_meet_devices_boundaries_and_faults() {
    run(Kind { x87: true, unusual: true, strict: true, ..Kind::default() }, 600_000..600_000 + CASES);
    run(Kind { x87: true, unusual: true, mode: Mode::User, ..Kind::default() }, 700_000..700_000 + CASES);
}

#[test]
fn compatibility_mode() {
    let kind = Kind { mode: Mode::Compatibility, ..Kind::default() };
    run(kind, 800_000..800_000 + CASES);
    run(Kind { unusual: true, ..kind }, 810_000..810_000 + CASES);
    run(Kind { unusual: true, strict: true, ..kind }, 820_000..820_000 + CASES);
    run(Kind { unusual: true, x87: true, ..kind }, 830_000..830_000 + CASES);
}

#[test]
fn protected_mode() {
    for (mode, seeds) in [(Mode::Protected, 900_000), (Mode::Segmented, 1_000_000)] {
        let kind = Kind { mode, ..Kind::default() };
        run(kind, seeds..seeds + CASES);
        run(Kind { unusual: true, ..kind }, seeds + 10_000..seeds + 10_000 + CASES);
        run(Kind { unusual: true, strict: true, ..kind }, seeds + 20_000..seeds + 20_000 + CASES);
        run(Kind { unusual: true, x87: true, ..kind }, seeds + 30_000..seeds + 30_000 + CASES);
    }
}

#[test]
fn code_of_16_bits() {
    for (mode, seeds) in [(Mode::Real, 1_100_000), (Mode::Virtual, 1_200_000), (Mode::Protected16, 1_300_000)]
    {
        let kind = Kind { mode, ..Kind::default() };
        run(kind, seeds..seeds + CASES);
        run(Kind { unusual: true, ..kind }, seeds + 10_000..seeds + 10_000 + CASES);
        run(Kind { unusual: true, strict: true, ..kind }, seeds + 20_000..seeds + 20_000 + CASES);
    }
}
