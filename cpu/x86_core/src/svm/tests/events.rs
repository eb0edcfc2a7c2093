//! Interrupts, exceptions, and events that the host injects.

use super::super::vmcb::at;
use super::super::{InterruptAction, code};
use super::rig::*;
use crate::testing::{DATA, HANDLERS, Machine, STACK};
use crate::{Exception, Seg, Trap, flags, reg, vector};

fn exception(vector: u8, error: Option<u32>) -> Exception {
    Exception { vector, error, address: DATA }
}

#[test]
fn intercepted_exceptions_go_to_the_host() {
    let mut machine = host();
    intercept(&machine, code::EXCEPTION + u64::from(vector::PF));
    enter(&mut machine);
    machine.cpu.cr2 = 7;
    assert_eq!(machine.core().deliver(exception(vector::PF, Some(6))), Ok(()));
    let told = exit(&machine);
    assert_eq!((told.code, told.info1, told.info2), (0x4e, 6, DATA));
    assert_eq!(machine.peek(VMCB + at::CR2), 7, "the guest has not seen it");
    assert_eq!(machine.peek(VMCB + at::INSTRUCTION) & 0xff, 15);
    enter(&mut machine);
    assert_eq!(machine.core().deliver(exception(vector::GP, Some(0))), Ok(()));
    assert!(machine.cpu.svm.guest);
    assert_eq!(machine.cpu.rip, HANDLERS + 16 * 13, "others are the guest's");
}

#[test]
fn an_exception_in_the_delivery_of_an_event_tells_of_that() {
    let mut machine = host();
    intercept(&machine, code::EXCEPTION + u64::from(vector::GP));
    machine.poke(VMCB + at::IDTR, 0);
    enter(&mut machine);
    assert_eq!(machine.core().interrupt(0x40), Ok(()));
    assert_eq!(exit(&machine).code, 0x4d);
    assert_eq!(machine.peek(VMCB + at::EXIT_INT_INFO), 1 << 31 | 0x40);
    enter(&mut machine);
    assert_eq!(machine.core().software_interrupt(0x80, GUEST + 2), Err(Trap::gp(0x80 * 8 + 2)));
    assert_eq!(machine.core().deliver(exception(vector::GP, Some(0x402))), Ok(()));
    assert_eq!(machine.peek(VMCB + at::EXIT_INT_INFO), 1 << 31 | 4 << 8 | 0x80);
    enter(&mut machine);
    assert_eq!(machine.core().deliver(exception(vector::UD, None)), Ok(()));
    assert_eq!(machine.peek(VMCB + at::EXIT_INT_INFO), 1 << 31 | 3 << 8 | 6);
    enter(&mut machine);
    leaves(&mut machine, CPUID);
    assert_eq!(machine.peek(VMCB + at::EXIT_INT_INFO), 0);
}

#[test]
fn a_nested_fault_in_the_delivery_of_an_event_tells_of_that() {
    let mut machine = nested_host();
    machine.poke(nested_entry(STACK - 8), 0);
    enter(&mut machine);
    assert_eq!(machine.core().deliver(exception(vector::PF, Some(2))), Ok(()));
    let told = exit(&machine);
    assert_eq!((told.code, told.info2), (code::NPF, STACK - 48));
    assert_eq!(machine.peek(VMCB + at::EXIT_INT_INFO), 1 << 31 | 1 << 11 | 3 << 8 | 14 | 2 << 32);
    assert_eq!(machine.peek(VMCB + at::CR2), DATA);
    assert_eq!(machine.peek(VMCB + at::RSP), STACK);
}

#[test]
fn a_guest_that_shuts_down_may_be_left() {
    let mut machine = host();
    machine.poke(VMCB + at::IDTR, 0);
    enter(&mut machine);
    assert_eq!(machine.core().deliver(exception(vector::GP, Some(0))), Err(Trap::TripleFault));
    let mut machine = host();
    machine.poke(VMCB + at::IDTR, 0);
    intercept(&machine, code::SHUTDOWN);
    enter(&mut machine);
    assert_eq!(machine.core().deliver(exception(vector::GP, Some(0))), Ok(()));
    assert_eq!(exit(&machine).code, code::SHUTDOWN);
}

fn injected(event: u64, next_rip: u64) -> Machine {
    let mut machine = host();
    machine.poke(VMCB + at::EVENT_INJECTION, event);
    machine.poke(VMCB + at::NEXT_RIP, next_rip);
    enter(&mut machine);
    machine
}

