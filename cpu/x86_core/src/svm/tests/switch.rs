//! World switches and intercepted instructions.

use super::super::vmcb::at;
use super::super::{Exit, code};
use super::rig::*;
use crate::testing::{CODE, DATA, Machine, STACK, selector};
use crate::{Flow, Segment, Trap, cr0, cr4, efer, flags, reg, shadow};

#[test]
fn a_guest_runs_until_something_is_intercepted() {
    let mut machine = host();
    machine.cpu.regs[reg::RBX] = 0x1234;
    machine.poke(VMCB + at::RSP, 0x5000);
    machine.poke(VMCB + at::RAX, 0x77);
    machine.poke(VMCB + at::CR2, 0xabc);
    machine.poke(VMCB + at::TSC_OFFSET, 1000);
    machine.poke(VMCB + at::INTERRUPT_SHADOW, 1);
    enter(&mut machine);
    let cpu = &machine.cpu;
    assert_eq!((cpu.rip, cpu.regs[reg::RSP], cpu.regs[reg::RAX]), (GUEST, 0x5000, 0x77));
    assert_eq!((cpu.regs[reg::RBX], cpu.cr2, cpu.rflags), (0x1234, 0xabc, flags::FIXED));
    assert_eq!((cpu.msrs.tsc_offset, cpu.interrupt_shadow, cpu.svm.gif), (1000, shadow::STI, true));
    machine.cpu.regs[reg::RAX] = 0x99;
    machine.cpu.regs[reg::RBX] = 0x5678;
    let next_rip = GUEST + 2;
    assert_eq!(leaves(&mut machine, CPUID), Exit { next_rip, ..Exit::plain(code::CPUID) });
    let cpu = &machine.cpu;
    assert_eq!((cpu.rip, cpu.regs[reg::RSP], cpu.regs[reg::RAX]), (CODE + 3, STACK, VMCB));
    assert_eq!((cpu.regs[reg::RBX], cpu.msrs.tsc_offset), (0x5678, 0));
    assert_eq!(cpu.rflags, flags::FIXED | flags::IF);
    for (offset, value) in [
        (at::RIP, GUEST),
        (at::RAX, 0x99),
        (at::CR2, 0xabc),
        (at::INTERRUPT_SHADOW, 1),
        (at::EXIT_INT_INFO, 0),
        (at::EVENT_INJECTION, 0),
        (at::RFLAGS, flags::FIXED),
    ] {
        assert_eq!(machine.peek(VMCB + offset), value, "{offset:#x}");
    }
}

#[test]
fn guests_of_other_modes_are_entered_and_left() {
    let mut machine = host();
    machine.poke(VMCB + at::CR0, cr0::ET);
    machine.poke(VMCB + at::CR4, 0);
    machine.poke(VMCB + at::EFER, efer::SVME);
    let code = Segment { base: 0xf_0000, limit: 0xffff, attributes: 0x9b, selector: 0xf000 };
    poke_segment(&machine, at::ES + 16, &code);
    machine.poke(VMCB + at::RIP, 0xfff0);
    enter(&mut machine);
    assert!(!machine.cpu.long64 && machine.cpu.cr0 == cr0::ET);
    assert_eq!(machine.cpu.segments[1], code);
    leaves(&mut machine, CPUID);
    assert!(machine.cpu.long64);
    assert_eq!(machine.cpu.segments[1].selector, selector::CODE64);
}

