//! A kernel without scruples: descriptors, gates, page tables, control registers and stacks of any contents,
//! and the instructions that rely on them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo_fuzz::Input;
use x86_core::svm::{InterruptAction, testing};
use x86_core::testing::{CODE, DATA, GDT, IDT, Machine, PAGE_TABLES, STACK, TSS, descriptor, selector};
use x86_core::{Core, Flow, Seg, Trap, cr0, cr4, efer, flags, vector};

/// Instructions that one operation may run.
const STEPS: usize = 8;
/// Paging structures of the machine, in bytes.
const TABLES_LEN: u64 = 6 << 12;

/// Instructions of the system, without their last operands' bytes.
const CODES: &[&[u8]] = &[
    b"\xcf",             // iret
    b"\x48\xcf",         // iretq
    b"\x66\xcf",         // iret with 16 bits
    b"\xcb",             // retf
    b"\x48\xcb",         // retfq
    b"\xca",             // retf imm16
    b"\xcd",             // int imm8
    b"\xcc",             // int3
    b"\xf1",             // int1
    b"\xff\x2f",         // jmp far [rdi]
    b"\x48\xff\x2f",     // jmp far [rdi] with 64 bits
    b"\xff\x1f",         // call far [rdi]
    b"\x48\xff\x1f",     // call far [rdi] with 64 bits
    b"\xea",             // jmp far imm
    b"\x9a",             // call far imm
    b"\x0f\x05",         // syscall
    b"\x48\x0f\x07",     // sysretq
    b"\x0f\x07",         // sysret
    b"\x0f\x34",         // sysenter
    b"\x48\x0f\x35",     // sysexit
    b"\x8e",             // mov sreg, r/m
    b"\x0f\x00",         // sldt, str, lldt, ltr, verr, verw
    b"\x0f\x01",         // sgdt, lgdt, lidt, smsw, lmsw, invlpg, swapgs, …
    b"\x0f\x02",         // lar
    b"\x0f\x03",         // lsl
    b"\x0f\x22",         // mov cr, r
    b"\x0f\x23",         // mov dr, r
    b"\x0f\x20",         // mov r, cr
    b"\x0f\x30",         // wrmsr
    b"\x0f\x32",         // rdmsr
    b"\x0f\xa2",         // cpuid
    b"\x0f\xb2\x27",     // lss esp, [rdi]
    b"\x0f\xa1",         // pop fs
    b"\x17",             // pop ss
    b"\x9d",             // popf
    b"\xfb",             // sti
    b"\xfa",             // cli
    b"\xf4",             // hlt
    b"\xee",             // out
    b"\x6c",             // ins
    b"\x6f",             // outs
    b"\x63",             // arpl or movsxd
    b"\x0f\xae",         // fxsave, fxrstor, xsave, xrstor, clflush, …
    b"\x0f\xc7",         // cmpxchg8b, xsavec, rdrand, …
    b"\x8f\x07",         // pop [rdi]
    b"\xff\x37",         // push [rdi]
    b"\xc8",             // enter
    b"\xc9",             // leave
    b"\x60",             // pusha
    b"\x61",             // popa
    b"\xf3\xa4",         // rep movsb
    b"\xf3\x48\xab",     // rep stosq
    b"\xf0\x48\x0f\xb1", // lock cmpxchg
    b"\x0f\x01\xd8",     // vmrun
    b"\x0f\x01\xd8",     // once more: a guest is seldom entered
    b"\x0f\x01\xd9",     // vmmcall
    b"\x0f\x01\xda",     // vmload
    b"\x0f\x01\xdb",     // vmsave
    b"\x0f\x01\xdc",     // stgi
    b"\x0f\x01\xdd",     // clgi
    b"\x0f\x01\xdf",     // invlpga
    b"\xf3\x90",         // pause
];

/// The VMCB of the guest that the machine may run, its nested page tables, and how many pages both have.
const VMCB: u64 = 0x60_0000;
const NESTED: u64 = VMCB + 0x1000;
const SVM_PAGES: u64 = 12;

fn selector(input: &mut Input<'_>) -> u16 {
    match input.u8() % 4 {
        0 => u16::from(input.u8()),
        1 => input.u16(),
        _ => selector::FREE + 8 * u16::from(input.u8() % 8) + u16::from(input.u8() % 4),
    }
}

fn address(input: &mut Input<'_>) -> u64 {
    match input.u8() % 8 {
        0 => input.number(),
        1 => 0x0000_8000_0000_0000 - u64::from(input.u8()),
        2 => 0xffff_8000_0000_0000 + u64::from(input.u8()),
        3 => STACK - u64::from(input.u8()),
        4 => CODE + u64::from(input.u8()),
        _ => DATA + u64::from(input.u16()),
    }
}

