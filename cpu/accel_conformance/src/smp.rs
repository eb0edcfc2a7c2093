//! Several processors.

use crate::guest::{APIC, Asm, CODE, DATA, TRAMPOLINE, assemble, boot64, exit, long_mode, set_handler};
use crate::rig::{Rig, Target};
use iced_x86::code_asm::*;

/// Code of the second processor.
const CODE2: u64 = CODE + 0x2_0000;
const HANDLER: u64 = CODE + 0x1_0000;

/// A rig with two processors in 64-bit mode at `CODE` and `CODE2`.
fn two(
    target: &Target<'_>,
    first: impl FnOnce(&mut CodeAssembler) -> Asm,
    second: impl FnOnce(&mut CodeAssembler) -> Asm,
) -> Rig {
    let mut rig = Rig::new(target, 2);
    boot64(&mut rig, first);
    rig.write(CODE2, &assemble(64, CODE2, second));
    rig.edit(1, |state| {
        long_mode(state, 1, CODE2);
        state.events.mp_state = accel::MpState::Runnable;
    });
    rig
}

pub(crate) fn init_and_sipi_start_a_processor(target: &Target<'_>) {
    let mut rig = Rig::new(target, 3);
    // In real mode: counts itself, and says who it is.
    let trampoline = assemble(16, 0, |a| {
        let mut again = a.create_label();
        a.mov(ax, cs)?;
        a.mov(ds, eax)?;
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.shr(ebx, 24)?;
        a.db(&[0x88, 0x9f, 0x00, 0x02])?; // mov [bx + 0x200], bl
        a.db(&[0xf0, 0xff, 0x06, 0x00, 0x01])?; // lock inc word [0x100]
        a.set_label(&mut again)?;
        a.cli()?;
        a.hlt()?;
        a.jmp(again)
    });
    rig.write(TRAMPOLINE, &trampoline);
    let counter = TRAMPOLINE + 0x100;
    boot64(&mut rig, |a| {
        let mut wait = [(); 3].map(|()| a.create_label());
        a.mov(rbx, APIC)?;
        a.mov(rsi, counter)?;
        let send = |a: &mut CodeAssembler, destination: i32, command: i32| {
            a.mov(dword_ptr(rbx + 0x310), destination << 24)?;
            a.mov(dword_ptr(rbx + 0x300), command)
        };
        let sipi = 0x4600 | (TRAMPOLINE >> 12) as i32;
        // Number 1, with a second SIPI that is ignored.
        send(a, 1, 0xc500)?;
        send(a, 1, sipi)?;
        a.set_label(&mut wait[0])?;
        a.pause()?;
        a.cmp(word_ptr(rsi), 1)?;
        a.jne(wait[0])?;
        send(a, 1, sipi)?;
        // Both, by the shorthand: 1 starts anew, 2 for the first time.
        send(a, 0, 3 << 18 | 0xc500)?;
        send(a, 0, 3 << 18 | sipi)?;
        a.set_label(&mut wait[1])?;
        a.pause()?;
        a.cmp(word_ptr(rsi), 3)?;
        a.jb(wait[1])?;
        a.movzx(eax, word_ptr(rsi))?;
        exit(a)
    });
    assert_eq!(rig.run(), 3);
    let mut seen = [0; 3];
    rig.memory.read(TRAMPOLINE + 0x200, &mut seen).unwrap();
    assert_eq!(seen, [0, 1, 2]);
}

pub(crate) fn x2apic_starts_processors(target: &Target<'_>) {
    let mut rig = Rig::new(target, 4);
    let trampoline = assemble(16, 0, |a| {
        let mut again = a.create_label();
        a.mov(ax, cs)?;
        a.mov(ds, eax)?;
        a.mov(ecx, 0x1b)?;
        a.rdmsr()?;
        a.or(eax, 1 << 10)?;
        a.wrmsr()?;
        a.mov(ecx, 0x802)?;
        a.rdmsr()?; // who it is
        a.mov(ebx, eax)?;
        a.db(&[0x88, 0x9f, 0x00, 0x02])?; // mov [bx + 0x200], bl
        a.db(&[0xf0, 0xff, 0x06, 0x00, 0x01])?; // lock inc word [0x100]
        a.set_label(&mut again)?;
        a.cli()?;
        a.hlt()?;
        a.jmp(again)
    });
    rig.write(TRAMPOLINE, &trampoline);
    let counter = TRAMPOLINE + 0x100;
    boot64(&mut rig, |a| {
        let mut wait = a.create_label();
        a.mov(rsi, counter)?;
        a.mov(ecx, 0x1b)?;
        a.rdmsr()?;
        a.or(eax, 1 << 10)?;
        a.wrmsr()?;
        a.mov(ecx, 0x830)?;
        // By number, each a 32-bit destination.
        for destination in 1..4 {
            for command in [0xc500, 0x4600 | (TRAMPOLINE >> 12) as i32] {
                a.mov(edx, destination)?;
                a.mov(eax, command)?;
                a.wrmsr()?;
            }
        }
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(word_ptr(rsi), 3)?;
        a.jb(wait)?;
        a.movzx(eax, word_ptr(rsi))?;
        exit(a)
    });
    assert_eq!(rig.run(), 3);
    let mut seen = [0; 4];
    rig.memory.read(TRAMPOLINE + 0x200, &mut seen).unwrap();
    assert_eq!(seen, [0, 1, 2, 3]);
    let modes = rig.vcpus.iter().map(|vcpu| vcpu.save().unwrap().lapic.apic_base >> 10 & 1);
    assert_eq!(modes.collect::<Vec<_>>(), [1; 4]);
}

