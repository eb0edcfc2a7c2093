//! Guests that run guests of their own, where processors announce SVM (AMD APM volume 2, chapter 15).

use crate::feature::{Feature, has};
use crate::guest::{APIC, Asm, CODE, DATA, PAGE_TABLES, assemble, boot64, exit, interrupt_handler, progress};
use crate::rig::{Rig, Target};
use crate::snapshot::copied;
use accel::{HaltReason, Segment, X86State};
use iced_x86::code_asm::*;

/// The VMCB, what VM_HSAVE_PA names, and nested page tables, which map the first 4 GiB one to one.
const VMCB: u64 = 0x50_0000;
const HSAVE: u64 = 0x50_1000;
const NESTED: u64 = 0x50_2000;
/// Where the guest's guest begins.
const INNER: u64 = CODE + 0x8000;

/// Exit codes, and the intercept bits with the same numbers.
const INTR: u64 = 0x60;
const VMRUN: u64 = 0x80;
const VMMCALL: u64 = 0x81;

/// Enables SVM, with the VMCB's address in RAX after it.
fn enable(a: &mut CodeAssembler) -> Asm {
    a.mov(ecx, 0xc000_0080u32)?;
    a.rdmsr()?;
    a.or(eax, 1 << 12)?;
    a.wrmsr()?;
    a.mov(ecx, 0xc001_0117u32)?;
    a.mov(eax, HSAVE as u32)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.mov(rax, VMCB)
}

/// Loads `listing` as the inner guest, with a VMCB in which `interrupts` is the word of virtual interrupts and the exits
/// of these codes are intercepted.
fn load_inner(rig: &Rig, interrupts: u64, exits: &[u64], listing: impl FnOnce(&mut CodeAssembler) -> Asm) {
    rig.write(INNER, &assemble(64, INNER, listing));
    let mut vmcb = [0u8; 0x1000];
    for code in exits.iter().chain(&[VMRUN]) {
        vmcb[(code / 8) as usize] |= 1 << (code % 8);
    }
    let mut put = |at: usize, value: u64| vmcb[at..at + 8].copy_from_slice(&value.to_le_bytes());
    let state = rig.vcpus[0].save().expect("a state");
    put(0x58, 1);
    put(0x60, interrupts);
    put(0x90, 1);
    put(0xb0, NESTED);
    let segment = |segment: &Segment| {
        let rights = u64::from(segment.rights & 0xff | segment.rights >> 4 & 0xf00);
        u64::from(segment.selector) | rights << 16 | u64::from(segment.limit) << 32
    };
    for (index, register) in state.segments[..4].iter().enumerate() {
        put(0x400 + 16 * index, segment(register));
    }
    for (at, table) in [(0x460, &state.gdtr), (0x480, &state.idtr)] {
        put(at, u64::from(table.limit) << 32);
        put(at + 8, table.base);
    }
    put(0x4d0, state.efer | 1 << 12);
    put(0x548, state.cr4);
    put(0x550, PAGE_TABLES);
    put(0x558, state.cr0);
    put(0x560, 0x400);
    put(0x568, 0xffff_0ff0);
    put(0x570, 2);
    put(0x578, INNER);
    put(0x5d8, state.regs[X86State::RSP] - 0x8000);
    put(0x668, 0x0007_0406_0007_0406);
    rig.write(VMCB, &vmcb);
    let mut tables = vec![0u64; 512 * 6];
    tables[0] = (NESTED + 0x1000) | 7;
    for gigabyte in 0..4 {
        tables[512 + gigabyte] = (NESTED + 0x2000 + gigabyte as u64 * 0x1000) | 7;
    }
    for (index, entry) in tables[1024..].iter_mut().enumerate() {
        *entry = (index as u64) << 21 | 0x87;
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|word| word.to_le_bytes()).collect();
    rig.write(NESTED, &bytes);
}

/// A handler that counts at `DATA + 8 * vector`, ended at the local APIC if `physical`.
fn counting_handler(rig: &Rig, vector: u8, physical: bool) {
    interrupt_handler(rig, vector, |a| {
        a.push(rax)?;
        a.mov(rax, DATA + 8 * u64::from(vector))?;
        a.inc(qword_ptr(rax))?;
        if physical {
            a.mov(rax, APIC)?;
            a.mov(dword_ptr(rax + 0xb0), 0)?;
        }
        a.pop(rax)?;
        a.iretq()
    });
}

