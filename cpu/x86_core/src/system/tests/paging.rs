//! What CR4 adds to paging: process-context identifiers, protection keys, a fifth level.

use super::*;
use crate::testing::PAGE_TABLES;

const INVPCID: &[u8] = &[0x66, 0x0f, 0x38, 0x82, 0x03]; // invpcid rax, [rbx]
const RDPKRU: &[u8] = &[0x0f, 0x01, 0xee];
const WRPKRU: &[u8] = &[0x0f, 0x01, 0xef];

/// A 64-bit machine whose page of `DATA` has protection key 3, and is a user page or not.
fn keyed(user_page: bool, cpl: u8) -> Machine {
    let mut machine = if cpl == 3 { Machine::user() } else { Machine::long() };
    let at = PAGE_TABLES + 0x2000 + (DATA >> 21) * 8;
    let entry = machine.peek(at) & !4 | if user_page { 4 } else { 0 };
    machine.poke(at, entry | 3 << 59);
    machine.core().flush_tlb(false);
    machine
}

#[test]
fn process_context_identifiers() {
    let mut machine = Machine::long();
    let mut core = machine.core();
    let gp = Err(Trap::gp(0));
    assert_eq!(core.set_cr3(1 << 63 | PAGE_TABLES), gp, "no identifiers yet");
    core.set_cr3(PAGE_TABLES | 8).unwrap();
    assert_eq!(core.set_cr4(core.cpu.cr4 | cr4::PCIDE), gp, "low bits of CR3");
    core.set_cr3(PAGE_TABLES).unwrap();
    core.set_cr4(core.cpu.cr4 | cr4::PCIDE).unwrap();
    core.set_cr3(1 << 63 | PAGE_TABLES | 0x123).unwrap();
    assert_eq!(core.cpu.cr3, PAGE_TABLES | 0x123, "the bit that keeps translations is not kept itself");
    assert_eq!(core.read::<u64>(Seg::Ds, DATA), Ok(0));
    // Compatibility mode: paging cannot go while there are identifiers.
    core.far_jump(selector::CODE32, CODE, 4, 0).unwrap();
    assert_eq!(core.set_cr0(core.cpu.cr0 & !cr0::PG), gp);
    core.set_cr4(core.cpu.cr4 & !cr4::PCIDE).unwrap();
    core.set_cr0(core.cpu.cr0 & !cr0::PG).unwrap();
    assert_eq!(core.set_cr4(core.cpu.cr4 | cr4::PCIDE), gp, "outside of IA-32e mode");
}

#[test]
fn invpcid_checks_its_descriptor() {
    let mut machine = Machine::long();
    machine.cpu.regs[reg::RBX] = DATA;
    let invalidate = |machine: &mut Machine, kind, context, va| {
        machine.cpu.regs[reg::RAX] = kind;
        machine.poke(DATA, context);
        machine.poke(DATA + 8, va);
        run(machine, INVPCID)
    };
    for kind in 0..4 {
        assert_eq!(invalidate(&mut machine, kind, 0, DATA), NEXT, "{kind}");
    }
    assert_eq!(invalidate(&mut machine, 4, 0, 0), GP);
    assert_eq!(invalidate(&mut machine, 0, 1, 0), GP, "an identifier, without identifiers");
    assert_eq!(invalidate(&mut machine, 2, 1, 0), NEXT, "which these kinds do not look at");
    assert_eq!(invalidate(&mut machine, 2, 1 << 12, 0), GP);
    assert_eq!(invalidate(&mut machine, 0, 0, 1 << 60), GP);
    machine.cpu.cr4 |= cr4::PCIDE;
    assert_eq!(invalidate(&mut machine, 0, 7, DATA), NEXT);
    let mut machine = Machine::user();
    machine.cpu.regs[reg::RBX] = DATA;
    assert_eq!(invalidate(&mut machine, 0, 0, 0), GP);
    let mut machine = Machine::long();
    let mut model = CpuModel::clone(&machine.cpu.model);
    model.change_features(&[("invpcid".to_owned(), false)]).unwrap();
    machine.cpu.model = Arc::new(model);
    assert_eq!(run(&mut machine, INVPCID), UD);
}

#[test]
fn protection_keys_of_user_pages() {
    let read = |machine: &mut Machine| machine.core().read::<u64>(Seg::Ds, DATA).map(drop);
    let write = |machine: &mut Machine| machine.core().write::<u64>(Seg::Ds, DATA, 0);
    for cpl in [0, 3] {
        let fault = |write: u32| Err(Trap::pf(DATA, 0x21 | write | if cpl == 3 { 4 } else { 0 }));
        let mut machine = keyed(true, cpl);
        machine.cpu.pkru = 0b11 << 6;
        assert_eq!((read(&mut machine), write(&mut machine)), (Ok(()), Ok(())), "keys are off");
        machine.cpu.cr4 |= cr4::PKE;
        machine.core().flush_tlb(false);
        assert_eq!((read(&mut machine), write(&mut machine)), (fault(0), fault(2)), "no access");
        machine.core().set_pkru(0b10 << 6);
        assert_eq!((read(&mut machine), write(&mut machine)), (Ok(()), fault(2)), "no stores");
        machine.cpu.cr0 &= !cr0::WP;
        machine.core().flush_tlb(false);
        let free = if cpl == 0 { Ok(()) } else { fault(2) };
        assert_eq!(write(&mut machine), free, "the kernel without write protection");
        machine.core().set_pkru(0xffff_ff3f);
        assert_eq!((read(&mut machine), write(&mut machine)), (Ok(()), Ok(())), "other keys");
        machine.core().set_pkru(0b11 << 6);
        machine.cpu.rip = DATA;
        assert!(machine.core().fetch_physical().is_ok(), "fetches have no keys");
    }
}

