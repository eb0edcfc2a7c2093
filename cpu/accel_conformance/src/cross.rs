//! Started under one accelerator, finished under another.

use crate::guest::{
    APIC, Asm, CODE, DATA, TRAMPOLINE, assemble, boot64, exit, interrupt_handler, long_mode, progress,
};
use crate::rig::{Access, Rig, STOP_PORT, Target};
use crate::snapshot::copied;
use accel::{HaltReason, MpState, X86State};
use iced_x86::code_asm::*;
use irq::MsiMessage;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;

/// Moves a VM, and checks that what both accelerators know of its processors is alike.
fn moved(from: &Rig, to: &Target<'_>) -> Rig {
    let rig = copied(to, from);
    for (new, old) in rig.vcpus.iter().zip(&from.vcpus) {
        let (new, old) = (new.save().unwrap(), old.save().unwrap());
        if old.events.init_pending || new.events.init_pending {
            // When it is dealt with is up to the accelerator.
            continue;
        }
        assert_eq!(essence(&new), essence(&old));
    }
    rig
}

/// What every accelerator must keep.
fn essence(state: &X86State) -> X86State {
    let mut essence = state.clone();
    // What MSRs there are, the hidden parts of segments that cannot be used and the pointers of the last x87
    // instruction differ between processors.
    essence.msrs.retain(|(index, _)| matches!(index, 0x174..=0x176 | 0x277 | 0xc000_0081..=0xc000_0084));
    let all = essence.segments.iter_mut().chain([&mut essence.ldtr, &mut essence.tr]);
    for segment in all {
        if segment.unusable {
            (segment.base, segment.limit, segment.rights) = (0, 0, 0);
        }
        // The type's lowest bit says that the segment was used.
        segment.rights &= !1;
    }
    (essence.fpu.instruction_pointer, essence.fpu.data_pointer, essence.fpu.opcode) = (0, 0, 0);
    essence.lapic.esr = 0;
    essence.lapic.apic_base = 0;
    essence.lapic.icr = 0;
    essence.pdpte = [0; 4];
    essence
}

/// Has the guest stop when it comes here.
fn stop_here(a: &mut CodeAssembler) -> Asm {
    a.out(STOP_PORT, al)
}

