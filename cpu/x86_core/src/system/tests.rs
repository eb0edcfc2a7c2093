mod paging;

use super::*;
use crate::cpuid::{CpuModel, feature};
use crate::testing::{CODE, DATA, GDT, IDT, Machine, STACK, TSS, selector};
use crate::{Seg, TableRegister, cr0, cr4, efer, flags, reg, shadow, vector};
use iced_x86::{Decoder, DecoderOptions};
use proptest::prelude::*;
use std::sync::Arc;

/// Executes one instruction at RIP and advances as a run loop does.
fn run(machine: &mut Machine, code: &[u8]) -> Result<Flow, Trap> {
    let bits = machine.core().code_size().bits();
    let insn = Decoder::with_ip(bits, code, machine.cpu.rip, DecoderOptions::NONE).decode();
    assert!(!insn.is_invalid(), "{code:x?}");
    let flow = execute(&mut machine.core(), &insn)?;
    if flow == Flow::Next {
        machine.cpu.rip = insn.next_ip();
    }
    Ok(flow)
}

const NEXT: Result<Flow, Trap> = Ok(Flow::Next);
const GP: Result<Flow, Trap> = Err(Trap::gp(0));
const UD: Result<Flow, Trap> = Err(Trap::UD);

#[test]
fn privileged_instructions_are_refused_to_user_code() {
    let privileged: &[&[u8]] = &[
        &[0x0f, 0x20, 0xc0],             // mov rax, cr0
        &[0x0f, 0x22, 0xd8],             // mov cr3, rax
        &[0x0f, 0x23, 0xf8],             // mov dr7, rax
        &[0x0f, 0x06],                   // clts
        &[0x0f, 0x01, 0xf0],             // lmsw ax
        &[0x0f, 0x01, 0x13],             // lgdt [rbx]
        &[0x0f, 0x01, 0x1b],             // lidt [rbx]
        &[0x0f, 0x00, 0xd0],             // lldt ax
        &[0x0f, 0x00, 0xd8],             // ltr ax
        &[0x0f, 0x32],                   // rdmsr
        &[0x0f, 0x30],                   // wrmsr
        &[0xf4],                         // hlt
        &[0xfa],                         // cli
        &[0xfb],                         // sti
        &[0x0f, 0x01, 0xf8],             // swapgs
        &[0x0f, 0x01, 0x3b],             // invlpg [rbx]
        &[0x66, 0x0f, 0x38, 0x82, 0x03], // invpcid rax, [rbx]
        &[0x0f, 0x08],                   // invd
        &[0x0f, 0x09],                   // wbinvd
        &[0x0f, 0x33],                   // rdpmc
        &[0x48, 0x0f, 0x07],             // sysretq
        &[0xe4, 0x80],                   // in al, 0x80
        &[0xee],                         // out dx, al
        &[0x6c],                         // insb
    ];
    for code in privileged {
        let mut machine = Machine::user();
        machine.cpu.regs[reg::RBX] = DATA;
        assert_eq!(run(&mut machine, code), GP, "{code:x?}");
        assert_eq!(machine.cpu.rip, CODE);
    }
    let mut machine = Machine::user();
    assert_eq!(run(&mut machine, &[0x0f, 0x01, 0xcb]), UD, "stac");
    assert_eq!(run(&mut machine, &[0x0f, 0x01, 0xc8]), UD, "monitor, which is not announced");
}

#[test]
fn instructions_that_umip_hides() {
    let codes: [&[u8]; 5] = [
        &[0x0f, 0x01, 0x03],
        &[0x0f, 0x01, 0x0b],
        &[0x0f, 0x00, 0xc0],
        &[0x0f, 0x00, 0xc8],
        &[0x0f, 0x01, 0xe0],
    ];
    for code in codes {
        let mut machine = Machine::user();
        machine.cpu.regs[reg::RBX] = DATA;
        assert_eq!(run(&mut machine, code), NEXT, "{code:x?}");
        machine.cpu.cr4 |= cr4::UMIP;
        assert_eq!(run(&mut machine, code), GP, "{code:x?}");
    }
    let mut machine = Machine::long();
    machine.cpu.regs[reg::RBX] = DATA;
    run(&mut machine, &[0x0f, 0x01, 0x0b]).unwrap();
    assert_eq!(machine.peek(DATA) & 0xffff, 0xfff);
    assert_eq!(machine.peek(DATA + 2), IDT);
    run(&mut machine, &[0x66, 0x0f, 0x00, 0xc8]).unwrap();
    assert_eq!(machine.cpu.regs[reg::RAX], u64::from(selector::TSS));
}

