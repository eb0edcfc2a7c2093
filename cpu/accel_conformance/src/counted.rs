//! Guests whose time is made of instructions: they do the same on every tier, however they are disturbed.

use crate::guest::{APIC, DATA, boot64, exit, interrupt_handler, progress};
use crate::rig::{Rig, Target};
use clock::Counter;
use iced_x86::code_asm::*;
use std::sync::Arc;

/// What a run came to: what the guest said, and the count, the time and the registers at its end.
#[derive(Debug, PartialEq)]
struct Outcome {
    said: Vec<u64>,
    result: u64,
    count: u64,
    time: u64,
    regs: [u64; 16],
    data: [u64; 4],
}

/// Runs a guest that computes under a fast timer, waits for it, copies strings, and says what time it is; kicks the
/// processor `kicks` times meanwhile.
fn outcome(target: &Target<'_>, kicks: u32) -> Outcome {
    let mut rig = Rig::counted(target, 1);
    interrupt_handler(&rig, 0x40, |a| {
        a.push(rax)?;
        a.push(rdx)?;
        a.mov(rax, DATA)?;
        a.inc(qword_ptr(rax))?;
        // When, and in the middle of what.
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rdx, rax)?;
        a.xor(rdx, qword_ptr(rsp + 16))?;
        a.mov(rax, DATA)?;
        a.add(qword_ptr(rax + 8), rdx)?;
        a.rol(qword_ptr(rax + 8), 7)?;
        a.add(qword_ptr(rax + 16), rcx)?;
        // CF and IF: some of the others are what the host leaves where nothing is said of them.
        a.mov(rdx, qword_ptr(rsp + 32))?;
        a.and(edx, 0x201)?;
        a.add(qword_ptr(rax + 24), rdx)?;
        a.mov(rax, APIC)?;
        a.mov(dword_ptr(rax + 0xb0), 0)?;
        a.pop(rdx)?;
        a.pop(rax)?;
        a.iretq()
    });
    boot64(&mut rig, |a| {
        let (mut again, mut work, mut skip, mut idle) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.mov(rbx, APIC)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(rbx + 0x3e0), 0b1011)?;
        a.mov(dword_ptr(rbx + 0x320), 0x2_0040)?;
        a.mov(dword_ptr(rbx + 0x380), 997)?;
        a.sti()?;
        a.mov(r12d, 40)?;
        a.set_label(&mut again)?;
        a.mov(ecx, 3000)?;
        a.xor(r13, r13)?;
        a.set_label(&mut work)?;
        a.imul_3(rax, rcx, 0x1234_5677)?;
        a.add(r13, rax)?;
        a.test(al, 8)?;
        a.je(skip)?;
        a.adc(r13, rcx)?;
        a.mul(rcx)?;
        a.set_label(&mut skip)?;
        a.push(r13)?;
        a.pop(r14)?;
        a.dec(rcx)?;
        a.jne(work)?;
        // Longer than is done without a pause.
        a.mov(rdi, DATA + 0x1000)?;
        a.mov(ecx, 0x2_8000)?;
        a.mov(eax, r12d)?;
        a.rep().stosd()?;
        a.rdtsc()?;
        progress(a)?;
        a.mov(eax, r13d)?;
        progress(a)?;
        a.mov(rsi, DATA)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.set_label(&mut idle)?;
        a.hlt()?;
        a.cmp(qword_ptr(rsi), rax)?;
        a.je(idle)?;
        a.dec(r12)?;
        a.jne(again)?;
        a.cli()?;
        a.mov(rax, qword_ptr(rsi))?;
        exit(a)
    });
    let reasons = rig.run_while(|rig, stop| {
        for _ in 0..kicks {
            stop.kick();
            std::thread::yield_now();
        }
        rig.bus.wait_for_stop(stop);
    });
    assert_eq!(reasons, [accel::HaltReason::Stopped]);
    let counter: &Arc<Counter> = rig.clock.counter().expect("the clock counts");
    let state = rig.vcpus[0].save().expect("a state");
    Outcome {
        said: rig.bus.progress(),
        result: rig.bus.exit().expect("the guest came to its end"),
        count: counter.count(),
        time: counter.now(),
        regs: state.regs,
        data: [0, 8, 16, 24].map(|at| rig.read_u64(DATA + at)),
    }
}

/// The same guest on two targets, and disturbed: everything is the same.
pub(crate) fn the_same_happens_at_the_same_counts(first: &Target<'_>, second: &Target<'_>) {
    let expected = outcome(first, 0);
    assert!(expected.result >= 40 && expected.said.len() == 80, "{expected:?}");
    assert!(expected.time > expected.count, "time was passed over while the processor was idle");
    for (target, kicks) in [(first, 500), (second, 0), (second, 500)] {
        assert_eq!(outcome(target, kicks), expected, "{:?}, {kicks} kicks", target.tier);
    }
}
