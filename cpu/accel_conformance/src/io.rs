//! Ports and device memory, events of both directions, dirty tracking.

use crate::guest::{APIC, CODE, DATA, assemble, boot64, exit, interrupt_handler, progress};
use crate::rig::{Access, MMIO, Rig, TOP, Target, pattern};
use accel::DoorbellAddress;
use iced_x86::code_asm::*;
use irq::MsiMessage;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, OwnedFd};

pub(crate) fn mmio_of_string_instructions(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.mov(rbx, DATA)?;
        a.cld()?;
        // Into memory, of each width.
        a.mov(rsi, MMIO)?;
        a.mov(rdi, rbx)?;
        a.mov(ecx, 3)?;
        a.rep().movsb()?;
        a.movsw()?;
        a.mov(rsi, MMIO + 8)?;
        a.movsd()?;
        a.mov(rsi, MMIO + 16)?;
        a.movsq()?;
        // Out of it.
        a.mov(rsi, rbx)?;
        a.mov(rdi, MMIO + 0x40)?;
        a.movsb()?;
        a.movsw()?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(rdi, MMIO + 0x50)?;
        a.mov(ecx, 2)?;
        a.rep().stosd()?;
        a.stosq()?;
        a.mov(rsi, MMIO + 0x60)?;
        a.lodsd()?;
        a.mov(dword_ptr(rbx + 0x40), eax)?;
        // Backwards.
        a.std()?;
        a.mov(rdi, MMIO + 0x82)?;
        a.mov(ecx, 2)?;
        a.rep().stosw()?;
        a.cld()?;
        a.mov(rax, rdi)?;
        exit(a)
    });
    assert_eq!(rig.run(), MMIO + 0x7e);
    let byte = |offset: u64| pattern(MMIO + offset, 1);
    let read: Vec<_> = [(0, 1), (1, 1), (2, 1), (3, 2), (8, 4), (16, 8)]
        .map(|(offset, len)| Access::Read(MMIO + offset, len))
        .into();
    let lod = pattern(MMIO + 0x60, 4);
    let mut expected = read;
    expected.extend([
        Access::Write(MMIO + 0x40, 1, byte(0)),
        Access::Write(MMIO + 0x41, 2, byte(2) << 8 | byte(1)),
        Access::Write(MMIO + 0x50, 4, 0x5566_7788),
        Access::Write(MMIO + 0x54, 4, 0x5566_7788),
        Access::Write(MMIO + 0x58, 8, 0x1122_3344_5566_7788),
        Access::Read(MMIO + 0x60, 4),
        Access::Write(MMIO + 0x82, 2, lod & 0xffff),
        Access::Write(MMIO + 0x80, 2, lod & 0xffff),
    ]);
    assert_eq!(rig.bus.log()[..expected.len()], expected);
    assert_eq!(rig.read_u64(DATA + 9), pattern(MMIO + 16, 8));
    assert_eq!(rig.read_u64(DATA + 0x40), lod);
}

pub(crate) fn mmio_of_vector_instructions(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.mov(rbx, MMIO)?;
        a.mov(rsi, DATA)?;
        a.movdqu(xmm1, xmmword_ptr(rbx))?;
        a.movdqu(xmmword_ptr(rsi), xmm1)?;
        a.movups(xmm2, xmmword_ptr(rbx + 0x10))?;
        a.movaps(xmmword_ptr(rbx + 0x20), xmm2)?;
        a.movdqa(xmmword_ptr(rbx + 0x30), xmm1)?;
        exit(a)
    });
    rig.run();
    // Each half is an access of its own.
    let half = |offset: u64| pattern(MMIO + offset, 8);
    let expected = [
        Access::Read(MMIO, 8),
        Access::Read(MMIO + 8, 8),
        Access::Read(MMIO + 0x10, 8),
        Access::Read(MMIO + 0x18, 8),
        Access::Write(MMIO + 0x20, 8, half(0x10)),
        Access::Write(MMIO + 0x28, 8, half(0x18)),
        Access::Write(MMIO + 0x30, 8, half(0)),
        Access::Write(MMIO + 0x38, 8, half(8)),
    ];
    assert_eq!(rig.bus.log()[..expected.len()], expected);
    assert_eq!((rig.read_u64(DATA), rig.read_u64(DATA + 8)), (half(0), half(8)));
}