#[test]
fn xcr0_has_what_the_model_has() {
    const XGETBV: &[u8] = &[0x0f, 0x01, 0xd0];
    const XSETBV: &[u8] = &[0x0f, 0x01, 0xd1];
    let mut machine = Machine::long();
    assert_eq!(run(&mut machine, XGETBV), UD);
    let cr4 = machine.cpu.cr4 | cr4::OSXSAVE;
    machine.core().set_cr4(cr4).unwrap();
    let mut set = |index: u64, value: u64| {
        machine.cpu.rip = CODE;
        machine.cpu.regs[reg::RCX] = index;
        machine.cpu.regs[reg::RAX] = value & 0xffff_ffff;
        machine.cpu.regs[reg::RDX] = value >> 32;
        run(&mut machine, XSETBV)
    };
    assert_eq!(set(0, 3), NEXT);
    for bad in [0, 2, 5, 1 << 63 | 1, 0x23, 0x67, 0xe3, 1 << 8 | 1] {
        assert_eq!(set(0, bad), GP, "{bad:#x}");
    }
    assert_eq!(set(1, 3), GP);
    let all = CpuModel::by_name("max").unwrap().xcr0_mask();
    assert_eq!(set(0, all), NEXT);
    assert_eq!(machine.cpu.xcr0, all);
    // What is in use of that.
    let mut get = |index: u64| {
        machine.cpu.rip = CODE;
        machine.cpu.regs[reg::RCX] = index;
        let end = run(&mut machine, XGETBV);
        end.map(|_| machine.cpu.regs[reg::RAX])
    };
    assert_eq!((get(0), get(1), get(2)), (Ok(all), Ok(0), Err(Trap::gp(0))));
    machine.cpu.vectors[9].0[3] = 1;
    machine.cpu.regs[reg::RCX] = 1;
    assert_eq!(run(&mut machine, XGETBV), NEXT);
    assert_eq!(machine.cpu.regs[reg::RAX], 2);
    // Not for user code, nor where there is no XSAVE.
    machine.cpu.cpl = 3;
    assert_eq!(run(&mut machine, XSETBV), GP);
    let mut machine = Machine::long();
    machine.cpu.model = Arc::new(CpuModel::by_name("x86-64-v2").unwrap());
    let cr4 = machine.cpu.cr4 | cr4::OSXSAVE;
    assert_eq!(machine.core().set_cr4(cr4), Err(Trap::gp(0)));
}

#[test]
fn clzero_clears_the_line_that_rax_points_into() {
    let mut machine = Machine::long();
    for at in 0..32 {
        machine.poke(DATA + 8 * at, u64::MAX);
    }
    machine.cpu.regs[reg::RAX] = DATA + 0x47;
    assert_eq!(run(&mut machine, &[0x0f, 0x01, 0xfc]), NEXT);
    let zeros: Vec<u64> = (0..32).filter(|at| machine.peek(DATA + 8 * at) == 0).collect();
    assert_eq!(zeros, (8..16).collect::<Vec<_>>());
    machine.cpu.regs[reg::RAX] = 1 << 47;
    assert!(run(&mut machine, &[0x0f, 0x01, 0xfc]).is_err());
    machine.cpu.model = Arc::new(CpuModel::by_name("x86-64-v2").unwrap());
    machine.cpu.regs[reg::RAX] = DATA;
    assert_eq!(run(&mut machine, &[0x0f, 0x01, 0xfc]), UD);
}

#[test]
fn control_register_rules() {
    let mut machine = Machine::long();
    let mut core = machine.core();
    let gp = Err(Trap::gp(0));
    let cr0 = core.cpu.cr0;
    assert_eq!(core.set_cr0(cr0 & !cr0::PE), gp, "paging without protection");
    assert_eq!(core.set_cr0(cr0 & !cr0::PG), gp, "in 64-bit mode");
    assert_eq!(core.set_cr0(cr0 | cr0::NW), gp);
    assert_eq!(core.set_cr0(cr0 | 1 << 32), gp);
    core.set_cr0(cr0 | cr0::TS).unwrap();
    assert_eq!(core.set_cr4(core.cpu.cr4 & !cr4::PAE), gp);
    assert_eq!(core.set_cr4(core.cpu.cr4 | cr4::LA57), gp);
    core.set_cr4(core.cpu.cr4 | cr4::SMEP | cr4::SMAP | cr4::UMIP | cr4::FSGSBASE).unwrap();
    assert_eq!(core.set_cr3(1 << 60), gp);
    assert_eq!(core.set_efer(core.cpu.msrs.efer & !efer::LME), gp);
    assert_eq!(core.set_efer(core.cpu.msrs.efer | 1 << 16), gp);
    core.set_efer(core.cpu.msrs.efer | efer::AUTOIBRS).unwrap();
    assert_eq!(core.cpu.msrs.efer & efer::LMA, efer::LMA);

    // The way into IA-32e mode, and LMA with it.
    let mut machine = Machine::protected();
    let tables = crate::testing::PAGE_TABLES;
    let directory = tables + 0x1000;
    machine.poke(tables, directory | 7);
    machine.poke(directory, 0x87);
    let mut core = machine.core();
    core.set_efer(efer::LME).unwrap();
    assert_eq!(core.set_cr0(cr0::PE | cr0::PG), gp, "without PAE");
    core.set_cr4(cr4::PAE).unwrap();
    core.set_cr3(tables).unwrap();
    core.set_cr0(cr0::PE | cr0::PG).unwrap();
    assert_eq!(core.cpu.msrs.efer, efer::LME | efer::LMA);
    assert!(!core.cpu.long64);
    core.far_jump(selector::CODE64, CODE, 4, 0).unwrap();
    assert!(core.cpu.long64);
    core.far_jump(selector::CODE32, CODE, 4, 0).unwrap();
    core.set_cr0(cr0::PE).unwrap();
    assert_eq!(core.cpu.msrs.efer, efer::LME);
}