/// Lays out something that the processor will read.
fn lay_out(machine: &Machine, input: &mut Input<'_>) {
    match input.u8() % 8 {
        0 | 1 => {
            let entry = u64::from(selector::FREE) / 8 + u64::from(input.u8() % 8);
            let attributes = u32::from(input.u16()) | if input.one_in(4) { 0 } else { 0x80 };
            let base = address(input) as u32;
            let limit = if input.flag() { 0xf_ffff } else { input.u32() & 0xf_ffff };
            let system = [descriptor(base, limit, attributes), input.u64() >> 32];
            machine.poke(GDT + 8 * entry, system[0]);
            if input.flag() {
                machine.poke(GDT + 8 * entry + 8, system[1]);
            }
        }
        2 => {
            // A call gate, or an interrupt gate.
            let low = u64::from(input.u16()) | u64::from(selector(input)) << 16;
            let high = u64::from(input.u16()) << 32 | (CODE >> 16) << 48;
            let target = if input.flag() { low | high } else { low | high & !(0xf << 40) | 0xc << 40 };
            let place = if input.flag() {
                GDT + u64::from(selector::FREE) + 8 * u64::from(input.u8() % 8)
            } else {
                IDT + 8 * u64::from(input.u16() % 512)
            };
            machine.poke(place, target);
            machine.poke(place + 8, input.u8().into());
        }
        3 => {
            let place = PAGE_TABLES + input.below(TABLES_LEN / 8) * 8;
            let entry = match input.u8() % 4 {
                0 => input.u64(),
                1 => {
                    u64::from(input.u16()) << 12
                        | u64::from(input.u16() & 0xfff)
                        | u64::from(input.u8()) << 56
                }
                2 => machine.peek(place) ^ 1u64 << (input.u8() % 64),
                _ => PAGE_TABLES + u64::from(input.u8() % 8) * 0x1000 + u64::from(input.u8()),
            };
            machine.poke(place, entry);
        }
        7 => {
            // The VMCB, or nested page tables.
            let place = match input.u8() % 4 {
                0 => VMCB + u64::from(input.u8()) / 8 * 8,
                1 => VMCB + 0x400 + u64::from(input.u16() % 0x2a0) / 8 * 8,
                2 => VMCB + input.pick(&[0, 8, 0x10, 0x40, 0x48, 0x58, 0x60, 0x90, 0xa8, 0xb0]),
                _ => NESTED + input.below(SVM_PAGES * 512) * 8,
            };
            let value = match input.u8() % 4 {
                0 => input.u64(),
                1 => address(input),
                2 => machine.peek(place) ^ 1u64 << (input.u8() % 64),
                _ => NESTED + u64::from(input.u8() % 16) * 0x1000 + u64::from(input.u8()),
            };
            machine.poke(place, value);
        }
        4 => machine.poke(TSS + u64::from(input.u8() % 0x60), address(input)),
        5 => {
            // A frame on the stack.
            let width = input.pick(&[8, 4, 2]);
            let stack = (machine.cpu.regs[4] & 0xff_ffff).min(x86_core::testing::RAM - 64);
            let values = [
                address(input),
                selector(input).into(),
                input.number(),
                address(input),
                selector(input).into(),
            ];
            for (index, value) in values.iter().enumerate() {
                let bytes = &value.to_le_bytes()[..width];
                // At the end of RAM it is lost.
                let _ = machine.memory.write(stack + (index * width) as u64, bytes);
            }
        }
        _ => {
            // A far pointer or a pseudo-descriptor where RDI points.
            machine.poke(DATA, address(input));
            machine.poke(DATA + input.pick(&[2, 4, 8]), selector(input).into());
        }
    }
}

