//! Registers and memory of a processor as gdb sees them.

use crate::fuzzing::{Processors, converse};
use crate::registers::{Architecture, Layout, code_address};
use crate::session::Session;
use crate::{PACKET_BYTES, monitor};
use accel::{Accelerator, DebugStop, VmSpec, WatchKind, Watchpoint, X86State};
use accel_dbt::DbtAccelerator;
use clock::{TimerService, VmClock};
use guest_memory::GuestMemory;

fn session() -> Session<Processors> {
    let memory = GuestMemory::new(std::slice::from_ref(&(0..1 << 20))).unwrap();
    let timers = TimerService::new(VmClock::new()).unwrap();
    let vm = DbtAccelerator.create_vm(&VmSpec { vcpus: 2, ..VmSpec::default() }, &memory, &timers).unwrap();
    let vcpus = (0..2).map(|id| vm.create_vcpu(id).unwrap()).collect();
    Session::new(Processors { memory, vcpus }, Architecture::default())
}

fn numbers(layout: &Layout) -> impl Fn(&str) -> usize + use<> {
    let description = layout.description().to_owned();
    move |name| {
        let names: Vec<_> = description.split("<reg name=\"").skip(1).collect();
        names.iter().position(|rest| rest.starts_with(&format!("{name}\""))).expect("a register")
    }
}

#[test]
fn registers_are_read_as_they_were_written() {
    let mut session = session();
    for (architecture, avx, bytes) in [
        // 16 general ones and RIP, flags and segments, x87, SSE, bases, system registers.
        (Architecture::X86_64, false, 17 * 8 + 7 * 4 + 80 + 32 + 256 + 4 + 16 + 7 * 8),
        (Architecture::X86_64, true, 17 * 8 + 7 * 4 + 80 + 32 + 256 + 4 + 256 + 16 + 7 * 8),
        (Architecture::I386, false, 9 * 4 + 7 * 4 + 80 + 32 + 128 + 4 + 5 * 4),
        (Architecture::I8086, false, 9 * 4 + 7 * 4 + 80 + 32 + 128 + 4 + 5 * 4),
    ] {
        let layout = Layout::new(architecture, avx);
        let mut state = session.state(0).unwrap().clone();
        for (index, register) in state.regs.iter_mut().enumerate() {
            *register = 0x1111_1111_1111_1111 * index as u64;
        }
        let all = layout.read_all(&state);
        assert_eq!(all.len(), bytes);
        let before = state.clone();
        layout.write_all(&mut state, &all).unwrap();
        assert_eq!(state, before, "what is written back as it was changes nothing");
        for at in 0.. {
            let Some(value) = layout.read(&state, at) else { break };
            assert_eq!(layout.write(&mut state, at, &value), Ok(()));
            assert!(layout.write(&mut state, at, &value[1..]).is_err());
        }
        assert_eq!(state, before);
    }
}

#[test]
fn registers_change_what_they_name() {
    let mut session = session();
    let layout = Layout::new(Architecture::X86_64, true);
    let number = numbers(&layout);
    let mut state = session.state(0).unwrap().clone();
    let mut put = |name: &str, bytes: &[u8]| layout.write(&mut state, number(name), bytes);
    put("rbx", &7u64.to_le_bytes()).unwrap();
    put("xmm3", &[1; 16]).unwrap();
    put("ymm3h", &[2; 16]).unwrap();
    put("fs_base", &9u64.to_le_bytes()).unwrap();
    put("k_gs_base", &10u64.to_le_bytes()).unwrap();
    put("cr8", &5u64.to_le_bytes()).unwrap();
    put("st1", &[3; 10]).unwrap();
    put("ftag", &0xfff3u32.to_le_bytes()).unwrap();
    // Real mode: a selector has its base with it, and the instruction pointer is a linear address.
    put("cs", &0x1000u32.to_le_bytes()).unwrap();
    put("rip", &0x1_0005u64.to_le_bytes()).unwrap();
    assert_eq!(state.regs[X86State::RBX], 7);
    assert_eq!(
        state.fpu.vectors[3][..4],
        [0x0101_0101_0101_0101, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0202_0202_0202_0202]
    );
    assert_eq!(
        (state.segments[X86State::FS].base, state.msr(0xc000_0102), state.lapic.tpr),
        (9, Some(10), 0x50)
    );
    assert_eq!((state.fpu.st[1], state.fpu.tag), ([3; 10], 2));
    assert_eq!((state.segments[X86State::CS].base, state.rip, code_address(&state)), (0x1_0000, 5, 0x1_0005));
}

