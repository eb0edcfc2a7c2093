//! Nested paging, and the translations of two worlds.

use super::super::code;
use super::super::vmcb::at;
use super::rig::*;
use crate::testing::{CODE, DATA, MMIO, PAGE_TABLES};
use crate::{Flow, Seg, Trap, reg};

const OTHER: u64 = 0x50_0000;

#[test]
fn addresses_of_the_guest_are_those_that_nested_tables_say() {
    let mut machine = nested_host();
    machine.poke(nested_entry(DATA), OTHER | 7);
    machine.poke(OTHER, 0x1234);
    machine.poke(DATA, 0x5678);
    enter(&mut machine);
    assert_eq!(machine.core().read::<u64>(Seg::Ds, DATA), Ok(0x1234));
    assert_eq!(machine.core().write::<u64>(Seg::Ds, DATA, 0x99), Ok(()));
    leaves(&mut machine, CPUID);
    assert_eq!(machine.core().read::<u64>(Seg::Ds, DATA), Ok(0x5678), "the host's own");
    assert_eq!(machine.peek(OTHER), 0x99);
    assert_eq!(machine.peek(nested_entry(DATA)) & 0x60, 0x60, "accessed and dirty");
    assert_eq!(machine.peek(nested_entry(PAGE_TABLES)) & 0x60, 0x60, "walks are stores");
}

#[test]
fn what_nested_tables_do_not_allow_the_host_is_told() {
    let read =
        |machine: &mut crate::testing::Machine| machine.core().read::<u8>(Seg::Ds, DATA + 5).map(|_| ());
    let mut machine = nested_host();
    machine.memory.write(GUEST, &[0x8a, 0x03]).unwrap();
    machine.poke(nested_entry(DATA), 0);
    enter(&mut machine);
    assert_eq!(read(&mut machine), Err(Trap::Intercepted));
    let told = finish(&mut machine);
    assert_eq!((told.code, told.info1, told.info2), (code::NPF, 0x1_0000_0004, DATA + 5));
    assert_eq!(machine.peek(VMCB + at::INSTRUCTION) & 0xff_ffff, 0x03_8a_0f, "15 bytes, and the first two");
    assert_eq!(machine.peek(VMCB + at::RIP), GUEST);

    machine.poke(nested_entry(DATA), DATA | 5);
    enter(&mut machine);
    assert_eq!(read(&mut machine), Ok(()), "entries that were not present are not kept");
    assert_eq!(machine.core().write::<u8>(Seg::Ds, DATA, 1), Err(Trap::Intercepted));
    assert_eq!(finish(&mut machine).info1, 0x1_0000_0007);

    machine.poke(nested_entry(DATA), DATA | 7);
    enter(&mut machine);
    assert_eq!(machine.core().write::<u8>(Seg::Ds, DATA, 1), Ok(()), "a right may be given without a flush");
    machine.poke(nested_entry(CODE), CODE | 7 | 1 << 63);
    machine.cpu.rip = CODE;
    assert_eq!(machine.core().fetch(&mut [0; 15]), Err(Trap::Intercepted));
    assert_eq!(finish(&mut machine).info1, 0x1_0000_0015);

    for (entry, info1) in [(5, 0x2_0000_0007), (0, 0x2_0000_0006), (7 | 1 << 51, 0x2_0000_000f)] {
        let mut machine = nested_host();
        machine.poke(nested_entry(PAGE_TABLES), if entry == 0 { 0 } else { PAGE_TABLES | entry });
        enter(&mut machine);
        assert_eq!(read(&mut machine), Err(Trap::Intercepted));
        let told = finish(&mut machine);
        assert_eq!((told.info1, told.info2), (info1, PAGE_TABLES));
    }
    let mut machine = nested_host();
    machine.poke(nested_entry(DATA), DATA | 3);
    enter(&mut machine);
    assert_eq!(read(&mut machine), Err(Trap::Intercepted), "all of the guest's accesses are a user's");
}

#[test]
fn guests_without_paging_go_through_nested_tables_too() {
    let mut machine = nested_host();
    machine.poke(VMCB + at::CR0, crate::cr0::PE | crate::cr0::ET);
    machine.poke(VMCB + at::EFER, crate::efer::SVME);
    let code = crate::Segment { attributes: 0xc09b, ..machine.cpu.segments[1] };
    poke_segment(&machine, at::ES + 16, &code);
    machine.poke(nested_entry(DATA), OTHER | 7);
    machine.poke(OTHER, 0x1234);
    enter(&mut machine);
    assert_eq!(machine.core().read::<u32>(Seg::Ds, DATA), Ok(0x1234));
    assert_eq!(machine.core().read::<u32>(Seg::Ds, 0x200_0000), Err(Trap::Intercepted));
    assert_eq!(finish(&mut machine).info2, 0x200_0000);
}

