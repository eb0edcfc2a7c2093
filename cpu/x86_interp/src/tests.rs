//! What the host cannot show: modes, faults in the middle, debug traps, devices, modified code.

use crate::step;
use x86_core::testing::{DATA, MMIO, Machine, PAGE_TABLES, STACK};
use x86_core::{Exception, Flow, Seg, Trap, flags, reg, shadow, vector};

fn exception(result: Result<Flow, Trap>) -> Exception {
    match result {
        Err(Trap::Exception(exception)) => exception,
        other => panic!("{other:?} is no exception"),
    }
}

/// Runs `count` instructions that are to complete.
fn run(machine: &mut Machine, count: usize) {
    for _ in 0..count {
        let rip = machine.cpu.rip;
        step(&mut machine.core()).unwrap_or_else(|trap| panic!("{trap:?} at {rip:#x}"));
    }
}

/// Takes away the 2 MiB page at `address`.
fn unmap(machine: &mut Machine, address: u64) {
    machine.poke(PAGE_TABLES + 0x2000 + (address >> 21) * 8, 0);
    machine.core().flush_tlb(false);
}

#[test]
fn a_small_program() {
    let mut machine = Machine::long();
    // mov ecx, 10; xor eax, eax; add eax, ecx; loop -4; push rax; pop rbx; call +0; ret-less end
    machine.load(b"\xb9\x0a\x00\x00\x00\x31\xc0\x01\xc8\xe2\xfc\x50\x5b\xe8\x00\x00\x00\x00");
    let start = machine.cpu.rip;
    run(&mut machine, 2 + 20 + 3);
    assert_eq!(machine.cpu.regs[reg::RBX], 55);
    assert_eq!(machine.cpu.rip, start + 18);
    assert_eq!(machine.peek(STACK - 8), start + 18);
}

#[test]
fn modified_code_is_seen_at_once() {
    let mut machine = Machine::long();
    let start = machine.cpu.rip;
    // mov byte [rip - 1 (next: inc eax -> dec eax)], 0xc8 ; the third byte is the opcode's modrm
    // c6 05 rel32 imm8 ; ff c0
    machine.load(b"\xc6\x05\x01\x00\x00\x00\xc8\xff\xc0");
    run(&mut machine, 2);
    assert_eq!(machine.cpu.regs[reg::RAX], 0xffff_ffff, "DEC EAX was executed");
    // Back to INC, behind the interpreter's back, with the DEC in its cache.
    machine.memory.write(start + 8, &[0xc0]).expect("RAM");
    machine.cpu.rip = start + 7;
    run(&mut machine, 1);
    assert_eq!(machine.cpu.regs[reg::RAX], 0);
}

#[test]
fn equal_bytes_mean_other_things_in_other_modes() {
    // dec eax; add eax, ecx in 32-bit mode, add rax, rcx in 64-bit mode
    let code = b"\x48\x01\xc8";
    let mut long = Machine::long();
    long.load(code);
    long.cpu.regs[reg::RCX] = 1 << 40;
    run(&mut long, 1);
    assert_eq!(long.cpu.regs[reg::RAX], 1 << 40);
    let mut protected = Machine::protected();
    protected.load(code);
    run(&mut protected, 1);
    assert_eq!(protected.cpu.regs[reg::RAX], 0xffff_ffff);
    assert_eq!(protected.cpu.rip, long.cpu.rip - 2);
}

#[test]
fn instructions_across_pages() {
    let mut machine = Machine::long();
    let boundary = DATA + 0x20_0000;
    machine.cpu.rip = boundary - 3;
    machine.load(b"\x48\xb8\x11\x22\x33\x44\x55\x66\x77\x88"); // mov rax, imm64
    run(&mut machine, 1);
    assert_eq!(machine.cpu.regs[reg::RAX], 0x8877_6655_4433_2211);
    unmap(&mut machine, boundary);
    machine.cpu.rip = boundary - 3;
    let fault = exception(step(&mut machine.core()));
    assert_eq!((fault.vector, fault.address), (vector::PF, boundary));
    assert_eq!(fault.error, Some(0x10), "a fetch");
    assert_eq!(machine.cpu.rip, boundary - 3);
}

