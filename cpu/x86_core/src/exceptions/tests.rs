use super::*;
use crate::segments::Descriptor;
use crate::testing::{
    CODE, GDT, HANDLERS, IDT, IST1_STACK, KERNEL_STACK, Machine, STACK, TSS, descriptor, selector,
};
use crate::{CodeSize, Segment, TableRegister, reg};

fn exception(vector: u8, error: Option<u32>) -> Exception {
    Exception { vector, error, address: 0x1234_5000 }
}

fn words(machine: &Machine, at: u64, count: u64) -> Vec<u64> {
    (0..count).map(|index| machine.peek(at + 8 * index)).collect()
}

fn dwords(machine: &Machine, at: u64, count: u64) -> Vec<u32> {
    (0..count).map(|index| machine.peek(at + 4 * index) as u32).collect()
}

#[test]
fn a_page_fault_of_user_code_in_64_bit_mode() {
    let mut machine = Machine::user();
    machine.cpu.regs[reg::RSP] = STACK - 3;
    let flags = flags::IF | flags::TF | flags::NT | flags::CF | flags::FIXED;
    machine.core().set_rflags(flags);
    machine.core().deliver(exception(vector::PF, Some(6))).unwrap();
    let cpu = &machine.cpu;
    assert_eq!((cpu.rip, cpu.cpl, cpu.cr2), (HANDLERS + 14 * 16, 0, 0x1234_5000));
    assert_eq!(cpu.rflags, flags::CF | flags::FIXED);
    assert_eq!(cpu.segments[Seg::Cs as usize].selector, selector::CODE64);
    assert_eq!(cpu.segments[Seg::Ss as usize].selector, 0);
    assert_eq!(cpu.regs[reg::RSP], KERNEL_STACK - 48);
    let (code, data) = (u64::from(selector::USER_CODE64), u64::from(selector::USER_DATA));
    assert_eq!(words(&machine, KERNEL_STACK - 48, 6), [6, CODE, code, flags | flags::RF, STACK - 3, data]);
    assert_eq!(machine.cpu.data_bank, crate::Tlb::SUPERVISOR as u8);
}

#[test]
fn interrupts_in_64_bit_mode() {
    let mut machine = Machine::long();
    machine.cpu.regs[reg::RSP] = STACK - 3;
    machine.core().set_rflags(flags::IF);
    machine.cpu.halted = true;
    machine.cpu.interrupt_shadow = shadow::STI;
    machine.core().interrupt(0x20).unwrap();
    assert_eq!(machine.cpu.rip, HANDLERS + 0x200);
    assert_eq!(machine.cpu.regs[reg::RSP], (STACK - 16) - 40, "aligned to 16 bytes, then the frame");
    assert_eq!(words(&machine, STACK - 56, 5)[2..4], [flags::IF | flags::FIXED, STACK - 3]);
    assert_eq!(machine.cpu.rflags, flags::FIXED);
    assert!(!machine.cpu.halted && machine.cpu.interrupt_shadow == 0);

    // A trap gate leaves IF; an IST entry switches stacks without a change of level.
    machine.core().set_rflags(flags::IF);
    machine.gate64(2, selector::CODE64, 0xffff_8000_1234_5678, 0xf, 0, 1);
    machine.core().nmi().unwrap();
    assert_eq!(machine.cpu.rip, 0xffff_8000_1234_5678);
    assert_eq!(machine.cpu.regs[reg::RSP], IST1_STACK - 40);
    assert_eq!(machine.cpu.rflags, flags::IF | flags::FIXED);
    assert_eq!(machine.cpu.interrupt_shadow, shadow::NMI);
    machine.cpu.rip = HANDLERS;
    machine.core().iret(8, 0).unwrap();
    assert_eq!(machine.cpu.interrupt_shadow, 0);
}

