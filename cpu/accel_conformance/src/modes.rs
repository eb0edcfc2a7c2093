//! The processor's modes, paging of each kind, and what goes wrong in them.

use crate::guest::{
    CODE, CODE32, DATA, DATA_SEGMENT, PAGE_TABLES, assemble, boot64, exit, interrupt_handler, progress,
    real_mode, set_handler, table_registers, write_tables,
};
use crate::rig::{EXIT_PORT, LOG_PORT, Rig, Target};
use accel::{Segment, X86State};
use iced_x86::code_asm::*;

fn u64s(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn u32s(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A processor in 32-bit protected mode without paging, at `rip`.
fn protected_mode(state: &mut X86State, rip: u64) {
    let data = Segment { selector: DATA_SEGMENT, base: 0, limit: u32::MAX, rights: 0xc093, unusable: false };
    state.cr0 = 0x11;
    state.segments = [data; 6];
    state.segments[X86State::CS] = Segment { selector: CODE32, rights: 0xc09b, ..data };
    (state.gdtr, state.idtr) = table_registers();
    state.regs[X86State::RSP] = 0x7000;
    state.rip = rip;
    state.rflags = 2;
}

pub(crate) fn real_mode_interrupts_use_the_vector_table(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    let code = assemble(16, 0x7c00, |a| {
        a.mov(ax, 0x1234)?;
        a.int(0x21)?;
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.movzx(eax, ax)?;
        a.out(dx, eax)?;
        a.cli()?;
        a.hlt()
    });
    let handler = assemble(16, 0, |a| {
        a.mov(bp, sp)?;
        a.xor(ax, word_ptr(bp + 2))?; // the caller's CS
        a.add(ax, word_ptr(bp))?; // and IP
        a.iret()
    });
    rig.write(0x7c00, &code);
    rig.write(0x1_2340, &handler);
    rig.write(0x21 * 4, &[0, 0, 0x34, 0x12]);
    rig.edit(0, |state| {
        real_mode(state, 0x7c00);
        state.regs[X86State::RSP] = 0x7000;
    });
    assert_eq!(rig.run(), 0x1234 + 0x7c05);
    let state = rig.vcpus[0].save().unwrap();
    assert_eq!(state.regs[X86State::RSP] & 0xffff, 0x7000);
}

/// A guest in 32-bit mode that turns on paging and writes and reads through a mapping of `DATA` at 0x4010_0000.
fn paged(rig: &mut Rig, directory: u32, features: i32) {
    const VIRTUAL: u32 = 0x4010_0000;
    let code = assemble(32, 0x7c00, |a| {
        a.mov(eax, features)?;
        a.mov(cr4, eax)?;
        a.mov(eax, directory)?;
        a.mov(cr3, eax)?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32 as i32)?;
        a.mov(cr0, eax)?;
        a.mov(ebx, VIRTUAL)?;
        a.mov(ecx, dword_ptr(ebx + 0x10))?;
        a.mov(dword_ptr(ebx + 0x20), ecx)?;
        a.mov(eax, ecx)?;
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.out(dx, eax)?;
        a.cli()?;
        a.hlt()
    });
    write_tables(rig);
    rig.write(0x7c00, &code);
    rig.write(DATA + 0x10, &u32s(&[0xcafe_f00d]));
    rig.edit(0, |state| protected_mode(state, 0x7c00));
}

pub(crate) fn protected_mode_pages_with_two_levels(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    // The directory at 0x1_0000: the first 4 MiB as one large page, 0x4000_0000 by a table at 0x1_1000.
    let directory = 0x1_0000;
    paged(&mut rig, directory as u32, 1 << 4);
    let mut entries = vec![0u32; 1024];
    entries[0] = 0x83;
    entries[0x100] = 0x1_1003;
    rig.write(directory, &u32s(&entries));
    let mut table = vec![0u32; 1024];
    table[0x100] = DATA as u32 | 3;
    rig.write(directory + 0x1000, &u32s(&table));
    assert_eq!(rig.run(), 0xcafe_f00d);
    assert_eq!(rig.read_u64(DATA + 0x20) as u32, 0xcafe_f00d);
    // Accessed, and dirty where written.
    let entry = |at: u64| rig.read_u64(at) as u32;
    assert_eq!(entry(directory) & 0xa0, 0xa0 & entry(directory) | 0x20);
    assert_eq!(entry(directory + 0x400) & 0x20, 0x20);
    assert_eq!(entry(directory + 0x1400) & 0x60, 0x60);
}

pub(crate) fn protected_mode_pages_with_pae(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    // Four pointers at 0x1_0020, directories at 0x1_1000 and 0x1_2000, a table at 0x1_3000.
    let pointers = 0x1_0020;
    paged(&mut rig, pointers as u32, 1 << 5);
    rig.write(pointers, &u64s(&[0x1_1001, 0x1_2001, 0, 0]));
    let mut directory = vec![0u64; 512];
    directory[0] = 0x83;
    directory[1] = 0x20_0083;
    rig.write(0x1_1000, &u64s(&directory));
    let mut second = vec![0u64; 512];
    second[0] = 0x1_3003;
    rig.write(0x1_2000, &u64s(&second));
    let mut table = vec![0u64; 512];
    table[0x100] = DATA | 3;
    rig.write(0x1_3000, &u64s(&table));
    assert_eq!(rig.run(), 0xcafe_f00d);
    assert_eq!(rig.read_u64(DATA + 0x20) as u32, 0xcafe_f00d);
    assert_eq!(rig.read_u64(0x1_3000 + 0x800) & 0x60, 0x60);
    // The pointers are in registers: saved and restored, they stay what they were.
    rig.write(pointers, &u64s(&[0, 0, 0, 0]));
    let saved = rig.vcpus[0].save().unwrap();
    assert_eq!((saved.cr3, saved.cr4, saved.cr0 >> 31), (pointers, 1 << 5, 1));
}

pub(crate) fn compatibility_mode_runs_in_long_mode(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    let compatible = CODE + 0x4_0000;
    boot64(&mut rig, |a| {
        a.push(i32::from(CODE32))?;
        a.mov(rax, compatible)?;
        a.push(rax)?;
        a.db(&[0x48, 0xcb]) // RETFQ
    });
    let code = assemble(32, compatible, |a| {
        a.mov(eax, 0xffff_ffffu32)?;
        a.inc(eax)?; // one byte: a REX prefix in 64-bit code
        a.mov(ebx, DATA as u32)?;
        a.mov(dword_ptr(ebx), esp)?;
        a.push(eax)?;
        a.sub(dword_ptr(ebx), esp)?; // four bytes, not eight
        a.mov(eax, dword_ptr(ebx))?;
        a.mov(edx, u32::from(EXIT_PORT))?;
        a.out(dx, eax)?;
        a.cli()?;
        a.hlt()
    });
    rig.write(compatible, &code);
    assert_eq!(rig.run(), 4);
}

pub(crate) fn page_faults_say_what_was_wrong(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let mut after = [(); 4].map(|()| a.create_label());
        // A table of its own for 0x40_0000: entries of 4 KiB at 0x1_0000.
        a.mov(r8, PAGE_TABLES + 0x2010)?;
        a.mov(qword_ptr(r8), 0x1_0003)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.or(eax, 1 << 11)?; // NXE
        a.wrmsr()?;
        a.mov(rax, cr0)?;
        a.or(eax, 1 << 16)?; // WP
        a.mov(cr0, rax)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.mov(rsi, DATA)?;
        a.mov(dword_ptr(rsi), 1)?; // its first page may be written
        a.lea(rbx, ptr(after[0]))?;
        a.mov(dword_ptr(rsi + 0x1004), 1)?; // the second may not
        a.set_label(&mut after[0])?;
        a.lea(rbx, ptr(after[1]))?;
        a.mov(eax, dword_ptr(rsi + 0x2008))?; // the third is not there
        a.set_label(&mut after[1])?;
        a.lea(rbx, ptr(after[2]))?;
        a.lea(rax, ptr(rsi + 0x300c))?; // the fourth is not for code
        a.jmp(rax)?;
        a.set_label(&mut after[2])?;
        a.lea(rbx, ptr(after[3]))?;
        a.mov(eax, dword_ptr(rsi + 0x4010))?; // the fifth has a reserved bit set
        a.set_label(&mut after[3])?;
        a.mov(eax, 1)?;
        exit(a)
    });
    let mut table = vec![0u64; 512];
    table[0] = DATA | 3;
    table[1] = (DATA + 0x1000) | 1;
    table[3] = (DATA + 0x3000) | 3 | 1 << 63;
    table[4] = (DATA + 0x4000) | 3 | 1 << 51;
    rig.write(0x1_0000, &u64s(&table));
    interrupt_handler(&rig, 14, |a| {
        a.pop(rax)?;
        progress(a)?;
        a.mov(rax, cr2)?;
        progress(a)?;
        a.mov(qword_ptr(rsp), rbx)?; // go on where RBX says
        a.iretq()
    });
    assert_eq!(rig.run(), 1);
    let data = DATA;
    let mut progress = rig.bus.progress();
    // QEMU's TCG, on which KVM may be tested, leaves the bit for a present page clear here.
    progress[6] |= 1;
    assert_eq!(
        progress,
        [3, data + 0x1004, 0, data + 0x2008, 0x11, data + 0x300c, 9, data + 0x4010],
        "write to a present page, read of an absent one, fetch, reserved bit"
    );
}