#[test]
fn moves_of_control_and_debug_registers() {
    let mut machine = Machine::long();
    machine.cpu.regs[reg::RAX] = 0x9;
    run(&mut machine, &[0x44, 0x0f, 0x22, 0xc0]).unwrap(); // mov cr8, rax
    assert_eq!(machine.platform.priority.get(), 9);
    run(&mut machine, &[0x44, 0x0f, 0x20, 0xc3]).unwrap(); // mov rbx, cr8
    assert_eq!(machine.cpu.regs[reg::RBX], 9);
    machine.cpu.regs[reg::RAX] = 0x10;
    assert_eq!(run(&mut machine, &[0x44, 0x0f, 0x22, 0xc0]), GP);
    machine.cpu.regs[reg::RAX] = 0xffff_ffff;
    run(&mut machine, &[0x0f, 0x23, 0xf0]).unwrap(); // mov dr6, rax
    run(&mut machine, &[0x0f, 0x21, 0xe1]).unwrap(); // mov rcx, dr4
    assert_eq!(machine.cpu.regs[reg::RCX], 0xffff_efff);
    machine.cpu.cr4 |= cr4::DE;
    assert_eq!(run(&mut machine, &[0x0f, 0x21, 0xe1]), UD);
    machine.cpu.dr[7] |= 1 << 13;
    assert_eq!(run(&mut machine, &[0x0f, 0x21, 0xf1]), Err(Trap::plain(vector::DB)));
    assert_eq!(machine.cpu.dr[6] & 1 << 13, 1 << 13);
    machine.cpu.dr[7] = 0x400;
    machine.cpu.regs[reg::RAX] = 1 << 32;
    assert_eq!(run(&mut machine, &[0x0f, 0x23, 0xf8]), GP);
    machine.cpu.cr0 |= cr0::TS;
    run(&mut machine, &[0x0f, 0x06]).unwrap();
    assert_eq!(machine.cpu.cr0 & cr0::TS, 0);
    machine.cpu.regs[reg::RAX] = 0; // lmsw does not clear PE
    run(&mut machine, &[0x0f, 0x01, 0xf0]).unwrap();
    assert_eq!(machine.cpu.cr0 & (cr0::PE | cr0::MP), cr0::PE);
}

#[test]
fn segment_register_moves_and_stack() {
    let mut machine = Machine::long();
    machine.cpu.regs[reg::RAX] = selector::USER_DATA.into();
    run(&mut machine, &[0x8e, 0xe0]).unwrap(); // mov fs, ax
    assert_eq!(machine.cpu.segments[Seg::Fs as usize].selector, selector::USER_DATA);
    machine.cpu.regs[reg::RCX] = u64::MAX;
    run(&mut machine, &[0x8c, 0xe1]).unwrap(); // mov ecx, fs
    assert_eq!(machine.cpu.regs[reg::RCX], u64::from(selector::USER_DATA));
    run(&mut machine, &[0x0f, 0xa0]).unwrap(); // push fs
    assert_eq!(machine.cpu.regs[reg::RSP], STACK - 8);
    run(&mut machine, &[0x0f, 0xa9]).unwrap(); // pop gs
    assert_eq!(machine.cpu.segments[Seg::Gs as usize].selector, selector::USER_DATA);
    machine.core().push(8, 0x7000).unwrap();
    assert_eq!(run(&mut machine, &[0x0f, 0xa9]), Err(Trap::gp(0x7000)));
    assert_eq!(machine.cpu.regs[reg::RSP], STACK - 8);
    machine.cpu.regs[reg::RAX] = selector::DATA.into();
    run(&mut machine, &[0x8e, 0xd0]).unwrap(); // mov ss, ax
    assert_eq!(machine.cpu.interrupt_shadow, shadow::MOV_SS);
    // lfs eax, [rbx]
    machine.poke(DATA, 0x5566_7788 | u64::from(selector::DATA) << 32);
    machine.cpu.regs[reg::RBX] = DATA;
    run(&mut machine, &[0x0f, 0xb4, 0x03]).unwrap();
    assert_eq!(machine.cpu.regs[reg::RAX], 0x5566_7788);
    assert_eq!(machine.cpu.segments[Seg::Fs as usize].selector, selector::DATA);
}

