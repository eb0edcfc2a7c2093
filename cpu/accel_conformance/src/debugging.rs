//! Breakpoints, watchpoints and single steps of a debugger on the host.

use crate::guest::{
    Asm, CODE, CODE32, DATA, PAGE_TABLES, assemble, boot64, exit, interrupt_handler, long_mode, progress,
    write_tables,
};
use crate::rig::{Access, LOG_PORT, RAM, Rig, Target};
use accel::{DebugSettings, DebugStop, HaltReason, MpState, WatchKind, Watchpoint, X86State};
use iced_x86::code_asm::*;
use irq::MsiMessage;

/// Functions are at this address and up.
const FUNCTION: u64 = CODE + 0x2000;

/// Puts a function at `address`.
fn function(rig: &Rig, address: u64, listing: impl FnOnce(&mut CodeAssembler) -> Asm) {
    rig.write(address, &assemble(64, address, listing));
}

fn debug(rig: &mut Rig, settings: &DebugSettings) {
    rig.vcpus[0].set_debug(settings).expect("the accelerator can do that");
}

fn breakpoint(address: u64) -> DebugSettings {
    DebugSettings { breakpoints: vec![address], ..DebugSettings::default() }
}

fn single_step() -> DebugSettings {
    DebugSettings { single_step: true, ..DebugSettings::default() }
}

fn watch(address: u64, len: u64, kind: WatchKind) -> DebugSettings {
    DebugSettings { watchpoints: vec![Watchpoint { address, len, kind }], ..DebugSettings::default() }
}

/// Runs, and gives what stopped the first processor.
fn run_to_stop(rig: &mut Rig) -> DebugStop {
    let reasons = rig.run_while(|_, _| {});
    match &reasons[0] {
        HaltReason::Debug(stop) => *stop,
        other => panic!("{other:?} instead of a stop; the guest did {:x?}", rig.bus.log()),
    }
}

fn state(rig: &Rig) -> X86State {
    rig.vcpus[0].save().expect("a state")
}

/// Executes the instruction that there is a breakpoint at, without it.
fn step_over(rig: &mut Rig) {
    debug(rig, &single_step());
    assert_eq!(run_to_stop(rig), DebugStop::Step);
}

/// A guest that calls [`FUNCTION`] `times` times and exits with what EBX is then.
fn calls(rig: &mut Rig, times: u32) {
    boot64(rig, |a| {
        let mut again = a.create_label();
        a.xor(ebx, ebx)?;
        a.mov(ecx, times)?;
        a.mov(rsi, FUNCTION)?;
        a.set_label(&mut again)?;
        a.call(rsi)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(eax, ebx)?;
        exit(a)
    });
    function(rig, FUNCTION, |a| {
        a.add(ebx, 5)?;
        a.nop()?;
        a.add(ebx, 2)?;
        a.ret()
    });
}

fn stops_at(rig: &mut Rig, settings: &DebugSettings, address: u64) {
    let code = |rig: &Rig| rig.read_u64(FUNCTION);
    let before = code(rig);
    for round in 0..3u64 {
        debug(rig, settings);
        assert_eq!(run_to_stop(rig), DebugStop::Breakpoint { address }, "in round {round}");
        let now = state(rig);
        assert_eq!(
            (now.rip, now.regs[X86State::RBX], now.regs[X86State::RCX]),
            (address, 7 * round + 5, 4 - round)
        );
        assert_eq!(now.rflags & 0x1_0100, 0, "neither TF nor RF are the guest's");
        assert_eq!(code(rig), before, "who looks sees the guest's code");
        // It is there still.
        assert_eq!(run_to_stop(rig), DebugStop::Breakpoint { address });
        step_over(rig);
        assert_eq!(state(rig).rip, address + 1);
    }
    debug(rig, &DebugSettings::default());
    assert_eq!(rig.run(), 7 * 4);
}

pub(crate) fn breakpoints_stop_before_the_instruction(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    calls(&mut rig, 4);
    stops_at(&mut rig, &breakpoint(FUNCTION + 3), FUNCTION + 3);
}

