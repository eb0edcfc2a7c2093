//! Instructions, the bus, exceptions, code that changes.

use crate::guest::{
    Asm, CODE, CODE32, CODE64, DATA, DATA_SEGMENT, PAGE_TABLES, assemble, boot64, exit, progress, real_mode,
    set_handler, table_registers, write_tables,
};
use crate::rig::{Access, EXIT_PORT, LOG_PORT, MMIO, Rig, TOP, Target, pattern};
use accel::HaltReason;
use iced_x86::code_asm::*;

/// A far jump with an operand of 32 bits, from 16- or 32-bit code.
fn far_jump(a: &mut CodeAssembler, from: u32, selector: u16, target: u32) -> Asm {
    let mut bytes = if from == 16 { vec![0x66] } else { Vec::new() };
    bytes.push(0xea);
    bytes.extend(target.to_le_bytes());
    bytes.extend(selector.to_le_bytes());
    a.db(&bytes)
}

pub(crate) fn starts_at_the_reset_vector(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    let code = assemble(16, 0, |a| {
        a.mov(eax, 0x1234_5678)?;
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.out(dx, eax)?;
        a.hlt()
    });
    rig.write(TOP.end - 16, &[0xe9, 0x0d, 0x80]); // jmp to 0xffff8000
    rig.write(TOP.end - 0x8000, &code);
    assert_eq!(rig.run(), 0x1234_5678);
}

pub(crate) fn real_mode_brings_up_long_mode(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    write_tables(&rig);
    let (gdt, _) = table_registers();
    let mut pointer = gdt.limit.to_le_bytes().to_vec();
    pointer.extend((gdt.base as u32).to_le_bytes());
    rig.write(0x7000, &pointer);
    let real = assemble(16, 0x7c00, |a| {
        a.xor(eax, eax)?;
        a.mov(ds, eax)?;
        a.db(&[0x66, 0x0f, 0x01, 0x16, 0x00, 0x70])?; // lgdt [0x7000], 32 bits of base
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        far_jump(a, 16, CODE32, 0x7d00)
    });
    let protected = assemble(32, 0x7d00, |a| {
        a.mov(eax, u32::from(DATA_SEGMENT))?;
        a.mov(ds, eax)?;
        a.mov(ss, eax)?;
        a.mov(es, eax)?;
        a.mov(eax, cr4)?;
        a.or(eax, 1 << 5)?;
        a.mov(cr4, eax)?;
        a.mov(eax, PAGE_TABLES as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.or(eax, 1 << 8)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32 as i32)?;
        a.mov(cr0, eax)?;
        far_jump(a, 32, CODE64, 0x7e00)
    });
    let long = assemble(64, 0x7e00, |a| {
        a.mov(rsp, 0x7000u64)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.push(rax)?;
        a.pop(rbx)?;
        a.shr(rbx, 32)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.and(eax, 1 << 10)?; // LMA
        a.or(eax, ebx)?;
        exit(a)
    });
    rig.write(0x7c00, &real);
    rig.write(0x7d00, &protected);
    rig.write(0x7e00, &long);
    rig.edit(0, |state| real_mode(state, 0x7c00));
    assert_eq!(rig.run(), 0x1122_3344 | 1 << 10);
    let state = rig.vcpus[0].save().unwrap();
    assert_eq!((state.efer, state.segments[1].selector, state.cr3), (0x500, CODE64, PAGE_TABLES));
}

pub(crate) fn ports_and_mmio_of_all_sizes(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.mov(rbx, MMIO)?;
        a.mov(rsi, DATA)?;
        a.mov(al, byte_ptr(rbx + 1))?;
        a.mov(byte_ptr(rsi), al)?;
        a.mov(ax, word_ptr(rbx + 2))?;
        a.mov(word_ptr(rsi + 2), ax)?;
        a.mov(eax, dword_ptr(rbx + 4))?;
        a.mov(dword_ptr(rsi + 4), eax)?;
        a.mov(rax, qword_ptr(rbx + 8))?;
        a.mov(qword_ptr(rsi + 8), rax)?;
        a.mov(rax, 0x8877_6655_4433_2211u64)?;
        a.mov(byte_ptr(rbx + 0x11), al)?;
        a.mov(word_ptr(rbx + 0x12), ax)?;
        a.mov(dword_ptr(rbx + 0x14), eax)?;
        a.mov(qword_ptr(rbx + 0x18), rax)?;
        a.mov(dx, 0x510)?;
        a.in_(al, dx)?;
        a.in_(ax, dx)?;
        a.in_(eax, dx)?;
        a.mov(dword_ptr(rsi + 16), eax)?;
        a.mov(eax, 0x4433_2211)?;
        a.out(0x80, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)?;
        a.add(dword_ptr(rbx + 0x20), 1)?; // a read and a write
        exit(a)
    });
    rig.run();
    let added = pattern(MMIO + 0x20, 4) + 1;
    let expected = [
        Access::Read(MMIO + 1, 1),
        Access::Read(MMIO + 2, 2),
        Access::Read(MMIO + 4, 4),
        Access::Read(MMIO + 8, 8),
        Access::Write(MMIO + 0x11, 1, 0x11),
        Access::Write(MMIO + 0x12, 2, 0x2211),
        Access::Write(MMIO + 0x14, 4, 0x4433_2211),
        Access::Write(MMIO + 0x18, 8, 0x8877_6655_4433_2211),
        Access::In(0x510, 1),
        Access::In(0x510, 2),
        Access::In(0x510, 4),
        Access::Out(0x80, 1, 0x11),
        Access::Out(0x510, 2, 0x2211),
        Access::Out(0x510, 4, 0x4433_2211),
        Access::Read(MMIO + 0x20, 4),
        Access::Write(MMIO + 0x20, 4, added),
    ];
    assert_eq!(rig.bus.log()[..expected.len()], expected);
    let low = pattern(MMIO + 1, 1) | pattern(MMIO + 2, 2) << 16 | pattern(MMIO + 4, 4) << 32;
    assert_eq!(rig.read_u64(DATA), low);
    assert_eq!(rig.read_u64(DATA + 8), pattern(MMIO + 8, 8));
    assert_eq!(rig.read_u64(DATA + 16), pattern(0x510, 4));
}