#[test]
fn a_host_that_steps_is_told_when_vmrun_is_done() {
    let mut machine = host();
    machine.cpu.rflags |= flags::TF;
    enter(&mut machine);
    leaves(&mut machine, CPUID);
    assert_eq!((machine.cpu.rip, machine.peek(STACK - 40)), (HANDLERS + 16, crate::testing::CODE + 3));
    assert_ne!(machine.cpu.dr[6] & 1 << 14, 0);
}

#[test]
fn events_are_injected_before_the_first_instruction() {
    let handler = |vector: u64| HANDLERS + 16 * vector;
    let machine = injected(1 << 31 | 0x40, 0);
    assert_eq!((machine.cpu.rip, machine.peek(STACK - 40)), (handler(0x40), GUEST));
    let machine = injected(1 << 31 | 3 << 8 | 1 << 11 | 14 | 6 << 32, 0);
    assert_eq!((machine.cpu.rip, machine.peek(STACK - 48)), (handler(14), 6));
    let machine = injected(1 << 31 | 2 << 8 | 2, 0);
    assert_eq!(machine.cpu.rip, handler(2));
    let machine = injected(1 << 31 | 4 << 8 | 0x80, GUEST + 2);
    assert_eq!((machine.cpu.rip, machine.peek(STACK - 40)), (handler(0x80), GUEST + 2));
    let machine = injected(1 << 31 | 3 << 8 | 3, GUEST + 1);
    assert_eq!((machine.cpu.rip, machine.peek(STACK - 40)), (handler(3), GUEST + 1));
    let machine = injected(1 << 31 | 2 << 8, 0);
    assert_eq!(machine.cpu.rip, handler(2), "an NMI's vector is its own");
    let machine = injected(0x40, 0);
    assert_eq!(machine.cpu.rip, GUEST, "it is not valid");
}

#[test]
fn what_the_delivery_of_an_injected_event_brings_about_may_be_intercepted() {
    let mut machine = host();
    machine.poke(VMCB + at::IDTR, 0);
    machine.poke(VMCB + at::EVENT_INJECTION, 1 << 31 | 0x40);
    intercept(&machine, code::EXCEPTION + u64::from(vector::GP));
    assert_eq!(run(&mut machine, VMRUN), Ok(crate::Flow::Jump));
    assert_eq!(exit(&machine).code, 0x4d);
    assert_eq!(machine.peek(VMCB + at::EXIT_INT_INFO), 1 << 31 | 0x40);
    assert_eq!(machine.peek(VMCB + at::EVENT_INJECTION), 0);
}

#[test]
fn interrupts_from_outside_are_held_off_by_the_flags_that_count() {
    use InterruptAction::{Intercept, None, Physical};
    let mut machine = host();
    assert_eq!(machine.cpu.interrupt_action(true), Physical);
    assert_eq!(machine.cpu.interrupt_action(false), None);
    machine.cpu.svm.gif = false;
    assert_eq!(machine.cpu.interrupt_action(true), None);
    machine.cpu.svm.gif = true;

    // The guest's own flag counts, unless it has a virtual one.
    enter(&mut machine);
    assert_eq!(machine.cpu.interrupt_action(true), None);
    assert!(machine.cpu.wants_interrupt_window(true));
    machine.cpu.rflags |= flags::IF;
    assert_eq!(machine.cpu.interrupt_action(true), Physical);
    leaves(&mut machine, CPUID);
    assert!(!machine.cpu.wants_interrupt_window(true), "GIF is clear");

    machine.poke(VMCB + at::INTERRUPTS, 1 << 24);
    intercept(&machine, code::INTR);
    machine.cpu.rflags &= !flags::IF;
    enter(&mut machine);
    machine.cpu.rflags |= flags::IF;
    assert_eq!(machine.cpu.interrupt_action(true), None, "the host's flag");
    leaves(&mut machine, CPUID);
    machine.cpu.rflags |= flags::IF;
    enter(&mut machine);
    machine.cpu.rflags &= !flags::IF;
    assert_eq!(machine.cpu.interrupt_action(true), Intercept);
    machine.core().intercept_interrupt().unwrap();
    assert_eq!(exit(&machine).code, code::INTR);
}