pub(crate) fn hardware_breakpoints_stop_before_the_instruction(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    calls(&mut rig, 4);
    let settings = DebugSettings { hardware_breakpoints: vec![FUNCTION + 3], ..DebugSettings::default() };
    stops_at(&mut rig, &settings, FUNCTION + 3);
}

pub(crate) fn any_number_of_breakpoints_stops(target: &Target<'_>) {
    let mut rig = Rig::new(target, 2);
    calls(&mut rig, 2);
    function(&rig, FUNCTION, |a| {
        for _ in 0..10 {
            a.inc(ebx)?; // 2 bytes
        }
        a.ret()
    });
    let code = rig.read_u64(FUNCTION);
    let all: Vec<_> = (0..10).map(|index| FUNCTION + 2 * index).collect();
    let settings = DebugSettings { breakpoints: all.clone(), ..DebugSettings::default() };
    for address in all.iter().chain(&all) {
        // The second processor waits to be started, and maps nothing.
        rig.vcpus.iter_mut().for_each(|vcpu| vcpu.set_debug(&settings).expect("any number"));
        assert_eq!(run_to_stop(&mut rig), DebugStop::Breakpoint { address: *address });
        assert_eq!(rig.read_u64(FUNCTION), code, "who looks sees the guest's code");
        rig.vcpus[1].set_debug(&DebugSettings::default()).expect("nothing");
        step_over(&mut rig);
    }
    debug(&mut rig, &DebugSettings::default());
    assert_eq!(rig.run(), 20);
}

pub(crate) fn breakpoints_are_met_in_code_that_has_run(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let mut again = a.create_label();
        a.mov(eax, 1)?;
        progress(a)?;
        a.mov(rsi, FUNCTION)?;
        a.mov(rdi, DATA)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.call(rsi)?;
        a.inc(ebx)?;
        a.cmp(dword_ptr(rdi), 0)?;
        a.je(again)?;
        exit(a)
    });
    function(&rig, FUNCTION, |a| {
        a.lea(rdx, ptr(rsp))?;
        a.nop()?;
        a.ret()
    });
    for _ in 0..3 {
        let reasons = rig.run_while(|rig, stop| {
            rig.bus.wait_for(1);
            std::thread::sleep(std::time::Duration::from_millis(5));
            stop.stop();
        });
        assert_eq!(reasons, [HaltReason::Stopped]);
        debug(&mut rig, &breakpoint(FUNCTION + 4));
        assert_eq!(run_to_stop(&mut rig), DebugStop::Breakpoint { address: FUNCTION + 4 });
        let rounds = state(&rig).regs[X86State::RBX];
        step_over(&mut rig);
        debug(&mut rig, &breakpoint(FUNCTION + 4));
        assert_eq!(run_to_stop(&mut rig), DebugStop::Breakpoint { address: FUNCTION + 4 });
        assert_eq!(state(&rig).regs[X86State::RBX], rounds + 1, "one round of the loop later");
        debug(&mut rig, &DebugSettings::default());
    }
    rig.write(DATA, &[1]);
    rig.run();
}

pub(crate) fn single_steps_execute_one_instruction(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let mut over = a.create_label();
        a.mov(eax, 0x55u32)?; // 5 bytes
        a.jmp(over)?; // 2
        a.int3()?; // 1
        a.set_label(&mut over)?;
        a.mov(dx, u32::from(LOG_PORT))?; // 4
        a.out(dx, al)?; // 1
        a.mov(rbx, DATA)?; // 10
        a.mov(qword_ptr(rbx), rax)?; // 3
        a.cpuid()?; // 2
        a.mov(ecx, 7)?; // 5
        exit(a)
    });
    debug(&mut rig, &single_step());
    for expected in [5, 8, 12, 13] {
        assert_eq!(run_to_stop(&mut rig), DebugStop::Step);
        assert_eq!(state(&rig).rip - CODE, expected);
        assert_eq!(state(&rig).rflags & 0x100, 0, "TF is the guest's");
    }
    assert_eq!(rig.bus.log(), [Access::Out(LOG_PORT, 1, 0x55)]);
    let here = state(&rig).rip;
    // The same instructions wherever they end.
    let mut last = here;
    for _ in 0..4 {
        assert_eq!(run_to_stop(&mut rig), DebugStop::Step);
        let now = state(&rig).rip;
        assert!(now > last && now - last <= 10, "from {last:#x} to {now:#x}");
        last = now;
    }
    assert_eq!((rig.read_u64(DATA), state(&rig).regs[X86State::RCX]), (0x55, 7));
    debug(&mut rig, &DebugSettings::default());
    rig.run();
}