#[test]
fn page_directory_pointers_of_guests_are_read_when_they_are_needed() {
    let mut machine = nested_host();
    machine.poke(VMCB + at::EFER, crate::efer::SVME | crate::efer::NXE);
    let code = crate::Segment { attributes: 0xc09b, ..machine.cpu.segments[1] };
    poke_segment(&machine, at::ES + 16, &code);
    let (pointers, directory) = (0x70_0000, 0x70_1000);
    machine.poke(VMCB + at::CR3, pointers);
    machine.poke(pointers, directory | 1);
    machine.poke(directory + 16, DATA | 0xe7);
    enter(&mut machine);
    machine.poke(DATA + 8, 0x4321);
    assert_eq!(machine.core().read::<u32>(Seg::Ds, DATA + 8), Ok(0x4321));
    machine.poke(nested_entry(pointers), 0);
    leaves(&mut machine, CPUID);
    machine.poke((VMCB + at::TLB_CONTROL) & !7, 1 | 3 << 32);
    enter(&mut machine);
    assert_eq!(machine.core().read::<u32>(Seg::Ds, DATA + 8), Err(Trap::Intercepted));
    let told = finish(&mut machine);
    assert_eq!((told.info1, told.info2), (0x2_0000_0006, pointers));
}

#[test]
fn translations_stay_for_the_next_run_of_the_same_guest() {
    let mut machine = nested_host();
    machine.poke(DATA, 0x5678);
    machine.poke(OTHER, 0x1234);
    let read = |machine: &mut crate::testing::Machine| machine.core().read::<u64>(Seg::Ds, DATA).unwrap();
    enter(&mut machine);
    assert_eq!(read(&mut machine), 0x5678);
    leaves(&mut machine, CPUID);
    machine.poke(nested_entry(DATA), OTHER | 7);
    enter(&mut machine);
    assert_eq!(read(&mut machine), 0x5678, "nobody said that it changed");
    leaves(&mut machine, CPUID);
    // TLB_CONTROL: what belongs to this guest.
    machine.poke(VMCB + at::ASID, 1 | 3 << 32);
    enter(&mut machine);
    assert_eq!(read(&mut machine), 0x1234);
    leaves(&mut machine, CPUID);
    machine.poke(nested_entry(DATA), DATA | 7);
    machine.poke(VMCB + at::ASID, 2);
    enter(&mut machine);
    assert_eq!(read(&mut machine), 0x5678, "another address space");
    leaves(&mut machine, CPUID);
}

#[test]
fn invlpga_drops_a_page_of_one_address_space() {
    let mut machine = host();
    let other_tables = 0x70_0000;
    // The guest has page tables of its own, with a 4 KiB page.
    machine.poke(VMCB + at::CR3, other_tables);
    machine.poke(other_tables, (other_tables + 0x1000) | 7);
    machine.poke(other_tables + 0x1000, (other_tables + 0x2000) | 7);
    machine.poke(other_tables + 0x2000 + 16, (other_tables + 0x3000) | 7);
    machine.poke(other_tables + 0x3000, DATA | 7);
    machine.poke(DATA, 1);
    machine.poke(OTHER, 2);
    let mut read = |asid: u64| {
        enter(&mut machine);
        let value = machine.core().read::<u64>(Seg::Ds, DATA).unwrap();
        leaves(&mut machine, CPUID);
        machine.poke(other_tables + 0x3000, OTHER | 7);
        machine.cpu.regs[reg::RAX] = DATA;
        machine.cpu.regs[reg::RCX] = asid;
        assert_eq!(run(&mut machine, &[0x0f, 0x01, 0xdf]), Ok(Flow::Next));
        value
    };
    assert_eq!([read(0), read(7), read(1), read(0)], [1, 1, 1, 2]);
}

#[test]
fn nested_tables_may_be_anywhere() {
    for root in [MMIO, 0xf_f000_0000, 0xff_f000, VMCB, NESTED + 0x3000] {
        let mut machine = nested_host();
        machine.poke(VMCB + at::NCR3, root);
        enter(&mut machine);
        // Whatever is there: the guest faults, or reads.
        if machine.core().read::<u64>(Seg::Ds, DATA) == Err(Trap::Intercepted) {
            assert_eq!(finish(&mut machine).code, code::NPF);
        }
    }
    // A table that maps itself.
    let mut machine = nested_host();
    machine.poke(NESTED, NESTED | 7);
    enter(&mut machine);
    let _ = machine.core().read::<u64>(Seg::Ds, DATA);
    let _ = machine.core().write::<u64>(Seg::Ds, NESTED, 0);
}

#[test]
fn rights_by_protection_key_change_for_both_worlds() {
    let mut machine = host();
    machine.cpu.cr4 |= crate::cr4::PKE;
    machine.poke(VMCB + at::CR4, machine.cpu.cr4);
    // The page of 2 MiB has key 1.
    let entry = PAGE_TABLES + 0x2000 + (DATA >> 21) * 8;
    machine.poke(entry, machine.peek(entry) | 1 << 59);
    let mut reads = |pkru: u32| {
        machine.core().set_pkru(pkru);
        let outside = machine.core().read::<u8>(Seg::Ds, DATA).is_ok();
        enter(&mut machine);
        let inside = machine.core().read::<u8>(Seg::Ds, DATA).is_ok();
        leaves(&mut machine, CPUID);
        (outside, inside)
    };
    assert_eq!([reads(0), reads(4), reads(0)], [(true, true), (false, false), (true, true)]);
}
