use crate::testing::{CODE, GDT, KERNEL_STACK, Machine, STACK, descriptor, selector};
use crate::{CodeSize, Core, Seg, Segment, Trap, efer, flags, reg, vector};

fn np(selector: u16) -> Trap {
    Trap::with_error(vector::NP, selector.into())
}

fn gp(selector: u16) -> Trap {
    Trap::gp(selector.into())
}

#[test]
fn loads_of_data_segments() {
    let mut machine = Machine::protected();
    let free = selector::FREE;
    let table = [
        (descriptor(0x1000, 0xfff, 0xc0f2), Ok(0xff_ffff)), // writable, DPL 3, pages
        (descriptor(0, 0xfff, 0x90), Ok(0xfff)),            // read-only
        (descriptor(0, 0xfff, 0x9a), Ok(0xfff)),            // readable code
        (descriptor(0, 0xfff, 0x98), Err(gp(free))),        // execute-only code
        (descriptor(0, 0xfff, 0x12), Err(np(free))),        // not present
        (descriptor(0, 0xfff, 0x89), Err(gp(free))),        // a TSS
    ];
    for (raw, expected) in table {
        machine.poke(GDT + u64::from(free), raw);
        let result = machine.core().load_segment(Seg::Fs, free);
        assert_eq!(result, expected.map(|_| ()), "{raw:#x}");
        if let Ok(limit) = expected {
            assert_eq!(machine.cpu.segments[Seg::Fs as usize].limit, limit.min(0xff_ffff));
            assert_eq!(machine.peek(GDT + u64::from(free)), raw | 1 << 40, "accessed");
        }
    }
    assert_eq!(machine.core().load_segment(Seg::Fs, 3), Ok(()));
    assert_eq!(machine.core().read::<u8>(Seg::Fs, 0), Err(Trap::gp(0)));
    assert_eq!(machine.core().load_segment(Seg::Fs, 0x1000), Err(gp(0x1000)), "outside the GDT");
    assert_eq!(machine.core().load_segment(Seg::Fs, 0xc), Err(gp(0xc)), "no LDT");
    // Privilege: DPL 0 data with RPL 3.
    assert_eq!(machine.core().load_segment(Seg::Ds, selector::DATA | 3), Err(gp(selector::DATA)));
    // The stack.
    assert_eq!(machine.core().load_segment(Seg::Ss, 0), Err(gp(0)));
    assert_eq!(machine.core().load_segment(Seg::Ss, selector::USER_DATA), Err(gp(selector::USER_DATA & !3)));
    assert_eq!(machine.core().load_segment(Seg::Ss, selector::CODE32), Err(gp(selector::CODE32)));
    machine.poke(GDT + u64::from(free), descriptor(0, 0xfff, 0x12));
    let ss = Trap::with_error(vector::SS, free.into());
    assert_eq!(machine.core().load_segment(Seg::Ss, free), Err(ss));
    // 64-bit mode takes a null stack segment below level 3.
    assert_eq!(Machine::long().core().load_segment(Seg::Ss, 0), Ok(()));
    assert_eq!(Machine::user().core().load_segment(Seg::Ss, 3), Err(gp(0)));
}

#[test]
fn real_mode_loads_keep_the_limit() {
    let mut machine = Machine::real();
    machine.cpu.segments[Seg::Ds as usize].limit = u32::MAX;
    machine.core().load_segment(Seg::Ds, 0x1234).unwrap();
    let segment = machine.cpu.segments[Seg::Ds as usize];
    assert_eq!((segment.base, segment.limit), (0x1_2340, u32::MAX));
    machine.core().far_call(0x100, 0x10, 2, 0x7c05).unwrap();
    assert_eq!((machine.cpu.rip, machine.cpu.segments[1].base), (0x10, 0x1000));
    machine.core().far_return(2, 2).unwrap();
    assert_eq!(
        (machine.cpu.rip, machine.cpu.segments[1].base, machine.cpu.regs[reg::RSP]),
        (0x7c05, 0, 0x7002)
    );
}

#[test]
fn between_code_sizes_in_ia_32e_mode() {
    let mut machine = Machine::long();
    machine.core().far_jump(selector::CODE32, 0x1_2345_6789, 4, 0).unwrap();
    assert_eq!(machine.core().code_size(), CodeSize::Bits32);
    assert_eq!(machine.cpu.rip, 0x2345_6789);
    machine.core().far_jump(selector::CODE16, 0x1234, 4, 0).unwrap();
    assert_eq!(machine.core().code_size(), CodeSize::Bits16);
    assert_eq!(machine.core().far_jump(selector::CODE16, 0x1_0000, 4, 0), Err(Trap::gp(0)), "past the limit");
    machine.core().far_call(selector::CODE64, 0x5000, 4, 0x1239).unwrap();
    assert_eq!(machine.core().code_size(), CodeSize::Bits64);
    assert_eq!(machine.peek(STACK - 8), 0x1239 | u64::from(selector::CODE16) << 32);
    machine.core().far_return(4, 0).unwrap();
    assert_eq!((machine.core().code_size(), machine.cpu.regs[reg::RSP]), (CodeSize::Bits16, STACK));
    machine.poke(GDT + u64::from(selector::FREE), descriptor(0, 0xf_ffff, 0xe09b));
    assert_eq!(machine.core().far_jump(selector::FREE, 0, 4, 0), Err(gp(selector::FREE)), "L and D");
    assert_eq!(machine.core().far_jump(0, 0, 4, 0), Err(Trap::gp(0)));
    assert_eq!(machine.core().far_jump(selector::USER_CODE64, 0, 4, 0), Err(gp(selector::USER_CODE64 & !3)));
    assert_eq!(machine.core().far_jump(selector::TSS, 0, 4, 0), Err(gp(selector::TSS)));
}