pub(crate) fn single_steps_can_hold_interrupts(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        let mut again = a.create_label();
        a.sti()?;
        a.nop()?;
        a.mov(eax, 1)?;
        progress(a)?;
        a.set_label(&mut again)?;
        a.inc(rcx)?;
        a.cmp(ebp, 0)?;
        a.je(again)?;
        a.mov(eax, ebp)?;
        exit(a)
    });
    interrupt_handler(&rig, 0x40, |a| {
        a.mov(ebp, 0x99u32)?;
        a.iretq()
    });
    rig.edit(0, |state| state.lapic.svr = 0x1ff);
    assert_eq!(
        rig.run_while(|rig, stop| {
            rig.bus.wait_for(1);
            stop.stop();
        }),
        [HaltReason::Stopped]
    );
    if !rig.vcpus[0].debug_limits().hold_interrupts {
        return;
    }
    rig.vm.msi_target().signal(MsiMessage { address: 0xfee0_0000, data: 0x40 });
    debug(&mut rig, &DebugSettings { hold_interrupts: true, ..single_step() });
    for _ in 0..6 {
        assert_eq!(run_to_stop(&mut rig), DebugStop::Step);
        let now = state(&rig);
        assert!(now.rip < CODE + 0x100 && now.regs[X86State::RBP] == 0, "the handler waits: {:#x}", now.rip);
    }
    debug(&mut rig, &DebugSettings::default());
    assert_eq!(rig.run(), 0x99);
}

pub(crate) fn watchpoints_stop_after_the_access(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.mov(rbx, DATA + 0x100)?;
        a.mov(eax, 0x1122_3344u32)?;
        a.mov(dword_ptr(rbx - 4), eax)?; // below
        a.mov(dword_ptr(rbx + 8), eax)?; // above
        a.mov(rcx, qword_ptr(rbx))?; // a load
        a.mov(esi, 1)?;
        a.mov(byte_ptr(rbx + 7), al)?; // the last byte
        a.mov(esi, 2)?;
        a.inc(qword_ptr(rbx - 4))?; // reaches into it
        a.mov(esi, 3)?;
        a.mov(eax, dword_ptr(rbx + 4))?; // a load
        a.mov(esi, 4)?;
        a.mov(eax, esi)?;
        exit(a)
    });
    let address = DATA + 0x100;
    let stores = watch(address, 8, WatchKind::Write);
    debug(&mut rig, &stores);
    for mark in [1, 2] {
        assert_eq!(run_to_stop(&mut rig), DebugStop::Watchpoint(stores.watchpoints[0]));
        assert_eq!(state(&rig).regs[X86State::RSI], mark);
        assert_eq!(rig.read_u64(address) >> 56, 0x44, "the store is done");
    }
    let both = watch(address, 8, WatchKind::Access);
    debug(&mut rig, &both);
    assert_eq!(run_to_stop(&mut rig), DebugStop::Watchpoint(both.watchpoints[0]));
    assert_eq!(state(&rig).regs[X86State::RSI], 3);
    assert_eq!(rig.run(), 4);
}

