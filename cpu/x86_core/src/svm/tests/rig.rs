//! A host in 64-bit mode with a guest in 64-bit mode that has the same page tables.

use super::super::vmcb::at;
use super::super::{Exit, code, testing};
use crate::testing::{CODE, Machine, PAGE_TABLES};
use crate::{Flow, Segment, Trap, efer, flags, reg};
use iced_x86::{Decoder, DecoderOptions};

/// The guest's VMCB, its nested page tables, the maps of MSRs and of ports.
pub(super) const VMCB: u64 = 0x60_0000;
pub(super) const NESTED: u64 = 0x61_0000;
pub(super) const MSRPM: u64 = 0x62_0000;
pub(super) const IOPM: u64 = 0x63_0000;
/// Where the guest begins.
pub(super) const GUEST: u64 = 0x30_0000;

pub(super) const VMRUN: &[u8] = &[0x0f, 0x01, 0xd8];
pub(super) const CPUID: &[u8] = &[0x0f, 0xa2];

/// The machine, with RIP at VMRUN and a VMCB that is good: VMRUN and CPUID are intercepted.
pub(super) fn host() -> Machine {
    let mut machine = Machine::long();
    machine.cpu.msrs.efer |= efer::SVME;
    machine.cpu.regs[reg::RAX] = VMCB;
    machine.cpu.rflags |= flags::IF;
    testing::write_vmcb(&machine, VMCB, GUEST);
    intercept(&machine, code::CPUID);
    machine
}

pub(super) fn poke_segment(machine: &Machine, offset: u64, segment: &Segment) {
    testing::write_segment(machine, VMCB + offset, segment);
}

/// The same with nested paging, which maps the first 16 MiB one to one in pages of 4 KiB.
pub(super) fn nested_host() -> Machine {
    let machine = host();
    testing::nest(&machine, VMCB, NESTED);
    machine
}

/// Where the nested tables' entry for a page is.
pub(super) fn nested_entry(gpa: u64) -> u64 {
    testing::nested_entry(NESTED, gpa)
}

/// Has an exit intercepted.
pub(super) fn intercept(machine: &Machine, code: u64) {
    testing::intercept(machine, VMCB, code);
}

/// Executes one system instruction at RIP, and what comes of it.
pub(super) fn run(machine: &mut Machine, bytes: &[u8]) -> Result<Flow, Trap> {
    let bits = machine.core().code_size().bits();
    let insn = Decoder::with_ip(bits, bytes, machine.cpu.rip, DecoderOptions::NONE).decode();
    assert!(!insn.is_invalid(), "{bytes:x?}");
    let flow = crate::system::execute(&mut machine.core(), &insn)?;
    if flow == Flow::Next {
        machine.cpu.rip = insn.next_ip();
    }
    Ok(flow)
}

/// Enters the guest.
pub(super) fn enter(machine: &mut Machine) {
    machine.cpu.rip = CODE;
    machine.cpu.regs[reg::RAX] = VMCB;
    assert_eq!(run(machine, VMRUN), Ok(Flow::Jump));
    assert!(machine.cpu.svm.guest, "exit code {:#x}", machine.peek(VMCB + at::EXIT_CODE));
}

/// Asserts that the guest leaves at an instruction, and gives what the host is told.
pub(super) fn leaves(machine: &mut Machine, bytes: &[u8]) -> Exit {
    assert_eq!(run(machine, bytes), Err(Trap::Intercepted), "{bytes:x?}");
    finish(machine)
}

/// Makes the #VMEXIT.
pub(super) fn finish(machine: &mut Machine) -> Exit {
    assert_eq!(machine.core().deliver_trap(Trap::Intercepted), Ok(()));
    exit(machine)
}

/// What the host is told of the exit that was made.
pub(super) fn exit(machine: &Machine) -> Exit {
    assert!(!machine.cpu.svm.guest && !machine.cpu.svm.gif, "the host runs, with GIF clear");
    assert_eq!(machine.cpu.cr3, PAGE_TABLES);
    Exit {
        code: machine.peek(VMCB + at::EXIT_CODE),
        info1: machine.peek(VMCB + at::EXIT_INFO1),
        info2: machine.peek(VMCB + at::EXIT_INFO2),
        next_rip: machine.peek(VMCB + at::NEXT_RIP),
        data_access: false,
    }
}