#[test]
fn too_long_and_undefined() {
    let mut machine = Machine::long();
    machine.load(&[0x66; 16]);
    assert_eq!(exception(step(&mut machine.core())).vector, vector::GP);
    machine.load(b"\xf0\x89\xd8"); // lock mov eax, ebx
    assert_eq!(step(&mut machine.core()), Err(Trap::UD));
    machine.load(b"\xf0\x01\xd8"); // lock add eax, ebx
    assert_eq!(step(&mut machine.core()), Err(Trap::UD));
    machine.load(b"\x0f\x0b");
    assert_eq!(step(&mut machine.core()), Err(Trap::UD));
}

#[test]
fn real_mode() {
    let mut machine = Machine::real();
    machine.cpu.segments[Seg::Ds as usize].base = 0x1_0000;
    machine.cpu.regs[reg::RBX] = 0xdead_0010;
    machine.cpu.regs[reg::RSI] = 0xfff8;
    // mov [bx+si+4], ax; push ax; call +0x10
    machine.cpu.regs[reg::RAX] = 0x1234_5678;
    machine.load(b"\x89\x40\x04\x50\xe8\x10\x00");
    run(&mut machine, 3);
    assert_eq!(machine.peek(0x1_000c) & 0xffff_ffff, 0x5678);
    assert_eq!(machine.cpu.regs[reg::RSP] & 0xffff, 0x7000 - 4);
    assert_eq!(machine.peek(0x7000 - 4) & 0xffff_ffff, 0x5678_7c07);
    assert_eq!(machine.cpu.rip, 0x7c17);
    // A jump is cut to 16 bits.
    machine.cpu.rip = 0xfff0;
    machine.load(b"\xeb\x7e");
    run(&mut machine, 1);
    assert_eq!(machine.cpu.rip, 0x70);
    // VEX prefixes are LES and LDS there.
    machine.load(b"\xc4\xe2\x70\xf2\xc1");
    assert_eq!(step(&mut machine.core()), Err(Trap::UD));
}

#[test]
fn branches_are_checked() {
    let mut machine = Machine::long();
    machine.cpu.regs[reg::RAX] = 1 << 47;
    for code in [b"\xff\xe0", b"\xff\xd0"] {
        machine.load(code);
        let rsp = machine.cpu.regs[reg::RSP];
        assert_eq!(exception(step(&mut machine.core())).vector, vector::GP, "{code:x?}");
        assert_eq!(machine.cpu.regs[reg::RSP], rsp);
    }
    machine.load(b"\xc3");
    machine.poke(STACK, 1 << 63);
    assert_eq!(exception(step(&mut machine.core())).vector, vector::GP);
    assert_eq!(machine.cpu.regs[reg::RSP], STACK);
    let mut machine = Machine::protected();
    let target = machine.cpu.rip + 0x7f;
    machine.cpu.segments[Seg::Cs as usize].limit = target as u32 - 1;
    machine.load(b"\xeb\x7d");
    assert_eq!(exception(step(&mut machine.core())).vector, vector::GP);
    machine.cpu.segments[Seg::Cs as usize].limit += 1;
    run(&mut machine, 1);
    assert_eq!(machine.cpu.rip, target);
}

#[test]
fn pop_to_memory_that_faults_leaves_the_stack_pointer() {
    let mut machine = Machine::long();
    let hole = DATA + 0x40_0000;
    unmap(&mut machine, hole);
    machine.cpu.regs[reg::RDI] = hole;
    machine.load(b"\x8f\x07"); // pop qword [rdi]
    let fault = exception(step(&mut machine.core()));
    assert_eq!((fault.vector, fault.address, fault.error), (vector::PF, hole, Some(2)));
    assert_eq!(machine.cpu.regs[reg::RSP], STACK);
    // The address of the operand is computed with the new stack pointer.
    machine.poke(STACK, 0x77);
    machine.load(b"\x8f\x44\x24\x10"); // pop qword [rsp+16]
    run(&mut machine, 1);
    assert_eq!(machine.peek(STACK + 24), 0x77);
}