#[test]
fn software_interrupts_check_the_gate() {
    let mut machine = Machine::user();
    let before = (machine.cpu.rip, machine.cpu.regs, machine.cpu.rflags);
    assert_eq!(machine.core().software_interrupt(0x80, CODE + 2), Err(Trap::gp(0x80 * 8 + 2)));
    machine.gate64(0x80, selector::CODE64, HANDLERS, 0xe, 3, 0);
    machine.core().software_interrupt(0x80, CODE + 2).unwrap();
    assert_eq!(words(&machine, KERNEL_STACK - 40, 1), [CODE + 2]);
    machine.core().iret(8, 0).unwrap();
    assert_eq!(machine.cpu.cpl, 3);
    assert_eq!((machine.cpu.rip - 2, machine.cpu.regs, machine.cpu.rflags), before);
    // Not present; of a wrong type; to data; outside the table.
    machine.poke(IDT + 0x80 * 16, machine.peek(IDT + 0x80 * 16) & !(1 << 47));
    let np = Trap::with_error(vector::NP, 0x402);
    assert_eq!(machine.core().software_interrupt(0x80, CODE), Err(np));
    machine.gate64(0x80, selector::CODE64, HANDLERS, 0xc, 3, 0);
    assert_eq!(machine.core().software_interrupt(0x80, CODE), Err(Trap::gp(0x402)));
    machine.gate64(0x80, selector::DATA, HANDLERS, 0xe, 3, 0);
    assert_eq!(machine.core().software_interrupt(0x80, CODE), Err(Trap::gp(selector::DATA.into())));
    machine.gate64(0x80, selector::CODE32, HANDLERS, 0xe, 3, 0);
    assert_eq!(machine.core().software_interrupt(0x80, CODE), Err(Trap::gp(selector::CODE32.into())));
    machine.cpu.idtr.limit = 0x7ff;
    assert_eq!(machine.core().software_interrupt(0x80, CODE), Err(Trap::gp(0x402)));
    assert_eq!(machine.cpu.cpl, 3);
}

#[test]
fn double_and_triple_faults() {
    let mut machine = Machine::user();
    // No stack for the handler: #PF within the delivery of #PF.
    machine.poke(TSS + 4, 0x7000_0000_0000);
    machine.gate64(vector::DF, selector::CODE64, HANDLERS + 128, 0xe, 0, 1);
    machine.core().deliver(exception(vector::PF, Some(4))).unwrap();
    assert_eq!(machine.cpu.rip, HANDLERS + 128);
    assert_eq!(machine.cpu.cr2, 0x7000_0000_0000 - 48, "that of the second fault");
    assert_eq!(words(&machine, IST1_STACK - 48, 2), [0, CODE]);

    // A benign exception first: the second one is delivered alone.
    let mut machine = Machine::user();
    machine.poke(IDT + 6 * 16, 0);
    machine.core().deliver(Exception { vector: vector::UD, error: None, address: 0 }).unwrap();
    assert_eq!(machine.cpu.rip, HANDLERS + 13 * 16);
    assert_eq!(machine.peek(KERNEL_STACK - 48), 6 * 8 + 2 + 1, "the error code says external event");

    let mut machine = Machine::long();
    machine.cpu.idtr = TableRegister { base: 0, limit: 0 };
    let before = machine.cpu.regs;
    assert_eq!(machine.core().deliver(exception(vector::GP, Some(0))), Err(Trap::TripleFault));
    assert_eq!(machine.core().interrupt(0x30), Err(Trap::TripleFault));
    assert_eq!((machine.cpu.regs, machine.cpu.rip), (before, CODE));
}

#[test]
fn table_of_double_faults() {
    let contributory = [0, 10, 11, 12, 13];
    for first in 0..32 {
        for second in 0..32 {
            let serious = contributory.contains(&second);
            let expected =
                (contributory.contains(&first) && serious) || (first == 14 && (serious || second == 14));
            assert_eq!(makes_double_fault(first, second), expected, "{first} then {second}");
        }
    }
}

#[test]
fn compatibility_mode_uses_the_64_bit_idt() {
    let mut machine = Machine::user();
    machine.core().iret(8, 0).unwrap_err();
    machine.cpu.segments[1] =
        Segment { base: 0, limit: u32::MAX, attributes: 0xc0fb, selector: selector::USER_CODE32 };
    machine.core().mode_changed();
    assert_eq!(machine.core().code_size(), CodeSize::Bits32);
    machine.core().interrupt(0x21).unwrap();
    assert_eq!(machine.core().code_size(), CodeSize::Bits64);
    machine.core().iret(8, 0).unwrap();
    assert_eq!(machine.core().code_size(), CodeSize::Bits32);
    assert_eq!((machine.cpu.rip, machine.cpu.regs[reg::RSP]), (CODE, STACK));
}