#[test]
fn table_and_task_registers() {
    let mut machine = Machine::long();
    machine.cpu.regs[reg::RBX] = DATA;
    machine.poke(DATA, 0x1234 | 0xffff_8000u64 << 16 << 16);
    machine.memory.write(DATA + 2, &0xffff_8000_0000_5000u64.to_le_bytes()).unwrap();
    run(&mut machine, &[0x0f, 0x01, 0x1b]).unwrap(); // lidt [rbx]
    assert_eq!(machine.cpu.idtr, TableRegister { base: 0xffff_8000_0000_5000, limit: 0x1234 });
    machine.memory.write(DATA + 2, &(1u64 << 57).to_le_bytes()).unwrap();
    assert_eq!(run(&mut machine, &[0x0f, 0x01, 0x13]), GP, "a base that is not canonical");
    // ltr ax: an available TSS becomes busy.
    machine.poke(GDT + u64::from(selector::TSS), 0x67 | TSS << 16 | 0x89 << 40);
    machine.poke(GDT + u64::from(selector::TSS) + 8, 0xffff_8000);
    machine.cpu.regs[reg::RAX] = selector::TSS.into();
    run(&mut machine, &[0x0f, 0x00, 0xd8]).unwrap();
    assert_eq!(machine.cpu.tr.base, 0xffff_8000_0000_0000 | TSS);
    assert_eq!(machine.peek(GDT + u64::from(selector::TSS)) >> 40 & 0xff, 0x8b);
    let busy = Err(Trap::gp(selector::TSS.into()));
    assert_eq!(run(&mut machine, &[0x0f, 0x00, 0xd8]), busy);
    machine.cpu.regs[reg::RAX] = 0;
    run(&mut machine, &[0x0f, 0x00, 0xd0]).unwrap(); // lldt ax
    assert!(!machine.cpu.ldtr.is_usable());
    // lsl ecx, ax and lar ecx, ax
    machine.cpu.regs[reg::RAX] = selector::CODE64.into();
    run(&mut machine, &[0x0f, 0x03, 0xc8]).unwrap();
    assert_eq!(machine.cpu.regs[reg::RCX], 0xffff_ffff);
    run(&mut machine, &[0x0f, 0x02, 0xc8]).unwrap();
    assert_eq!(machine.cpu.regs[reg::RCX], 0x00af_9b00);
    assert_eq!(machine.cpu.rflags & flags::ZF, flags::ZF);
    run(&mut machine, &[0x0f, 0x00, 0xe8]).unwrap(); // verw ax
    assert_eq!(machine.cpu.rflags & flags::ZF, 0);
    machine.cpu.regs[reg::RAX] = 0x1000;
    run(&mut machine, &[0x0f, 0x03, 0xc8]).unwrap();
    assert_eq!(machine.cpu.rflags & flags::ZF, 0, "outside the table is no fault");
}

#[test]
fn flags_instructions() {
    let mut machine = Machine::long();
    run(&mut machine, &[0xfb]).unwrap();
    assert_eq!((machine.cpu.rflags, machine.cpu.interrupt_shadow), (flags::IF | 2, shadow::STI));
    machine.cpu.interrupt_shadow = 0;
    run(&mut machine, &[0xfb]).unwrap();
    assert_eq!(machine.cpu.interrupt_shadow, 0, "IF was set already");
    machine.core().push(8, u64::MAX).unwrap();
    run(&mut machine, &[0x9d]).unwrap();
    assert_eq!(machine.cpu.rflags, 0x24_7fd7, "no VM, RF, VIF, VIP");
    run(&mut machine, &[0x9c]).unwrap();
    assert_eq!(machine.peek(STACK - 8), 0x24_7fd7);
    machine.cpu.cr4 |= cr4::SMAP;
    run(&mut machine, &[0x0f, 0x01, 0xca]).unwrap(); // clac
    assert_eq!(machine.cpu.data_bank, crate::Tlb::SUPERVISOR as u8);
    run(&mut machine, &[0x0f, 0x01, 0xcb]).unwrap(); // stac
    assert_eq!(machine.cpu.data_bank, crate::Tlb::SUPERVISOR_AC as u8);
    // User code with IOPL 0 changes neither IF nor IOPL.
    let mut machine = Machine::user();
    machine.core().set_rflags(flags::IF);
    machine.core().push(8, flags::IOPL | flags::CF).unwrap();
    run(&mut machine, &[0x9d]).unwrap();
    assert_eq!(machine.cpu.rflags, flags::IF | flags::CF | 2);
    machine.core().set_rflags(flags::IOPL);
    run(&mut machine, &[0xfb]).unwrap();
    assert_eq!(machine.cpu.rflags & flags::IF, flags::IF);
}