pub(crate) fn code_of_32_bits_is_debugged(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    write_tables(&rig);
    let code = assemble(32, CODE, |a| {
        let mut again = a.create_label();
        a.xor(ebx, ebx)?;
        a.mov(ecx, 100)?;
        a.mov(esi, FUNCTION as u32)?;
        a.set_label(&mut again)?;
        a.call(esi)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(eax, ebx)?;
        exit(a)
    });
    rig.write(CODE, &code);
    let function = assemble(32, FUNCTION, |a| {
        a.add(ebx, 5)?; // 3 bytes
        a.nop()?;
        a.mov(dword_ptr(DATA as u32), ebx)?;
        a.inc(ebx)?;
        a.ret()
    });
    rig.write(FUNCTION, &function);
    rig.edit(0, |state| {
        long_mode(state, 0, CODE);
        let code = &mut state.segments[X86State::CS];
        (code.selector, code.rights) = (CODE32, 0xc09b);
    });
    let stores = watch(DATA, 4, WatchKind::Write);
    for round in 0..3 {
        debug(&mut rig, &breakpoint(FUNCTION + 3));
        assert_eq!(run_to_stop(&mut rig), DebugStop::Breakpoint { address: FUNCTION + 3 });
        assert_eq!(state(&rig).regs[X86State::RBX], 6 * round + 5);
        debug(&mut rig, &stores);
        assert_eq!(run_to_stop(&mut rig), DebugStop::Watchpoint(stores.watchpoints[0]));
        assert_eq!((rig.read_u64(DATA), state(&rig).regs[X86State::RBX]), (6 * round + 5, 6 * round + 5));
        step_over(&mut rig);
        assert_eq!(state(&rig).regs[X86State::RBX], 6 * round + 6);
    }
    debug(&mut rig, &DebugSettings::default());
    assert_eq!(rig.run(), 600);
}

pub(crate) fn loads_are_watched_for_alone_or_refused(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.mov(rbx, DATA)?;
        a.mov(dword_ptr(rbx), 1)?;
        a.mov(eax, dword_ptr(rbx))?;
        exit(a)
    });
    let loads = watch(DATA, 4, WatchKind::Read);
    let set = rig.vcpus[0].set_debug(&loads);
    if rig.vcpus[0].debug_limits().read_watchpoints {
        set.unwrap();
        assert_eq!(run_to_stop(&mut rig), DebugStop::Watchpoint(loads.watchpoints[0]));
        assert_eq!(state(&rig).regs[X86State::RAX], 1);
    } else {
        set.unwrap_err();
    }
    assert_eq!(rig.run(), 1);
}

pub(crate) fn more_than_there_is_is_refused(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    calls(&mut rig, 4);
    let most = rig.vcpus[0].debug_limits().hardware;
    let wanted = most.map_or(40, |most| most + 1);
    // The function's addresses in their midst.
    let first = FUNCTION + 3 - u64::from(wanted - 1);
    let hardware_breakpoints = (0..u64::from(wanted)).map(|n| first + n).collect();
    let settings = DebugSettings { hardware_breakpoints, ..DebugSettings::default() };
    let set = rig.vcpus[0].set_debug(&settings);
    if most.is_some() {
        set.unwrap_err();
    } else {
        set.unwrap();
        assert_eq!(run_to_stop(&mut rig), DebugStop::Breakpoint { address: FUNCTION });
        debug(&mut rig, &DebugSettings::default());
    }
    assert_eq!(rig.run(), 28);
}

pub(crate) fn the_guest_keeps_its_own_breakpoints(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    boot64(&mut rig, |a| {
        a.xor(ebx, ebx)?;
        a.int3()?;
        a.mov(rax, FUNCTION)?;
        a.mov(dr0, rax)?;
        a.mov(rax, 0x401u64)?;
        a.mov(dr7, rax)?;
        a.call(FUNCTION)?;
        a.int3()?;
        a.mov(eax, ebx)?;
        exit(a)
    });
    function(&rig, FUNCTION, |a| {
        a.inc(ebx)?;
        a.ret()
    });
    interrupt_handler(&rig, 3, |a| {
        a.add(ebx, 0x100)?;
        a.iretq()
    });
    interrupt_handler(&rig, 1, |a| {
        a.add(ebx, 0x1_0000)?;
        a.or(dword_ptr(rsp + 16), 0x1_0000)?; // RF
        a.iretq()
    });
    debug(&mut rig, &breakpoint(FUNCTION + 2));
    assert_eq!(run_to_stop(&mut rig), DebugStop::Breakpoint { address: FUNCTION + 2 });
    let own = if rig.vcpus[0].debug_limits().guest_registers { 0x1_0000 } else { 0 };
    assert_eq!(state(&rig).regs[X86State::RBX], own + 0x101);
    assert_eq!((state(&rig).dr7, state(&rig).debug_addresses[0]), (0x401, FUNCTION));
    // Still with a breakpoint, at an address that is not executed.
    debug(&mut rig, &breakpoint(FUNCTION + 0x100));
    assert_eq!(rig.run(), own + 0x201);
}

