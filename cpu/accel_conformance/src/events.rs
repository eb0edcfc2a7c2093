//! Interrupts, timers, stops.

use crate::guest::{APIC, Asm, DATA, boot64, exit, interrupt_handler as handler, progress};
use crate::rig::{Access, Rig, Target};
use accel::HaltReason;
use iced_x86::code_asm::*;
use irq::MsiMessage;
use parking_lot::Mutex;
use std::sync::Arc;

/// A handler that counts in memory at `DATA + 8 * vector` and ends the interrupt.
fn counting_handler(rig: &Rig, vector: u8) {
    handler(rig, vector, |a| {
        a.push(rax)?;
        a.mov(rax, DATA + 8 * u64::from(vector))?;
        a.inc(qword_ptr(rax))?;
        a.mov(rax, APIC)?;
        a.mov(dword_ptr(rax + 0xb0), 0)?;
        a.pop(rax)?;
        a.iretq()
    });
}

/// Enables the local APIC; RBX has its address from then on.
fn enable_apic(a: &mut CodeAssembler) -> Asm {
    a.mov(rbx, APIC)?;
    a.mov(dword_ptr(rbx + 0xf0), 0x1ff)
}

fn msi(data: u32) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000, data }
}

pub(crate) fn stop_ends_a_busy_loop(target: &Target<'_>) {
    let mut rig = Rig::new(target, 2);
    boot64(&mut rig, |a| {
        let mut again = a.create_label();
        a.mov(rsi, DATA)?;
        a.xor(ecx, ecx)?;
        a.set_label(&mut again)?;
        a.inc(rcx)?;
        a.mov(qword_ptr(rsi), rcx)?;
        a.jmp(again)
    });
    // The other processor waits for a SIPI, and is stopped as well.
    for _ in 0..3 {
        let before = rig.read_u64(DATA);
        let mut during = before;
        let reasons = rig.run_while(|rig, stop| {
            during = rig.wait_for_change(DATA, before);
            stop.stop();
        });
        assert_eq!(reasons, [HaltReason::Stopped, HaltReason::Stopped]);
        // The loop went on from where it was stopped, and its counter is the one in memory or just ahead.
        let counter = rig.vcpus[0].save().unwrap().regs[1];
        assert!(during > before && counter >= during, "{before} {during} {counter}");
        assert!(counter - rig.read_u64(DATA) <= 1);
    }
}

pub(crate) fn stop_ends_a_halt(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.mov(eax, 1)?;
        progress(a)?;
        a.hlt()
    });
    let reasons = rig.run_while(|rig, stop| {
        rig.bus.wait_for(1);
        stop.kick(); // a kick alone ends nothing
        std::thread::yield_now();
        stop.stop();
    });
    assert_eq!(reasons, [HaltReason::Stopped]);
    // A token that said stop ends a run at once.
    let stop = accel::StopToken::new();
    stop.stop();
    let before = rig.vcpus[0].save().unwrap();
    assert_eq!(rig.vcpus[0].run(&*rig.bus, &stop), HaltReason::Stopped);
    assert_eq!(rig.vcpus[0].save().unwrap().rip, before.rip);
}

pub(crate) fn no_stop_is_lost(target: &Target<'_>) {
    let mut rig = Rig::new(target, 2);
    // In guest code, in accesses to a device, and asleep.
    boot64(&mut rig, |a| {
        let (mut again, mut busy) = (a.create_label(), a.create_label());
        a.mov(rsi, DATA)?;
        a.set_label(&mut again)?;
        a.mov(ecx, 300)?;
        a.set_label(&mut busy)?;
        a.inc(qword_ptr(rsi))?;
        a.dec(ecx)?;
        a.jne(busy)?;
        a.out(0x80, al)?;
        a.jmp(again)
    });
    for round in 0..200u32 {
        let before = rig.read_u64(DATA);
        let reasons = rig.run_while(|rig, stop| {
            if round % 8 == 7 {
                rig.wait_for_change(DATA, before);
            }
            for _ in 0..(round % 8) * 500 {
                std::hint::spin_loop();
            }
            stop.stop();
        });
        assert_eq!(reasons, [HaltReason::Stopped, HaltReason::Stopped], "round {round}");
        rig.bus.forget();
    }
    assert!(rig.read_u64(DATA) > 0);
}