#[test]
fn ports() {
    let mut machine = Machine::long();
    machine.cpu.regs[reg::RDX] = 0x3f8;
    machine.cpu.regs[reg::RAX] = 0x1122_3344_5566_7788;
    run(&mut machine, &[0xef]).unwrap(); // out dx, eax
    machine.cpu.regs[reg::RAX] = u64::MAX;
    run(&mut machine, &[0x66, 0xed]).unwrap(); // in ax, dx
    assert_eq!(machine.cpu.regs[reg::RAX], 0xffff_ffff_ffff_7788);
    run(&mut machine, &[0xed]).unwrap(); // in eax, dx
    assert_eq!(machine.cpu.regs[reg::RAX], 0x5566_7788);
    machine.cpu.regs[reg::RDI] = DATA;
    machine.cpu.regs[reg::RCX] = 1500;
    assert_eq!(run(&mut machine, &[0xf3, 0x66, 0x6d]), Ok(Flow::Again)); // rep insw
    assert_eq!(machine.cpu.regs[reg::RCX], 1500 - 1024);
    assert_eq!(run(&mut machine, &[0xf3, 0x66, 0x6d]), NEXT);
    assert_eq!((machine.cpu.regs[reg::RCX], machine.cpu.regs[reg::RDI]), (0, DATA + 3000));
    assert_eq!(machine.peek(DATA + 2992), 0x7788_7788_7788_7788);
    // A fault in the middle leaves the progress.
    machine.cpu.regs[reg::RDI] = 0x1_0000_0000 - 2;
    machine.cpu.regs[reg::RCX] = 5;
    assert_eq!(run(&mut machine, &[0xf3, 0x6c]), Err(Trap::pf(0x1_0000_0000, 2)));
    assert_eq!(machine.cpu.regs[reg::RCX], 3);
    machine.core().set_rflags(flags::DF);
    machine.cpu.regs[reg::RSI] = DATA;
    run(&mut machine, &[0x6e]).unwrap(); // outsb
    assert_eq!((machine.cpu.regs[reg::RSI], machine.platform.ports.borrow()[&0x3f8]), (DATA - 1, 0x88));
}

#[test]
fn the_port_bitmap() {
    let mut machine = Machine::user();
    machine.cpu.tr.limit = 0x68 + 0x81;
    machine.memory.write(TSS + 0x66, &0x68u16.to_le_bytes()).unwrap();
    machine.memory.write(TSS + 0x68 + 0x7f, &[0x7f, 0xfe]).unwrap();
    machine.cpu.regs[reg::RDX] = 0x3ff;
    assert_eq!(run(&mut machine, &[0xec]), NEXT, "in al, 0x3ff");
    assert_eq!(run(&mut machine, &[0x66, 0xed]), NEXT, "ports 0x3ff and 0x400");
    assert_eq!(run(&mut machine, &[0xed]), GP, "to 0x402");
    machine.cpu.regs[reg::RDX] = 0x3fe;
    assert_eq!(run(&mut machine, &[0xec]), GP);
    machine.cpu.regs[reg::RDX] = 0x410;
    assert_eq!(run(&mut machine, &[0xec]), GP, "past the limit");
    machine.core().set_rflags(flags::IOPL);
    assert_eq!(run(&mut machine, &[0xec]), NEXT);
}