/// Runs `rig` to its end, and moves it to the other of the targets whenever it stops on the way. Gives what it
/// said at its end, and how often it was moved.
fn run_between(targets: [&Target<'_>; 2], mut rig: Rig) -> (u64, usize, Vec<Access>) {
    let mut log = Vec::new();
    for moves in 1.. {
        let reasons = rig.run_while(|rig, stop| rig.bus.wait_for_stop(stop));
        assert!(reasons.iter().all(|reason| *reason == HaltReason::Stopped), "{reasons:?}");
        log.extend(rig.bus.log());
        if let Some(result) = rig.bus.exit() {
            return (result, moves - 1, log);
        }
        assert!(moves < 1000, "the guest does not end: {log:x?}");
        rig = moved(&rig, targets[moves % 2]);
    }
    unreachable!("the loop ends by its own")
}

pub(crate) fn a_run_alternates(from: &Target<'_>, to: &Target<'_>) {
    // After each instruction the VM moves. The flags, registers and memory of each way of computing count.
    let listing = |step: fn(&mut CodeAssembler) -> Asm| {
        move |a: &mut CodeAssembler| {
            a.mov(rsi, DATA)?;
            a.mov(rax, 0x9e37_79b9_7f4a_7c15u64)?;
            step(a)?;
            a.add(rax, rax)?;
            step(a)?;
            a.adc(rax, 1)?;
            step(a)?;
            a.push(rax)?;
            step(a)?;
            a.xor(qword_ptr(rsp), 0x55)?;
            step(a)?;
            a.fninit()?;
            a.fldpi()?;
            step(a)?;
            a.fld1()?;
            step(a)?;
            a.faddp(st1, st0)?;
            step(a)?;
            a.fstp(qword_ptr(rsi))?;
            step(a)?;
            a.movq(xmm9, rax)?;
            step(a)?;
            a.punpcklqdq(xmm9, xmm9)?;
            step(a)?;
            a.movdqu(xmmword_ptr(rsi + 16), xmm9)?;
            step(a)?;
            a.mov(ecx, 0x1234)?;
            a.mov(r11, rcx)?;
            step(a)?;
            a.bsr(r12, r11)?;
            step(a)?;
            a.std()?;
            step(a)?;
            a.cld()?;
            a.mov(ecx, 3)?;
            a.lea(rdi, ptr(rsi + 0x40))?;
            step(a)?;
            a.rep().stosd()?;
            step(a)?;
            a.mov(eax, 0x10)?;
            a.mov(ds, eax)?;
            step(a)?;
            a.mov(dr0, rsi)?;
            a.mov(ecx, 0xc000_0102u32)?;
            a.mov(eax, 0x77)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
            step(a)?;
            a.rdmsr()?;
            a.mov(rbx, dr0)?;
            a.add(rax, rbx)?;
            step(a)?;
            a.pop(rdx)?;
            a.add(rax, rdx)?;
            a.add(rax, qword_ptr(rsi))?;
            a.add(rax, qword_ptr(rsi + 24))?;
            a.add(rax, qword_ptr(rsi + 0x44))?;
            a.add(rax, r12)?;
            exit(a)
        }
    };
    let mut rig = Rig::new(from, 1);
    boot64(&mut rig, listing(|_| Ok(())));
    let expected = rig.run();
    let mut rig = Rig::new(from, 1);
    boot64(&mut rig, listing(stop_here));
    let (result, moves, _) = run_between([from, to], rig);
    assert_eq!((result, moves), (expected, 20));
}

pub(crate) fn string_instructions_are_moved_in_their_middle(from: &Target<'_>, to: &Target<'_>) {
    let mut rig = Rig::new(from, 1);
    boot64(&mut rig, |a| {
        a.mov(rsi, DATA)?;
        a.mov(rax, 0x0807_0605_0403_0201u64)?;
        a.mov(qword_ptr(rsi), rax)?;
        a.mov(edx, STOP_PORT)?;
        a.mov(ecx, 8)?;
        a.cld()?;
        a.rep().outsb()?;
        a.lea(eax, ptr(rsi + rcx))?;
        exit(a)
    });
    let (result, moves, log) = run_between([from, to], rig);
    assert_eq!(result, DATA + 8);
    assert!(moves >= 1, "it was moved");
    let port = u16::try_from(STOP_PORT).unwrap_or(0);
    let written: Vec<_> =
        log.into_iter().filter(|access| matches!(access, Access::Out(p, ..) if *p == port)).collect();
    assert_eq!(written, (1..=8).map(|byte| Access::Out(port, 1, byte)).collect::<Vec<_>>());
}

pub(crate) fn a_busy_run_alternates(from: &Target<'_>, to: &Target<'_>) {
    let listing = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(eax, 1)?;
        progress(a)?;
        a.mov(rsi, DATA)?;
        a.mov(rax, 0x9e37_79b9_7f4a_7c15u64)?;
        a.mov(ecx, 400_000)?;
        a.movq(xmm1, rax)?;
        a.set_label(&mut again)?;
        a.rol(rax, 13)?;
        a.adc(rax, rcx)?;
        a.mov(r9, rax)?;
        a.and(r9d, 0xff8)?;
        a.add(qword_ptr(rsi + r9), rax)?;
        a.movq(xmm2, rax)?;
        a.paddq(xmm1, xmm2)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.movq(rdx, xmm1)?;
        a.xor(rax, rdx)?;
        exit(a)
    };
    let mut rig = Rig::new(from, 1);
    boot64(&mut rig, listing);
    let expected = rig.run();
    let mut rig = Rig::new(from, 1);
    boot64(&mut rig, listing);
    for moves in 1.. {
        rig.run_while(|rig, stop| {
            if moves == 1 {
                rig.bus.wait_for(1);
            }
            // Longer each time, so that it gets on however late its thread starts.
            std::thread::sleep(Duration::from_micros(300 + moves * 10));
            stop.stop();
        });
        if let Some(result) = rig.bus.exit() {
            assert_eq!(result, expected, "after {moves} moves");
            break;
        }
        rig = moved(&rig, if moves % 2 == 0 { from } else { to });
    }
}