pub(crate) fn kicks_leave_the_guest_running(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let mut again = a.create_label();
        a.mov(rsi, DATA)?;
        a.mov(ecx, 50_000)?;
        a.set_label(&mut again)?;
        a.inc(qword_ptr(rsi))?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(eax, dword_ptr(rsi))?;
        exit(a)
    });
    let reasons = rig.run_while(|rig, stop| {
        while rig.bus.exit().is_none() && !stop.is_stopped() {
            stop.kick();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    });
    assert_eq!(reasons, [HaltReason::Stopped]);
    assert_eq!(rig.bus.exit(), Some(50_000));
}

pub(crate) fn an_msi_wakes_a_halted_processor(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let mut again = a.create_label();
        enable_apic(a)?;
        a.mov(rsi, DATA)?;
        a.xor(ecx, ecx)?;
        a.set_label(&mut again)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.mov(eax, dword_ptr(rsi + 8 * 0x41))?;
        progress(a)?;
        a.cmp(eax, 50)?;
        a.jb(again)?; // (one that comes while another is handled is counted with it)
        exit(a)
    });
    counting_handler(&rig, 0x41);
    let last = rig.run_with(|rig| {
        // Before the guest has enabled its APIC an interrupt is lost: repeat until the first is counted.
        while rig.bus.progress().is_empty() && !rig.bus.is_over() {
            rig.vm.msi_target().signal(msi(0x41));
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        while !rig.bus.is_over() {
            rig.vm.msi_target().signal(msi(0x41));
            std::thread::yield_now();
        }
    });
    assert!(last >= 50);
    assert!(rig.bus.progress().is_sorted());
}

pub(crate) fn level_triggered_interrupts_are_ended(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        enable_apic(a)?;
        a.mov(eax, 1)?;
        progress(a)?;
        a.sti()?;
        a.hlt()?; // the second interrupt waits when the first one's handler returns
        a.mov(eax, 2)?;
        exit(a)
    });
    counting_handler(&rig, 0x51);
    counting_handler(&rig, 0x62);
    let ended = Arc::new(Mutex::new(Vec::new()));
    let heard = ended.clone();
    let target = rig.vm.msi_target();
    rig.vm.set_eoi_listener(Arc::new(move |vector| {
        heard.lock().push(vector);
        // What an I/O APIC does next may well be another interrupt.
        target.signal(msi(0x62));
    }));
    rig.run_with(|rig| {
        rig.bus.wait_for(1);
        rig.vm.msi_target().signal(msi(1 << 15 | 1 << 14 | 0x51));
    });
    assert_eq!(*ended.lock(), [0x51]);
    assert_eq!((rig.read_u64(DATA + 8 * 0x51), rig.read_u64(DATA + 8 * 0x62)), (1, 1));
}

pub(crate) fn the_8259s_vector_is_asked_for(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.mov(eax, 1)?;
        progress(a)?;
        a.sti()?;
        a.hlt()?;
        a.hlt()
    });
    handler(&rig, 0x77, |a| {
        a.mov(eax, 0x77)?;
        exit(a)
    });
    let result = rig.run_with(|rig| {
        rig.bus.wait_for(1);
        rig.vm.set_ext_int(true);
    });
    rig.vm.set_ext_int(false);
    assert_eq!(result, 0x77);
    let acknowledged = rig.bus.log().iter().filter(|access| **access == Access::Acknowledge).count();
    assert_eq!(acknowledged, 1);
}