/// Counts in memory at `RSI`, and ends the interrupt.
fn counting_handler(rig: &Rig, vector: u8, offset: i32) {
    let at = HANDLER + u64::from(vector) * 0x100;
    let code = assemble(64, at, |a| {
        a.inc(dword_ptr(rsi + offset))?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.iretq()
    });
    rig.write(at, &code);
    set_handler(rig, vector, at);
}

pub(crate) fn processors_answer_each_other_s_interrupts(target: &Target<'_>) {
    const ROUNDS: i32 = 200;
    // Each sends the other its vector and halts until the answer's count has come.
    let player = |me: i32, begins: bool| {
        move |a: &mut CodeAssembler| {
            let (mut again, mut sleep, mut awake) = (a.create_label(), a.create_label(), a.create_label());
            let (mine, yours) = if me == 0 { (0x41, 0x52) } else { (0x52, 0x41) };
            let received = if me == 0 { 0 } else { 4 };
            a.mov(rbx, APIC)?;
            a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
            a.mov(rsi, DATA)?;
            let mut ready = a.create_label();
            a.mov(dword_ptr(rsi + 0x10 + me * 4), 1)?;
            a.set_label(&mut ready)?;
            a.pause()?;
            a.cmp(dword_ptr(rsi + 0x10 + (1 - me) * 4), 1)?;
            a.jne(ready)?;
            a.mov(dword_ptr(rbx + 0x310), (1 - me) << 24)?;
            a.xor(ecx, ecx)?;
            let _ = mine;
            a.set_label(&mut again)?;
            if begins {
                a.mov(dword_ptr(rbx + 0x300), yours)?;
            }
            a.inc(ecx)?;
            a.set_label(&mut sleep)?;
            a.cli()?;
            a.cmp(dword_ptr(rsi + received), ecx)?;
            a.jae(awake)?;
            a.sti()?;
            a.hlt()?;
            a.jmp(sleep)?;
            a.set_label(&mut awake)?;
            if !begins {
                a.mov(dword_ptr(rbx + 0x300), yours)?;
            }
            a.cmp(ecx, ROUNDS)?;
            a.jb(again)?;
            if begins {
                a.mov(eax, ecx)?;
                exit(a)?;
            }
            a.hlt()
        }
    };
    let mut rig = two(target, player(0, true), player(1, false));
    counting_handler(&rig, 0x41, 0);
    counting_handler(&rig, 0x52, 4);
    assert_eq!(rig.run(), ROUNDS as u64);
    assert_eq!(rig.read_u64(DATA), (ROUNDS as u64) << 32 | ROUNDS as u64);
}

pub(crate) fn locked_increments_are_not_lost(target: &Target<'_>) {
    const COUNT: u32 = 20_000;
    let worker = |finish: fn(&mut CodeAssembler) -> Asm| {
        move |a: &mut CodeAssembler| {
            let (mut again, mut retry) = (a.create_label(), a.create_label());
            a.mov(rsi, DATA)?;
            a.mov(ecx, COUNT)?;
            a.set_label(&mut again)?;
            a.lock().inc(qword_ptr(rsi))?;
            a.mov(eax, 1)?;
            a.lock().xadd(qword_ptr(rsi + 8), rax)?;
            a.set_label(&mut retry)?;
            a.mov(rax, qword_ptr(rsi + 16))?;
            a.lea(rdx, ptr(rax + 3))?;
            a.lock().cmpxchg(qword_ptr(rsi + 16), rdx)?;
            a.jne(retry)?;
            a.lock().add(dword_ptr(rsi + 0x3e), 1)?; // across a cache line's end
            a.dec(ecx)?;
            a.jne(again)?;
            a.lock().inc(dword_ptr(rsi + 0x80))?;
            finish(a)
        }
    };
    let first = worker(|a| {
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(rsi + 0x80), 2)?;
        a.jne(wait)?;
        a.mov(eax, 1)?;
        exit(a)
    });
    let second = worker(|a| a.hlt());
    let mut rig = two(target, first, second);
    assert_eq!(rig.run(), 1);
    let count = u64::from(COUNT);
    assert_eq!(rig.read_u64(DATA), 2 * count);
    assert_eq!(rig.read_u64(DATA + 8), 2 * count);
    assert_eq!(rig.read_u64(DATA + 16), 6 * count);
    assert_eq!(rig.read_u64(DATA + 0x3e) & 0xffff_ffff, 2 * count);
}

pub(crate) fn a_processor_modifies_another_s_code(target: &Target<'_>) {
    const ROUNDS: i32 = 100;
    let function = CODE + 0x3_0000;
    // The first writes a new constant into a function and waits until the second has called it with that
    // result. The function's constant is aligned, so the second sees the old or the new.
    let writer = |a: &mut CodeAssembler| {
        let (mut again, mut wait) = (a.create_label(), a.create_label());
        a.mov(rsi, DATA)?;
        a.mov(rdi, function)?;
        a.mov(ecx, 1)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(rdi + 4), ecx)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(rsi), ecx)?;
        a.jne(wait)?;
        a.inc(ecx)?;
        a.cmp(ecx, ROUNDS)?;
        a.jbe(again)?;
        a.mov(eax, ecx)?;
        exit(a)
    };
    let caller = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(rsi, DATA)?;
        a.mov(rdi, function)?;
        a.set_label(&mut again)?;
        a.call(rdi)?;
        a.mov(dword_ptr(rsi), eax)?;
        a.jmp(again)
    };
    let mut rig = two(target, writer, caller);
    let code = assemble(64, function, |a| {
        a.nop()?;
        a.nop()?;
        a.nop()?;
        a.mov(eax, 0)?;
        a.ret()
    });
    rig.write(function, &code);
    assert_eq!(rig.run(), ROUNDS as u64 + 1);
}