#[test]
fn repeated_strings_fault_with_their_progress_kept() {
    let mut machine = Machine::long();
    let hole = DATA + 0x20_0000;
    unmap(&mut machine, hole);
    machine.cpu.regs[reg::RDI] = hole - 0x1800;
    machine.cpu.regs[reg::RCX] = 0x1000;
    machine.cpu.regs[reg::RAX] = 0x5a;
    machine.load(b"\xf3\x48\xab"); // rep stosq
    let fault = exception(step(&mut machine.core()));
    assert_eq!((fault.vector, fault.address), (vector::PF, hole));
    assert_eq!(machine.cpu.regs[reg::RDI], hole);
    assert_eq!(machine.cpu.regs[reg::RCX], 0x1000 - 0x300);
    assert_eq!(machine.peek(hole - 8), 0x5a);
    assert_eq!(machine.peek(hole - 0x1808), 0);
}

#[test]
fn long_repetitions_pause() {
    let mut machine = Machine::long();
    machine.cpu.regs[reg::RDI] = DATA;
    machine.cpu.regs[reg::RCX] = 0x30_0000;
    machine.cpu.regs[reg::RAX] = 0x11;
    machine.load(b"\xf3\xaa"); // rep stosb
    let start = machine.cpu.rip;
    let mut pauses = 0;
    while step(&mut machine.core()) == Ok(Flow::Again) {
        assert_eq!(machine.cpu.rip, start);
        pauses += 1;
    }
    assert!(pauses > 10, "{pauses} pauses");
    assert_eq!(machine.cpu.rip, start + 2);
    assert_eq!((machine.cpu.regs[reg::RDI], machine.cpu.regs[reg::RCX]), (DATA + 0x30_0000, 0));
    assert_eq!(machine.peek(DATA + 0x30_0000 - 8), 0x1111_1111_1111_1111);
    assert_eq!(machine.peek(DATA + 0x30_0000), 0);
}

#[test]
fn strings_to_devices_and_downwards() {
    let mut machine = Machine::long();
    machine.memory.write(DATA, b"abcdefgh").expect("RAM");
    machine.cpu.regs[reg::RSI] = DATA;
    machine.cpu.regs[reg::RDI] = MMIO;
    machine.cpu.regs[reg::RCX] = 2;
    machine.load(b"\xf3\xa5"); // rep movsd
    run(&mut machine, 1);
    let log = machine.platform.log.borrow().clone();
    assert_eq!(log, [(true, MMIO, b"abcd".to_vec()), (true, MMIO + 4, b"efgh".to_vec())]);
    // Overlapping, downwards: a memmove by one.
    machine.cpu.rip -= 2;
    machine.load(b"\xfd\xf3\xa4"); // std; rep movsb
    machine.cpu.regs[reg::RSI] = DATA + 7;
    machine.cpu.regs[reg::RDI] = DATA + 8;
    machine.cpu.regs[reg::RCX] = 8;
    run(&mut machine, 2);
    let mut moved = [0; 9];
    machine.memory.read(DATA, &mut moved).expect("RAM");
    assert_eq!(&moved, b"aabcdefgh");
    // Overlapping, upwards: a fill.
    machine.cpu.rip -= 3;
    machine.load(b"\xfc\xf3\xa4"); // cld; rep movsb
    machine.cpu.regs[reg::RSI] = DATA;
    machine.cpu.regs[reg::RDI] = DATA + 1;
    machine.cpu.regs[reg::RCX] = 8;
    run(&mut machine, 2);
    machine.memory.read(DATA, &mut moved).expect("RAM");
    assert_eq!(&moved, b"aaaaaaaaa");
}