#[test]
fn a_64_bit_call_gate_and_the_return() {
    let mut machine = Machine::user();
    let free = u64::from(selector::FREE);
    let target = 0xffff_8000_1234_5678u64;
    let low =
        target & 0xffff | u64::from(selector::CODE64) << 16 | 0xec00 << 32 | (target >> 16 & 0xffff) << 48;
    machine.poke(GDT + free, low);
    machine.poke(GDT + free + 8, target >> 32);
    machine.core().far_call(selector::FREE | 3, 0, 4, CODE + 7).unwrap();
    assert_eq!((machine.cpu.rip, machine.cpu.cpl), (target, 0));
    assert_eq!(machine.cpu.regs[reg::RSP], KERNEL_STACK - 32);
    let frame: Vec<_> = (0..4).map(|index| machine.peek(KERNEL_STACK - 32 + 8 * index)).collect();
    let (code, data) = (u64::from(selector::USER_CODE64), u64::from(selector::USER_DATA));
    assert_eq!(frame, [CODE + 7, code, STACK, data]);
    machine.core().far_return(8, 0).unwrap();
    assert_eq!((machine.cpu.rip, machine.cpu.cpl, machine.cpu.regs[reg::RSP]), (CODE + 7, 3, STACK));
    // A gate that user code may not use.
    machine.poke(GDT + free, low & !(3 << 45));
    assert_eq!(machine.core().far_call(selector::FREE | 3, 0, 4, 0), Err(gp(selector::FREE)));
}

#[test]
fn a_32_bit_call_gate_copies_parameters() {
    let mut machine = Machine::protected();
    let segment = |attributes, selector| Segment { base: 0, limit: u32::MAX, attributes, selector };
    machine.cpu.segments = [segment(0xc0f3, selector::USER_DATA); 6];
    machine.cpu.segments[1] = segment(0xc0fb, selector::USER_CODE32);
    machine.cpu.cpl = 3;
    machine.core().mode_changed();
    let gate = 0x5678 | u64::from(selector::CODE32) << 16 | 0xec02 << 32 | 0x1234 << 48;
    machine.poke(GDT + u64::from(selector::FREE), gate);
    machine.core().push(4, 0xaaaa).unwrap();
    machine.core().push(4, 0xbbbb).unwrap();
    machine.core().far_call(selector::FREE | 3, 0, 4, CODE + 7).unwrap();
    assert_eq!((machine.cpu.rip, machine.cpu.cpl), (0x1234_5678, 0));
    let at = machine.cpu.regs[reg::RSP];
    assert_eq!(at, KERNEL_STACK - 24);
    let frame: Vec<_> = (0..6).map(|index| machine.peek(at + 4 * index) as u32).collect();
    let (code, data) = (u32::from(selector::USER_CODE32), u32::from(selector::USER_DATA));
    assert_eq!(frame, [CODE as u32 + 7, code, 0xbbbb, 0xaaaa, STACK as u32 - 8, data]);
    machine.core().far_return(4, 8).unwrap();
    assert_eq!((machine.cpu.rip, machine.cpu.cpl, machine.cpu.regs[reg::RSP]), (CODE + 7, 3, STACK));
}

#[test]
fn syscall_and_sysret() {
    let mut machine = Machine::user();
    let msrs = &mut machine.cpu.msrs;
    msrs.star = 0x08 << 32 | 0x1b << 48;
    msrs.lstar = 0xffff_8000_0000_1000;
    msrs.sfmask = flags::IF | flags::TF | flags::AC;
    machine.core().set_rflags(flags::IF | flags::CF | flags::RF);
    machine.core().syscall(CODE + 2).unwrap();
    let cpu = &machine.cpu;
    assert_eq!((cpu.rip, cpu.cpl, cpu.regs[reg::RCX]), (0xffff_8000_0000_1000, 0, CODE + 2));
    assert_eq!((cpu.regs[11], cpu.rflags), (flags::IF | flags::CF | 2, flags::CF | 2));
    assert_eq!((cpu.segments[1].selector, cpu.segments[2].selector), (0x08, 0x10));
    assert_eq!(cpu.regs[reg::RSP], STACK, "the kernel's business");
    machine.core().sysret(8).unwrap();
    let cpu = &machine.cpu;
    assert_eq!((cpu.rip, cpu.cpl, cpu.rflags), (CODE + 2, 3, flags::IF | flags::CF | 2));
    assert_eq!((cpu.segments[1].selector, cpu.segments[2].selector), (0x2b, 0x23));
    assert_eq!(machine.core().sysret(8), Err(Trap::gp(0)), "not at level 3");
    // To 32-bit code and from it.
    machine.core().syscall(CODE).unwrap();
    machine.core().sysret(4).unwrap();
    assert_eq!(machine.core().code_size(), CodeSize::Bits32);
    machine.cpu.msrs.cstar = 0x7000;
    machine.core().syscall(CODE).unwrap();
    assert_eq!((machine.cpu.rip, machine.core().code_size()), (0x7000, CodeSize::Bits64));
    machine.cpu.msrs.efer &= !efer::SCE;
    assert_eq!(machine.core().syscall(CODE), Err(Trap::UD));
}