#[test]
fn protected_mode_at_the_same_level() {
    let mut machine = Machine::protected();
    machine.core().set_rflags(flags::IF);
    machine.core().deliver(exception(vector::GP, Some(0x18))).unwrap();
    assert_eq!(machine.cpu.rip, HANDLERS + 13 * 16);
    assert_eq!(machine.cpu.regs[reg::RSP], STACK - 16);
    let image = (flags::IF | flags::RF | flags::FIXED) as u32;
    assert_eq!(dwords(&machine, STACK - 16, 4), [0x18, CODE as u32, selector::CODE32.into(), image]);
    machine.cpu.regs[reg::RSP] += 4;
    machine.core().iret(4, 0).unwrap();
    assert_eq!((machine.cpu.rip, machine.cpu.regs[reg::RSP]), (CODE, STACK));
    assert_eq!(machine.cpu.rflags, flags::IF | flags::RF | flags::FIXED);
}

fn enter_user32(machine: &mut Machine) {
    let cpu = &mut machine.cpu;
    let segment = |attributes, selector| Segment { base: 0, limit: u32::MAX, attributes, selector };
    cpu.segments = [segment(0xc0f3, selector::USER_DATA); 6];
    cpu.segments[1] = segment(0xc0fb, selector::USER_CODE32);
    cpu.cpl = 3;
    machine.core().mode_changed();
}

#[test]
fn protected_mode_from_an_outer_level_and_back() {
    let mut machine = Machine::protected();
    enter_user32(&mut machine);
    machine.core().interrupt(0x40).unwrap();
    assert_eq!((machine.cpu.cpl, machine.cpu.rip), (0, HANDLERS + 0x400));
    assert_eq!(machine.cpu.segments[Seg::Ss as usize].selector, selector::DATA);
    assert_eq!(
        dwords(&machine, KERNEL_STACK - 20, 5),
        [CODE as u32, selector::USER_CODE32.into(), 2, STACK as u32, selector::USER_DATA.into()]
    );
    // The kernel loads its own DS; the return takes it away.
    machine.core().load_segment(Seg::Ds, selector::DATA).unwrap();
    machine.core().iret(4, 0).unwrap();
    assert_eq!((machine.cpu.cpl, machine.cpu.rip, machine.cpu.regs[reg::RSP]), (3, CODE, STACK));
    assert_eq!(machine.cpu.segments[Seg::Ds as usize].selector, 0);
    assert_eq!(machine.core().read::<u8>(Seg::Ds, 0), Err(Trap::gp(0)));
    assert_eq!(machine.cpu.segments[Seg::Es as usize].selector, selector::USER_DATA);
    // A bad stack in the TSS: #TS names its selector, and the handler of #TS has the same stack.
    machine.poke(TSS + 4, KERNEL_STACK | u64::from(selector::USER_DATA) << 32);
    assert_eq!(machine.core().interrupt(0x40), Err(Trap::TripleFault));
    assert_eq!((machine.cpu.cpl, machine.cpu.rip), (3, CODE));
}

#[test]
fn sixteen_bit_gates() {
    let mut machine = Machine::protected();
    let gate = 0x1234 | u64::from(selector::CODE32) << 16 | 0x8700 << 32 | 0xffff << 48;
    machine.poke(IDT + 8 * 0x50, gate);
    machine.core().set_rflags(flags::IF);
    machine.core().interrupt(0x50).unwrap();
    assert_eq!(machine.cpu.rip, 0x1234);
    assert_eq!(machine.cpu.regs[reg::RSP], STACK - 6);
    assert_eq!(machine.cpu.rflags & flags::IF, flags::IF, "a trap gate");
    let frame = machine.peek(STACK - 6);
    assert_eq!(frame & 0xffff_ffff_ffff, CODE & 0xffff | u64::from(selector::CODE32) << 16 | 0x202 << 32);
}