pub(crate) fn the_trap_flag_steps(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.mov(rsi, DATA)?;
        a.xor(ecx, ecx)?;
        a.pushfq()?;
        a.or(dword_ptr(rsp), 1 << 8)?;
        a.popfq()?;
        a.inc(ecx)?; // 1
        a.add(ecx, ecx)?; // 2
        a.push(rcx)?; // 3
        a.pop(rdx)?; // 4
        a.pushfq()?; // 5: with the flag
        a.and(dword_ptr(rsp), !(1 << 8))?; // 6
        a.popfq()?; // 7: traps still
        a.inc(ecx)?;
        a.mov(eax, dword_ptr(rsi))?;
        exit(a)
    });
    interrupt_handler(&rig, 1, |a| {
        a.push(rax)?;
        a.inc(dword_ptr(rsi))?;
        a.mov(rax, dr6)?;
        a.and(eax, 1 << 14)?; // BS
        a.or(dword_ptr(rsi + 4), eax)?;
        a.xor(eax, eax)?;
        a.mov(dr6, rax)?;
        a.pop(rax)?;
        a.iretq()
    });
    assert_eq!(rig.run(), 7);
    assert_eq!(rig.read_u64(DATA) >> 32, 1 << 14);
}

pub(crate) fn a_double_fault_has_a_stack_of_its_own(target: &Target<'_>) {
    const TSS: u64 = 0xb000;
    const STACK: u64 = 0x1f_8000;
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.mov(eax, 0x20)?;
        a.ltr(ax)?;
        a.xor(esp, esp)?;
        a.sub(rsp, 0x1000)?; // not mapped: the fault's frame faults as well
        a.ud2()
    });
    let handler = CODE + 0x5_0000;
    rig.write(
        handler,
        &assemble(64, handler, |a| {
            a.pop(rax)?; // the error code
            a.mov(ebx, STACK as u32)?;
            a.sub(rbx, rsp)?;
            a.shl(ebx, 8)?;
            a.or(eax, ebx)?;
            exit(a)
        }),
    );
    set_handler(&rig, 8, handler);
    set_handler(&rig, 6, handler);
    // The handler's gate names stack 1.
    rig.write(0x9000 + 8 * 16 + 4, &[1]);
    let mut tss = vec![0; 104];
    tss[36..44].copy_from_slice(&STACK.to_le_bytes());
    rig.write(TSS, &tss);
    rig.write(0x8020, &u64s(&[TSS << 16 | 0x0000_8900_0000_0067, 0]));
    rig.edit(0, |state| state.gdtr.limit = 0x2f);
    assert_eq!(rig.run(), 40 << 8, "an error code of 0, and a frame of five words on the stack of its own");
    assert!(rig.bus.progress().is_empty(), "nothing went to port {LOG_PORT:#x}");
}