#[test]
fn sysenter_and_sysexit() {
    let mut machine = Machine::user();
    assert_eq!(machine.core().sysenter(), Err(Trap::gp(0)), "no kernel entry");
    let msrs = &mut machine.cpu.msrs;
    (msrs.sysenter_cs, msrs.sysenter_esp, msrs.sysenter_eip) = (0x08, 0x9000, 0xffff_8000_0000_2000);
    machine.core().set_rflags(flags::IF);
    machine.core().sysenter().unwrap();
    assert_eq!((machine.cpu.rip, machine.cpu.regs[reg::RSP]), (0xffff_8000_0000_2000, 0x9000));
    assert_eq!((machine.cpu.cpl, machine.cpu.rflags), (0, 2));
    machine.cpu.regs[reg::RDX] = CODE;
    machine.cpu.regs[reg::RCX] = STACK;
    machine.core().sysexit(8).unwrap();
    assert_eq!((machine.cpu.rip, machine.cpu.cpl, machine.cpu.regs[reg::RSP]), (CODE, 3, STACK));
    assert_eq!(machine.cpu.segments[1].selector, 0x2b);
}

fn push_iret_frame(core: &mut Core, rip: u64, code: u16, flags: u64, rsp: u64, stack: u16) {
    for value in [stack.into(), rsp, flags, code.into(), rip] {
        core.push(8, value).unwrap();
    }
}

#[test]
fn iret_checks_what_it_pops() {
    let mut machine = Machine::long();
    let mut core = machine.core();
    let bad = [
        (CODE, 0, STACK, selector::DATA, Trap::gp(0)),
        (CODE, selector::DATA, STACK, selector::DATA, gp(selector::DATA)),
        (CODE, selector::CODE64 | 3, STACK, selector::USER_DATA, gp(selector::CODE64)),
        (1 << 47, selector::USER_CODE64, STACK, selector::USER_DATA, Trap::gp(0)),
        (CODE, selector::USER_CODE64, STACK, selector::DATA, gp(selector::DATA)),
        (CODE, selector::USER_CODE64, STACK, 3, Trap::gp(0)),
        (CODE, 0xff0, STACK, 3, gp(0xff0)),
    ];
    for (rip, code, rsp, stack, trap) in bad {
        let before = core.cpu.regs[reg::RSP];
        push_iret_frame(&mut core, rip, code, 2, rsp, stack);
        assert_eq!(core.iret(8, 0), Err(trap), "{code:#x}:{rip:#x} {stack:#x}");
        assert_eq!((core.cpu.regs[reg::RSP], core.cpu.rip, core.cpu.cpl), (before - 40, CODE, 0));
        core.cpu.regs[reg::RSP] = before;
    }
    // FS keeps its base through a return to user code if its selector is null.
    core.load_segment(Seg::Fs, 0).unwrap();
    core.write_msr(0xc000_0100, 0x7777_0000).unwrap();
    core.load_segment(Seg::Ds, selector::DATA).unwrap();
    push_iret_frame(&mut core, CODE + 1, selector::USER_CODE64, u64::MAX, 0x1234, selector::USER_DATA);
    core.set_rflags(flags::FIXED);
    core.iret(8, 0).unwrap();
    assert_eq!((core.cpu.cpl, core.cpu.rip, core.cpu.regs[reg::RSP]), (3, CODE + 1, 0x1234));
    assert_eq!(core.cpu.segments[Seg::Fs as usize].base, 0x7777_0000);
    assert_eq!(core.cpu.segments[Seg::Ds as usize].selector, 0);
    let all = 0x3f_7fd7 & !flags::VM;
    assert_eq!(core.cpu.rflags, all, "all flags but VM");
    // User code changes neither IOPL nor IF with IOPL 0.
    core.set_rflags(flags::IF);
    core.cpu.regs[reg::RSP] = STACK;
    push_iret_frame(
        &mut core,
        CODE,
        selector::USER_CODE64,
        flags::IOPL | flags::ID,
        STACK,
        selector::USER_DATA,
    );
    core.iret(8, 0).unwrap();
    assert_eq!(core.cpu.rflags, flags::IF | flags::ID | flags::FIXED);
    // Nested tasks do not exist.
    core.set_rflags(flags::NT);
    assert_eq!(core.iret(8, 0), Err(Trap::gp(0)));
}