#[test]
fn msrs_refuse_bad_values() {
    let mut machine = Machine::long();
    let mut core = machine.core();
    let bad = [
        (0x175u32, 1u64 << 57),
        (0xc000_0082, 1 << 63),
        (0xc000_0100, 1 << 57),
        (0xc000_0102, 1 << 57),
        (0xc000_0103, 1 << 32),
        (0xc000_0080, 1 << 1),
        (0x277, 0x0200_0000_0000_0000),
        (0x2ff, 2),
        (0x200, 2),
        (0x250, 7),
        (0x1b, 0),
        (0x401, 1),
        (0x17b, 1),
        (0xfe, 0),
        (0x179, 0),
        (0xda0, 1),
        (0x48, 1),
        (0x1234_5678, 0),
        (0x40 + 0x400, 0),
        (0x4000_0000, 0),
    ];
    for (msr, value) in bad {
        assert_eq!(core.write_msr(msr, value), Err(Trap::gp(0)), "{msr:#x} = {value:#x}");
    }
    for msr in [0x0, 0x1b, 0x800, 0x3a, 0xc000_0105, 0xc001_0118, 0xc001_1fff] {
        assert_eq!(core.read_msr(msr), Err(Trap::gp(0)), "{msr:#x}");
    }
    let good = [
        (0x174u32, 0x10u64),
        (0x175, 0xffff_8000_0000_0000),
        (0x176, 0x1000),
        (0xc000_0081, 0x23_0008 << 32),
        (0xc000_0082, 0xffff_ffff_8100_0000),
        (0xc000_0084, 0x4_7700),
        (0xc000_0100, 0x7fff_0000_0000),
        (0xc000_0101, 0xffff_8880_0000_0000),
        (0xc000_0102, 0x1000),
        (0xc000_0103, 3),
        (0x277, 0x0407_0600_0407_0106),
        (0x2ff, 0xc06),
        (0x200, 0x8000_0006),
        (0x201, 0x3fff_8000_0800),
        (0x268, 0x0606_0606_0606_0606),
        (0x400, u64::MAX),
        (0x17b, u64::MAX),
    ];
    for (msr, value) in good {
        core.write_msr(msr, value).unwrap();
        assert_eq!(core.read_msr(msr), Ok(value), "{msr:#x}");
    }
    machine.platform.apic.borrow_mut().insert(0x1b, 0);
    let mut core = machine.core();
    core.write_msr(0x1b, 0xfee0_0900).unwrap();
    assert_eq!(core.read_msr(0x1b), Ok(0xfee0_0900));
}

#[test]
fn the_time_stamp_counter_and_its_offset() {
    let mut machine = Machine::long();
    machine.platform.clock.set(1000);
    machine.platform.apic.borrow_mut().insert(0x6e0, 0);
    let mut core = machine.core();
    core.write_msr(0x3b, 5000).unwrap();
    assert_eq!(core.tsc(), 6001);
    core.write_msr(0x10, 100).unwrap();
    assert_eq!(core.tsc(), 101);
    assert_eq!(core.read_msr(0x3b).unwrap() as i64, 5000 - 5902);
    // The deadline goes to the platform in the platform's time.
    core.write_msr(0x6e0, 200).unwrap();
    assert_eq!(core.platform.apic_msr(0x6e0), Some(1102));
    assert_eq!(core.read_msr(0x6e0), Ok(200));
    core.write_msr(0x6e0, 0).unwrap();
    assert_eq!(core.platform.apic_msr(0x6e0), Some(0));
    core.cpu.msrs.tsc_aux = 7;
    machine.cpu.regs[reg::RAX] = u64::MAX;
    run(&mut machine, &[0x0f, 0x01, 0xf9]).unwrap(); // rdtscp
    assert_eq!(
        (machine.cpu.regs[reg::RAX], machine.cpu.regs[reg::RDX], machine.cpu.regs[reg::RCX]),
        (102, 0, 7)
    );
    let mut machine = Machine::user();
    machine.cpu.cr4 |= cr4::TSD;
    assert_eq!(run(&mut machine, &[0x0f, 0x31]), GP);
}

#[test]
fn bases_halting_random_numbers() {
    let mut machine = Machine::long();
    assert_eq!(run(&mut machine, &[0xf3, 0x48, 0x0f, 0xae, 0xd0]), UD, "wrfsbase rax without CR4.FSGSBASE");
    machine.cpu.cr4 |= cr4::FSGSBASE;
    machine.cpu.regs[reg::RAX] = 0x1234_5678_9abc;
    run(&mut machine, &[0xf3, 0x48, 0x0f, 0xae, 0xd8]).unwrap(); // wrgsbase rax
    machine.cpu.msrs.kernel_gs_base = 7;
    run(&mut machine, &[0x0f, 0x01, 0xf8]).unwrap(); // swapgs
    run(&mut machine, &[0xf3, 0x48, 0x0f, 0xae, 0xc9]).unwrap(); // rdgsbase rcx
    assert_eq!((machine.cpu.regs[reg::RCX], machine.cpu.msrs.kernel_gs_base), (7, 0x1234_5678_9abc));
    machine.cpu.regs[reg::RAX] = 1 << 57;
    assert_eq!(run(&mut machine, &[0xf3, 0x48, 0x0f, 0xae, 0xd0]), GP);

    run(&mut machine, &[0x48, 0x0f, 0xc7, 0xf3]).unwrap(); // rdrand rbx
    assert_eq!(machine.cpu.rflags & flags::ARITHMETIC, flags::CF);
    let first = machine.cpu.regs[reg::RBX];
    run(&mut machine, &[0x48, 0x0f, 0xc7, 0xfb]).unwrap(); // rdseed rbx
    assert_ne!(machine.cpu.regs[reg::RBX], first);

    let rip = machine.cpu.rip;
    assert_eq!(run(&mut machine, &[0xf4]), Ok(Flow::Halt));
    assert_eq!((machine.cpu.rip, machine.cpu.halted), (rip + 1, true));
}