#[test]
fn virtual_interrupts_wait_for_the_guests_flag_and_priority() {
    use InterruptAction::{None, Virtual};
    let mut machine = host();
    // Vector 0x51 of priority 5, masking, V_TPR 5.
    machine.poke(VMCB + at::INTERRUPTS, 0x51 << 32 | 1 << 24 | 5 << 16 | 1 << 8 | 5);
    enter(&mut machine);
    machine.cpu.rflags |= flags::IF;
    assert_eq!(machine.cpu.interrupt_action(false), None);
    machine.cpu.regs[reg::RBX] = 4;
    run(&mut machine, &[0x44, 0x0f, 0x22, 0xc3]).unwrap();
    assert_eq!(machine.platform.priority.get(), 0, "the host's priority is another");
    run(&mut machine, &[0x44, 0x0f, 0x20, 0xc1]).unwrap();
    assert_eq!(machine.cpu.regs[reg::RCX], 4);
    assert_eq!(machine.cpu.interrupt_action(false), Virtual);
    machine.cpu.rflags &= !flags::IF;
    assert_eq!(machine.cpu.interrupt_action(false), None);
    assert!(machine.cpu.wants_interrupt_window(false));
    machine.cpu.rflags |= flags::IF;
    machine.cpu.halted = true;
    machine.core().virtual_interrupt().unwrap();
    assert_eq!((machine.cpu.rip, machine.cpu.halted), (HANDLERS + 16 * 0x51, false));
    assert_eq!(machine.cpu.interrupt_action(false), None, "it was taken");
    leaves(&mut machine, CPUID);
    assert_eq!(machine.peek(VMCB + at::INTERRUPTS), 0x51 << 32 | 1 << 24 | 5 << 16 | 4);

    machine.poke(VMCB + at::INTERRUPTS, 0x51 << 32 | 1 << 24 | 1 << 20 | 1 << 8);
    machine.poke(VMCB + at::RFLAGS, flags::FIXED | flags::IF);
    intercept(&machine, code::VINTR);
    enter(&mut machine);
    assert_eq!(machine.cpu.interrupt_action(false), Virtual);
    machine.core().virtual_interrupt().unwrap();
    assert_eq!(exit(&machine).code, code::VINTR);
    assert_ne!(machine.peek(VMCB + at::INTERRUPTS) & 1 << 8, 0, "it waits still");
}

#[test]
fn guests_may_have_a_global_interrupt_flag_of_their_own() {
    let mut machine = host();
    machine.poke(VMCB + at::INTERRUPTS, 0x51 << 32 | 1 << 25 | 1 << 24 | 1 << 20 | 1 << 9 | 1 << 8);
    machine.poke(VMCB + at::RFLAGS, flags::FIXED | flags::IF);
    enter(&mut machine);
    run(&mut machine, &[0x0f, 0x01, 0xdd]).unwrap();
    assert!(machine.cpu.svm.gif);
    assert_eq!(machine.cpu.interrupt_action(false), InterruptAction::None);
    run(&mut machine, &[0x0f, 0x01, 0xdc]).unwrap();
    assert_eq!(machine.cpu.interrupt_action(false), InterruptAction::Virtual);
}

#[test]
fn nmis_and_inits_are_the_hosts_if_it_wants_them() {
    let mut machine = host();
    enter(&mut machine);
    assert_eq!((machine.core().intercept_nmi(), machine.core().intercept_init()), (Ok(false), Ok(false)));
    leaves(&mut machine, CPUID);
    intercept(&machine, code::NMI);
    intercept(&machine, code::INIT);
    enter(&mut machine);
    assert_eq!(machine.core().intercept_nmi(), Ok(true));
    assert_eq!(exit(&machine).code, code::NMI);
    enter(&mut machine);
    assert_eq!(machine.core().intercept_init(), Ok(true));
    assert_eq!(exit(&machine).code, code::INIT);
}

#[test]
fn pauses_are_let_pass_by_the_filter() {
    let mut machine = host();
    intercept(&machine, code::PAUSE);
    machine.memory.write(VMCB + at::PAUSE_COUNT, &3u16.to_le_bytes()).unwrap();
    enter(&mut machine);
    let insn = iced_x86::Decoder::with_ip(64, &[0xf3, 0x90], GUEST, 0).decode();
    for _ in 0..3 {
        assert_eq!(machine.core().check_pause_intercept(&insn), Ok(()));
    }
    assert_eq!(machine.core().check_pause_intercept(&insn), Err(Trap::Intercepted));
    assert_eq!(finish(&mut machine).code, code::PAUSE);
    machine.memory.write(VMCB + at::PAUSE_THRESHOLD, &100u16.to_le_bytes()).unwrap();
    enter(&mut machine);
    for _ in 0..10 {
        machine.platform.clock.set(machine.platform.clock.get() + 200);
        assert_eq!(machine.core().check_pause_intercept(&insn), Ok(()), "seldom");
    }
    let _ = machine.core().read::<u8>(Seg::Ds, DATA);
}
