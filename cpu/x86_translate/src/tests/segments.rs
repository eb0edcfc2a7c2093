//! Code of 32 and of 16 bits: calls, wrap-around, segments, and changes of the mode.

use super::differential::{Mode, interpret};
use super::{State, Translated, options};
use crate::{Counters, Exit, Options};
use x86_core::testing::{CODE, DATA, Machine, PAGE_TABLES, STACK, selector};
use x86_core::{Seg, reg};

/// Runs what `make` gives by the interpreter and translated, and compares; gives the translated one. `None` if it
/// does not come to an end.
fn both(make: impl Fn() -> Machine) -> Option<Translated> {
    let mut expected = make();
    let end = interpret(&mut expected, 10_000)?;
    let mut actual = Translated::new(make(), &Options { strict: true, ..options() });
    match actual.vcpu.run(&actual.platform) {
        Ok(Exit::Halt) => assert_eq!(end, Ok(())),
        Err(trap) => assert_eq!(end, Err(trap)),
        Ok(exit) => panic!("{exit:?}"),
    }
    let (want, got) = (State::of(&expected.cpu), State::of(actual.vcpu.cpu()));
    let mut differences = want.differences(&got, 0);
    for index in 0..6 {
        let (want, got) = (expected.cpu.segments[index], actual.vcpu.cpu().segments[index]);
        if want != got {
            differences.push(format!("segment {index}: {want:x?} is {got:x?}"));
        }
    }
    for start in [0, DATA, STACK - 0x8000, CODE - 0x4000] {
        let (mut a, mut b) = (vec![0; 0x8000], vec![0; 0x8000]);
        expected.memory.read(start, &mut a).expect("RAM");
        actual.memory.read(start, &mut b).expect("RAM");
        if let Some(at) = (0..a.len()).find(|at| a[*at] != b[*at]) {
            differences.push(format!("[{:#x}]: {:#x} is {:#x}", start + at as u64, a[at], b[at]));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    Some(actual)
}

fn with_code(mode: Mode, code: &[u8], set: impl Fn(&mut Machine)) -> Machine {
    let mut machine = mode.machine();
    machine.load(code);
    set(&mut machine);
    machine.core().mode_changed();
    machine
}

fn interpreted(counters: &Counters) -> u64 {
    counters.steps + counters.interpreted.values().sum::<u64>()
}

/// The numbers of Fibonacci by recursion, in 32 and in 16 bits.
const FIB32: &[u8] =
    b"\xb8\x0f\x00\x00\x00\xe8\x01\x00\x00\x00\xf4\x83\xf8\x02\x72\x14\x50\x48\xe8\xf4\xff\xff\xff\
    \x59\x50\x8d\x41\xfe\xe8\xea\xff\xff\xff\x59\x01\xc8\xc3";
const FIB16: &[u8] =
    b"\xb8\x0f\x00\xe8\x01\x00\xf4\x83\xf8\x02\x72\x12\x50\x48\xe8\xf6\xff\x59\x50\x89\xc8\x83\xe8\x02\
    \xe8\xec\xff\x59\x01\xc8\xc3";

#[test]
fn recursion_is_translated_in_every_mode() {
    for (mode, code) in [
        (Mode::Protected, FIB32),
        (Mode::Segmented, FIB32),
        (Mode::Compatibility, FIB32),
        (Mode::Real, FIB16),
        (Mode::Virtual, FIB16),
        (Mode::Protected16, FIB16),
    ] {
        let machine = || {
            with_code(mode, code, |machine| {
                machine.cpu.regs[reg::RSP] = STACK_OFFSET[usize::from(mode.has_based_stack())]
            })
        };
        let mut actual = Translated::new(machine(), &options());
        assert_eq!(actual.vcpu.run(&actual.platform), Ok(Exit::Halt));
        assert_eq!(actual.vcpu.cpu().regs[reg::RAX], 610);
        assert!(interpreted(actual.vcpu.counters()) < 16, "{:?}", actual.vcpu.counters());
    }
}

const STACK_OFFSET: [u64; 2] = [STACK - 0x1000, 0x7000];

#[test]
fn addresses_wrap_at_4_gib() {
    // In compatibility mode what is at 4 GiB is other memory than what is at 0, and so is what is below 0.
    let machine = |code: &[u8], rbx: u64, rcx: u64| {
        with_code(Mode::Compatibility, code, |machine| {
            // Directories for 0xc000_0000, for 4 GiB, and for the highest addresses.
            machine.poke(PAGE_TABLES + 0x5000 + 511 * 8, 0xa0_00e7);
            machine.poke(PAGE_TABLES + 0x1000 + 4 * 8, 0x7_0000 + 7);
            machine.poke(0x7_0000, 0x80_00e7);
            machine.poke(PAGE_TABLES + 511 * 8, 0x7_1000 + 7);
            machine.poke(0x7_1000 + 511 * 8, 0x7_2000 + 7);
            machine.poke(0x7_2000 + 511 * 8, 0xc0_00e7);
            for (at, byte) in [(0x80_0000, 0x11), (0x9f_f000, 0x22), (0xbf_f000, 0x33), (0xdf_f000, 0x44)] {
                machine.memory.write(at, &[byte; 0x1000]).expect("RAM");
            }
            // The top of memory and the first page, in the TLB before 64-bit sums are.
            machine.cpu.regs[reg::RBX] = rbx;
            machine.cpu.regs[reg::RCX] = rcx;
            machine.cpu.regs[reg::RDI] = 0xffff_fff0;
        })
    };
    // mov eax, [edi]; mov edx, [0x10]; then the access; then twice more
    let programs: [&[u8]; 8] = [
        b"\x8b\x07\x8b\x15\x10\x00\x00\x00\x8b\x43\x40\x8b\x43\x44\x89\x43\x48\x0f\x0b",
        b"\x8b\x07\x8b\x15\x10\x00\x00\x00\x8b\x04\x8b\x8b\x14\x8b\x0f\x0b",
        b"\x8b\x07\x8b\x15\x10\x00\x00\x00\x8b\x83\xf0\xff\xff\x7f\x8b\x93\xf4\xff\xff\x7f\x8b\x8b\x00\x00\x00\x80\x0f\x0b",
        b"\x8b\x07\x8b\x15\x10\x00\x00\x00\x89\x83\xfc\xff\xff\x7f\x89\x83\x00\x00\x00\x80\x89\x83\x04\x00\x00\x80\x0f\x0b",
        b"\x8b\x07\x8b\x15\x10\x00\x00\x00\x8b\x43\xf0\x8b\x4b\xf4\x8b\x53\xf8\x0f\x0b",
        // lea eax, [ebx + 0x40]; mov ecx, [eax]; add eax, 4; mov ecx, [eax]; dec eax; mov ecx, [eax]
        b"\x8b\x07\x8b\x15\x10\x00\x00\x00\x8d\x43\x40\x8b\x08\x83\xc0\x04\x8b\x08\x48\x8b\x08\x0f\x0b",
        // add ebx, 0x7fffffff; mov eax, [ebx]; add ebx, 0x7fffffff; mov eax, [ebx + 2]; mov [ebx + 6], eax
        b"\x8b\x07\x8b\x15\x10\x00\x00\x00\x81\xc3\xff\xff\xff\x7f\x8b\x03\x81\xc3\xff\xff\xff\x7f\x8b\x43\x02\x89\x43\x06\x0f\x0b",
        // movups xmm0, [ebx + 0x40]; mov eax, gs:[ebx + 0x44]
        b"\x8b\x07\x8b\x15\x10\x00\x00\x00\x0f\x10\x43\x40\x65\x8b\x43\x44\x0f\x0b",
    ];
    for code in programs {
        for rbx in [
            0xffff_ffd0,
            0xffff_fff0,
            0x8000_0000,
            0x7fff_fff8,
            0x10,
            DATA,
            0xffff_ffbd,
            0x1_0000_0010 + DATA,
        ] {
            for rcx in [0, 0xffff_fffc, 0x4000_0000, 0xc000_0004] {
                both(|| machine(code, rbx, rcx));
            }
        }
    }
}

#[test]
fn a_stack_wraps() {
    // push eax; push 5; call +0; pop ecx; pop edx; pushf; leave; ret 4
    let code = b"\x50\x6a\x05\xe8\x00\x00\x00\x00\x59\x5a\x9c\x5d\x50\xc9\x50\x50\xc2\x04\x00";
    for mode in
        [Mode::Protected, Mode::Segmented, Mode::Real, Mode::Protected16, Mode::Virtual, Mode::Compatibility]
    {
        for top in
            [0u64, 1, 2, 3, 4, 6, 0xffff, 0x1_0000, 0x1_0002, 0xbfff, 0xc000, 0xc002, 0xffff_ffff, 0x7000]
        {
            for short in [false, true] {
                both(|| {
                    with_code(mode, code, |machine| {
                        machine.cpu.regs[reg::RSP] = top;
                        machine.cpu.regs[reg::RBP] = top;
                        if short {
                            machine.cpu.segments[Seg::Ss as usize].attributes &= !0x4000;
                        }
                    })
                });
            }
        }
    }
}

#[test]
fn the_instruction_pointer_wraps() {
    // At the end of 64 KiB: jumps beyond it, calls, and what runs into the end.
    let programs: [&[u8]; 5] = [
        b"\xeb\x10",
        b"\xe8\x20\x00",
        b"\x90\x90\x90\x90",
        b"\x40\x0f\x84\x40\x00\x75\x10",
        b"\xb8\x34\x12\xeb\xf0",
    ];
    for mode in [Mode::Real, Mode::Protected16, Mode::Virtual] {
        for code in programs {
            for ip in 0xfff0..0x1_0000u64 {
                both(|| {
                    let mut machine = mode.machine();
                    let base = machine.cpu.segments[Seg::Cs as usize].base;
                    let end: &[u8] = if mode == Mode::Virtual { b"\x0f\x0b" } else { b"\xf4" };
                    machine.memory.write(base, &end.repeat(0x8000 / end.len())).expect("RAM");
                    machine.memory.write(base + 0xff00, &end.repeat(0x200 / end.len())).expect("RAM");
                    machine.cpu.rip = ip;
                    machine.load(code);
                    machine.cpu.regs[reg::RSP] = 0x7000;
                    machine
                });
            }
        }
    }
}

#[test]
fn code_wraps_at_4_gib() {
    // At the end of a page, and with a base in the middle of one.
    for (base, ip) in
        [0, 0x7800].into_iter().flat_map(|base| (0xffff_fff0..=0xffff_ffffu64).map(move |ip| (base, ip)))
    {
        for code in [&b"\xeb\x20"[..], b"\xe8\x30\x00\x00\x00", b"\x40\x40\x40", b"\xb8\x78\x56\x34\x12\x90"]
        {
            let end = both(|| {
                let mut machine = Mode::Compatibility.machine();
                machine.poke(PAGE_TABLES + 0x5000 + 511 * 8, 0xa0_00e7);
                for page in [0xbf_f000, 0, 0x7000] {
                    machine.memory.write(page, &[0x0f, 0x0b].repeat(0x800)).expect("RAM");
                }
                for (byte, linear) in code.iter().zip(ip + base..) {
                    let at = if linear >> 32 == 0 { linear - 0xff40_0000 } else { linear & 0xffff_ffff };
                    machine.memory.write(at, &[*byte]).expect("RAM");
                }
                machine.cpu.segments[Seg::Cs as usize].base = base;
                machine.cpu.rip = ip;
                machine
            });
            assert!(end.is_some(), "code that crosses the end faults");
        }
    }
}

#[test]
fn user_code_with_a_base_is_looked_up_anew_in_another_address_space() {
    let mut machine = Mode::Compatibility.machine();
    let base = 0x1000;
    // l: nop; jmp to DATA; there: inc eax or inc ebx; jmp to DATA + 0x100
    let distance = (DATA - CODE - 6) as u32;
    machine.memory.write(CODE, &[&b"\x90\xe9"[..], &distance.to_le_bytes()].concat()).expect("RAM");
    for (at, code) in [(DATA, b"\x40\xe9\xfa\x00\x00\x00"), (DATA + 0x20_0000, b"\x43\xe9\xfa\x00\x00\x00")] {
        machine.memory.write(at, code).expect("RAM");
    }
    machine.cpu.segments[Seg::Cs as usize].base = base;
    machine.core().mode_changed();
    let mut actual = Translated::new(machine, &options());
    actual.set_breakpoints(&[DATA + 0x100]);
    // Without any code of the kernel: first until the jump is linked, then with other memory where it leads.
    for (frame, want) in [(DATA, (1, 0)), (DATA, (2, 0)), (DATA + 0x20_0000, (2, 1))] {
        let entry = frame | 0xe7;
        actual.memory.write(PAGE_TABLES + 0x2000 + 8 * (DATA >> 21), &entry.to_le_bytes()).expect("RAM");
        let mut core = actual.vcpu.core(&actual.platform);
        let root = core.cpu.cr3;
        core.set_cr3(root).expect("the same table");
        core.cpu.rip = CODE - base;
        assert_eq!(actual.vcpu.run(&actual.platform), Ok(Exit::Breakpoint));
        let regs = &actual.vcpu.cpu().regs;
        assert_eq!((regs[reg::RAX] as u32, regs[reg::RBX] as u32), want);
    }
}

#[test]
fn limits_are_met_exactly() {
    // inc byte [bx]; mov ax, [bx]; movups/mov dword with a prefix; push [bx]
    let short: [&[u8]; 5] =
        [b"\xfe\x07\xf4", b"\x8b\x07\xf4", b"\x66\x01\x07\xf4", b"\xff\x37\x8b\x07\xf4", b"\xac\xae\xa4\xf4"];
    let wide: [&[u8]; 5] = [
        b"\xfe\x03\xf4",
        b"\x66\x8b\x03\xf4",
        b"\x01\x03\xf4",
        b"\xff\x33\x8b\x43\x01\xf4",
        b"\xac\xae\xa4\xf4",
    ];
    for (mode, programs) in [
        (Mode::Real, short),
        (Mode::Protected16, short),
        (Mode::Virtual, short),
        (Mode::Segmented, wide),
        (Mode::Protected, wide),
        (Mode::Compatibility, wide),
    ] {
        for code in programs {
            for limit in [3u32, 0x8fff, 0xffff, u32::MAX] {
                for attributes in [0xc093, 0xc091, 0xc097, 0x95, 0xc09b, 0x1_c093] {
                    if attributes != 0xc093 && matches!(mode, Mode::Real | Mode::Virtual) {
                        continue;
                    }
                    for distance in -4..=1i64 {
                        both(|| {
                            with_code(mode, code, |machine| {
                                let offset = (i64::from(limit) + distance) as u64 & 0xffff_ffff;
                                let segments = &mut machine.cpu.segments;
                                segments[Seg::Ds as usize].limit = limit;
                                if mode != Mode::Virtual {
                                    segments[Seg::Ds as usize].attributes = attributes;
                                }
                                machine.cpu.regs[reg::RBX] = offset;
                                machine.cpu.regs[reg::RSI] = offset;
                                machine.cpu.regs[reg::RDI] = 0x1000;
                                machine.cpu.regs[reg::RSP] =
                                    STACK_OFFSET[usize::from(mode.has_based_stack())];
                            })
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn modes_change_back_and_forth() {
    // 64-bit code: a far return to 32-bit code, which returns in the same way; 300 times
    let code64 = b"\xb9\x2c\x01\x00\x00\
        \x6a\x1b\x68\x00\x10\x20\x00\x48\xcb\
        \xff\xc9\x75\xf3\x0f\x0b";
    // inc eax; mov [ebx], eax; push 0x2b; push CODE + 14; retf
    let code32 = b"\x40\x89\x03\x6a\x2b\x68\x0e\x00\x20\x00\xcb";
    let actual = both(|| {
        let mut machine = Machine::user();
        machine.load(code64);
        machine.memory.write(CODE + 0x1000, code32).expect("RAM");
        machine.cpu.regs[reg::RBX] = DATA | 0xff << 32;
        machine.cpu.regs[reg::RAX] = 0;
        machine
    })
    .expect("an end");
    assert_eq!(actual.vcpu.cpu().regs[reg::RAX], 300);
}

#[test]
fn a_near_return_to_another_code_segment_goes_there() {
    // At 0x2345: call near to 0x2355, which goes far to the same offsets in another segment, and returns there.
    let mut first = vec![0x90; 0x40];
    first[..3].copy_from_slice(b"\xe8\x0d\x00");
    first[3..7].copy_from_slice(b"\xb8\x01\x00\xf4");
    // jmp far 0x1000:0x2360
    first[0x10..0x15].copy_from_slice(b"\xea\x60\x23\x00\x10");
    let mut second = vec![0x90; 0x40];
    second[3..7].copy_from_slice(b"\xb8\x02\x00\xf4");
    second[0x1b] = 0xc3;
    let actual = both(|| {
        let machine = with_code(Mode::Real, &first, |machine| machine.cpu.regs[reg::RSP] = 0x7000);
        machine.memory.write(0x1_2345, &second).expect("RAM");
        machine.memory.write(CODE + 0x100, b"\xf4").expect("RAM");
        machine
    })
    .expect("an end");
    assert_eq!(actual.vcpu.cpu().regs[reg::RAX] & 0xffff, 2);
}

#[test]
fn segments_that_are_loaded_count_at_once() {
    // mov eax, [ebx]; mov ds, cx; mov edx, [ebx]; mov es, cx; mov es:[ebx], edx; hlt
    let code = b"\x8b\x03\x8e\xd9\x8b\x13\x8e\xc1\x26\x89\x13\xf4";
    for limit in [0xffffu32, 0x10, 0xf_ffff] {
        for base in [0, 0x1000] {
            both(|| {
                with_code(Mode::Protected, code, |machine| {
                    let new = x86_core::testing::descriptor(base, limit, 0x4093);
                    machine.poke(x86_core::testing::GDT + u64::from(selector::FREE), new);
                    machine.cpu.regs[reg::RCX] = selector::FREE.into();
                    machine.cpu.regs[reg::RBX] = 0x8000;
                    machine.poke(0x8000, 0);
                    machine.poke(0x9000 + 0x800, 0x1234);
                })
            });
        }
    }
}

#[test]
fn exceptions_of_16_bit_code_are_precise() {
    // add [bx], ax; mov ax, [bx + 2], where bx is just below the limit
    let code = b"\x01\x07\x40\x8b\x47\x02\xf4";
    for bx in [0xfffb, 0xfffc, 0xfffd, 0xfffe, 0xffff] {
        let actual = both(|| {
            with_code(Mode::Protected16, code, |machine| {
                machine.cpu.regs[reg::RBX] = bx;
                machine.cpu.regs[reg::RSP] = 0x7000;
            })
        })
        .expect("an end");
        assert!(actual.vcpu.counters().blocks > 0);
    }
}

#[test]
fn an_instruction_pointer_with_more_bits_is_cut() {
    for (mode, bits) in
        [(Mode::Compatibility, 0x7u64 << 32), (Mode::Protected, 1 << 63), (Mode::Real, 1 << 40)]
    {
        for at in [0, 0xffe] {
            let end = both(|| {
                let mut machine = mode.machine();
                machine.cpu.rip += at;
                machine.load(if mode == Mode::Compatibility {
                    b"\x40\x43\x0f\x0b"
                } else {
                    b"\x40\x43\xeb\x00\xf4"
                });
                machine.cpu.rip |= bits;
                machine
            });
            assert!(end.is_some());
        }
    }
}