#[test]
fn vmcbs_that_make_no_sense_are_refused() {
    let bad: &[(u64, u64)] = &[
        (at::EFER, efer::LME | efer::LMA | efer::NXE),
        (at::EFER, efer::SVME | efer::LME | 1 << 2),
        (at::CR0, cr0::PE | cr0::PG | cr0::NW),
        (at::CR0, 1 << 32 | cr0::PE | cr0::PG),
        (at::CR0, cr0::PG),
        (at::CR3, 1 << 52),
        (at::CR4, 0),
        (at::CR4, cr4::PAE | 1 << 31),
        (at::DR6, 1 << 32),
        (at::DR7, 1 << 32),
        (at::ASID, 0),
        (0x10, 0),
        (at::EVENT_INJECTION, 1 << 31 | 1 << 8),
        (at::EVENT_INJECTION, 1 << 31 | 3 << 8 | 2),
        (at::EVENT_INJECTION, 1 << 31 | 3 << 8 | 32),
        (at::EVENT_INJECTION, 1 << 31 | 7 << 8 | 3),
    ];
    for &(offset, value) in bad {
        let mut machine = host();
        machine.poke(VMCB + offset, value);
        assert_eq!(run(&mut machine, VMRUN), Ok(Flow::Jump));
        assert_eq!(exit(&machine).code, code::INVALID, "{offset:#x} {value:#x}");
        assert_eq!(machine.cpu.rip, CODE + 3);
    }
    let mut machine = host();
    let both = Segment { attributes: 0xe09b, ..machine.cpu.segments[1] };
    poke_segment(&machine, at::ES + 16, &both);
    assert_eq!(run(&mut machine, VMRUN), Ok(Flow::Jump));
    assert_eq!(exit(&machine).code, code::INVALID, "64-bit and 32-bit code at once");
    for (map, exit_code) in [(at::MSRPM, code::MSR), (at::IOPM, code::IOIO)] {
        let mut machine = host();
        machine.poke(VMCB + map, (machine.cpu.model.physical_mask() + 1) - 0x1000);
        intercept(&machine, exit_code);
        assert_eq!(run(&mut machine, VMRUN), Ok(Flow::Jump));
        assert_eq!(exit(&machine).code, code::INVALID, "a map beyond what there can be");
    }
}

#[test]
fn the_instructions_need_svm_privilege_and_a_page() {
    let all: [&[u8]; 6] = [
        VMRUN,
        &[0x0f, 0x01, 0xda],
        &[0x0f, 0x01, 0xdb],
        &[0x0f, 0x01, 0xdc],
        &[0x0f, 0x01, 0xdd],
        &[0x0f, 0x01, 0xdf],
    ];
    for bytes in all {
        assert_eq!(run(&mut Machine::long(), bytes), Err(Trap::UD), "SVME is clear");
        let mut machine = Machine::user();
        machine.cpu.msrs.efer |= efer::SVME;
        assert_eq!(run(&mut machine, bytes), Err(Trap::gp(0)));
    }
    for bytes in &all[..3] {
        for address in [VMCB + 8, 1 << 50] {
            let mut machine = host();
            machine.cpu.regs[reg::RAX] = address;
            assert_eq!(run(&mut machine, bytes), Err(Trap::gp(0)));
        }
    }
    assert_eq!(run(&mut host(), &[0x0f, 0x01, 0xde]), Err(Trap::UD), "SKINIT");
}

#[test]
fn vmload_and_vmsave_move_the_rest_of_the_state() {
    let mut machine = host();
    machine.cpu.msrs.star = 0x23_0010_0000_0000;
    machine.cpu.msrs.kernel_gs_base = 0xffff_8000_0000_1000;
    machine.cpu.segments[4].base = 0x1234_5000;
    let before = (machine.cpu.msrs, machine.cpu.segments, machine.cpu.tr, machine.cpu.ldtr);
    run(&mut machine, &[0x0f, 0x01, 0xdb]).unwrap();
    machine.cpu.msrs.star = 0;
    machine.cpu.msrs.kernel_gs_base = 0;
    machine.cpu.segments[4].base = 0;
    machine.cpu.tr.base = 0;
    machine.cpu.ldtr.attributes = 0x82;
    run(&mut machine, &[0x0f, 0x01, 0xda]).unwrap();
    assert_eq!((machine.cpu.msrs, machine.cpu.segments, machine.cpu.tr, machine.cpu.ldtr), before);
    machine.poke(VMCB + at::FS + 8, 1 << 56);
    run(&mut machine, &[0x0f, 0x01, 0xda]).unwrap();
    assert_eq!(machine.cpu.segments[4].base, 0xff00_0000_0000_0000, "bases are made canonical");
}

#[test]
fn the_global_interrupt_flag_is_set_and_cleared() {
    let mut machine = host();
    run(&mut machine, &[0x0f, 0x01, 0xdd]).unwrap();
    assert!(!machine.cpu.svm.gif);
    run(&mut machine, &[0x0f, 0x01, 0xdc]).unwrap();
    assert!(machine.cpu.svm.gif);
}