pub(crate) fn an_interrupt_is_ended_elsewhere(from: &Target<'_>, to: &Target<'_>) {
    let mut rig = Rig::new(from, 1);
    boot64(&mut rig, |a| {
        a.mov(rbx, APIC)?;
        a.mov(rsi, DATA)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(eax, 1)?;
        progress(a)?;
        a.sti()?;
        a.hlt()?;
        a.mov(eax, dword_ptr(rsi))?;
        exit(a)
    });
    interrupt_handler(&rig, 0x51, |a| {
        a.inc(dword_ptr(rsi))?;
        stop_here(a)?;
        a.inc(dword_ptr(rsi))?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.iretq()
    });
    rig.run_while(|rig, stop| {
        rig.bus.wait_for(1);
        rig.vm.msi_target().signal(MsiMessage { address: 0xfee0_0000, data: 0xc051 });
        rig.bus.wait_for_stop(stop);
    });
    let state = rig.vcpus[0].save().unwrap();
    assert_eq!((state.lapic.isr[2], state.lapic.tmr[2]), (1 << 17, 1 << 17), "in service, level-triggered");
    let mut rig = moved(&rig, to);
    let ended = Arc::new(Mutex::new(Vec::new()));
    let heard = ended.clone();
    rig.vm.set_eoi_listener(Arc::new(move |vector| heard.lock().push(vector)));
    assert_eq!(rig.run(), 2);
    assert_eq!(*ended.lock(), [0x51]);
}

pub(crate) fn a_timer_goes_on_elsewhere(from: &Target<'_>, to: &Target<'_>) {
    // In each of the timer's modes; the deadline is of the counter.
    for mode in [0, 1, 2] {
        let mut rig = Rig::new(from, 1);
        let ticks = (rig.vm.tsc_hertz() / 200) as i32; // five milliseconds
        boot64(&mut rig, |a| {
            let mut again = a.create_label();
            a.mov(rbx, APIC)?;
            a.mov(rsi, DATA)?;
            a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
            a.mov(dword_ptr(rbx + 0x3e0), 0xb)?;
            a.mov(dword_ptr(rbx + 0x320), mode << 17 | 0x41)?;
            if mode == 2 {
                a.mfence()?;
                a.rdtsc()?;
                a.add(eax, ticks)?;
                a.adc(edx, 0)?;
                a.mov(ecx, 0x6e0)?;
                a.wrmsr()?;
            } else {
                a.mov(dword_ptr(rbx + 0x380), 5_000_000)?;
            }
            stop_here(a)?;
            a.set_label(&mut again)?;
            a.sti()?;
            a.hlt()?;
            a.cli()?;
            a.cmp(dword_ptr(rsi), if mode == 1 { 4 } else { 1 })?;
            a.jb(again)?;
            a.mov(eax, dword_ptr(rsi))?;
            exit(a)
        });
        interrupt_handler(&rig, 0x41, |a| {
            a.inc(dword_ptr(rsi))?;
            a.mov(dword_ptr(rbx + 0xb0), 0)?;
            a.iretq()
        });
        rig.run_while(|rig, stop| rig.bus.wait_for_stop(stop));
        // Time outside the VM does not count.
        std::thread::sleep(Duration::from_millis(20));
        let before = rig.clock.now();
        // (Whether a timer that is just due was raised already is up to the accelerator.)
        let mut rig = copied(to, &rig);
        assert_eq!(rig.clock.now(), before);
        assert!(rig.run() >= if mode == 1 { 4 } else { 1 });
        let least = if mode == 1 { 19_900_000 } else { 4_900_000 };
        assert!(rig.clock.now() >= least, "mode {mode}: {} ns", rig.clock.now());
    }
}

pub(crate) fn a_processor_is_started_elsewhere(from: &Target<'_>, to: &Target<'_>) {
    let mut rig = Rig::new(from, 2);
    let trampoline = assemble(16, 0, |a| {
        let mut again = a.create_label();
        a.mov(ax, cs)?;
        a.mov(ds, eax)?;
        a.db(&[0xf0, 0xff, 0x06, 0x00, 0x01])?; // lock inc word [0x100]
        a.set_label(&mut again)?;
        a.cli()?;
        a.hlt()?;
        a.jmp(again)
    });
    rig.write(TRAMPOLINE, &trampoline);
    boot64(&mut rig, |a| {
        let mut wait = a.create_label();
        a.mov(rbx, APIC)?;
        a.mov(rsi, TRAMPOLINE + 0x100)?;
        a.mov(dword_ptr(rbx + 0x310), 1 << 24)?;
        a.mov(dword_ptr(rbx + 0x300), 0xc500)?;
        stop_here(a)?;
        a.mov(dword_ptr(rbx + 0x310), 1 << 24)?;
        a.mov(dword_ptr(rbx + 0x300), 0x4600 | (TRAMPOLINE >> 12) as i32)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(word_ptr(rsi), 1)?;
        a.jne(wait)?;
        stop_here(a)?;
        a.movzx(eax, word_ptr(rsi))?;
        exit(a)
    });
    let (result, moves, _) = run_between([from, to], rig);
    assert_eq!((result, moves), (1, 2));
}

