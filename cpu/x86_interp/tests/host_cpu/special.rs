//! Instructions whose results are the host's own affair: what can be compared of them is.

use crate::cases::{Case, Random};
use crate::guest::Guest;
use crate::{difference, normalized};
use iced_x86::{Decoder, Instruction};
use native_oracle::{End, Mode, NativeState, Outcome, Tally};
use std::arch::x86_64::__cpuid_count;
use x86_core::flags;
use x86_interp::DECODER_OPTIONS;

/// Whether the host has the feature at that bit of leaf 7: 1 is EBX, 2 ECX.
fn leaf_7(register: usize, bit: u32) -> bool {
    let leaf = __cpuid_count(7, 0);
    [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx][register] >> bit & 1 != 0
}

fn host_run(case: &Case) -> Outcome {
    match case.mode {
        Mode::Bits64 => native_oracle::run(&case.bytes, &case.state),
        Mode::Bits32 => native_oracle::run32(&case.bytes, &case.state),
        Mode::Bits16 => native_oracle::run16(&case.bytes, &case.state),
    }
}

fn bits(mode: Mode) -> u32 {
    match mode {
        Mode::Bits64 => 64,
        Mode::Bits32 => 32,
        Mode::Bits16 => 16,
    }
}

/// A case of `bytes` with random registers; the last of its instructions is what it is about.
fn case(random: &mut Random, mode: Mode, bytes: &[u8]) -> Case {
    let mut decoder = Decoder::with_ip(bits(mode), bytes, mode.start(), DECODER_OPTIONS);
    let mut insn = Instruction::default();
    while decoder.can_decode() {
        insn = decoder.decode();
        assert!(!insn.is_invalid(), "{bytes:x?}");
    }
    let mut state =
        NativeState { rflags: random.next() & native_oracle::LOADABLE_FLAGS, ..Default::default() };
    for register in &mut state.regs {
        *register = random.value();
    }
    state.regs[4] = mode.scratch() + 2048;
    Case { bytes: bytes.to_vec(), insn, state, mode }
}

/// Random numbers: of registers what is not random, and all flags.
#[test]
fn random_numbers() {
    let mut random = Random::new();
    let mut guest = Guest::new();
    for mode in [Mode::Bits64, Mode::Bits32, Mode::Bits16] {
        let mut tally = Tally::new(mode);
        for (group, bit) in [(0xf0u8, 30), (0xf8, 18)] {
            let announced =
                if bit == 30 { std::arch::is_x86_feature_detected!("rdrand") } else { leaf_7(1, bit) };
            if !announced {
                continue;
            }
            for prefix in [&[][..], &[0x66], &[0x48], &[0x41]] {
                if mode != Mode::Bits64 && prefix.first().is_some_and(|byte| byte & 0xf0 == 0x40) {
                    continue;
                }
                for register in [0u8, 3, 7] {
                    let bytes = [prefix, &[0x0f, 0xc7, group | register]].concat();
                    let case = case(&mut random, mode, &bytes);
                    let target = case.insn.op0_register();
                    let mask = u64::MAX >> (64 - 8 * target.size());
                    let mut host = host_run(&case);
                    let mut ours = guest.run(&case);
                    // A number of zero with carry clear means that there is none just now.
                    let carry = host.state.rflags & ours.state.rflags & flags::CF != 0;
                    for outcome in [&mut host, &mut ours] {
                        outcome.state.regs[target.number()] &= !mask;
                    }
                    tally.add(case.insn.code(), 1);
                    if let Some(text) = difference(&case, &host, &ours).filter(|_| carry) {
                        tally.fail(case.insn.code(), text);
                    }
                }
            }
        }
        tally.finish();
    }
}

/// The time-stamp counter's reader's number, which changes as the thread moves between processors.
#[test]
fn processor_numbers() {
    let mut random = Random::new();
    let mut guest = Guest::new();
    for mode in [Mode::Bits64, Mode::Bits32, Mode::Bits16] {
        let mut tally = Tally::new(mode);
        let mut codes: Vec<&[u8]> = vec![&[0x0f, 0x31], &[0x0f, 0x01, 0xf9]];
        if leaf_7(2, 22) {
            codes.extend([&[0xf3, 0x0f, 0xc7, 0xf8][..], &[0xf3, 0x0f, 0xc7, 0xfb]]);
            if mode == Mode::Bits64 {
                codes.push(&[0xf3, 0x41, 0x0f, 0xc7, 0xff]);
            }
        }
        for bytes in codes {
            for _ in 0..20 * native_oracle::rounds() {
                let case = case(&mut random, mode, bytes);
                // rdtscp
                let number = || native_oracle::run(&[0x0f, 0x01, 0xf9], &case.state).state.regs[1];
                let (mut host, number) = loop {
                    let before = number();
                    let host = host_run(&case);
                    if number() == before {
                        break (host, before);
                    }
                };
                guest.set_processor_number(number);
                let mut ours = guest.run(&case);
                if bytes[0] == 0x0f {
                    // The counter itself.
                    for outcome in [&mut host, &mut ours] {
                        outcome.state.regs[0] &= !0xffff_ffff;
                        outcome.state.regs[2] &= !0xffff_ffff;
                    }
                }
                tally.add(case.insn.code(), 1);
                if let Some(text) = difference(&case, &host, &ours) {
                    tally.fail(case.insn.code(), text);
                }
            }
        }
        tally.finish();
    }
}