pub(crate) fn breakpoints_are_a_processor_s_own(target: &Target<'_>) {
    let mut rig = Rig::new(target, 2);
    write_tables(&rig);
    let code = assemble(64, CODE, |a| {
        let (mut again, mut wait) = (a.create_label(), a.create_label());
        a.mov(ecx, 1000)?;
        a.mov(rsi, FUNCTION)?;
        a.set_label(&mut again)?;
        a.call(rsi)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.lock().inc(dword_ptr(DATA))?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(DATA), 2)?;
        a.jb(wait)?;
        exit(a)
    });
    rig.write(CODE, &code);
    function(&rig, FUNCTION, |a| {
        a.nop()?;
        a.ret()
    });
    for id in 0..2 {
        rig.edit(id, |state| {
            long_mode(state, id as u64, CODE);
            state.events.mp_state = MpState::Runnable;
        });
    }
    rig.vcpus[1].set_debug(&breakpoint(FUNCTION)).unwrap();
    let reasons = rig.run_while(|_, _| {});
    assert_eq!(
        reasons,
        [HaltReason::Stopped, HaltReason::Debug(DebugStop::Breakpoint { address: FUNCTION })]
    );
    rig.vcpus[1].set_debug(&breakpoint(FUNCTION + 1)).unwrap();
    let reasons = rig.run_while(|_, _| {});
    assert_eq!(
        reasons,
        [HaltReason::Stopped, HaltReason::Debug(DebugStop::Breakpoint { address: FUNCTION + 1 })]
    );
    // The first goes on through the same code while the second is in it.
    rig.vcpus[1].set_debug(&breakpoint(FUNCTION + 0x40)).unwrap();
    rig.run();
}

pub(crate) fn debugging_outlives_a_reset(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    calls(&mut rig, 4);
    let settings = DebugSettings { hardware_breakpoints: vec![FUNCTION], ..DebugSettings::default() };
    debug(&mut rig, &settings);
    rig.vcpus[0].reset();
    rig.edit(0, |state| long_mode(state, 0, CODE));
    assert_eq!(run_to_stop(&mut rig), DebugStop::Breakpoint { address: FUNCTION });
    debug(&mut rig, &DebugSettings::default());
    assert_eq!(rig.run(), 28);
}

pub(crate) fn addresses_are_translated(target: &Target<'_>) {
    let mut rig = Rig::new(target, 1);
    let translate = |rig: &Rig, address: u64| rig.vcpus[0].translate(address).expect("a translation");
    assert_eq!(translate(&rig, 0x1234), Some(0x1234), "without paging");
    calls(&mut rig, 1);
    // A page of 4 KiB in the upper half, and a table of them.
    let (tables, high) = (0x1_0000u64, 0xffff_8000_0000_0000u64);
    rig.write(PAGE_TABLES + 256 * 8, &(tables | 3).to_le_bytes());
    rig.write(tables, &((tables + 0x1000) | 3).to_le_bytes());
    rig.write(tables + 0x1000, &((tables + 0x2000) | 3).to_le_bytes());
    rig.write(tables + 0x2000, &(DATA | 1).to_le_bytes());
    let table = |rig: &Rig| {
        [PAGE_TABLES + 256 * 8, tables, tables + 0x1000, tables + 0x2000].map(|at| rig.read_u64(at))
    };
    let before = table(&rig);
    assert_eq!(translate(&rig, high + 0x123), Some(DATA + 0x123));
    assert_eq!(translate(&rig, CODE + 5), Some(CODE + 5));
    assert_eq!(translate(&rig, RAM + 0x12_3456), Some(RAM + 0x12_3456), "no memory is no matter");
    assert_eq!(translate(&rig, high + 0x1000), None);
    assert_eq!(translate(&rig, 0x7fff_0000_0000), None);
    const ACCESSED: u64 = 1 << 5;
    assert_eq!(table(&rig).map(|entry| entry & !ACCESSED), before);
    assert_eq!(rig.run(), 7);
}