pub(crate) fn string_io_reaches_the_bus(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.mov(rdi, DATA)?;
        a.mov(ecx, 5)?;
        a.mov(dx, 0x1f0)?;
        a.cld()?;
        a.rep().insw()?;
        a.mov(rsi, DATA)?;
        a.mov(ecx, 3)?;
        a.mov(dx, u32::from(LOG_PORT))?;
        a.rep().outsb()?;
        a.mov(rdi, MMIO)?;
        a.mov(rsi, DATA)?;
        a.mov(ecx, 2)?;
        a.rep().movsd()?;
        a.lea(eax, ptr(rcx + rdi))?;
        exit(a)
    });
    assert_eq!(rig.run(), MMIO + 8);
    let word = pattern(0x1f0, 2);
    let mut expected = vec![Access::In(0x1f0, 2); 5];
    for shift in [0, 8, 0] {
        expected.push(Access::Out(LOG_PORT, 1, word >> shift & 0xff));
    }
    for offset in [0, 4] {
        expected.push(Access::Write(MMIO + offset, 4, word << 16 | word));
    }
    assert_eq!(rig.bus.log()[..expected.len()], expected);
}

pub(crate) fn exceptions_arrive_with_error_codes(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    let handlers: [(u8, bool); 5] = [(0, false), (3, false), (6, false), (13, true), (14, true)];
    for (index, (vector, has_error)) in handlers.into_iter().enumerate() {
        let at = CODE + 0x1_0000 + index as u64 * 0x100;
        let code = assemble(64, at, |a| {
            a.mov(eax, u32::from(vector))?;
            progress(a)?;
            if has_error {
                a.pop(rax)?;
                progress(a)?;
            }
            if vector == 14 {
                a.mov(rax, cr2)?;
                progress(a)?;
            }
            a.mov(ptr(rsp), rbx)?; // go on where RBX says
            a.iretq()
        });
        rig.write(at, &code);
        set_handler(&rig, vector, at);
    }
    boot64(&mut rig, |a| {
        let mut after = [(); 5].map(|()| a.create_label());
        a.lea(rbx, ptr(after[0]))?;
        a.xor(ecx, ecx)?;
        a.div(ecx)?;
        a.set_label(&mut after[0])?;
        a.lea(rbx, ptr(after[1]))?;
        a.int3()?;
        a.set_label(&mut after[1])?;
        a.lea(rbx, ptr(after[2]))?;
        a.ud2()?;
        a.set_label(&mut after[2])?;
        a.lea(rbx, ptr(after[3]))?;
        a.mov(eax, 0x28)?; // past the GDT's end
        a.mov(ds, eax)?;
        a.set_label(&mut after[3])?;
        a.lea(rbx, ptr(after[4]))?;
        a.mov(rcx, 0x1_2345_6000u64)?;
        a.mov(byte_ptr(rcx), al)?; // not mapped
        a.set_label(&mut after[4])?;
        a.mov(eax, 1)?;
        exit(a)
    });
    assert_eq!(rig.run(), 1);
    assert_eq!(rig.bus.progress(), [0, 3, 6, 13, 0x28, 14, 2, 0x2345_6000]);
}

pub(crate) fn a_triple_fault_ends_the_run(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| a.ud2()); // the IDT is empty
    assert_eq!(rig.run_while(|_, _| {}), [HaltReason::TripleFault]);
}