pub(crate) fn a_halted_processor_is_woken_elsewhere(from: &Target<'_>, to: &Target<'_>) {
    let mut rig = Rig::new(from, 1);
    boot64(&mut rig, |a| {
        a.mov(rbx, APIC)?;
        a.mov(rsi, DATA)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(eax, 1)?;
        progress(a)?;
        a.sti()?;
        a.hlt()?;
        a.mov(eax, dword_ptr(rsi))?;
        exit(a)
    });
    interrupt_handler(&rig, 0x41, |a| {
        a.inc(dword_ptr(rsi))?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.iretq()
    });
    rig.run_until_halted(0);
    let mut rig = moved(&rig, to);
    let result = rig.run_with(|rig| {
        rig.vm.msi_target().signal(MsiMessage { address: 0xfee0_0000, data: 0x41 });
    });
    assert_eq!(result, 1);
}

pub(crate) fn an_event_in_flight_arrives_elsewhere(from: &Target<'_>, to: &Target<'_>) {
    // An exception and an external interrupt that the one accelerator was about to deliver.
    let mut rig = Rig::new(from, 1);
    boot64(&mut rig, |a| {
        a.mov(rsi, DATA)?;
        stop_here(a)?;
        a.mov(eax, dword_ptr(rsi))?;
        exit(a)
    });
    interrupt_handler(&rig, 14, |a| {
        a.pop(rax)?; // the error code
        a.mov(dword_ptr(rsi), eax)?;
        a.iretq()
    });
    interrupt_handler(&rig, 0x41, |a| {
        a.mov(dword_ptr(rsi), 0x41)?;
        a.iretq()
    });
    rig.run_while(|rig, stop| rig.bus.wait_for_stop(stop));
    let exception = accel::InjectedException { vector: 14, error: Some(6) };
    for (event, expected) in [(Some(exception), 6), (None, 0x41)] {
        let mut other = moved(&rig, to);
        other.edit(0, |state| {
            state.events.exception = event;
            state.events.interrupt = event.is_none().then_some(0x41);
            if event.is_none() {
                state.rflags |= 1 << 9;
            }
        });
        assert_eq!(other.run(), expected);
    }
}

pub(crate) fn both_processors_go_on_elsewhere(from: &Target<'_>, to: &Target<'_>) {
    const ROUNDS: i32 = 3000;
    // Two processors pass a token in memory; each moves the VM now and then.
    let player = |me: i32| {
        move |a: &mut CodeAssembler| {
            let (mut wait, mut on) = (a.create_label(), a.create_label());
            a.mov(rsi, DATA)?;
            a.xor(ecx, ecx)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.mov(eax, dword_ptr(rsi))?;
            a.and(eax, 1)?;
            a.cmp(eax, me)?;
            a.jne(wait)?;
            a.lock().inc(dword_ptr(rsi))?;
            a.inc(ecx)?;
            a.test(ecx, 0x3ff)?;
            a.jne(on)?;
            stop_here(a)?;
            a.set_label(&mut on)?;
            a.cmp(ecx, ROUNDS)?;
            a.jb(wait)?;
            if me == 1 {
                a.mov(eax, dword_ptr(rsi))?;
                exit(a)?;
            }
            a.hlt()
        }
    };
    let second = CODE + 0x2_0000;
    let mut rig = Rig::new(from, 2);
    boot64(&mut rig, player(0));
    rig.write(second, &assemble(64, second, player(1)));
    rig.edit(1, |state| {
        long_mode(state, 1, second);
        state.events.mp_state = MpState::Runnable;
    });
    let (result, moves, _) = run_between([from, to], rig);
    assert_eq!(result, 2 * ROUNDS as u64);
    assert!(moves >= 2, "{moves} moves");
}