#[test]
fn registers_of_svm_can_be_read_and_written() {
    let mut machine = Machine::long();
    assert_eq!(machine.core().write_msr(0xc001_0117, 0x5000), Ok(()));
    assert_eq!(machine.core().read_msr(0xc001_0117), Ok(0x5000));
    assert_eq!(machine.core().write_msr(0xc001_0117, 0x5001), Err(Trap::gp(0)));
    let efer = machine.cpu.msrs.efer;
    assert_eq!(machine.core().write_msr(0xc000_0080, efer | efer::SVME), Ok(()));
    assert_eq!(machine.core().write_msr(0xc001_0114, 0x10), Err(Trap::gp(0)), "while SVME is set");
    assert_eq!(machine.core().write_msr(0xc000_0080, efer), Ok(()));
    assert_eq!(machine.core().write_msr(0xc001_0114, 0x18), Ok(()));
    assert_eq!(machine.core().write_msr(0xc000_0080, efer | efer::SVME), Err(Trap::gp(0)));
    assert_eq!(machine.core().write_msr(0xc001_0114, 0), Ok(()));
    assert_eq!(machine.core().read_msr(0xc001_0114), Ok(0x18), "locked");
}

#[test]
fn instructions_leave_with_what_the_host_needs() {
    const MOV: u64 = 1 << 63;
    let cases: &[(u64, &[u8], u64)] = &[
        (code::CR_READ, &[0x0f, 0x20, 0xc3], MOV | 3),
        (code::CR_WRITE + 3, &[0x0f, 0x22, 0xde], MOV | 6),
        (code::CR_WRITE + 8, &[0x44, 0x0f, 0x22, 0xc0], MOV),
        (code::CR_WRITE, &[0x0f, 0x06], 0),
        (code::CR_READ, &[0x0f, 0x01, 0xe0], 0),
        (code::DR_WRITE + 7, &[0x0f, 0x23, 0xf9], MOV | 1),
        (code::DR_READ, &[0x0f, 0x21, 0xc1], MOV | 1),
        (code::IDTR_WRITE, &[0x0f, 0x01, 0x1b], 0),
        (code::GDTR_READ, &[0x0f, 0x01, 0x03], 0),
        (code::LDTR_WRITE, &[0x0f, 0x00, 0xd0], 0),
        (code::TR_READ, &[0x0f, 0x00, 0xc8], 0),
        (code::RDTSC, &[0x0f, 0x31], 0),
        (code::RDTSCP, &[0x0f, 0x01, 0xf9], 0),
        (code::RDPMC, &[0x0f, 0x33], 0),
        (code::PUSHF, &[0x9c], 0),
        (code::POPF, &[0x9d], 0),
        (code::IRET, &[0x48, 0xcf], 0),
        (code::SWINT, &[0xcd, 0x80], 0x80),
        (code::INVD, &[0x0f, 0x08], 0),
        (code::WBINVD, &[0x0f, 0x09], 0),
        (code::HLT, &[0xf4], 0),
        (code::INVLPG, &[0x0f, 0x01, 0x3b], DATA),
        (code::VMMCALL, &[0x0f, 0x01, 0xd9], 0),
        (code::VMLOAD, &[0x0f, 0x01, 0xda], 0),
        (code::STGI, &[0x0f, 0x01, 0xdc], 0),
        (code::ICEBP, &[0xf1], 0),
        (code::EXCEPTION + 3, &[0xcc], 0),
    ];
    for &(exit_code, bytes, info1) in cases {
        let mut machine = host();
        intercept(&machine, exit_code);
        enter(&mut machine);
        machine.cpu.regs[reg::RBX] = DATA;
        let next_rip = GUEST + bytes.len() as u64;
        let wanted = Exit { info1, next_rip, ..Exit::plain(exit_code) };
        assert_eq!(leaves(&mut machine, bytes), wanted, "{bytes:x?}");
    }
}