#[test]
fn sysret_that_sets_tf_is_stepped_itself() {
    let mut machine = Machine::long();
    machine.cpu.msrs.star = 0x1b << 48;
    machine.cpu.regs[reg::RCX] = DATA;
    machine.cpu.regs[11] = flags::TF;
    let step = Err(Trap::plain(vector::DB));
    assert_eq!(run(&mut machine, &[0x48, 0x0f, 0x07]), step);
    assert_eq!((machine.cpu.rip, machine.cpu.cpl, machine.cpu.dr[6] >> 14 & 1), (DATA, 3, 1));
}

#[test]
fn a_smaller_model_lacks_instructions_and_bits() {
    let mut machine = Machine::long();
    machine.cpu.model = Arc::new(CpuModel::by_name("qemu64").unwrap());
    assert!(!machine.cpu.model.has(feature::SMAP));
    assert_eq!(run(&mut machine, &[0x48, 0x0f, 0xc7, 0xf3]), UD, "rdrand");
    assert_eq!(run(&mut machine, &[0x0f, 0x01, 0xcb]), UD, "stac");
    let smap = machine.cpu.cr4 | cr4::SMAP;
    assert_eq!(machine.core().set_cr4(smap), Err(Trap::gp(0)));
    assert_eq!(machine.core().read_msr(0x3b), Err(Trap::gp(0)));
}