pub(crate) fn an_nmi_arrives_with_interrupts_off(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let mut again = a.create_label();
        a.mov(rsi, DATA)?;
        a.mov(eax, 1)?;
        progress(a)?;
        a.set_label(&mut again)?;
        a.pause()?;
        a.cmp(dword_ptr(rsi), 2)?;
        a.jne(again)?;
        a.mov(eax, dword_ptr(rsi + 4))?;
        exit(a)
    });
    // While one is handled, another waits: seen by the depth that the handler notes.
    handler(&rig, 2, |a| {
        let mut again = a.create_label();
        a.push(rax)?;
        a.push(rdx)?;
        a.inc(dword_ptr(rsi + 8))?; // depth
        a.mov(eax, dword_ptr(rsi + 8))?;
        a.cmp(eax, dword_ptr(rsi + 4))?;
        a.cmova(edx, eax)?;
        a.cmovbe(edx, dword_ptr(rsi + 4))?;
        a.mov(dword_ptr(rsi + 4), edx)?;
        a.mov(eax, dword_ptr(rsi))?;
        a.add(eax, 2)?;
        progress(a)?;
        a.cmp(dword_ptr(rsi), 0)?;
        let mut out = a.create_label();
        a.jne(out)?;
        a.set_label(&mut again)?;
        a.cmp(dword_ptr(rsi + 12), 0)?; // until the test has sent another
        a.je(again)?;
        a.set_label(&mut out)?;
        a.inc(dword_ptr(rsi))?;
        a.dec(dword_ptr(rsi + 8))?;
        a.pop(rdx)?;
        a.pop(rax)?;
        a.iretq()
    });
    let deepest = rig.run_with(|rig| {
        rig.bus.wait_for(1);
        rig.vm.msi_target().signal(msi(4 << 8));
        rig.bus.wait_for(2);
        rig.vm.msi_target().signal(msi(4 << 8));
        rig.memory.write(DATA + 12, &[1]).unwrap();
    });
    assert_eq!(deepest, 1);
    assert_eq!(rig.bus.progress(), [1, 2, 3]);
}

pub(crate) fn interrupts_wait_for_their_shadow(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        enable_apic(a)?;
        a.mov(dword_ptr(rbx + 0x310), 0)?;
        a.xor(edi, edi)?;
        // A self-IPI waits; STI lets one more instruction through.
        a.mov(dword_ptr(rbx + 0x300), 1 << 18 | 0x41)?;
        a.sti()?;
        a.inc(edi)?;
        a.cli()?;
        a.mov(eax, ebp)?; // EDI when the interrupt came
        progress(a)?;
        // STI; CLI: none comes.
        a.mov(dword_ptr(rbx + 0x300), 1 << 18 | 0x41)?;
        a.xor(ebp, ebp)?;
        a.sti()?;
        a.cli()?;
        a.nop()?;
        a.mov(eax, ebp)?;
        progress(a)?;
        // POPF and IRET have no shadow.
        a.pushfq()?;
        a.or(dword_ptr(rsp), 1 << 9)?;
        a.mov(edi, 7)?;
        a.popfq()?;
        a.mov(edi, 8)?;
        a.cli()?;
        a.mov(eax, ebp)?;
        progress(a)?;
        // STI; HLT does not sleep through what waits.
        a.mov(dword_ptr(rbx + 0x300), 1 << 18 | 0x41)?;
        a.mov(edi, 9)?;
        a.sti()?;
        a.hlt()?;
        a.mov(eax, ebp)?;
        exit(a)
    });
    handler(&rig, 0x41, |a| {
        a.mov(ebp, edi)?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.iretq()
    });
    assert_eq!(rig.run(), 9);
    assert_eq!(rig.bus.progress(), [1, 0, 7]);
}