#[test]
fn the_registers_of_protection_keys() {
    let mut machine = keyed(true, 3);
    (machine.cpu.regs[reg::RCX], machine.cpu.regs[reg::RDX]) = (0, 0);
    assert_eq!(run(&mut machine, RDPKRU), UD, "keys are off");
    machine.cpu.cr4 |= cr4::PKE;
    machine.cpu.regs[reg::RAX] = 0xffff_ffff_0000_00c0;
    run(&mut machine, WRPKRU).unwrap();
    assert_eq!(machine.cpu.pkru, 0xc0);
    assert!(machine.core().read::<u8>(Seg::Ds, DATA).is_err());
    machine.cpu.regs[reg::RAX] = 0;
    run(&mut machine, WRPKRU).unwrap();
    assert!(machine.core().read::<u8>(Seg::Ds, DATA).is_ok());
    machine.cpu.regs[reg::RDX] = 5;
    assert_eq!(run(&mut machine, WRPKRU), GP);
    run(&mut machine, RDPKRU).unwrap();
    assert_eq!((machine.cpu.regs[reg::RAX], machine.cpu.regs[reg::RDX]), (0, 0));
    machine.cpu.regs[reg::RCX] = 1;
    assert_eq!(run(&mut machine, RDPKRU), GP);
    assert_eq!(machine.core().cpuid(7, 0)[2] >> 3 & 3, 3, "PKU and OSPKE");

    // Those of supervisor pages are in an MSR, and do not concern user pages.
    let mut machine = keyed(false, 0);
    let mut core = machine.core();
    core.set_cr4(core.cpu.cr4 | cr4::PKS).unwrap();
    core.read::<u8>(Seg::Ds, DATA).unwrap();
    core.write_msr(0x6e1, 0b11 << 6).unwrap();
    assert_eq!(core.read::<u8>(Seg::Ds, DATA), Err(Trap::pf(DATA, 0x21)));
    core.write_msr(0x6e1, 0b10 << 6).unwrap();
    assert_eq!(core.write::<u8>(Seg::Ds, DATA, 1), Err(Trap::pf(DATA, 0x23)));
    assert_eq!(core.read_msr(0x6e1), Ok(0b10 << 6));
    assert_eq!(core.write_msr(0x6e1, 1 << 32), Err(Trap::gp(0)));
    let mut machine = keyed(true, 0);
    machine.cpu.cr4 |= cr4::PKS;
    machine.core().write_msr(0x6e1, 0b11 << 6).unwrap();
    assert!(machine.core().write::<u8>(Seg::Ds, DATA, 1).is_ok());
}

#[test]
fn a_fifth_level_of_paging() {
    const TOP: u64 = 0x50_0000;
    const FAR: u64 = 0x00f0_0000_0000_0000;
    let mut machine = Machine::long();
    let gp = Err(Trap::gp(0));
    let with_la57 = machine.cpu.cr4 | cr4::LA57;
    assert_eq!(machine.core().set_cr4(with_la57), Err(Trap::gp(0)), "in IA-32e mode");
    assert_eq!(machine.core().read::<u64>(Seg::Ds, FAR), gp);
    machine.poke(TOP, PAGE_TABLES | 7);
    machine.poke(TOP + (FAR >> 48 & 0x1ff) * 8, PAGE_TABLES | 7);
    machine.poke(DATA, 0x1234);
    machine.cpu.cr4 |= cr4::LA57;
    machine.core().set_cr3(TOP).unwrap();
    for va in [DATA, FAR + DATA] {
        assert_eq!(machine.core().read::<u64>(Seg::Ds, va), Ok(0x1234), "{va:#x}");
    }
    assert_eq!(machine.core().read::<u64>(Seg::Ds, 1 << 56), gp);
    let absent = 0x0020_0000_0000_0000;
    assert_eq!(machine.core().read::<u64>(Seg::Ds, absent), Err(Trap::pf(absent, 0)));
    machine.poke(TOP + 8, 0x87);
    let reserved = 1 << 48;
    assert_eq!(
        machine.core().read::<u64>(Seg::Ds, reserved),
        Err(Trap::pf(reserved, 9)),
        "no page is so large"
    );
    // Bases may have the bits of five levels whatever is in force.
    machine.cpu.cr4 &= !cr4::LA57;
    machine.core().set_cr3(PAGE_TABLES).unwrap();
    machine.core().write_msr(0xc000_0102, FAR).unwrap();
    assert_eq!(machine.core().write_msr(0xc000_0102, 1 << 56), Err(Trap::gp(0)));
    assert_eq!(machine.core().cpuid(0x8000_0008, 0)[0] >> 8 & 0xff, 57);
}