/// Bases of FS and GS. That of FS is the test's own, and is put back before anything can ask for it.
#[test]
fn segment_bases() {
    if !leaf_7(1, 0) {
        return;
    }
    let mut random = Random::new();
    let mut guest = Guest::new();
    let mut tally = Tally::new(Mode::Bits64);
    for wide in [0x48u8, 0x40] {
        for number in [0u8, 1] {
            for _ in 0..50 * native_oracle::rounds() {
                // rdfsbase r11; wrfsbase rax; rdfsbase rbx; wrfsbase r11
                let save = [0xf3, 0x49, 0x0f, 0xae, 0xc3 | number << 3];
                let write = [0xf3, wide, 0x0f, 0xae, 0xd0 | number << 3];
                let read = [0xf3, wide, 0x0f, 0xae, 0xc3 | number << 3];
                let back = [0xf3, 0x49, 0x0f, 0xae, 0xd3 | number << 3];
                let bytes = [save, write, read, back].concat();
                let mut case = case(&mut random, Mode::Bits64, &bytes);
                let canonical = |bits: u32| {
                    let value = case.state.regs[0] as i64;
                    value << (64 - bits) >> (64 - bits) == value
                };
                // What is canonical with 57 bits alone is so on newer processors, which the guest's is.
                if random.chance(2) || canonical(57) && !canonical(48) {
                    case.state.regs[0] &= 0x7fff_ffff_ffff;
                }
                let mut host = host_run(&case);
                let mut ours = guest.run_all(&case, 4);
                for outcome in [&mut host, &mut ours] {
                    outcome.state.regs[11] = 0;
                    outcome.end = normalized(outcome.end, case.mode);
                    // Where the fault is, as distance from the beginning.
                    if let End::Fault { rip, .. } = &mut outcome.end {
                        *rip -= case.mode.start();
                    }
                }
                let decode = |bytes: &[u8]| Decoder::new(64, bytes, DECODER_OPTIONS).decode().code();
                for code in [decode(&write), decode(&read)] {
                    tally.add(code, 1);
                }
                if let Some(text) = difference(&case, &host, &ours) {
                    tally.fail(decode(&write), format!("{bytes:x?} {:x}: {text}", case.state.regs[0]));
                }
            }
        }
    }
    tally.finish();
}

/// XGETBV of XCR0, and of registers that there are not.
#[test]
fn extended_control_registers() {
    let mut random = Random::new();
    let mut guest = Guest::new();
    // xgetbv
    let xcr0 = native_oracle::run(&[0x0f, 0x01, 0xd0], &NativeState::default()).state.regs[0];
    for mode in [Mode::Bits64, Mode::Bits32, Mode::Bits16] {
        let mut tally = Tally::new(mode);
        for register in [0u64, 0xffff_ffff_0000_0000, 2, 7, 0x8000_0000] {
            let mut case = case(&mut random, mode, &[0x0f, 0x01, 0xd0]);
            case.state.regs[1] = register;
            guest.set_xcr0(xcr0);
            let (host, ours) = (host_run(&case), guest.run(&case));
            let host = Outcome { end: normalized(host.end, mode), ..host };
            let ours = Outcome { end: normalized(ours.end, mode), ..ours };
            tally.add(case.insn.code(), 1);
            if let Some(text) = difference(&case, &host, &ours) {
                tally.fail(case.insn.code(), text);
            }
        }
        tally.finish();
    }
}

/// Selectors: the kernel's code and data, user code and data, none, data at level 0, one behind the table.
const SELECTORS: [u64; 10] = [0x33, 0x33, 0x30, 0x23, 0x2b, 0x10, 0x18, 0, 3, 0xfff8];