#[test]
fn single_step() {
    let mut machine = Machine::long();
    machine.load(b"\x90\xf3\xaa"); // nop; rep stosb
    machine.cpu.regs[reg::RCX] = 3;
    machine.cpu.regs[reg::RDI] = DATA;
    machine.core().set_rflags(flags::FIXED | flags::TF);
    let start = machine.cpu.rip;
    assert_eq!(exception(step(&mut machine.core())).vector, vector::DB);
    assert_eq!((machine.cpu.rip, machine.cpu.dr[6] & 1 << 14), (start + 1, 1 << 14));
    for left in [2, 1, 0] {
        assert_eq!(exception(step(&mut machine.core())).vector, vector::DB);
        assert_eq!(machine.cpu.regs[reg::RCX], left);
    }
}

#[test]
fn breakpoints_and_the_resume_flag() {
    let mut machine = Machine::long();
    machine.load(b"\x90\x90");
    let start = machine.cpu.rip;
    machine.cpu.dr[1] = start;
    machine.cpu.dr[7] = 1 << 2;
    assert_eq!(exception(step(&mut machine.core())).vector, vector::DB);
    assert_eq!((machine.cpu.rip, machine.cpu.dr[6] & 0xf), (start, 2));
    machine.core().set_rflags(flags::FIXED | flags::RF);
    run(&mut machine, 1);
    assert_eq!(machine.cpu.rflags & flags::RF, 0);
    assert_eq!(machine.cpu.rip, start + 1);
}

#[test]
fn shadows_last_one_instruction() {
    let mut machine = Machine::long();
    machine.load(b"\x90");
    machine.cpu.interrupt_shadow = shadow::STI | shadow::NMI;
    run(&mut machine, 1);
    assert_eq!(machine.cpu.interrupt_shadow, shadow::NMI);
    machine.cpu.interrupt_shadow = shadow::MOV_SS;
    machine.load(b"\x0f\x0b");
    assert_eq!(step(&mut machine.core()), Err(Trap::UD));
    assert_eq!(machine.cpu.interrupt_shadow, shadow::MOV_SS);
}

#[test]
fn a_wide_compare_and_exchange_must_be_aligned() {
    let mut machine = Machine::long();
    machine.cpu.regs[reg::RSI] = DATA + 8;
    machine.load(b"\xf0\x48\x0f\xc7\x0e"); // lock cmpxchg16b [rsi]
    assert_eq!(exception(step(&mut machine.core())).vector, vector::GP);
    machine.cpu.regs[reg::RSI] = DATA;
    machine.cpu.regs[..4].copy_from_slice(&[0, 6, 0, 5]);
    machine.cpu.lock_needed = true;
    run(&mut machine, 1);
    assert_eq!((machine.peek(DATA), machine.peek(DATA + 8)), (5, 6));
    assert!(machine.cpu.rflags & flags::ZF != 0);
}

#[test]
fn read_modify_write_faults_as_a_write() {
    let mut machine = Machine::user();
    let page = DATA + 0x20_0000;
    // Present, for users, but read-only.
    machine.poke(PAGE_TABLES + 0x2000 + (page >> 21) * 8, page | 0xe5);
    machine.core().flush_tlb(false);
    machine.cpu.regs[reg::RSI] = page;
    for code in [&b"\x01\x06"[..], b"\xf0\x0f\xb1\x0e", b"\x0f\xab\x06", b"\xd1\x26", b"\x87\x06"] {
        machine.load(code);
        let fault = exception(step(&mut machine.core()));
        assert_eq!((fault.vector, fault.error), (vector::PF, Some(7)), "{code:x?}");
    }
    machine.load(b"\x39\x06"); // cmp only reads
    run(&mut machine, 1);
}