#[test]
fn impossible_registers_leave_the_processor_as_it_was() {
    let mut session = session();
    let layout = session.layout.clone();
    let number = numbers(&layout);
    let before = session.state(0).unwrap().clone();
    let paging_without_protection =
        session.change(0, |layout, state| layout.write(state, number("cr0"), &0x8000_0000u64.to_le_bytes()));
    assert!(paging_without_protection.is_err());
    assert_eq!(session.state(0).unwrap().cr0, before.cr0);
    assert_eq!(session.state(0).unwrap().regs, before.regs);
}

#[test]
fn memory_ends_where_it_is_not() {
    let mut session = session();
    let data: Vec<u8> = (0..=255).collect();
    assert!(session.write_memory(0, 0xff0, &data));
    let mut read = [0; 256];
    assert_eq!(session.read_memory(0, 0xff0, &mut read), 256);
    assert_eq!(read[..], data[..]);
    assert_eq!(session.read_memory(0, (1 << 20) - 16, &mut read), 16);
    assert_eq!(session.read_memory(0, u64::MAX, &mut read), 0);
    assert!(!session.write_memory(0, (1 << 20) - 16, &data));
    assert_eq!(session.read_memory(0, 0, &mut [0; PACKET_BYTES]), PACKET_BYTES);
}

/// What a client sends for a packet, with its acknowledgement of the answer.
fn packet(text: &str) -> Vec<u8> {
    let sum = text.bytes().fold(0u8, |sum, byte| sum.wrapping_add(byte));
    format!("${text}#{sum:02x}+").into_bytes()
}

#[test]
fn answers_are_no_longer_than_packets() {
    let mut session = session();
    // Digits that repeat would be shortened.
    session.write_memory(0, 0, &[0x12; PACKET_BYTES]);
    let mut said = |text: &str| converse(&mut session, &packet(text), |_| None);
    // "+", "$", two digits a byte, "#" and a checksum.
    assert_eq!(said("m0,2000"), 1 + 1 + PACKET_BYTES + 3);
    for endless in ["m0,2001", "m0,ffffffffffffffff", "mfffffffffffff000,ffffffffffffffff"] {
        assert!(said(endless) < 16, "{endless}");
    }
}

#[test]
fn watchpoints_that_are_gone_stop_nobody() {
    let mut session = session();
    let point = Watchpoint { address: 0x1000, len: 4, kind: WatchKind::Write };
    assert!(session.change_points(|points| points.watched.push(point)));
    assert!(!session.goes_on(1, DebugStop::Watchpoint(point)));
    assert!(session.goes_on(1, DebugStop::Watchpoint(Watchpoint { address: 0x2000, ..point })));
    assert!(!session.goes_on(1, DebugStop::Step));
}

#[test]
fn registers_of_32_bit_code_are_in_its_order() {
    let number = numbers(&Layout::new(Architecture::I386, false));
    let names = ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip", "eflags", "cs"];
    assert_eq!(names.map(number), std::array::from_fn(|index| index));
    let number = numbers(&Layout::new(Architecture::X86_64, false));
    assert_eq!(
        ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"].map(number),
        [0, 1, 2, 3, 4, 5, 6, 7]
    );
}

#[test]
fn breakpoints_are_bounded() {
    let mut session = session();
    for address in 0..1024 {
        assert!(session.change_points(|points| {
            points.software.insert(address);
        }));
    }
    assert!(!session.change_points(|points| {
        points.software.insert(5000);
    }));
    assert_eq!(session.points.software.len(), 1024);
}

#[test]
fn monitor_commands_answer_and_refuse_in_a_line() {
    let mut session = session();
    session.write_memory(0, 0x1000, &[0x78, 0x56, 0x34, 0x12, 1, 2, 3, 4]);
    let mut say = |command: &str| monitor::execute(&mut session, command);
    assert!(say("help").lines().count() > 5);
    assert_eq!(say("xp /2w 0x1000"), "0000000000001000: 0x12345678 0x04030201\n");
    assert_eq!(say("xp /1g 4096"), "0000000000001000: 0x0403020112345678\n");
    assert_eq!(say("info cpus").lines().count(), 2);
    assert!(say("info registers 1").contains("waits to be started"));
    assert_eq!(say("gva2gpa 0x1234"), "gpa: 0x1234\n");
    assert!(say("arch i386").contains("i386") && say("stepirq on").contains("on"));
    assert!(say("reset").contains("was reset"));
    for wrong in [
        "halt",
        "xp",
        "xp 0x",
        "xp /q 0",
        "xp /1w 0x100000",
        "xp /99999999999999999999b 0",
        "info registers 2",
        "gva2gpa x",
        "arch arm",
        "arch i386 please",
        "stepirq maybe",
    ] {
        let answer = say(wrong);
        assert!(answer.ends_with('\n') && answer.lines().count() == 1, "{wrong}: {answer}");
    }
}