pub(crate) fn mmio_that_is_read_modified_and_written(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.mov(rbx, MMIO)?;
        a.mov(rsi, DATA)?;
        a.or(byte_ptr(rbx), 0x80)?;
        a.not(word_ptr(rbx + 2))?;
        a.mov(eax, 7)?;
        a.xchg(dword_ptr(rbx + 4), eax)?;
        a.mov(dword_ptr(rsi), eax)?;
        a.cmp(dword_ptr(rbx + 8), 0)?; // only read
        a.movzx(ecx, byte_ptr(rbx + 12))?;
        a.push(qword_ptr(rbx + 16))?;
        a.pop(rcx)?;
        a.bts(dword_ptr(rbx + 24), 31)?;
        exit(a)
    });
    rig.run();
    let at = |offset: u64, len| pattern(MMIO + offset, len);
    let expected = [
        Access::Read(MMIO, 1),
        Access::Write(MMIO, 1, at(0, 1) | 0x80),
        Access::Read(MMIO + 2, 2),
        Access::Write(MMIO + 2, 2, !at(2, 2) & 0xffff),
        Access::Read(MMIO + 4, 4),
        Access::Write(MMIO + 4, 4, 7),
        Access::Read(MMIO + 8, 4),
        Access::Read(MMIO + 12, 1),
        Access::Read(MMIO + 16, 8),
        Access::Read(MMIO + 24, 4),
        Access::Write(MMIO + 24, 4, at(24, 4) | 1 << 31),
    ];
    assert_eq!(rig.bus.log()[..expected.len()], expected);
    assert_eq!(rig.read_u64(DATA), at(4, 4));
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("the host has events")
}

/// How often the event was signalled since this was last asked.
fn taken(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(event, &mut count) {
        Ok(8) => u64::from_ne_bytes(count),
        _ => 0,
    }
}

pub(crate) fn doorbells_signal_without_the_bus(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    let guest = |a: &mut CodeAssembler| {
        a.mov(rbx, MMIO)?;
        a.mov(eax, 3)?;
        a.mov(dword_ptr(rbx + 0x100), eax)?;
        a.mov(dword_ptr(rbx + 0x100), eax)?;
        a.mov(word_ptr(rbx + 0x104), ax)?; // its value does not match
        a.mov(word_ptr(rbx + 0x104), 5)?;
        a.mov(byte_ptr(rbx + 0x108), al)?; // any length
        a.mov(dx, 0x520)?;
        a.out(dx, al)?;
        a.out(dx, ax)?; // not its length
        a.mov(dword_ptr(rbx + 0x10c), eax)?; // nobody's
        exit(a)
    };
    let all = [
        (DoorbellAddress::Mmio(MMIO + 0x100), 4, None, 2),
        (DoorbellAddress::Mmio(MMIO + 0x104), 2, Some(5), 1),
        (DoorbellAddress::Mmio(MMIO + 0x108), 0, None, 1),
        (DoorbellAddress::Pio(0x520), 1, Some(3), 1),
    ];
    let to_bus = |registered: bool| {
        let rings = [
            Access::Write(MMIO + 0x100, 4, 3),
            Access::Write(MMIO + 0x100, 4, 3),
            Access::Write(MMIO + 0x104, 2, 5),
            Access::Write(MMIO + 0x108, 1, 3),
            Access::Out(0x520, 1, 3),
        ];
        let mut all = vec![
            Access::Write(MMIO + 0x100, 4, 3),
            Access::Write(MMIO + 0x100, 4, 3),
            Access::Write(MMIO + 0x104, 2, 3),
            Access::Write(MMIO + 0x104, 2, 5),
            Access::Write(MMIO + 0x108, 1, 3),
            Access::Out(0x520, 1, 3),
            Access::Out(0x520, 2, 3),
            Access::Write(MMIO + 0x10c, 4, 3),
        ];
        all.retain(|access| !registered || !rings.contains(access));
        all
    };
    let events = [(); 4].map(|()| event());
    // Without doorbells every write reaches the bus: that is what devices fall back to.
    let doorbells = rig.vm.doorbells();
    if let Some(doorbells) = &doorbells {
        for ((address, len, data, _), event) in all.iter().zip(&events) {
            doorbells.register(*address, *len, *data, event.as_fd()).unwrap();
        }
        let again = doorbells.register(all[0].0, all[0].1, all[0].2, events[0].as_fd());
        assert!(again.is_err(), "the same doorbell twice");
    }
    boot64(&mut rig, guest);
    rig.run();
    let expected = to_bus(doorbells.is_some());
    assert_eq!(rig.bus.log()[..expected.len()], expected);
    for ((address, _, _, count), event) in all.iter().zip(&events) {
        assert_eq!(taken(event), if doorbells.is_some() { *count } else { 0 }, "{address:?}");
    }
    if let Some(doorbells) = &doorbells {
        for ((address, len, data, _), event) in all.iter().zip(&events) {
            doorbells.unregister(*address, *len, *data, event.as_fd()).unwrap();
        }
        rig.bus.forget();
        boot64(&mut rig, guest);
        rig.run();
        let expected = to_bus(false);
        assert_eq!(rig.bus.log()[..expected.len()], expected);
    }
}

