//! Saving and restoring.

use crate::guest::{APIC, Asm, CODE, DATA, assemble, boot64, exit, progress, set_handler};
use crate::rig::{RAM, Rig, TOP, Target};
use accel::{HaltReason, MpState, X86State};
use iced_x86::code_asm::*;
use std::time::Duration;

/// A new rig with the memory, the time and the processors of another of the same accelerator.
fn moved(target: &Target<'_>, from: &Rig) -> Rig {
    let rig = copied(target, from);
    for (new, old) in rig.vcpus.iter().zip(&from.vcpus) {
        assert_eq!(new.save().unwrap(), old.save().unwrap(), "a restored state is saved unchanged");
    }
    rig
}

/// A new rig with the memory, the time and the processors of another.
pub(crate) fn copied(target: &Target<'_>, from: &Rig) -> Rig {
    let mut rig = Rig::new(target, from.vcpus.len() as u32);
    for range in [0..RAM, TOP] {
        let mut data = vec![0; (range.end - range.start) as usize];
        from.memory.read(range.start, &mut data).unwrap();
        rig.write(range.start, &data);
    }
    rig.clock.set(from.clock.now());
    for (new, old) in rig.vcpus.iter_mut().zip(&from.vcpus) {
        // Through the stream's format, as a migration does.
        let saved = old.save().unwrap().to_saved();
        new.restore(&X86State::from_saved(&saved).unwrap()).unwrap();
    }
    rig
}

pub(crate) fn a_saved_run_goes_on_elsewhere(target: &Target<'_>) {
    const ROUNDS: u32 = 2_000_000;
    // Mixes integer, vector and x87 registers and memory for a while.
    let listing = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(eax, 1)?;
        progress(a)?;
        a.mov(rsi, DATA)?;
        a.mov(rax, 0x9e37_79b9_7f4a_7c15u64)?;
        a.mov(ecx, ROUNDS)?;
        a.fninit()?;
        a.fld1()?;
        a.fldpi()?;
        a.pxor(xmm9, xmm9)?;
        a.movq(xmm1, rax)?;
        a.set_label(&mut again)?;
        a.mov(rdx, rax)?;
        a.shl(rdx, 13)?;
        a.xor(rax, rdx)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 7)?;
        a.xor(rax, rdx)?;
        a.rol(rax, 17)?;
        a.mov(r9, rax)?;
        a.and(r9d, 0xff8)?;
        a.adc(qword_ptr(rsi + r9), rax)?;
        a.add(rax, qword_ptr(rsi + r9))?;
        a.movq(xmm2, rax)?;
        a.paddq(xmm9, xmm2)?;
        a.pxor(xmm9, xmm1)?;
        a.fadd_2(st1, st0)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.movq(rdx, xmm9)?;
        a.xor(rax, rdx)?;
        a.fstp(st0)?;
        a.fistp(qword_ptr(rsi + 0x1000))?;
        a.xor(rax, qword_ptr(rsi + 0x1000))?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.xor(eax, edx)?;
        exit(a)
    };
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, listing);
    let expected = rig.run();

    // A guest that ends before its first stop, as this thread was not let run, says nothing.
    let moves = (0..20).map(|_| run_with_moves(target, listing, expected)).find(|moves| *moves > 0);
    assert!(moves.is_some(), "the guest was moved at least once");
}

/// Runs a guest that is moved again and again, and checks its result; says how often it was moved.
fn run_with_moves(target: &Target<'_>, listing: impl Fn(&mut CodeAssembler) -> Asm, expected: u64) -> u32 {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, listing);
    let mut moves = 0;
    loop {
        let reasons = rig.run_while(|rig, stop| {
            if moves == 0 {
                rig.bus.wait_for(1);
            } else {
                std::thread::sleep(Duration::from_micros(500));
            }
            stop.stop();
        });
        assert_eq!(reasons, [HaltReason::Stopped]);
        if let Some(result) = rig.bus.exit() {
            assert_eq!(result, expected, "after {moves} moves");
            return moves;
        }
        moves += 1;
        rig = moved(target, &rig);
    }
}