pub(crate) fn interrupts_leave_a_guest_and_virtual_ones_reach_it(target: &Target<'_>) {
    const OUTER_VECTOR: u8 = 0x40;
    const INNER_VECTOR: u8 = 0x51;
    if !has(target, &[Feature::SVM]) {
        return;
    }
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let (mut again, mut interrupted) = (a.create_label(), a.create_label());
        a.mov(rbx, APIC)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(rbx + 0x3e0), 0xb)?;
        a.mov(dword_ptr(rbx + 0x320), u32::from(OUTER_VECTOR))?;
        a.mov(dword_ptr(rbx + 0x380), 100_000)?;
        enable(a)?;
        a.set_label(&mut again)?;
        a.clgi()?;
        a.sti()?;
        a.vmrun()?;
        a.mov(rdx, qword_ptr(rax + 0x70))?;
        a.cmp(edx, INTR as i32)?;
        a.je(interrupted)?;
        // The exit's code, and how often either handler ran.
        a.mov(eax, edx)?;
        a.shl(eax, 8)?;
        a.mov(rsi, DATA)?;
        a.add(eax, dword_ptr(rsi + 8 * i32::from(OUTER_VECTOR)))?;
        a.shl(eax, 8)?;
        a.add(eax, dword_ptr(rsi + 8 * i32::from(INNER_VECTOR)))?;
        exit(a)?;
        a.set_label(&mut interrupted)?;
        a.stgi()?;
        a.nop()?;
        // A virtual interrupt of priority 5 for the guest.
        a.mov(rcx, u64::from(INNER_VECTOR) << 32 | 1 << 24 | 5 << 16 | 1 << 8)?;
        a.mov(qword_ptr(rax + 0x60), rcx)?;
        a.jmp(again)
    });
    counting_handler(&rig, OUTER_VECTOR, true);
    counting_handler(&rig, INNER_VECTOR, false);
    load_inner(&rig, 1 << 24, &[INTR, VMMCALL], |a| {
        let mut again = a.create_label();
        // The inner guest's own interrupt flag does not hold the outer's interrupts off.
        a.mov(rsi, DATA)?;
        a.set_label(&mut again)?;
        a.cmp(qword_ptr(rsi + 8 * i32::from(OUTER_VECTOR)), 0)?;
        a.je(again)?;
        a.mov(rdx, qword_ptr(rsi + 8 * i32::from(INNER_VECTOR)))?;
        a.sti()?;
        a.nop()?;
        a.cli()?;
        a.vmmcall()
    });
    assert_eq!(rig.run(), VMMCALL << 16 | 1 << 8 | 1);
}

pub(crate) fn a_guest_of_a_guest_is_saved_as_it_runs(target: &Target<'_>) {
    const ROUNDS: u32 = 20_000_000;
    if !has(target, &[Feature::SVM]) {
        return;
    }
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.mov(r8d, 7)?;
        enable(a)?;
        a.vmrun()?;
        // What the inner guest counted, and whether the host's RAX and R8 are as they were.
        a.sub(rax, VMCB as i32)?;
        a.sub(r8d, 7)?;
        a.add(rax, rcx)?;
        a.add(eax, r8d)?;
        exit(a)
    });
    load_inner(&rig, 0, &[VMMCALL], |a| {
        let mut again = a.create_label();
        a.mov(eax, 1)?;
        progress(a)?;
        a.xor(ecx, ecx)?;
        a.set_label(&mut again)?;
        a.inc(ecx)?;
        a.mov(rsi, DATA)?;
        a.mov(qword_ptr(rsi), rcx)?;
        a.cmp(ecx, ROUNDS as i32)?;
        a.jne(again)?;
        a.vmmcall()
    });
    let reasons = rig.run_while(|rig, stop| {
        rig.bus.wait_for(1);
        stop.stop();
    });
    assert_eq!(reasons, [HaltReason::Stopped]);
    let state = rig.vcpus[0].save().unwrap();
    let inner = state.svm.as_ref().and_then(|svm| svm.guest.as_ref()).expect("the inner guest runs");
    assert_eq!((inner.vmcb, inner.ncr3, inner.host.cr3), (VMCB, NESTED, PAGE_TABLES));
    let mut elsewhere = copied(target, &rig);
    assert_eq!(elsewhere.vcpus[0].save().unwrap(), state, "a restored state is saved unchanged");
    assert_eq!(elsewhere.run(), u64::from(ROUNDS));
    assert_eq!(rig.run(), u64::from(ROUNDS));
}