pub(crate) fn events_raise_interrupts(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let mut again = a.create_label();
        a.mov(rbx, APIC)?;
        a.mov(rsi, DATA)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(eax, 1)?;
        progress(a)?;
        a.set_label(&mut again)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.mov(eax, dword_ptr(rsi))?;
        progress(a)?;
        a.cmp(eax, 0x100)?;
        a.jb(again)?;
        exit(a)
    });
    for (vector, count) in [(0x41, 2), (0x52, 0x100)] {
        interrupt_handler(&rig, vector, |a| {
            a.add(dword_ptr(rsi), count)?;
            a.mov(dword_ptr(rbx + 0xb0), 0)?;
            a.iretq()
        });
    }
    let Some(irqfd) = rig.vm.irqfd() else {
        // Somebody reads the event and signals the message: the same guest sees the same.
        let result = rig.run_with(|rig| {
            rig.bus.wait_for(1);
            rig.vm.msi_target().signal(MsiMessage { address: 0xfee0_0000, data: 0x52 });
        });
        assert_eq!(result, 0x100);
        return;
    };
    let event = event();
    let ring = || assert_eq!(rustix::io::write(&event, &1u64.to_ne_bytes()), Ok(8));
    let message = |data| Some(MsiMessage { address: 0xfee0_0000, data });
    let route = irqfd.route(event.as_fd()).unwrap();
    let result = rig.run_with(|rig| {
        rig.bus.wait_for(1);
        ring(); // kept until there is a message
        route.set(message(0x41)).unwrap();
        rig.bus.wait_for(2);
        ring();
        rig.bus.wait_for(4);
        route.set(None).unwrap();
        ring();
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(rig.bus.progress().last(), Some(&4), "nothing is delivered without a message");
        route.set(message(0x52)).unwrap();
    });
    assert_eq!(result, 0x104);
    drop(route);
    ring();
    assert_eq!(taken(&event), 1, "nobody reads the event any more");
}

pub(crate) fn the_dirty_log_starts_over_when_taken(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let mut wait = [(); 3].map(|()| a.create_label());
        a.mov(rbx, DATA)?;
        a.mov(eax, 1)?;
        progress(a)?;
        for (round, wait) in (1i32..).zip(&mut wait) {
            a.set_label(wait)?;
            a.pause()?;
            a.cmp(byte_ptr(rbx), round)?;
            a.jne(*wait)?;
            // Ways to write: a string instruction over three pages, a locked one, a vector, the x87.
            a.lea(rdi, ptr(rbx + 0x1_0000 * round))?;
            a.mov(ecx, 0x1002)?;
            a.mov(eax, round)?;
            a.cld()?;
            a.add(rdi, 0xfff)?;
            a.rep().stosb()?;
            a.lock().inc(dword_ptr(rbx + 0x1_0000 * round + 0x4ffc))?;
            a.movdqu(xmmword_ptr(rbx + 0x1_0000 * round + 0x6000), xmm0)?;
            a.fninit()?;
            a.fld1()?;
            a.fstp(qword_ptr(rbx + 0x1_0000 * round + 0x8ff8))?;
            a.mov(eax, 10 * round)?;
            progress(a)?;
        }
        exit(a)
    });
    let mut logs = Vec::new();
    rig.run_with(|rig| {
        rig.bus.wait_for(1);
        rig.vm.set_dirty_log(true);
        for round in 1u8..=3 {
            rig.memory.write(DATA, &[round]).unwrap();
            rig.bus.wait_for(10 * u64::from(round));
            let mut taken = Vec::new();
            rig.vm.take_dirty(&mut |gpa| taken.push(gpa));
            taken.retain(|gpa| *gpa >= CODE);
            logs.push(taken);
        }
    });
    for (round, log) in (1u64..).zip(logs) {
        let offsets = [0x0, 0x1000, 0x2000, 0x4000, 0x6000, 0x8000];
        let mut expected = vec![DATA];
        expected.extend(offsets.map(|offset| DATA + 0x1_0000 * round + offset));
        assert_eq!(log, expected, "round {round}");
    }
    rig.vm.set_dirty_log(false);
    let mut rest = 0;
    rig.vm.take_dirty(&mut |_| rest += 1);
    assert_eq!(rest, 0, "nothing is logged after the log's end");
}

