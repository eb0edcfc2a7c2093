//! Tables that small indices select from: the whole of such a table is checked at once.

use super::differential::{Mode, interpret};
use super::{State, Translated, options};
use crate::{Exit, Options};
use x86_core::reg;
use x86_core::testing::{DATA, Machine, PAGE_TABLES, RAM};

/// The same bytes mean this in 64- and in 32-bit code: a table of doublewords and one of bytes at ESI, a table of
/// counters behind EDI.
const LOOKUPS: &[u8] = &[
    0x0f, 0xb6, 0xd0, // movzx edx, al
    0x8b, 0x1c, 0x96, // mov ebx, [rsi + rdx * 4]
    0xc1, 0xe8, 0x08, // shr eax, 8
    0x31, 0xd8, // xor eax, ebx
    0x89, 0xca, // mov edx, ecx
    0x83, 0xe2, 0x3f, // and edx, 63
    0xff, 0x44, 0xd7, 0x10, // inc dword [rdi + rdx * 8 + 16]
    0x89, 0xc2, // mov edx, eax
    0xc1, 0xea, 0x18, // shr edx, 24
    0x0f, 0xb6, 0x2c, 0x16, // movzx ebp, byte [rsi + rdx]
    0x01, 0xe8, // add eax, ebp
    0xff, 0xc9, // dec ecx
    0x75, 0xdd, // jnz to the beginning
    0xf4, // hlt
];

const LOOPS: u64 = 500;

/// Runs `code` from equal states by the interpreter and translated, and compares; gives the latter.
fn both(mode: Mode, code: &[u8], strict: bool, set: impl Fn(&mut Machine)) -> Translated {
    let make = || {
        let mut machine = mode.machine();
        machine.load(code);
        let noise: Vec<u8> = (0..0x4000u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 23) as u8).collect();
        machine.memory.write(DATA, &noise).expect("RAM");
        machine.memory.write(RAM - 0x2000, &noise[..0x2000]).expect("RAM");
        machine.cpu.regs[reg::RAX] = 0x1234_5678;
        machine.cpu.regs[reg::RCX] = LOOPS;
        set(&mut machine);
        machine
    };
    let mut expected = make();
    let end = interpret(&mut expected, 20_000).expect("an end");
    let mut actual = Translated::new(make(), &Options { strict, ..options() });
    match actual.vcpu.run(&actual.platform) {
        Ok(Exit::Halt) => assert_eq!(end, Ok(())),
        Err(trap) => assert_eq!(end, Err(trap)),
        Ok(exit) => panic!("{exit:?}"),
    }
    let ignored = if strict { 0 } else { x86_core::flags::ARITHMETIC };
    let differences = State::of(&expected.cpu).differences(&State::of(actual.vcpu.cpu()), ignored);
    assert!(differences.is_empty(), "{mode:?}: {differences:?}");
    for start in [DATA, RAM - 0x2000, 0x1f_e000] {
        let (mut a, mut b) = ([0; 0x2000], [0; 0x2000]);
        expected.memory.read(start, &mut a).expect("RAM");
        actual.memory.read(start, &mut b).expect("RAM");
        assert!(a == b, "{mode:?}: memory at {start:#x} differs");
    }
    actual
}

const MODES: [Mode; 3] = [Mode::User, Mode::Compatibility, Mode::Protected];

#[test]
fn tables_within_a_page_need_no_slow_path() {
    for mode in MODES {
        let actual = both(mode, LOOKUPS, true, |machine| {
            machine.cpu.regs[reg::RSI] = DATA + 0x100;
            machine.cpu.regs[reg::RDI] = DATA + 0x1000;
        });
        let counters = actual.vcpu.counters();
        assert!(counters.slow_accesses < 10 && counters.ungrouped == 0, "{mode:?}: {counters:?}");
        assert!(counters.entries < 10, "{mode:?}: {counters:?}");
    }
}

#[test]
fn tables_may_lie_across_pages() {
    for mode in MODES {
        for (table, counters) in
            [(0x1000 - 0x100, 0x2000), (0x100, 0x2000 - 0x88), (0x1000 - 2, 0x2000 - 0x42)]
        {
            for strict in [true, false] {
                both(mode, LOOKUPS, strict, |machine| {
                    machine.cpu.regs[reg::RSI] = DATA + table;
                    machine.cpu.regs[reg::RDI] = DATA + counters;
                });
            }
        }
    }
}

/// The end of RAM, behind which there are devices; the other table likewise.
#[test]
fn tables_may_reach_into_devices() {
    for mode in MODES {
        for (table, counters) in [(RAM - 0x100, DATA), (DATA, RAM - 0x88), (RAM, RAM + 0x400)] {
            both(mode, LOOKUPS, true, |machine| {
                machine.cpu.regs[reg::RSI] = table;
                machine.cpu.regs[reg::RDI] = counters;
            });
        }
    }
}

/// What is selected decides on a fault, not what might have been.
#[test]
fn tables_may_reach_into_pages_that_are_absent_or_read_only() {
    for mode in [Mode::User, Mode::Compatibility] {
        for entry in [0, 0x20_0000 | 0xe5] {
            // Few lookups find the first page alone.
            for (loops, table, counters) in [
                (3, DATA, 0x20_0000 - 0x1c),
                (LOOPS, DATA, 0x20_0000 - 0x88),
                (LOOPS, 0x20_0000 - 0x200, DATA),
            ] {
                both(mode, LOOKUPS, true, |machine| {
                    machine.poke(PAGE_TABLES + 0x2000 + 8, entry);
                    machine.core().flush_tlb(false);
                    machine.cpu.regs[reg::RCX] = loops;
                    machine.cpu.regs[reg::RSI] = table;
                    machine.cpu.regs[reg::RDI] = counters;
                });
            }
        }
    }
}

/// An index that was small is not when something else has been put there, or when only a part of it was cleared.
#[test]
fn only_what_is_small_is_taken_for_small() {
    let changes: &[&[u8]] = &[
        &[0x01, 0xca],             // add edx, ecx
        &[0xff, 0xc2],             // inc edx
        &[0x8d, 0x14, 0x8a],       // lea edx, [rdx + rcx * 4]
        &[0x87, 0xd1],             // xchg ecx, edx
        &[0x0f, 0xca],             // bswap edx
        &[0xc1, 0xe2, 0x04],       // shl edx, 4
        &[0xb6, 0x10],             // mov dh, 0x10
        &[0x66, 0x0f, 0xb6, 0xd1], // movzx dx, cl
        &[0x66, 0x83, 0xe2, 0x0f], // and dx, 15
        &[0x83, 0xe2, 0xf0],       // and edx, -16
        &[0xc1, 0xea, 0x20],       // shr edx, 32
        &[0x89, 0xfa],             // mov edx, edi
        &[0x0f, 0x44, 0xd1],       // cmove edx, ecx
    ];
    for mode in MODES {
        for change in changes {
            for before in [&[0x0f, 0xb6, 0xd0][..], &[0x90]] {
                // mov eax, [rsi + rdx * 4]; hlt
                let code = [before, change, &[0x8b, 0x04, 0x96, 0xf4]].concat();
                both(mode, &code, true, |machine| {
                    machine.cpu.regs[reg::RSI] = DATA;
                    machine.cpu.regs[reg::RDI] = 0x500;
                    machine.cpu.regs[reg::RDX] = 0x481;
                    machine.cpu.regs[reg::RCX] = 0x3c1;
                });
            }
        }
    }
}
