//! Saving and restoring.

use crate::guest::{APIC, Asm, CODE, DATA, assemble, boot64, exit, progress, set_handler};
use crate::rig::{RAM, Rig, TOP, Target};
use accel::{HaltReason, InjectedException, MpState, X86State};
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
                // Longer each time, so that it gets on however late its thread starts.
                std::thread::sleep(Duration::from_micros(500 + u64::from(moves) * 20));
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
    rig.run_until_halted(0);
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
        // (Two that come while the guest is not let run are counted together.)
        assert!(rig.run() >= 10);
    }
    assert!(rig.clock.now() >= 20_000_000);
}

/// Numbers that look random and are the same in every run (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A canonical address.
    fn address(&mut self) -> u64 {
        ((self.next() << 16) as i64 >> 16) as u64
    }

    fn chance(&mut self) -> bool {
        self.next() & 1 != 0
    }
}

/// Makes a state in 64-bit mode another one that a processor can be in.
fn vary(state: &mut X86State, numbers: &mut Numbers) {
    state.regs = std::array::from_fn(|_| numbers.next());
    state.rip = numbers.address();
    state.rflags = numbers.next() & 0x24_4cd5 | 2;
    state.cr0 |= numbers.next() & 0x5_0008; // AM, WP, TS
    state.cr2 = numbers.next();
    state.cr4 |= numbers.next() & 0x88; // PGE, DE
    state.segments[4].base = numbers.address();
    state.segments[5].base = numbers.address();
    state.gdtr.base = numbers.address();
    state.debug_addresses = std::array::from_fn(|_| numbers.address());
    state.dr6 = 0xffff_0ff0 | numbers.next() & 0x400f;
    state.dr7 = 0x400 | numbers.next() & 0x3ff;
    for index in [0xc000_0082, 0xc000_0083, 0xc000_0102] {
        let address = numbers.address();
        state.set_msr(index, address);
    }
    // (The SYSENTER registers have 32 bits on AMD's processors.)
    for index in [0x174, 0x175, 0x176, 0xc000_0084, 0xc000_0103] {
        let value = numbers.next() & 0xffff_ffff;
        if state.msr(index).is_some() {
            state.set_msr(index, value);
        }
    }
    state.set_msr(0xc000_0081, numbers.next());
    state.set_msr(0x277, [0x0007_0406_0007_0406, 0x0407_0506_0007_0106][numbers.next() as usize & 1]);
    let fpu = &mut state.fpu;
    fpu.control = (numbers.next() & 0xf40) as u16 | 0x7f;
    fpu.status = (numbers.next() & 0x7f7f) as u16 & !0x80;
    fpu.tag = numbers.next() as u8;
    fpu.st = std::array::from_fn(|_| std::array::from_fn(|_| numbers.next() as u8));
    fpu.mxcsr = (numbers.next() & 0xe03f) as u32 | 0x1f80;
    let words = if state.xcr0 & 1 << 6 != 0 {
        8
    } else if state.xcr0 & 4 != 0 {
        4
    } else {
        2
    };
    for register in &mut fpu.vectors {
        register[..words].fill_with(|| numbers.next());
    }
    if words == 8 {
        fpu.opmask = std::array::from_fn(|_| numbers.next());
    }
    let events = &mut state.events;
    events.mp_state = if numbers.chance() { MpState::Runnable } else { MpState::Halted };
    events.sti_shadow = numbers.chance();
    events.nmi_masked = numbers.chance();
    events.nmi_pending = numbers.chance();
    let faults = [(0, None), (6, None), (13, Some(0x28)), (14, Some(6)), (17, Some(0))];
    let (vector, error) = faults[numbers.next() as usize % faults.len()];
    events.exception = numbers.chance().then_some(InjectedException { vector, error });
    events.interrupt = (events.exception.is_none() && numbers.chance()).then_some(0x51);
    let lapic = &mut state.lapic;
    lapic.tpr = numbers.next() as u8;
    lapic.svr = 0x1ff;
    lapic.irr = std::array::from_fn(|_| numbers.next() as u32);
    lapic.isr = std::array::from_fn(|_| numbers.next() as u32);
    (lapic.irr[0], lapic.isr[0]) = (lapic.irr[0] & 0xffff_0000, lapic.isr[0] & 0xffff_0000);
    lapic.lvt.timer = 1 << 16 | 2 << 17 | 0x40;
    lapic.tsc_deadline = numbers.next() >> 1;
    state.tsc = numbers.next() >> 4;
}

pub(crate) fn any_state_is_saved_as_it_was_restored(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| a.hlt());
    let plain = rig.vcpus[0].save().unwrap();
    let mut numbers = Numbers(1);
    // As much as the processor has: AVX-512, AVX, SSE.
    let widths = [(0xe7, 7), (7, 3), (3, 1)].map(|(xcr0, word)| {
        let mut wide = X86State { xcr0, ..plain.clone() };
        wide.fpu.vectors[0][word] = 1;
        wide
    });
    let wide = widths.into_iter().find(|state| rig.vcpus[0].restore(state).is_ok());
    let wide = wide.expect("SSE is part of the architecture");
    for round in 0..50 {
        let mut state = if round % 2 == 0 { plain.clone() } else { wide.clone() };
        vary(&mut state, &mut numbers);
        // One that is due would be raised.
        state.lapic.tsc_deadline |= 1 << 62;
        rig.vcpus[0].restore(&state).unwrap_or_else(|error| panic!("round {round}: {error}: {state:x?}"));
        let saved = rig.vcpus[0].save().unwrap();
        assert_eq!(saved, state, "round {round}");
    }
    // What is not mentioned is as after reset: nothing of it stays.
    rig.vcpus[0].restore(&plain).unwrap();
    let mut saved = rig.vcpus[0].save().unwrap();
    saved.tsc = plain.tsc;
    assert_eq!(saved, plain);
}

pub(crate) fn impossible_states_are_refused(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    let good = rig.vcpus[0].save().unwrap();
    let spoil: [fn(&mut X86State); 6] = [
        |state| state.cr0 = 1 << 31,
        |state| state.efer = 1 << 10,
        |state| state.efer = u64::MAX,
        |state| state.fpu.vectors.clear(),
        |state| state.lapic.id = 0x300,
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
