//! VMCBs, maps and tables at addresses where there is nothing of the kind.

use super::super::code;
use super::super::vmcb::at;
use super::rig::*;
use crate::testing::{MMIO, RAM};
use crate::{Flow, Seg, Trap, reg};
use proptest::prelude::*;

#[test]
fn a_vmcb_that_is_no_memory_makes_no_sense() {
    for address in [MMIO, RAM, 0x3fff_ffff_f000] {
        let mut machine = host();
        machine.cpu.regs[reg::RAX] = address;
        assert_eq!(run(&mut machine, VMRUN), Ok(Flow::Jump));
        assert!(!machine.cpu.svm.guest && !machine.cpu.svm.gif);
        for bytes in [&[0x0f, 0x01, 0xda][..], &[0x0f, 0x01, 0xdb]] {
            machine.cpu.regs[reg::RAX] = address;
            assert_eq!(run(&mut machine, bytes), Ok(Flow::Next));
        }
        assert!(machine.platform.log.borrow().is_empty(), "devices are not touched");
    }
}

#[test]
fn maps_that_are_no_memory_intercept_everything() {
    let mut machine = host();
    intercept(&machine, code::MSR);
    intercept(&machine, code::IOIO);
    machine.poke(VMCB + at::MSRPM, MMIO);
    machine.poke(VMCB + at::IOPM, RAM - 0x1000);
    enter(&mut machine);
    assert_eq!(run(&mut machine, &[0xe4, 0x80]), Ok(Flow::Next), "the last page of memory says nothing");
    machine.cpu.regs[reg::RDX] = 0x8000;
    assert_eq!(leaves(&mut machine, &[0xec]).code, code::IOIO);
    enter(&mut machine);
    machine.cpu.regs[reg::RCX] = 0xc000_0080;
    assert_eq!(leaves(&mut machine, &[0x0f, 0x32]).code, code::MSR);
}

#[test]
fn maps_of_a_restored_guest_may_be_anywhere() {
    let mut machine = host();
    intercept(&machine, code::MSR);
    intercept(&machine, code::IOIO);
    machine.poke(VMCB + at::MSRPM, MSRPM);
    machine.poke(VMCB + at::IOPM, IOPM);
    enter(&mut machine);
    let control = &mut machine.cpu.svm.control;
    (control.msrpm, control.iopm) = (!0xfff, !0xfff);
    machine.cpu.regs[reg::RDX] = 0xffff;
    machine.cpu.regs[reg::RCX] = 0xc001_1fff;
    // Beyond the highest address there is the lowest.
    assert_eq!(run(&mut machine, &[0xec]), Ok(Flow::Next));
    assert!(!machine.core().msr_is_mapped(0xc001_1fff, true));
}

proptest! {
    #[test]
    fn whatever_the_vmcb_says_the_processor_goes_on(
        control in prop::collection::vec((0u64..0x100, any::<u64>()), 0..12),
        state in prop::collection::vec((0x400u64..0x690, any::<u64>()), 0..12),
        mask in any::<u64>(),
        nested: bool,
        addresses in prop::collection::vec(any::<u64>(), 4),
        instructions in prop::collection::vec(prop::collection::vec(any::<u8>(), 15), 6),
    ) {
        let mut machine = if nested { nested_host() } else { host() };
        for (offset, value) in control.into_iter().chain(state) {
            let offset = VMCB + (offset & !7);
            // Some bits of what is good: otherwise hardly any is.
            machine.poke(offset, machine.peek(offset) ^ value & mask);
        }
        match run(&mut machine, VMRUN) {
            Ok(flow) => prop_assert_eq!(flow, Flow::Jump),
            // What it injects has no handler.
            Err(trap) => {
                prop_assert_eq!(trap, Trap::TripleFault);
                return Ok(());
            }
        }
        for address in addresses {
            for address in [address, address & 0xff_ffff] {
                let trap = machine.core().read::<u64>(Seg::Ds, address).err();
                let trap = trap.or_else(|| machine.core().write::<u64>(Seg::Ss, address, 1).err());
                let fetched = machine.core().fetch(&mut [0; 15]).err();
                if let Some(trap) = trap.or(fetched) {
                    let guest = machine.cpu.svm.guest;
                    prop_assert!(guest || trap != Trap::Intercepted);
                    if machine.core().deliver_trap(trap).is_err() {
                        return Ok(());
                    }
                }
            }
        }
        for bytes in instructions {
            let bits = machine.core().code_size().bits();
            let insn = iced_x86::Decoder::with_ip(bits, &bytes, machine.cpu.rip, 0).decode();
            if insn.is_invalid() {
                continue;
            }
            if let Err(trap) = crate::system::execute(&mut machine.core(), &insn)
                && machine.core().deliver_trap(trap).is_err()
            {
                return Ok(());
            }
        }
    }
}