/// Changes what the processor is in the midst of.
fn disturb(core: &mut Core<'_>, input: &mut Input<'_>) {
    const CR0: [u64; 8] = [cr0::PE, cr0::MP, cr0::EM, cr0::TS, cr0::NE, cr0::WP, cr0::AM, cr0::PG];
    const EFER: [u64; 4] = [efer::SCE, efer::LME, efer::NXE, efer::SVME];
    let before = (core.cpu.cr0, core.cpu.cr3, core.cpu.cr4, core.cpu.msrs.efer);
    let result = match input.u8() % 15 {
        0 => core.set_cr0(core.cpu.cr0 ^ input.pick(&CR0)),
        1 => core.set_cr4(core.cpu.cr4 ^ 1u64 << (input.u8() % 24)),
        2 => {
            core.set_cr3(if input.one_in(4) { input.number() } else { PAGE_TABLES + u64::from(input.u16()) })
        }
        3 => core.set_efer(core.cpu.msrs.efer ^ input.pick(&EFER)),
        4 => {
            let msr = match input.u8() % 4 {
                0 => input.u32(),
                1 => 0x174 + u32::from(input.u8() % 3),
                2 => 0xc000_0080 + u32::from(input.u8() % 5),
                _ => 0xc000_0100 + u32::from(input.u8() % 4),
            };
            let value = if input.flag() { address(input) } else { input.u64() };
            core.write_msr(msr, value)
        }
        5 => {
            core.cpu.regs[usize::from(input.u8() % 16)] = address(input);
            Ok(())
        }
        6 => {
            core.set_rflags(input.u32().into());
            Ok(())
        }
        7 => {
            let seg = input.pick(&[Seg::Es, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs]);
            core.load_segment(seg, selector(input))
        }
        8 => core.interrupt(input.u8()),
        9 => core.nmi(),
        10 => {
            core.invlpg(address(input));
            Ok(())
        }
        11 => {
            core.cpu.regs[0] = if input.one_in(4) { input.number() } else { VMCB };
            Ok(())
        }
        12 => {
            // Between two instructions.
            match core.cpu.interrupt_action(input.flag()) {
                InterruptAction::None => Ok(()),
                InterruptAction::Physical => core.interrupt(input.u8()),
                InterruptAction::Intercept => core.intercept_interrupt(),
                InterruptAction::Virtual => core.virtual_interrupt(),
            }
        }
        13 => core.intercept_nmi().and_then(|_| core.intercept_init()).map(|_| ()),
        _ => {
            core.cpu.dr[usize::from(input.u8() % 4)] = address(input);
            Ok(())
        }
    };
    if let Err(Trap::Intercepted) = result {
        let _ = core.deliver_trap(Trap::Intercepted);
    }
    if let Err(Trap::Exception(_)) = result {
        let after = (core.cpu.cr0, core.cpu.cr3, core.cpu.cr4, core.cpu.msrs.efer);
        assert_eq!(before, after, "what faults changes nothing");
    }
}

/// Runs a few instructions. False if the processor has stopped for good.
fn run(core: &mut Core<'_>) -> bool {
    for _ in 0..STEPS {
        let cpu = &core.cpu;
        let before = (cpu.segments, cpu.rip, cpu.cpl, cpu.cr0, cpu.cr4, cpu.gdtr.base, cpu.idtr.base);
        let result = x86_interp::step(core);
        let cpu = &core.cpu;
        let after = (cpu.segments, cpu.rip, cpu.cpl, cpu.cr0, cpu.cr4, cpu.gdtr.base, cpu.idtr.base);
        assert!(cpu.rflags & flags::FIXED != 0 && cpu.cpl <= 3);
        assert_eq!(cpu.long64, cpu.msrs.efer & efer::LMA != 0 && cpu.segments[1].attributes >> 13 & 1 != 0);
        assert!(cpu.svm.guest || cpu.cr0 & cr0::PG == 0 || cpu.cr0 & cr0::PE != 0, "paging without protection");
        assert!(cpu.msrs.efer & efer::LMA == 0 || cpu.cr4 & cr4::PAE != 0, "long mode without PAE");
        match result {
            Ok(Flow::Halt) => core.cpu.halted = false,
            Ok(_) => {}
            Err(trap @ (Trap::TripleFault | Trap::Intercepted)) => {
                assert!(trap == Trap::TripleFault || core.cpu.svm.guest, "an intercept without a guest");
                if core.deliver_trap(trap).is_err() {
                    return false;
                }
            }
            Err(Trap::Exception(exception)) => {
                if exception.vector != vector::DB {
                    assert_eq!(before, after, "{exception:x?} left the processor changed");
                }
                if core.deliver(exception).is_err() {
                    return false;
                }
            }
        }
    }
    true
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut machine = match input.u8() % 5 {
        0 => Machine::real(),
        1 => Machine::protected(),
        2 => Machine::long(),
        3 => Machine::user(),
        _ => {
            let mut machine = Machine::user();
            machine.cpu.segments[1].attributes = 0x0c0fb; // compatibility mode
            machine
        }
    };
    machine.core().mode_changed();
    machine.cpu.regs[7] = DATA;
    if input.flag() {
        // A host of a guest, which may have nested page tables.
        machine.cpu.msrs.efer |= efer::SVME;
        machine.cpu.regs[0] = VMCB;
        testing::write_vmcb(&machine, VMCB, CODE);
        if input.flag() {
            testing::nest(&machine, VMCB, NESTED);
        }
    }
    while !input.is_empty() {
        match input.u8() % 4 {
            0 => lay_out(&machine, &mut input),
            1 => disturb(&mut machine.core(), &mut input),
            _ => {
                let mut code = Vec::new();
                for _ in 0..1 + input.u8() % 3 {
                    code.extend_from_slice(input.pick(CODES));
                    let len = input.below(8) as usize;
                    code.extend_from_slice(input.bytes(len));
                }
                let at = machine.cpu.segments[1].base.wrapping_add(machine.cpu.rip);
                // Where there is no RAM, whatever is there runs.
                let _ = machine.memory.write(at, &code);
                if !run(&mut machine.core()) {
                    break;
                }
            }
        }
    }
});