#[test]
fn init_and_startup() {
    let mut machine = Machine::user();
    machine.cpu.msrs.pat = 7;
    machine.cpu.mxcsr = 0x1fa0;
    let mut core = machine.core();
    core.init();
    let cpu = &*core.cpu;
    assert_eq!((cpu.rip, cpu.segments[1].base, cpu.cpl, cpu.cr0), (0xfff0, 0xffff_0000, 0, cr0::ET));
    assert_eq!((cpu.msrs.pat, cpu.mxcsr, cpu.msrs.efer), (7, 0x1fa0, 0));
    assert_eq!(core.code_size(), crate::CodeSize::Bits16);
    core.startup(0x9a);
    assert_eq!(
        (core.cpu.rip, core.cpu.segments[1].base, core.cpu.segments[1].selector),
        (0, 0x9_a000, 0x9a00)
    );
    core.reset();
    assert_eq!(core.cpu.mxcsr, 0x1f80);
    assert_eq!(core.cpu.regs[reg::RDX], u64::from(core.cpu.model.signature()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any instruction, in any mode, with any registers, ends in a result.
    #[test]
    fn no_instruction_panics(
        code in proptest::collection::vec(any::<u8>(), 15),
        two_byte in any::<bool>(),
        mode in 0..4,
        regs in any::<[u64; 16]>(),
        rflags in any::<u64>(),
    ) {
        let mut machine = match mode {
            0 => Machine::real(),
            1 => Machine::protected(),
            2 => Machine::long(),
            _ => Machine::user(),
        };
        machine.cpu.regs = regs;
        machine.core().set_rflags(rflags & !flags::VM);
        let mut code = code;
        if two_byte {
            code[0] = 0x0f;
            code[1] &= 0x33;
        }
        let bits = machine.core().code_size().bits();
        let insn = Decoder::with_ip(bits, &code, machine.cpu.rip, DecoderOptions::NONE).decode();
        let before = machine.cpu.rip;
        if !insn.is_invalid() && execute(&mut machine.core(), &insn).is_err() {
            prop_assert_eq!(machine.cpu.rip, before);
        }
    }
}

#[test]
fn hypercalls_say_that_there_are_none() {
    for code in [[0x0f, 0x01, 0xc1], [0x0f, 0x01, 0xd9]] {
        let mut machine = Machine::long();
        assert_eq!(run(&mut machine, &code), NEXT);
        assert_eq!(machine.cpu.regs[reg::RAX] as i64, -1000);
        let mut machine = Machine::user();
        assert_eq!(run(&mut machine, &code), NEXT);
        assert_eq!(machine.cpu.regs[reg::RAX] as i64, -1);
        let mut machine = Machine::long();
        let mut model = CpuModel::clone(&machine.cpu.model);
        model.change_features(&[("hypervisor".to_owned(), false)]).unwrap();
        machine.cpu.model = Arc::new(model);
        assert_eq!(run(&mut machine, &code), UD);
        assert_eq!(run(&mut Machine::real(), &code), UD);
    }
}

#[test]
fn x2apic_mode_needs_the_feature() {
    let mut machine = Machine::long();
    machine.platform.apic.borrow_mut().insert(0x1b, 0xfee0_0900);
    assert_eq!(machine.core().write_msr(0x1b, 0xfee0_0d00), Ok(()));
    let mut model = CpuModel::clone(&machine.cpu.model);
    model.change_features(&[("x2apic".to_owned(), false)]).unwrap();
    machine.cpu.model = Arc::new(model);
    assert_eq!(machine.core().write_msr(0x1b, 0xfee0_0d00), Err(Trap::gp(0)));
    assert_eq!(machine.core().write_msr(0x1b, 0xfee0_0900), Ok(()));
}

/// The offsets of far pointers with REX.W have 32 bits on AMD's processors and 64 on Intel's.
#[test]
fn far_pointers_with_64_bit_operands() {
    let on = |model: &str, code: &[u8], pointer: [u64; 2]| {
        let mut machine = Machine::long();
        machine.cpu.model = Arc::new(CpuModel::by_name(model).unwrap());
        machine.cpu.regs[reg::RBX] = DATA;
        machine.cpu.regs[reg::RSP] = STACK;
        machine.poke(DATA, pointer[0]);
        machine.poke(DATA + 8, pointer[1]);
        let flow = run(&mut machine, code);
        (flow, machine)
    };
    let (call, jump, lss) = ([0x48, 0xff, 0x1b], [0x48, 0xff, 0x2b], [0x48, 0x0f, 0xb2, 0x03]);
    let [code, data] = [selector::CODE64, selector::DATA].map(u64::from);
    for (model, narrow) in [("max", true), ("Haswell", false)] {
        let pointer = |selector: u64| {
            if narrow { [0x9abc_def0 | selector << 32, 0] } else { [0x1234_9abc_def0, selector] }
        };
        let offset = if narrow { 0x9abc_def0 } else { 0x1234_9abc_def0 };
        let (flow, machine) = on(model, &call, pointer(code));
        assert_eq!((flow, machine.cpu.rip), (Ok(Flow::Jump), offset), "{model}");
        // What it pushes has 64 bits in any case.
        assert_eq!(machine.cpu.regs[reg::RSP], STACK - 16);
        assert_eq!(machine.peek(STACK - 16), CODE + 3);
        let (flow, machine) = on(model, &jump, pointer(code));
        assert_eq!((flow, machine.cpu.rip), (Ok(Flow::Jump), offset), "{model}");
        let (flow, machine) = on(model, &lss, pointer(data));
        assert_eq!((flow, machine.cpu.regs[reg::RAX]), (NEXT, offset), "{model}");
    }
}

/// What a far call in 64-bit mode pushes, a far return takes.
#[test]
fn far_calls_of_user_code_return() {
    let mut machine = Machine::user();
    machine.cpu.regs[reg::RBX] = DATA;
    machine.cpu.regs[reg::RSP] = STACK;
    machine.poke(DATA, (CODE + 0x40) | u64::from(selector::USER_CODE64 | 3) << 32);
    assert_eq!(run(&mut machine, &[0x48, 0xff, 0x1b]), Ok(Flow::Jump));
    assert_eq!(machine.cpu.rip, CODE + 0x40);
    assert_eq!(run(&mut machine, &[0x48, 0xcb]), Ok(Flow::Jump));
    assert_eq!((machine.cpu.rip, machine.cpu.regs[reg::RSP]), (CODE + 3, STACK));
}

#[test]
fn arpl_writes_what_changes_alone() {
    let mut machine = Machine::protected();
    // arpl ax, bx; arpl [ebx], cx
    machine.cpu.regs[reg::RAX] = 0xffff_fff0;
    machine.cpu.regs[reg::RBX] = 2;
    assert_eq!(run(&mut machine, &[0x63, 0xd8]), NEXT);
    assert_eq!(machine.cpu.regs[reg::RAX], 0xffff_fff2);
    assert_ne!(machine.cpu.rflags & flags::ZF, 0);
    machine.cpu.regs[reg::RBX] = DATA;
    machine.poke(DATA, 0xfff1);
    machine.cpu.segments[Seg::Ds as usize].attributes &= !2;
    machine.core().mode_changed();
    for (rpl, result) in [(0, NEXT), (1, NEXT), (2, GP)] {
        machine.cpu.regs[reg::RCX] = rpl;
        assert_eq!(run(&mut machine, &[0x63, 0x0b]), result);
    }
    assert_eq!(machine.cpu.rflags & flags::ZF, 0);
    machine.cpu.segments[Seg::Ds as usize].attributes |= 2;
    machine.core().mode_changed();
    assert_eq!(run(&mut machine, &[0x63, 0x0b]), NEXT);
    assert_eq!(machine.peek(DATA), 0xfff2);
}
