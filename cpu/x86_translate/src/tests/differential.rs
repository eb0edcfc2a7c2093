//! Random programs, run by the interpreter and translated.

use super::generate::{Program, Random, Roles, program};
use super::{State, Translated, interpret, options};
use crate::Options;
use iced_x86::{Decoder, Formatter, Instruction, IntelFormatter};
use x86_core::testing::{CODE, DATA, MMIO, Machine, STACK};
use x86_core::{Cpu, flags, reg};

fn listing(bytes: &[u8], ip: u64) -> String {
    let mut decoder = Decoder::with_ip(64, bytes, ip, x86_interp::DECODER_OPTIONS);
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

/// How a kind of program differs from the usual.
#[derive(Clone, Copy, Default)]
struct Kind {
    user: bool,
    strict: bool,
    /// Data at page boundaries, in MMIO and in unmapped pages now and then.
    unusual: bool,
    /// Many x87 and MMX instructions.
    x87: bool,
}

fn prepare(kind: Kind, seed: u64) -> (Machine, Program) {
    let mut random = Random::new(seed);
    let mut machine = if kind.user { Machine::user() } else { Machine::long() };
    let roles = Roles::new(&mut random);
    let count = 1 + random.below(14) as usize;
    let mut program = program(&mut random, &roles, count, CODE, kind.x87);
    if kind.user {
        // UD2: HLT is for the kernel.
        program.bytes.pop();
        program.bytes.extend([0x0f, 0x0b]);
    }
    machine.load(&program.bytes);
    let cpu = &mut *machine.cpu;
    for register in 0..16 {
        cpu.regs[register] = if random.chance(50) { random.next() } else { random.below(256) };
        for byte in &mut cpu.vectors[register].0[..16] {
            *byte = random.next() as u8;
        }
        if random.chance(50) {
            // Numbers as programs have them.
            let number = random.below(1000) as f64 / 8.0;
            cpu.vectors[register].0[..8].copy_from_slice(&number.to_le_bytes());
        }
    }
    for base in &roles.bases {
        let near = random.below(64) * if random.chance(50) { 16 } else { 1 };
        let place = match random.below(100) {
            0..15 if kind.unusual => 0x1000 - 64 + random.below(128),
            15..20 if kind.unusual => MMIO - DATA + 0x800,
            20..22 if kind.unusual => 0x8000_0000_0000,
            _ => 0x2000 * random.below(3) + 0x800 + near,
        };
        cpu.regs[usize::from(*base)] = DATA + place;
    }
    for index in &roles.indices {
        cpu.regs[usize::from(*index)] = random.below(32);
    }
    cpu.regs[reg::RSP] = STACK - 0x800 - 8 * random.below(8);
    if kind.unusual && random.chance(20) {
        cpu.regs[reg::RSP] = STACK + 8 * random.below(8);
    }
    cpu.rflags = flags::FIXED | random.next() & flags::ARITHMETIC;
    cpu.mxcsr = 0x1f80;
    set_x87(cpu, &mut random);
    cpu.segments[4].base = 0x40;
    cpu.segments[5].base = 0x100;
    let data: Vec<u8> = (0..0x8000).map(|_| random.next() as u8).collect();
    machine.memory.write(DATA, &data).expect("RAM");
    (machine, program)
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

fn compare(kind: Kind, seed: u64, options: &Options) {
    let (mut expected, program) = prepare(kind, seed);
    let (machine, _) = prepare(kind, seed);
    let mut actual = Translated::new(machine, options);
    interpret(&mut expected, 1000);
    actual.run();
    let mut ignored = 0;
    let faulted = expected.cpu.rip < CODE;
    let undefined = if faulted { program.ever } else { program.undefined };
    for (iced, flag) in [
        (iced_x86::RflagsBits::OF, flags::OF),
        (iced_x86::RflagsBits::SF, flags::SF),
        (iced_x86::RflagsBits::ZF, flags::ZF),
        (iced_x86::RflagsBits::AF, flags::AF),
        (iced_x86::RflagsBits::CF, flags::CF),
        (iced_x86::RflagsBits::PF, flags::PF),
    ] {
        if undefined & iced != 0 {
            ignored |= flag;
        }
    }
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
                let frame = expected.cpu.rip < CODE && expected.cpu.regs[reg::RSP] + 0x28 > start + at as u64;
                let in_frame = frame && start + at as u64 >= expected.cpu.regs[reg::RSP];
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
        listing(&program.bytes, CODE),
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
    run(Kind { user: true, ..Kind::default() }, 100_000..100_000 + CASES);
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
    run(Kind { x87: true, user: true, ..Kind::default() }, 500_000..500_000 + CASES);
}

#[test]
fn x87_programs_that_meet_devices_boundaries_and_faults() {
    run(Kind { x87: true, unusual: true, strict: true, ..Kind::default() }, 600_000..600_000 + CASES);
    run(Kind { x87: true, unusual: true, user: true, ..Kind::default() }, 700_000..700_000 + CASES);
}