#[test]
fn locked_instructions_are_atomic_between_processors() {
    const ROUNDS: u64 = 20_000;
    let memory = Machine::long().memory;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let memory = memory.clone();
            scope.spawn(move || {
                let mut machine = Machine { memory, ..Machine::long() };
                machine.cpu.lock_needed = true;
                machine.cpu.regs[..8].copy_from_slice(&[0, ROUNDS, 1, 0, STACK, 0, DATA, 0]);
                // lock inc dword [rsi]; mov eax, edx; lock xadd [rsi+8], rax
                // spin: xor eax, eax; lock cmpxchg [rsi+16], edx; jnz spin
                // inc dword [rsi+24]; xor eax, eax; xchg [rsi+16], eax; dec rcx; jnz
                machine.load(
                    b"\xf0\xff\x06\x89\xd0\xf0\x48\x0f\xc1\x46\x08\
                      \x31\xc0\xf0\x0f\xb1\x56\x10\x75\xf7\
                      \xff\x46\x18\x31\xc0\x87\x46\x10\x48\xff\xc9\x75\xdf",
                );
                let end = machine.cpu.rip + 33;
                while machine.cpu.rip != end {
                    run(&mut machine, 1);
                }
            });
        }
    });
    let read = |offset: u64| {
        let mut data = [0; 4];
        memory.read(DATA + offset, &mut data).expect("RAM");
        u64::from(u32::from_le_bytes(data))
    };
    assert_eq!([read(0), read(8), read(24)], [2 * ROUNDS; 3]);
}

#[test]
fn branches_are_recorded_while_that_is_asked_for() {
    const DEBUGCTL: u32 = 0x1d9;
    const FROM: u32 = 0x1db;
    let mut machine = Machine::long();
    let start = machine.cpu.rip;
    // jmp +2; two bytes that are skipped; jz (not taken); call +0; nop
    machine.load(b"\xeb\x02\x90\x90\x74\x10\xe8\x00\x00\x00\x00\x90");
    machine.cpu.rflags &= !flags::ZF;
    let records = |machine: &mut Machine| [0, 1].map(|at| machine.core().read_msr(FROM + at).unwrap());
    run(&mut machine, 1);
    assert_eq!(records(&mut machine), [0, 0]);
    machine.cpu.rip = start;
    machine.core().write_msr(DEBUGCTL, 1).unwrap();
    run(&mut machine, 2);
    assert_eq!(records(&mut machine), [start, start + 4], "the branch that was not taken is none");
    run(&mut machine, 1);
    assert_eq!(records(&mut machine), [start + 6, start + 11]);
    // A debug exception ends it.
    machine.cpu.rflags |= flags::TF;
    assert_eq!(exception(step(&mut machine.core())).vector, vector::DB);
    machine.core().write_msr(FROM, 7).unwrap();
    assert_eq!(records(&mut machine), [start + 6, start + 11], "programs do not write them");
}

/// AMD's processors read far pointers of 32-bit offsets even with REX.W, but a CALL pushes 64 bits.
#[test]
fn far_calls_with_rex_w() {
    use x86_core::testing::{CODE, selector};
    // rex.w call far [rbx]; and behind a prefix.
    for code in [&b"\x48\xff\x1b"[..], b"\x66\x48\xff\x1b"] {
        let mut machine = Machine::user();
        machine.load(code);
        machine.cpu.regs[reg::RBX] = DATA;
        machine.cpu.regs[reg::RSP] = STACK;
        machine.poke(DATA, (CODE + 0x40) | u64::from(selector::USER_CODE64 | 3) << 32);
        let start = machine.cpu.rip;
        machine.memory.write(CODE + 0x40, b"\x48\xcb").expect("RAM"); // rex.w retf
        run(&mut machine, 1);
        assert_eq!((machine.cpu.rip, machine.cpu.regs[reg::RSP]), (CODE + 0x40, STACK - 16));
        run(&mut machine, 1);
        let end = start + code.len() as u64;
        assert_eq!((machine.cpu.rip, machine.cpu.regs[reg::RSP]), (end, STACK));
    }
    // rex.w lss rax, [rbx]; without REX.W
    for code in [&b"\x48\x0f\xb2\x03"[..], b"\x0f\xb2\x03"] {
        let mut machine = Machine::user();
        machine.load(code);
        machine.cpu.regs[reg::RBX] = DATA;
        machine.cpu.regs[reg::RAX] = u64::MAX;
        machine.poke(DATA, 0x89ab_cdef | u64::from(selector::USER_DATA | 3) << 32);
        run(&mut machine, 1);
        assert_eq!(machine.cpu.regs[reg::RAX], 0x89ab_cdef);
    }
}