#[test]
fn virtual_8086_mode() {
    let mut machine = Machine::protected();
    let push = |machine: &mut Machine, value: u64| machine.core().push(4, value).unwrap();
    // An IRET into virtual-8086 mode: GS FS DS ES SS ESP EFLAGS CS EIP.
    for value in [0x700, 0x600, 0x500, 0x400, 0x300, 0xfff0, flags::VM | 2, 0x200, 0x10] {
        push(&mut machine, value);
    }
    machine.core().iret(4, 0).unwrap();
    let cpu = &machine.cpu;
    assert_eq!((cpu.cpl, cpu.rip, cpu.regs[reg::RSP]), (3, 0x10, 0xfff0));
    assert_eq!(cpu.segments[Seg::Gs as usize], Segment::vm86(0x700));
    assert_eq!(cpu.segments[Seg::Cs as usize].base, 0x2000);
    assert_eq!(machine.core().code_size(), CodeSize::Bits16);
    assert_eq!(machine.core().software_interrupt(0x10, 0x12), Err(Trap::gp(0)), "IOPL is 0");
    machine.core().deliver(exception(vector::GP, Some(0))).unwrap();
    assert_eq!((machine.cpu.cpl, machine.cpu.rip), (0, HANDLERS + 13 * 16));
    let image = (flags::VM | flags::RF | 2) as u32;
    assert_eq!(
        dwords(&machine, KERNEL_STACK - 40, 10),
        [0, 0x10, 0x200, image, 0xfff0, 0x300, 0x400, 0x500, 0x600, 0x700]
    );
    assert_eq!(machine.cpu.segments[Seg::Ds as usize].selector, 0);
    machine.cpu.regs[reg::RSP] += 4;
    machine.core().iret(4, 0).unwrap();
    assert_eq!(machine.cpu.segments[Seg::Es as usize], Segment::vm86(0x400));
}

#[test]
fn the_vector_table_of_real_mode() {
    let mut machine = Machine::real();
    machine.memory.write(0x10 * 4, &[0x34, 0x12, 0x00, 0x80]).unwrap();
    machine.core().set_rflags(flags::IF | flags::TF | flags::CF);
    machine.core().software_interrupt(0x10, 0x7c02).unwrap();
    let code = machine.cpu.segments[Seg::Cs as usize];
    assert_eq!((code.selector, code.base, machine.cpu.rip), (0x8000, 0x8_0000, 0x1234));
    assert_eq!(machine.cpu.rflags, flags::CF | flags::FIXED);
    assert_eq!(machine.peek(0x6ffa) & 0xffff_ffff_ffff, 0x7c02 | 0x303 << 32);
    machine.core().iret(2, 0).unwrap();
    assert_eq!((machine.cpu.rip, machine.cpu.regs[reg::RSP]), (0x7c02, 0x7000));
    assert_eq!(machine.cpu.rflags, flags::IF | flags::TF | flags::CF | flags::FIXED);
    machine.cpu.idtr.limit = 0x3f;
    assert_eq!(machine.core().interrupt(0x10), Ok(()), "#GP instead, through its own vector");
    machine.cpu.idtr.limit = 3;
    assert_eq!(machine.core().interrupt(0x10), Err(Trap::TripleFault));
}

#[test]
fn a_task_gate_switches_tasks() {
    let mut machine = Machine::protected();
    let (other, free) = (0x6_0000u64, u64::from(selector::FREE));
    machine.poke(GDT + free, descriptor(other as u32, 0x67, 0x89));
    machine.poke(IDT + 8 * 8, free << 16 | 0x8500 << 32);
    let mut task = vec![0u8; 0x68];
    let mut put = |at: usize, value: u32| task[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(0x20, 0x4321);
    put(0x24, 2);
    put(0x38, 0x5_0000);
    for (index, selector) in
        [0, selector::CODE32, selector::DATA, selector::DATA, 0, 0].into_iter().enumerate()
    {
        put(0x48 + 4 * index, selector.into());
    }
    machine.memory.write(other, &task).unwrap();
    machine.core().deliver(exception(vector::DF, Some(0))).unwrap();
    assert_eq!((machine.cpu.rip, machine.cpu.regs[reg::RSP]), (0x4321, 0x5_0000 - 4));
    assert_eq!(machine.cpu.tr.selector, selector::FREE);
    assert_eq!(machine.cpu.rflags & flags::NT, flags::NT);
    assert_eq!(machine.peek(other) & 0xffff, u64::from(selector::TSS), "the back link");
    assert_eq!(machine.peek(TSS + 0x20) as u32, CODE as u32, "the old task's EIP");
    let busy = |machine: &Machine, at: u64| Descriptor { raw: machine.peek(at), address: 0 }.kind() & 2 != 0;
    assert!(busy(&machine, GDT + free));
    // The way back; the old TSS has to be busy, as it is while a nested task runs.
    machine.poke(GDT + u64::from(selector::TSS), descriptor(TSS as u32, 0x67, 0x8b));
    machine.core().iret(4, 0x4322).unwrap();
    assert_eq!(machine.peek(other + 0x20) as u32, 0x4322, "behind the IRET");
    assert_eq!((machine.cpu.rip, machine.cpu.tr.selector), (CODE, selector::TSS));
    assert_eq!(machine.cpu.regs[reg::RSP], STACK);
    assert!(!busy(&machine, GDT + free));
}