pub(crate) fn a_halted_processor_is_saved_halted(target: &Target<'_>) {
    let mut rig = Rig::new(target, 2);
    boot64(&mut rig, |a| {
        a.mov(rbx, APIC)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(eax, 1)?;
        progress(a)?;
        a.sti()?;
        a.hlt()?;
        a.mov(eax, 2)?;
        exit(a)
    });
    let handler = CODE + 0x1_0000;
    rig.write(
        handler,
        &assemble(64, handler, |a| {
            a.mov(dword_ptr(rbx + 0xb0), 0)?;
            a.iretq()
        }),
    );
    set_handler(&rig, 0x41, handler);
    loop {
        rig.run_while(|rig, stop| {
            rig.bus.wait_for(1);
            std::thread::sleep(Duration::from_millis(1));
            stop.stop();
        });
        if rig.vcpus[0].save().unwrap().events.mp_state == MpState::Halted {
            break;
        }
    }
    let mut rig = moved(target, &rig);
    let states: Vec<_> = rig.vcpus.iter().map(|vcpu| vcpu.save().unwrap().events.mp_state).collect();
    assert_eq!(states, [MpState::Halted, MpState::WaitForSipi]);
    let result = rig.run_with(|rig| {
        rig.vm.msi_target().signal(irq::MsiMessage { address: 0xfee0_0000, data: 0x41 });
    });
    assert_eq!(result, 2);
}

pub(crate) fn a_timer_goes_on_after_a_restore(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let mut again = a.create_label();
        a.mov(rbx, APIC)?;
        a.mov(rsi, DATA)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(rbx + 0x3e0), 0xb)?;
        a.mov(dword_ptr(rbx + 0x320), 1 << 17 | 0x41)?;
        a.mov(dword_ptr(rbx + 0x380), 2_000_000)?;
        a.mov(eax, 1)?;
        progress(a)?;
        a.set_label(&mut again)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.cmp(dword_ptr(rsi), 10)?;
        a.jb(again)?;
        a.mov(eax, dword_ptr(rsi))?;
        exit(a)
    });
    let handler = CODE + 0x1_0000;
    rig.write(
        handler,
        &assemble(64, handler, |a| {
            a.inc(dword_ptr(rsi))?;
            a.mov(dword_ptr(rbx + 0xb0), 0)?;
            a.iretq()
        }),
    );
    set_handler(&rig, 0x41, handler);
    rig.run_while(|rig, stop| {
        rig.bus.wait_for(1);
        std::thread::sleep(Duration::from_millis(3));
        stop.stop();
    });
    // Time outside the VM does not count.
    std::thread::sleep(Duration::from_millis(10));
    let before = rig.clock.now();
    let mut rig = moved(target, &rig);
    assert_eq!(rig.clock.now(), before);
    if rig.read_u64(DATA) < 10 {
        assert_eq!(rig.run(), 10);
    }
    assert!(rig.clock.now() >= 20_000_000);
}

pub(crate) fn impossible_states_are_refused(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    let good = rig.vcpus[0].save().unwrap();
    let spoil: [fn(&mut X86State); 6] = [
        |state| state.cr0 = 1 << 31,
        |state| state.efer = 1 << 10,
        |state| state.efer = u64::MAX,
        |state| state.fpu.vectors.clear(),
        |state| state.lapic.id = 3,
        |state| state.set_msr(0x277, u64::MAX),
    ];
    for spoil in spoil {
        let mut state = good.clone();
        spoil(&mut state);
        assert!(rig.vcpus[0].restore(&state).is_err(), "{state:x?}");
    }
    rig.vcpus[0].restore(&good).unwrap();
    let mut restored = rig.vcpus[0].save().unwrap();
    restored.tsc = good.tsc;
    assert_eq!(restored, good);
}

pub(crate) fn reset_starts_over(target: &Target<'_>) {
    let mut rig = Rig::new(target, 2);
    let fresh = rig.vcpus[1].save().unwrap();
    rig.write(TOP.end - 16, &[0xeb, 0xfe]); // a loop at the reset vector
    boot64(&mut rig, |a| {
        a.mov(eax, 7)?;
        exit(a)
    });
    assert_eq!(rig.run(), 7);
    for vcpu in &mut rig.vcpus {
        vcpu.reset();
    }
    let state = rig.vcpus[0].save().unwrap();
    assert_eq!((state.rip, state.segments[1].base, state.cr0 & 1), (0xfff0, 0xffff_0000, 0));
    assert_eq!(state.events.mp_state, MpState::Runnable);
    let other = rig.vcpus[1].save().unwrap();
    assert_eq!((other.events, other.lapic), (fresh.events, fresh.lapic));
    boot64(&mut rig, |a| {
        a.mov(eax, 8)?;
        exit(a)
    });
    assert_eq!(rig.run(), 8);
}