pub(crate) fn the_dirty_log_takes_many_pages_at_once(target: &Target<'_>) {
    const PAGE: u64 = 0x1000;
    // More than the rings of accelerators that have such hold.
    const PAGES: u64 = 5000;
    let mut rig = Rig::with_ram(target, 1, DATA + (PAGES + 1) * PAGE);
    boot64(&mut rig, |a| {
        let (mut wait, mut again) = (a.create_label(), a.create_label());
        a.mov(rbx, DATA)?;
        a.mov(eax, 1)?;
        progress(a)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(byte_ptr(rbx), 1)?;
        a.jne(wait)?;
        a.mov(ecx, PAGES as i32)?;
        a.set_label(&mut again)?;
        a.add(rbx, PAGE as i32)?;
        a.mov(dword_ptr(rbx + 8), ecx)?;
        a.dec(ecx)?;
        a.jne(again)?;
        exit(a)
    });
    rig.run_with(|rig| {
        rig.bus.wait_for(1);
        rig.vm.set_dirty_log(true);
        rig.memory.write(DATA, &[1]).unwrap();
    });
    let mut taken = Vec::new();
    rig.vm.take_dirty(&mut |gpa| taken.push(gpa));
    taken.retain(|gpa| *gpa >= CODE);
    assert!(
        taken.iter().copied().eq((0..=PAGES).map(|page| DATA + page * PAGE)),
        "{} pages from {:x?} on",
        taken.len(),
        taken.first()
    );
    rig.vm.set_dirty_log(false);
    // What was not taken is not in the next log.
    boot64(&mut rig, |a| {
        a.mov(rbx, DATA)?;
        a.mov(dword_ptr(rbx), 1)?;
        exit(a)
    });
    rig.vm.set_dirty_log(true);
    rig.run();
    rig.vm.set_dirty_log(false);
    rig.vm.set_dirty_log(true);
    let mut rest = Vec::new();
    rig.vm.take_dirty(&mut |gpa| rest.push(gpa));
    assert!(rest.is_empty(), "{rest:x?}");
    rig.vm.set_dirty_log(false);
}

pub(crate) fn stores_to_memory_that_is_only_read_reach_the_bus(target: &Target<'_>) {
    const FUNCTION: u64 = TOP.start + 0x100;
    let rom = TOP.start;
    let mut rig = Rig::new(target, 1);
    let guest = |a: &mut CodeAssembler| {
        a.mov(rbx, rom)?;
        a.mov(rsi, DATA)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(qword_ptr(rsi), rax)?;
        a.mov(eax, 0x4433_2211)?;
        a.mov(byte_ptr(rbx + 1), al)?;
        a.mov(word_ptr(rbx + 2), ax)?;
        a.mov(dword_ptr(rbx + 4), eax)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.add(dword_ptr(rbx), 1)?; // read, and not changed
        a.lock().inc(dword_ptr(rbx + 4))?;
        a.lea(rdi, ptr(rbx + 0x20))?;
        a.mov(ecx, 2)?;
        a.cld()?;
        a.rep().stosd()?;
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(qword_ptr(rsi + 8), rax)?;
        a.mov(rdi, FUNCTION)?;
        a.call(rdi)?; // code is executed there
        exit(a)
    };
    let content = 0x8877_6655_0403_0201u64;
    let stores = [
        Access::Write(rom + 1, 1, 0x11),
        Access::Write(rom + 2, 2, 0x2211),
        Access::Write(rom + 4, 4, 0x4433_2211),
        Access::Write(rom + 8, 8, 0x4433_2211),
        Access::Write(rom, 4, 0x0403_0202),
        Access::Write(rom + 4, 4, 0x8877_6656),
        Access::Write(rom + 0x20, 4, 0x4433_2211),
        Access::Write(rom + 0x24, 4, 0x4433_2211),
    ];
    let code = assemble(64, FUNCTION, |a| {
        a.mov(eax, 0x77)?;
        a.ret()
    });
    // As RAM between two times as ROM, so that what is known of it from before is seen to be forgotten.
    for (round, read_only) in [true, false, true].into_iter().enumerate() {
        rig.memory.set_read_only(rom, read_only).unwrap();
        rig.vm.memory_changed(TOP);
        rig.write(rom, &content.to_le_bytes());
        rig.write(rom + 8, &[0; 0x20]);
        rig.write(FUNCTION, &code);
        rig.bus.forget();
        boot64(&mut rig, guest);
        assert_eq!(rig.run(), 0x77, "round {round}");
        let mut seen = rig.bus.log();
        seen.pop(); // the end
        let (expected, after, word) = match read_only {
            true => (&stores[..], content, 0),
            false => (&[][..], 0x4433_2212_2211_1102, 0x4433_2211),
        };
        assert_eq!(seen, expected, "round {round}");
        assert_eq!((rig.read_u64(DATA), rig.read_u64(DATA + 8)), (content, after), "round {round}");
        assert_eq!((rig.read_u64(rom), rig.read_u64(rom + 8)), (after, word), "round {round}");
    }
}