#[test]
fn intercepted_invalidations_of_contexts_tell_of_what() {
    let mut machine = host();
    // invpcid rcx, [rbx + 8]
    let bytes = &[0x66, 0x0f, 0x38, 0x82, 0x4b, 0x08];
    machine.cpu.regs[reg::RBX] = DATA;
    machine.cpu.regs[reg::RCX] = 2;
    enter(&mut machine);
    assert_eq!(run(&mut machine, bytes), Ok(Flow::Next), "it is not intercepted");
    assert_eq!(run(&mut machine, CPUID), Err(Trap::Intercepted));
    finish(&mut machine);
    intercept(&machine, code::INVPCID);
    machine.poke(VMCB + at::RIP, GUEST);
    enter(&mut machine);
    let wanted = Exit { info1: DATA + 8, info2: 2, next_rip: GUEST + 6, ..Exit::plain(code::INVPCID) };
    assert_eq!(leaves(&mut machine, bytes), wanted);
}

#[test]
fn only_writes_of_cr0_that_change_much_meet_the_selective_intercept() {
    let mut machine = host();
    intercept(&machine, code::CR0_SEL_WRITE);
    enter(&mut machine);
    machine.cpu.regs[reg::RBX] = machine.cpu.cr0 ^ cr0::TS;
    assert_eq!(run(&mut machine, &[0x0f, 0x22, 0xc3]), Ok(Flow::Next));
    machine.cpu.regs[reg::RBX] = machine.cpu.cr0 ^ cr0::AM;
    assert_eq!(leaves(&mut machine, &[0x0f, 0x22, 0xc3]).code, code::CR0_SEL_WRITE);
}

#[test]
fn maps_say_which_registers_and_ports_are_intercepted() {
    let mut machine = host();
    intercept(&machine, code::MSR);
    intercept(&machine, code::IOIO);
    machine.poke(VMCB + at::MSRPM, MSRPM);
    machine.poke(VMCB + at::IOPM, IOPM);
    // Writes of LSTAR (0xc0000082); ports 0x3f8 and 0xffff.
    machine.poke(MSRPM + 0x800 + 0x20, 1 << 5);
    machine.poke(IOPM + 0x3f8 / 8, 1);
    machine.poke(IOPM + 0x1ff8, 1 << 63);
    enter(&mut machine);
    machine.cpu.regs[reg::RCX] = 0xc000_0082;
    assert_eq!(run(&mut machine, &[0x0f, 0x32]), Ok(Flow::Next));
    assert_eq!(leaves(&mut machine, &[0x0f, 0x30]).info1, 1);
    enter(&mut machine);
    machine.cpu.regs[reg::RCX] = 0x4000_0000;
    assert_eq!(leaves(&mut machine, &[0x0f, 0x32]).code, code::MSR, "one that no map knows");
    for (port, bytes, info1) in [
        (0x3f8, &[0xee][..], 0x3f8_0010),
        (0x3f7, &[0x66, 0xed], 0x3f7_0021),
        (0x3f8, &[0xf3, 0x6c], 0x3f8_0000 | 1 | 4 | 8 | 0x10 | 0x200),
        (0x3f8, &[0x64, 0x6e], 0x3f8_0000 | 4 | 0x10 | 0x200 | 4 << 10),
        (0xffff, &[0xec], 0xffff_0011),
    ] {
        machine.poke(VMCB + at::RIP, GUEST);
        enter(&mut machine);
        machine.cpu.regs[reg::RDX] = port;
        machine.cpu.regs[reg::RCX] = 5;
        let next_rip = GUEST + bytes.len() as u64;
        let wanted = Exit { info1, info2: next_rip, next_rip, ..Exit::plain(code::IOIO) };
        assert_eq!(leaves(&mut machine, bytes), wanted, "{bytes:x?}");
    }
    enter(&mut machine);
    machine.cpu.regs[reg::RDX] = 0x400;
    assert_eq!(run(&mut machine, &[0xee]), Ok(Flow::Next));
}