/// What a far transfer or a load of a segment register takes is at RBX: 16, 32 or 64 bits of offset, and a selector. And
/// at RSP: what far returns and IRET take.
fn with_selector(random: &mut Random, bytes: &[u8]) -> Case {
    let mut case = case(random, Mode::Bits64, bytes);
    let selector = SELECTORS[random.below(SELECTORS.len() as u64) as usize];
    let target = Mode::Bits64.start() + 0x40 + random.below(0x400);
    let size = case.insn.memory_size().size() as u64;
    case.state.regs[3] = Mode::Bits64.scratch() + 512 + random.below(64);
    case.state.regs[1] = selector | random.next() << 16;
    let mut put = |address: u64, value: u64| {
        let at = (address - Mode::Bits64.scratch()) as usize;
        case.state.scratch[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    let (rbx, rsp) = (case.state.regs[3], case.state.regs[4]);
    // Of an offset of 64 bits AMD's processors read 32.
    put(rbx, target);
    put(rbx + if size == 4 { 2 } else { 4 }, selector);
    let flags = random.next() & native_oracle::LOADABLE_FLAGS | flags::IF | 2;
    let words = [target, selector, flags, rsp + 64, 0x2b];
    let size = match bytes[0] {
        0x48 => 8,
        0x66 => 2,
        // PUSHF and POPF.
        0x9c | 0x9d => 8,
        _ => 4,
    };
    let words = if matches!(bytes.last(), Some(0x9d)) { [flags; 5] } else { words };
    for (index, word) in (0..).zip(words) {
        put(rsp + size * index, word);
    }
    case
}

/// Far transfers in user code, and other instructions that take selectors or give them: the segments are Linux's on both
/// sides. (FS stays as it is: it is the test's own.)
#[test]
fn selectors() {
    if !native_oracle::host_is_amd() {
        // Far pointers with REX.W differ.
        return;
    }
    let codes: &[&[u8]] = &[
        &[0xff, 0x2b], // jmp far [rbx]
        &[0x48, 0xff, 0x2b],
        &[0x66, 0xff, 0x2b],
        &[0xff, 0x1b], // call far [rbx]
        &[0x48, 0xff, 0x1b],
        &[0x66, 0xff, 0x1b],
        &[0xcb], // retf
        &[0x48, 0xcb],
        &[0x66, 0xcb],
        &[0xca, 0x10, 0x00],
        &[0x48, 0xca, 0x08, 0x00],
        &[0xcf], // iretd
        &[0x48, 0xcf],
        &[0x0f, 0xb2, 0x03], // lss eax, [rbx]
        &[0x48, 0x0f, 0xb2, 0x03],
        &[0x66, 0x0f, 0xb2, 0x03],
        &[0x8c, 0xc8], // mov eax, cs
        &[0x48, 0x8c, 0xd0],
        &[0x66, 0x8c, 0xd8],
        &[0x8c, 0x03],             // mov [rbx], es
        &[0x8e, 0xd1],             // mov ss, ecx
        &[0x0f, 0xa0],             // push fs
        &[0x66, 0x0f, 0xa0],       // push fs, of 16 bits
        &[0x9c],                   // pushfq
        &[0x66, 0x9c],             // pushfw
        &[0x9d],                   // popfq
        &[0x66, 0x9d],             // popfw
        &[0x0f, 0x02, 0xc1],       // lar eax, cx
        &[0x66, 0x0f, 0x02, 0xc1], // lar ax, cx
        &[0x48, 0x0f, 0x02, 0xc1], // lar rax, ecx
        &[0x0f, 0x03, 0xc1],       // lsl eax, cx
        &[0x66, 0x0f, 0x03, 0xc1], // lsl ax, cx
        &[0x48, 0x0f, 0x03, 0xc1], // lsl rax, ecx
        &[0x0f, 0x00, 0xe1],       // verr cx
        &[0x0f, 0x00, 0xe9],       // verw cx
    ];
    let mut random = Random::new();
    let mut guest = Guest::new();
    guest.make_linux_segments();
    let mut tally = Tally::new(Mode::Bits64);
    for code in codes {
        for _ in 0..60 * native_oracle::rounds() {
            let case = with_selector(&mut random, code);
            let (host, ours) = (host_run(&case), guest.run(&case));
            let host = Outcome { end: normalized(host.end, case.mode), ..host };
            let ours = Outcome { end: normalized(ours.end, case.mode), ..ours };
            tally.add(case.insn.code(), 1);
            if let Some(text) = difference(&case, &host, &ours) {
                tally.fail(case.insn.code(), format!("{code:x?} {:x}: {text}", case.state.regs[1]));
            }
        }
    }
    tally.finish();
}
