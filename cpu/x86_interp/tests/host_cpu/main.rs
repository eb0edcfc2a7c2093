//! T0 against the host's processor: systematic encodings with random operands, every register, flag and
//! scratch byte compared, and the faults too. The host is right by definition; flags that the manuals leave
//! undefined are compared if it is an AMD processor, whose behaviour T0 follows.

#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod cases;
mod guest;
mod special;

use cases::{Case, Generator};
use guest::Guest;
use iced_x86::Code;
use native_oracle::{End, Mode, NativeState, Outcome, Tally};
use x86_core::flags;

/// What differs between the host's outcome and T0's, if anything.
fn difference(case: &Case, host: &Outcome, ours: &Outcome) -> Option<String> {
    let mut flags_mask = flags::ARITHMETIC | flags::DF;
    if !native_oracle::host_is_amd() {
        flags_mask &= !case.undefined_flags();
    }
    let mut text = String::new();
    if host.end != ours.end {
        text += &format!("  end: host {:x?}, T0 {:x?}\n", host.end, ours.end);
    }
    let (registers, mask) = match case.mode {
        Mode::Bits64 => (16, u64::MAX),
        Mode::Bits32 | Mode::Bits16 => (8, 0xffff_ffff),
    };
    for register in 0..registers {
        let (a, b) = (host.state.regs[register] & mask, ours.state.regs[register] & mask);
        if a != b {
            text += &format!("  r{register}: host {a:#x}, T0 {b:#x}\n");
        }
    }
    let (a, b) = (host.state.rflags & flags_mask, ours.state.rflags & flags_mask);
    if a != b {
        text += &format!("  flags: host {a:#x}, T0 {b:#x} (differ {:#x})\n", a ^ b);
    }
    if host.state.scratch != ours.state.scratch {
        let mut bytes = host.state.scratch.iter().zip(&ours.state.scratch).enumerate();
        if let Some((offset, (a, b))) = bytes.find(|(_, (a, b))| a != b) {
            text += &format!("  scratch+{offset:#x}: host {a:#x}, T0 {b:#x}\n");
        }
    }
    (!text.is_empty()).then_some(text)
}

fn describe(case: &Case) -> String {
    let NativeState { regs, rflags, .. } = &case.state;
    format!(
        "{:?} {:02x?} {:?}\n  regs {regs:x?} flags {rflags:#x}\n",
        case.mode,
        case.bytes,
        case.insn.code()
    )
}

/// Runs all cases of a generator.
fn compare_all(mut generator: Generator, mode: Mode) -> Tally {
    let mut guest = Guest::new();
    let mut tally = Tally::new(mode);
    while let Some(case) = generator.next_case() {
        let host = match mode {
            Mode::Bits64 => native_oracle::run(&case.bytes, &case.state),
            Mode::Bits32 => native_oracle::run32(&case.bytes, &case.state),
            Mode::Bits16 => native_oracle::run16(&case.bytes, &case.state),
        };
        let host = Outcome { end: normalized(host.end, mode), ..host };
        let ours = guest.run(&case);
        let ours = Outcome { end: normalized(ours.end, mode), ..ours };
        let form = case.insn.code();
        tally.add(form, 1);
        if let Some(text) = difference(&case, &host, &ours) {
            tally.fail(form, describe(&case) + &text);
        }
    }
    tally
}

/// A fault somewhere else is a jump to where code cannot be fetched, which T0 does not try here.
fn normalized(end: End, mode: Mode) -> End {
    match end {
        End::Fault { rip, vector: 14, .. } if rip != mode.start() => End::Jumped(rip),
        End::Fault { signal: _, vector, error, address, rip } => {
            // Of the others the kernel reports no data address.
            let address = if vector == 14 { address } else { 0 };
            // Of its own half of the address space the kernel does not tell what is mapped.
            let error = if address >> 63 != 0 { error | 1 } else { error };
            End::Fault { signal: 0, vector, error, address, rip }
        }
        end => end,
    }
}

#[test]
fn long_mode() {
    let tally = compare_all(Generator::new(Mode::Bits64, 24), Mode::Bits64);
    assert!(tally.forms() > 400, "only {} forms were generated", tally.forms());
    tally.finish();
}

#[test]
fn compatibility_mode() {
    let tally = compare_all(Generator::new(Mode::Bits32, 12), Mode::Bits32);
    for form in [
        Code::Daa,
        Code::Das,
        Code::Aaa,
        Code::Aas,
        Code::Aam_imm8,
        Code::Aad_imm8,
        Code::Pushad,
        Code::Popad,
        Code::Salc,
        Code::Bound_r32_m3232,
    ] {
        assert!(tally.contains(form), "{form:?} was not generated");
    }
    tally.finish();
}

#[test]
fn segments_of_16_bits() {
    assert!(native_oracle::has_16_bit(), "the kernel makes no 16-bit segments");
    let tally = compare_all(Generator::new(Mode::Bits16, 12), Mode::Bits16);
    assert!(tally.forms() > 300, "only {} forms were generated", tally.forms());
    tally.finish();
}