pub(crate) fn task_priority_holds_interrupts_back(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        enable_apic(a)?;
        a.mov(rsi, DATA)?;
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        a.mov(dword_ptr(rbx + 0x310), 0)?;
        a.sti()?;
        a.mov(dword_ptr(rbx + 0x300), 1 << 18 | 0x51)?; // held back
        a.mov(dword_ptr(rbx + 0x300), 1 << 18 | 0x61)?; // not
        a.nop()?;
        a.mov(eax, dword_ptr(rsi + 8 * 0x51))?;
        a.shl(eax, 4)?;
        a.or(eax, dword_ptr(rsi + 8 * 0x61))?;
        progress(a)?;
        a.mov(eax, dword_ptr(rbx + 0x80))?; // the TPR
        progress(a)?;
        a.xor(eax, eax)?;
        a.mov(cr8, rax)?;
        a.nop()?;
        a.mov(eax, dword_ptr(rsi + 8 * 0x51))?;
        exit(a)
    });
    counting_handler(&rig, 0x51);
    counting_handler(&rig, 0x61);
    assert_eq!(rig.run(), 1);
    assert_eq!(rig.bus.progress(), [1, 0x50]);
}

pub(crate) fn the_periodic_timer_counts(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let mut again = a.create_label();
        enable_apic(a)?;
        a.mov(rsi, DATA)?;
        a.mov(dword_ptr(rbx + 0x3e0), 0xb)?; // by 1
        a.mov(dword_ptr(rbx + 0x320), 1 << 17 | 0x41)?;
        a.mov(dword_ptr(rbx + 0x380), 1_000_000)?;
        a.set_label(&mut again)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.cmp(dword_ptr(rsi + 8 * 0x41), 20)?;
        a.jb(again)?;
        a.mov(dword_ptr(rbx + 0x380), 0)?;
        a.mov(eax, dword_ptr(rbx + 0x390))?;
        exit(a)
    });
    counting_handler(&rig, 0x41);
    assert_eq!(rig.run(), 0);
    assert!(rig.read_u64(DATA + 8 * 0x41) >= 20);
    assert!(rig.clock.now() >= 20_000_000, "twenty milliseconds of the guest's time have passed");
}

pub(crate) fn tsc_deadlines_arrive(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    let wait = (rig.vm.tsc_hertz() / 1000) as u32; // a millisecond
    boot64(&mut rig, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 0x1b)?; // into x2APIC mode
        a.rdmsr()?;
        a.or(eax, 1 << 10)?;
        a.wrmsr()?;
        a.mov(ecx, 0x80f)?;
        a.mov(eax, 0x1ff)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(ecx, 0x832)?;
        a.mov(eax, 2 << 17 | 0x41)?;
        a.wrmsr()?;
        a.mov(rsi, DATA)?;
        a.set_label(&mut again)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.lea(rdi, ptr(rax + rdx + wait))?; // the deadline
        a.mov(eax, edi)?;
        a.mov(rdx, rdi)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, 0x6e0)?;
        a.wrmsr()?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.cmp(dword_ptr(rsi), 10)?;
        a.jb(again)?;
        a.mov(ecx, 0x6e0)?;
        a.rdmsr()?; // not armed any more
        exit(a)
    });
    handler(&rig, 0x41, |a| {
        a.inc(dword_ptr(rsi))?;
        a.mov(ecx, 0x80b)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.iretq()
    });
    assert_eq!(rig.run(), 0);
    assert!(rig.clock.now() >= 9_900_000, "ten milliseconds of the guest's time have passed");
}

pub(crate) fn the_counter_advances_and_stops(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let (mut again, mut wrong) = (a.create_label(), a.create_label());
        a.mov(rsi, DATA)?;
        a.mov(ecx, 10_000)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.cmp(rax, rbx)?;
        a.jb(wrong)?;
        a.mov(rbx, rax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(qword_ptr(rsi), rbx)?;
        a.xor(eax, eax)?;
        exit(a)?;
        a.set_label(&mut wrong)?;
        a.mov(eax, 1)?;
        exit(a)
    });
    assert_eq!(rig.run(), 0);
    let last = rig.read_u64(DATA);
    let first_save = rig.vcpus[0].save().unwrap();
    assert!(last > 0 && first_save.tsc >= last);
    std::thread::sleep(std::time::Duration::from_millis(20));
    let second_save = rig.vcpus[0].save().unwrap();
    assert_eq!((first_save.tsc, first_save.tsc_time), (second_save.tsc, second_save.tsc_time));
}
