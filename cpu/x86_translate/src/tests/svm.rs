//! Guests that the guest runs.

use super::{State, Translated, interpret, options};
use crate::Exit;
use std::sync::atomic::Ordering;
use x86_core::svm::{code, testing};
use x86_core::testing::{DATA, Machine};
use x86_core::{efer, flags, reg};

const VMCB: u64 = 0x60_0000;
const NESTED: u64 = 0x61_0000;
const GUEST: u64 = 0x30_0000;

/// l: vmrun; inc ebx; add qword [VMCB.rip], 3; cmp ebx, 50; jne l; hlt
const HOST: &[u8] = b"\x0f\x01\xd8\xff\xc3\x48\x83\x04\x25\x78\x05\x60\x00\x03\x83\xfb\x32\x75\xed\xf4";

/// l: push rcx; call f; pop rcx; add rdx, rdi; mov [DATA + 8], rdx; inc r8; pushfq; popfq; vmmcall; jmp l;
/// f: lea rdi, [rdi + 3]; ret
const LOOP: &[u8] =
    b"\x51\xe8\x16\x00\x00\x00\x59\x48\x01\xfa\x48\x89\x14\x25\x08\x00\x40\x00\x49\xff\xc0\x9c\x9d\
    \x0f\x01\xd9\xeb\xe4\x48\x8d\x7f\x03\xc3";

fn host(nested: bool, guest: &[u8]) -> Machine {
    let mut machine = Machine::long();
    machine.cpu.msrs.efer |= efer::SVME;
    machine.cpu.regs[reg::RAX] = VMCB;
    machine.cpu.regs[reg::RDX] = 0;
    machine.load(HOST);
    machine.memory.write(GUEST, guest).unwrap();
    testing::write_vmcb(&machine, VMCB, GUEST);
    testing::intercept(&machine, VMCB, code::VMMCALL);
    if nested {
        testing::nest(&machine, VMCB, NESTED);
    }
    machine
}

/// Runs until HLT, past the looks that world switches ask for.
fn run(translated: &mut Translated) {
    loop {
        match translated.vcpu.run(&translated.platform) {
            Ok(Exit::Halt) => return,
            Ok(Exit::Requested) => translated.vcpu.cpu().exit_request.store(0, Ordering::Relaxed),
            other => panic!("{other:?} at {:#x}", translated.vcpu.cpu().rip),
        }
    }
}

fn both(prepare: impl Fn() -> Machine) -> (Machine, Translated) {
    let mut expected = prepare();
    interpret(&mut expected, 1_000_000);
    let mut actual = Translated::new(prepare(), &options());
    run(&mut actual);
    let differences = State::of(&expected.cpu).differences(&State::of(actual.vcpu.cpu()), flags::AF);
    assert!(differences.is_empty(), "{differences:?}");
    (expected, actual)
}

#[test]
fn both_worlds_run_translated_code_that_stays() {
    for nested in [false, true] {
        let (expected, actual) = both(|| host(nested, LOOP));
        let cpu = actual.vcpu.cpu();
        assert_eq!((cpu.regs[reg::RBX], cpu.regs[8]), (50, 50));
        assert_eq!(expected.peek(DATA + 8), (1..=50).map(|round| 3 * round).sum::<u64>());
        let counters = actual.vcpu.counters();
        assert!(counters.blocks < 20 && counters.steps < 20, "translated once: {counters:?}");
        assert!(counters.entries < 50 * 4, "two entries for each switch: {counters:?}");
    }
}

#[test]
fn instructions_that_are_translated_are_intercepted_all_the_same() {
    for (exit, insn) in [(code::PUSHF, 0x9c), (code::POPF, 0x9d)] {
        let (expected, _) = both(|| {
            let machine = host(true, &[&[0x90; 2][..], &[insn; 3], &[0xeb, 0xf9]].concat());
            testing::intercept(&machine, VMCB, exit);
            machine
        });
        assert_eq!(expected.peek(VMCB + testing::EXIT[0]), exit);
    }
}

#[test]
fn addresses_that_both_worlds_use_are_kept_apart() {
    let other = 0x50_0000;
    // l: mov rdx, [DATA]; inc qword [DATA]; call [DATA + 16]; vmmcall; jmp l, and what it calls: inc r8; ret
    let guest =
        b"\x48\x8b\x14\x25\x00\x00\x40\x00\x48\xff\x04\x25\x00\x00\x40\x00\xff\x14\x25\x10\x00\x40\x00\
        \x0f\x01\xd9\xeb\xe4\x49\xff\xc0\xc3";
    let (expected, actual) = both(|| {
        let machine = host(true, guest);
        machine.poke(testing::nested_entry(NESTED, DATA), other | 7);
        machine.poke(DATA, 1000);
        machine.poke(other, 5);
        machine.poke(other + 16, GUEST + 28);
        machine
    });
    assert_eq!((expected.peek(DATA), expected.peek(other)), (1000, 55));
    assert_eq!(actual.vcpu.cpu().regs[reg::RDX], 54);
    let mut bytes = [0; 8];
    actual.memory.read(other, &mut bytes).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 55);
}

#[test]
fn system_calls_of_guests_stay_in_their_world() {
    // Kernel: mov rcx, USER; mov r11d, 0x202; sysretq. User: l: syscall; jmp l. LSTAR: vmmcall; inc r8; sysretq
    let guest = b"\x48\xc7\xc1\x20\x00\x30\x00\x41\xbb\x02\x02\x00\x00\x48\x0f\x07";
    let (_, actual) = both(|| {
        let mut machine = host(true, guest);
        machine.memory.write(GUEST + 0x20, b"\x0f\x05\xeb\xfc").unwrap();
        machine.memory.write(GUEST + 0x40, b"\x0f\x01\xd9\x49\xff\xc0\x48\x0f\x07").unwrap();
        machine.cpu.msrs.star = 0x1b << 48 | 0x08 << 32;
        machine.cpu.msrs.lstar = GUEST + 0x40;
        machine.cpu.msrs.sfmask = flags::IF | flags::AC;
        machine
    });
    assert_eq!(actual.vcpu.cpu().regs[8], 49);
}
