//! Counts of instructions, translated and interpreted.

use super::differential::{Kind, Mode, listing, prepare};
use super::generate::Random;
use super::{State, Translated, options, rflags};
use crate::{Exit, Options};
use x86_core::testing::{CODE, Machine};
use x86_core::{Flow, Trap, flags, reg};

/// How a processor stopped.
#[derive(Debug, PartialEq)]
enum End {
    /// The count is reached.
    Counted,
    Halt,
    Dead(Trap),
}

/// Runs the interpreter until the count is `end`.
fn interpret(machine: &mut Machine, count: &mut u64, end: u64) -> End {
    while *count < end {
        match x86_interp::step(&mut machine.core()) {
            Ok(Flow::Again) => continue,
            Ok(Flow::Halt) => {
                *count += 1;
                return End::Halt;
            }
            Ok(Flow::Next | Flow::Jump) => {}
            Err(trap) => {
                if let Err(trap) = machine.core().deliver_trap(trap) {
                    return End::Dead(trap);
                }
            }
        }
        *count += 1;
    }
    End::Counted
}

/// The same translated.
fn translate(translated: &mut Translated, count: &mut u64, end: u64) -> End {
    translated.vcpu.count_up_to(*count, end);
    let exit = translated.vcpu.run(&translated.platform);
    *count = translated.vcpu.count();
    match exit {
        Ok(Exit::Counted) => End::Counted,
        Ok(Exit::Halt) => End::Halt,
        Err(trap) => End::Dead(trap),
        Ok(exit) => panic!("{exit:?}"),
    }
}

/// Runs a random program on both in pieces that end at the same counts: the state is to be the same at the end of each.
fn compare(kind: Kind, seed: u64) {
    let (mut expected, program) = prepare(kind, seed);
    let (machine, _) = prepare(kind, seed);
    let mut random = Random::new(seed);
    // So that pieces are longer than blocks, but not much.
    let max_instructions = [1, 4, 8, 64][random.below(4) as usize];
    let mut actual = Translated::new(machine, &Options { counting: true, max_instructions, ..options() });
    let (mut want_count, mut got_count) = (0, 0);
    let longest = if random.chance(30) { 2000 } else { 1 + 3 * max_instructions as u64 };
    loop {
        let end = want_count + 1 + random.below(longest);
        assert!(end < 20_000, "no HLT, seed {seed}");
        let want = interpret(&mut expected, &mut want_count, end);
        let got = translate(&mut actual, &mut got_count, end);
        let text = || listing(kind.mode.bits(), &program.bytes, prepare(kind, seed).0.cpu.rip);
        assert_eq!((&got, got_count), (&want, want_count), "seed {seed}:\n{}", text());
        if let End::Dead(_) = want {
            return;
        }
        // What the manuals leave undefined comes out as on the host translated, and as on AMD's interpreted.
        let mut ignored = flags::RF;
        ignored |= rflags(program.ever);
        let differences = State::of(&expected.cpu).differences(&State::of(actual.vcpu.cpu()), ignored);
        assert!(
            differences.is_empty(),
            "seed {seed}, after {want_count}:\n{}\nmust be:\n{}",
            text(),
            differences.join("\n")
        );
        if want == End::Halt {
            return;
        }
    }
}

#[test]
fn random_programs_stop_at_exact_counts() {
    for seed in 0..1500 {
        compare(Kind::default(), seed);
        compare(Kind { mode: Mode::User, unusual: true, ..Kind::default() }, 10_000 + seed);
        compare(Kind { unusual: true, x87: true, ..Kind::default() }, 20_000 + seed);
    }
}

#[test]
fn random_programs_of_short_code_stop_at_exact_counts() {
    let modes = [Mode::Compatibility, Mode::Protected, Mode::Segmented, Mode::Real, Mode::Virtual];
    for (number, mode) in (0..).zip(modes) {
        for seed in 0..600 {
            compare(Kind { mode, unusual: true, ..Kind::default() }, 30_000 + 1_000 * number + seed);
        }
    }
}

/// A machine with `code` and the processor that runs it in translated form.
fn counted(code: &[u8]) -> Translated {
    let mut machine = Machine::long();
    machine.load(code);
    machine.cpu.rip = CODE;
    Translated::new(machine, &Options { counting: true, ..options() })
}

#[test]
fn a_loop_is_left_at_any_count() {
    // mov ecx, 1000; next: inc rax; cmp rax, 1 << 20; je away; dec ecx; jnz next; away: hlt
    let code = [
        0xb9, 0xe8, 3, 0, 0, 0x48, 0xff, 0xc0, 0x48, 0x3d, 0, 0, 0x10, 0, 0x74, 4, 0xff, 0xc9, 0x75, 0xf1,
        0xf4,
    ];
    let mut whole = counted(&code);
    let mut count = 0;
    assert_eq!(translate(&mut whole, &mut count, u64::MAX), End::Halt);
    assert_eq!(count, 1 + 5 * 1000 + 1);
    for end in (1..5000).step_by(97) {
        let mut part = counted(&code);
        let mut count = 0;
        assert_eq!(translate(&mut part, &mut count, end), End::Counted);
        assert_eq!(count, end);
        // INC is the first of five.
        assert_eq!(part.vcpu.cpu().regs[reg::RAX], (end - 1).div_ceil(5), "after {end}");
        assert!(part.vcpu.counters().entries > 0 || end < 64);
    }
}

#[test]
fn a_repeated_instruction_counts_once() {
    // mov edi, DATA; mov ecx, 200000; rep stosb; hlt: more than is done without a pause
    let code = [0xbf, 0, 0, 0x40, 0, 0xb9, 0x40, 0x0d, 3, 0, 0xf3, 0xaa, 0xf4];
    let mut machine = counted(&code);
    let mut count = 0;
    assert_eq!(translate(&mut machine, &mut count, 3), End::Counted);
    assert_eq!(machine.vcpu.cpu().regs[reg::RCX], 0, "it is done, or the count is less");
    assert_eq!(translate(&mut machine, &mut count, u64::MAX), End::Halt);
    assert_eq!(count, 4);
}
