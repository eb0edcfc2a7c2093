//! VMCBs and nested page tables for tests.

use super::code;
use super::vmcb::at;
use crate::testing::{Machine, STACK};
use crate::{Segment, flags};

/// Where EXITCODE, EXITINFO1 and EXITINFO2 are in a VMCB.
pub const EXIT: [u64; 3] = [at::EXIT_CODE, at::EXIT_INFO1, at::EXIT_INFO2];
/// Where RIP is.
pub const RIP: u64 = at::RIP;
/// Where RFLAGS are.
pub const RFLAGS: u64 = at::RFLAGS;
/// Where the word of the virtual interrupt is.
pub const INTERRUPTS: u64 = at::INTERRUPTS;
/// Where the address space identifier is, with TLB_CONTROL above it.
pub const ASID: u64 = at::ASID;

/// Makes the page at `vmcb` a VMCB that is good, of a guest that begins at `rip` in the mode that the machine's
/// processor is in, with its tables and its stack. VMRUN is intercepted.
pub fn write_vmcb(machine: &Machine, vmcb: u64, rip: u64) {
    let cpu = &machine.cpu;
    intercept(machine, vmcb, code::VMRUN);
    for (offset, value) in [
        (at::ASID, 1),
        (at::EFER, cpu.msrs.efer),
        (at::CR0, cpu.cr0),
        (at::CR3, cpu.cr3),
        (at::CR4, cpu.cr4),
        (at::RFLAGS, flags::FIXED),
        (at::RIP, rip),
        (at::RSP, STACK),
        (at::DR6, 0xffff_0ff0),
        (at::DR7, 0x400),
        (at::PAT, 0x0007_0406_0007_0406),
        (at::GDTR, u64::from(cpu.gdtr.limit) << 32),
        (at::GDTR + 8, cpu.gdtr.base),
        (at::IDTR, u64::from(cpu.idtr.limit) << 32),
        (at::IDTR + 8, cpu.idtr.base),
    ] {
        machine.poke(vmcb + offset, value);
    }
    for (index, segment) in (0..).zip(&cpu.segments[..4]) {
        write_segment(machine, vmcb + at::ES + 16 * index, segment);
    }
}

/// Writes a segment register of a VMCB.
pub fn write_segment(machine: &Machine, place: u64, segment: &Segment) {
    let attributes = u64::from(segment.attributes & 0xff | segment.attributes >> 4 & 0xf00);
    machine.poke(place, u64::from(segment.selector) | attributes << 16 | u64::from(segment.limit) << 32);
    machine.poke(place + 8, segment.base);
}

/// Has an exit intercepted.
///
/// # Panics
/// If there is no RAM.
pub fn intercept(machine: &Machine, vmcb: u64, code: u64) {
    let place = vmcb + code / 32 * 4;
    let mut word = [0; 4];
    machine.memory.read(place, &mut word).expect("RAM");
    let word = u32::from_le_bytes(word) | 1 << (code % 32);
    machine.memory.write(place, &word.to_le_bytes()).expect("RAM");
}

/// Gives the VMCB nested page tables, in the eleven pages from `tables` on, which map the first 16 MiB one to one in
/// pages of 4 KiB.
pub fn nest(machine: &Machine, vmcb: u64, tables: u64) {
    machine.poke(vmcb + at::NESTED_CONTROL, 1);
    machine.poke(vmcb + at::NCR3, tables);
    machine.poke(tables, (tables + 0x1000) | 7);
    machine.poke(tables + 0x1000, (tables + 0x2000) | 7);
    for table in 0..8 {
        machine.poke(tables + 0x2000 + 8 * table, (tables + 0x3000 + 0x1000 * table) | 7);
        for page in 0..512 {
            machine.poke(tables + 0x3000 + 0x1000 * table + 8 * page, table << 21 | page << 12 | 7);
        }
    }
}

/// Where the entry for a page is in those.
pub fn nested_entry(tables: u64, gpa: u64) -> u64 {
    tables + 0x3000 + (gpa >> 12) * 8
}