pub(crate) fn cpuid_knows_the_processor(target: &Target<'_>) {
    for (id, vcpus) in [(0, 1), (2, 3)] {
        let mut rig = Rig::new(target, vcpus);
        let listing = |a: &mut CodeAssembler| {
            a.mov(eax, 1)?;
            a.cpuid()?;
            a.mov(eax, ebx)?;
            progress(a)?;
            a.mov(eax, ecx)?;
            a.shr(eax, 31)?; // the hypervisor bit
            exit(a)
        };
        boot64(&mut rig, listing);
        let parked = rig.vcpus[0].save().unwrap();
        if id != 0 {
            // The other processors stay where they are.
            rig.edit(0, |state| state.events.mp_state = accel::MpState::Halted);
            rig.edit(id, |state| {
                let (lapic, msrs) = (state.lapic.clone(), state.msrs.clone());
                *state = accel::X86State { lapic, msrs, ..parked };
            });
        }
        assert_eq!(rig.run(), 1);
        assert_eq!(rig.bus.progress()[0] >> 24, id as u64);
    }
}

pub(crate) fn modified_code_is_executed(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    // A function that returns a constant; the constant is changed between calls, from the same page and
    // from another, and just before it is executed.
    boot64(&mut rig, |a| {
        let (mut function, mut again, mut just) = (a.create_label(), a.create_label(), a.create_label());
        a.xor(ebp, ebp)?;
        a.mov(ecx, 1000)?;
        a.set_label(&mut again)?;
        a.lea(rbx, ptr(function))?;
        a.mov(dword_ptr(rbx + 1), ecx)?;
        a.call(function)?;
        a.add(ebp, eax)?;
        a.lea(rbx, ptr(just))?;
        a.mov(dword_ptr(rbx + 1), ecx)?;
        a.set_label(&mut just)?;
        a.mov(edx, 0)?; // the constant was just written
        a.add(ebp, edx)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(eax, ebp)?;
        exit(a)?;
        a.set_label(&mut function)?;
        a.mov(eax, 0)?;
        a.ret()
    });
    assert_eq!(rig.run(), 1000 * 1001);
}

pub(crate) fn code_modified_from_outside_is_executed(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    let function = CODE + 0x1_0000;
    let returns = |value: u32| {
        assemble(64, function, |a| {
            a.mov(eax, value)?;
            a.ret()
        })
    };
    rig.write(function, &returns(1));
    boot64(&mut rig, |a| {
        let mut again = a.create_label();
        a.mov(rbx, function)?;
        a.xor(ebp, ebp)?;
        a.set_label(&mut again)?;
        a.call(rbx)?;
        a.mov(edx, eax)?;
        a.xchg(edx, ebp)?;
        a.cmp(edx, eax)?;
        a.je(again)?; // until it returns something new
        progress(a)?;
        a.cmp(eax, 5)?;
        a.jne(again)?;
        exit(a)
    });
    rig.run_with(|rig| {
        for value in 1..=5u32 {
            if value > 1 {
                // One store, as a device's DMA would: the guest sees the old or the new.
                rig.memory.write(function + 1, &[value as u8]).unwrap();
            }
            rig.bus.wait_for(value.into());
        }
    });
    assert_eq!(rig.bus.progress(), [1, 2, 3, 4, 5]);
}

pub(crate) fn the_dirty_log_has_the_pages_written(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let mut again = a.create_label();
        a.mov(rbx, DATA)?;
        a.mov(byte_ptr(rbx), 1)?; // a translation that may write is there already
        a.mov(eax, 1)?;
        progress(a)?;
        a.set_label(&mut again)?;
        a.cmp(byte_ptr(rbx + 0x8000), 1)?;
        a.jne(again)?;
        a.mov(byte_ptr(rbx), 2)?;
        a.mov(byte_ptr(rbx + 0x3fff), 2)?;
        a.mov(dword_ptr(rbx + 0x5ffe), 2)?; // two pages
        a.mov(al, byte_ptr(rbx + 0x7000))?; // only read
        a.mov(eax, 2)?;
        progress(a)?;
        a.mov(byte_ptr(rbx + 0x3000), 3)?;
        exit(a)
    });
    let mut taken = Vec::new();
    rig.run_with(|rig| {
        rig.bus.wait_for(1);
        rig.vm.set_dirty_log(true);
        rig.memory.write(DATA + 0x8000, &[1]).unwrap();
    });
    rig.vm.take_dirty(&mut |gpa| taken.push(gpa));
    // The page tables' accessed and dirty bits count as writes; whether they were set before is open.
    taken.retain(|gpa| *gpa >= CODE);
    // An accelerator may also count a page that was read for the first time.
    taken.retain(|gpa| *gpa != DATA + 0x7000);
    assert_eq!(taken, [0, 0x3000, 0x5000, 0x6000, 0x8000].map(|offset| DATA + offset));
    let mut again = 0;
    rig.vm.take_dirty(&mut |_| again += 1);
    assert_eq!(again, 0);
    rig.vm.set_dirty_log(false);
}