#[test]
fn exceptions_of_privilege_come_before_intercepts() {
    let mut machine = host();
    for code in [code::HLT, code::MSR, code::CR_READ, code::INVLPG] {
        intercept(&machine, code);
    }
    machine.memory.write(VMCB + at::CPL, &[3]).unwrap();
    enter(&mut machine);
    for bytes in [&[0xf4][..], &[0x0f, 0x32], &[0x0f, 0x20, 0xc0], &[0x0f, 0x01, 0x3b]] {
        assert_eq!(run(&mut machine, bytes), Err(Trap::gp(0)), "{bytes:x?}");
    }
}

#[test]
fn pointers_of_pae_paging_are_looked_at_without_nested_paging() {
    const POINTERS: u64 = 0x5_0020;
    let pae = |machine: &Machine, pointer: u64| {
        machine.poke(POINTERS + 16, pointer);
        machine.poke(VMCB + at::CR0, cr0::PE | cr0::PG | cr0::ET);
        machine.poke(VMCB + at::CR3, POINTERS);
        machine.poke(VMCB + at::EFER, efer::SVME);
    };
    let mut machine = host();
    pae(&machine, 0x5_1001);
    enter(&mut machine);
    assert_eq!(machine.cpu.pdpte[2], 0x5_1001);
    for bad in [1 | 1 << 52, 1 | 1 << 5, 1 | 1 << 63] {
        let mut machine = host();
        pae(&machine, bad);
        assert_eq!(run(&mut machine, VMRUN), Ok(Flow::Jump));
        assert_eq!(exit(&machine).code, code::INVALID, "{bad:#x}");
        // An absent one may have any bits, and with nested paging nobody looks until it is used.
        let mut machine = host();
        pae(&machine, bad & !1);
        enter(&mut machine);
        let mut machine = nested_host();
        pae(&machine, bad);
        enter(&mut machine);
    }
}

#[test]
fn writes_of_cr0_have_two_intercepts() {
    const MOV_CR0_EAX: &[u8] = &[0x0f, 0x22, 0xc0];
    const LMSW_AX: &[u8] = &[0x0f, 0x01, 0xf0];
    let cr0_with = |bit: u64, intercepts: &[u64], bytes: &[u8]| {
        let mut machine = host();
        intercepts.iter().for_each(|code| intercept(&machine, *code));
        enter(&mut machine);
        machine.cpu.regs[reg::RAX] = machine.cpu.cr0 ^ bit;
        match run(&mut machine, bytes) {
            Err(Trap::Intercepted) => finish(&mut machine).code,
            _ => 0,
        }
    };
    let both = [code::CR_WRITE, code::CR0_SEL_WRITE];
    assert_eq!(cr0_with(cr0::CD, &both, MOV_CR0_EAX), code::CR_WRITE, "that of all writes comes first");
    assert_eq!(cr0_with(cr0::CD, &both[1..], MOV_CR0_EAX), code::CR0_SEL_WRITE);
    assert_eq!(cr0_with(cr0::MP, &both[1..], MOV_CR0_EAX), 0);
    assert_eq!(cr0_with(cr0::MP, &both[1..], LMSW_AX), code::CR0_SEL_WRITE, "every change by LMSW counts");
    assert_eq!(cr0_with(0, &both[1..], LMSW_AX), 0);
}

#[test]
fn a_guest_that_sets_the_counter_sets_the_host_s() {
    const TSC: u32 = 0x10;
    let mut machine = host();
    machine.poke(VMCB + at::TSC_OFFSET, 5000);
    enter(&mut machine);
    machine.core().write_msr(TSC, 1_000_000).unwrap();
    // The clock of tests goes on by one at each look.
    let counter = |machine: &mut Machine| machine.core().read_msr(TSC).unwrap() / 100 * 100;
    assert_eq!(counter(&mut machine), 1_005_000);
    leaves(&mut machine, CPUID);
    assert_eq!(counter(&mut machine), 1_000_000);
}

#[test]
fn rsm_is_intercepted_before_it_is_undefined() {
    const RSM: &[u8] = &[0x0f, 0xaa];
    let mut machine = host();
    enter(&mut machine);
    assert_eq!(run(&mut machine, RSM), Err(Trap::UD));
    let mut machine = host();
    intercept(&machine, code::RSM);
    enter(&mut machine);
    assert_eq!(leaves(&mut machine, RSM).code, code::RSM);
}
