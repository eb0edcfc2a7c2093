//! Small programs with loops, calls, modified code.

use super::differential::wide_model;
use super::{State, Translated, interpret, options};
use crate::{Exit, Options};
use x86_core::cpuid::host_has_avx512;
use x86_core::testing::{CODE, DATA, HANDLERS, Machine, PAGE_TABLES};
use x86_core::{cr4, flags, reg};

fn both(code: &[u8], set_up: impl Fn(&mut Machine)) -> (Machine, Translated) {
    both_with(code, &options(), set_up)
}

fn both_with(code: &[u8], options: &Options, set_up: impl Fn(&mut Machine)) -> (Machine, Translated) {
    let prepare = || {
        let mut machine = Machine::long();
        machine.load(code);
        machine.cpu.mxcsr = 0x1f80;
        set_up(&mut machine);
        machine
    };
    let mut expected = prepare();
    interpret(&mut expected, 1_000_000);
    let mut actual = Translated::new(prepare(), options);
    actual.run();
    let differences = State::of(&expected.cpu).differences(&State::of(actual.vcpu.cpu()), flags::AF);
    assert!(differences.is_empty(), "{differences:?}");
    (expected, actual)
}

#[test]
fn a_loop_is_linked() {
    // mov ecx, 100000; xor eax, eax; l: add rax, rcx; dec rcx; jnz l; hlt
    let (_, actual) = both(b"\xb9\xa0\x86\x01\x00\x31\xc0\x48\x01\xc8\x48\xff\xc9\x75\xf8\xf4", |_| {});
    assert_eq!(actual.vcpu.cpu().regs[reg::RAX], 5_000_050_000);
    assert!(actual.vcpu.counters().entries < 10, "{:?}", actual.vcpu.counters());
}

#[test]
fn recursion() {
    // Fibonacci of 15 by recursion: mov edi, 15; call fib; hlt;
    // fib: cmp edi, 2; jb one; push rdi; dec edi; call fib; pop rdi; push rax; sub edi, 2; call fib; pop rcx;
    // add rax, rcx; ret; one: mov eax, edi; ret
    let code = b"\xbf\x0f\x00\x00\x00\xe8\x01\x00\x00\x00\xf4\
        \x83\xff\x02\x72\x1a\x57\xff\xcf\xe8\xf3\xff\xff\xff\x5f\x50\x83\xef\x02\xe8\xe9\xff\xff\xff\
        \x59\x48\x01\xc8\xc3\x90\x90\x90\x89\xf8\xc3";
    let (_, actual) = both(code, |_| {});
    assert_eq!(actual.vcpu.cpu().regs[reg::RAX], 610);
    assert!(actual.vcpu.counters().entries < 40, "{:?}", actual.vcpu.counters());
}

#[test]
fn code_in_two_pages_is_linked() {
    // At the end of one page: l: dec ecx; jmp next (in the next page); there: jnz back; hlt
    let mut code = vec![0x90; 0x1000 - 7];
    code.extend([0xff, 0xc9, 0xe9, 0x00, 0x00, 0x00, 0x00]);
    code.extend([0x75, 0xf7, 0xf4]);
    let (_, actual) = both(&code, |machine| machine.cpu.regs[reg::RCX] = 10_000);
    assert!(actual.vcpu.counters().entries < 100, "{:?}", actual.vcpu.counters());
}

#[test]
fn flags_of_instructions_that_leave_the_block_stay() {
    // cli; push 0x2d7; xor eax, eax; popfq (which enables interrupts); setc al; pushfq; pop rbx; hlt
    let (_, actual) = both(b"\xfa\x68\xd7\x02\x00\x00\x31\xc0\x9d\x0f\x92\xc0\x9c\x5b\xf4", |_| {});
    assert_eq!(actual.vcpu.cpu().regs[reg::RAX], 1);
    assert_eq!(actual.vcpu.cpu().regs[reg::RBX] & flags::ARITHMETIC, 0xd5 & flags::ARITHMETIC);
    // mov ecx, 200000; mov edi, DATA; mov esi, DATA; repe cmpsb, which pauses; sete al; hlt
    let mut code = b"\xb9\x40\x0d\x03\x00\xbf\x00\x00\x40\x00\xbe\x00\x00\x40\x00".to_vec();
    code.extend(b"\xf3\xa6\x0f\x94\xc0\xf4");
    let (_, actual) = both(&code, |_| {});
    assert_eq!(actual.vcpu.cpu().regs[reg::RAX] & 0xff, 1);
}

#[test]
fn code_that_modifies_itself() {
    // mov ecx, 50; l: inc eax; (the next changes "inc eax" to "dec eax" when ecx is 20)
    // cmp ecx, 20; jne skip; mov byte [rip + modrm of inc], 0xc8; skip: dec ecx; jnz l; hlt
    let code =
        b"\xb9\x32\x00\x00\x00\xff\xc0\x83\xf9\x14\x75\x07\xc6\x05\xf3\xff\xff\xff\xc8\xff\xc9\x75\xee\xf4";
    both(code, |_| {});
}

#[test]
fn a_store_into_the_next_instruction_is_seen() {
    // mov byte [rip + 1], 0xc8; inc eax -> dec eax; hlt, run twice with the block already there
    let code = b"\xb9\x02\x00\x00\x00\xc6\x05\x01\x00\x00\x00\xc8\xff\xc0\xff\xc9\xc6\x05\xf6\xff\xff\xff\xc0\x75\xec\xf4";
    both(code, |_| {});
}

#[test]
fn instructions_that_are_none_or_too_long_raise_their_exceptions() {
    // nop; then REX.W 15 times, or an opcode that does not exist
    for (code, vector) in [(&[&b"\x90"[..], &[0x48; 16]].concat()[..], 13), (b"\x90\x0f\x04\xf4", 6)] {
        let (_, actual) = both(code, |_| {});
        assert_eq!(actual.vcpu.cpu().rip, HANDLERS + 16 * vector + 1);
    }
}

#[test]
fn code_written_by_a_device_is_translated_anew() {
    let machine = Machine::long();
    machine.load(b"\xff\xc0\xf4");
    let mut actual = Translated::new(machine, &options());
    actual.run();
    actual.memory.write(CODE, b"\xff\xc8").expect("RAM");
    let cpu = actual.vcpu.cpu_mut();
    cpu.halted = false;
    cpu.rip = CODE;
    cpu.regs[reg::RAX] = 10;
    actual.run();
    assert_eq!(actual.vcpu.cpu().regs[reg::RAX], 9);
}

#[test]
fn data_in_a_page_with_code_is_fast_again_after_a_while() {
    // mov ecx, 1000; l: inc dword [rip + far]; dec ecx; jnz l; hlt
    let (_, actual) = both(b"\xb9\xe8\x03\x00\x00\xff\x05\x00\x04\x00\x00\xff\xc9\x75\xf6\xf4", |_| {});
    assert!(actual.vcpu.counters().blocks < 100);
}

#[test]
fn division_and_its_faults() {
    for (rdx, rax, rcx) in
        [(0u64, 100u64, 7u64), (0, 100, 0), (7, 0, 7), (u64::MAX, 1 << 63, u64::MAX), (1, 5, 9)]
    {
        for code in [b"\x48\xf7\xf1\xf4", b"\x48\xf7\xf9\xf4", b"\x90\xf7\xf1\xf4", b"\x90\xf7\xf9\xf4"] {
            let mut expected = Machine::long();
            let mut machine = Machine::long();
            for machine in [&mut expected, &mut machine] {
                machine.load(code);
                machine.cpu.regs[..3].copy_from_slice(&[rax, rcx, rdx]);
            }
            interpret(&mut expected, 10);
            let mut actual = Translated::new(machine, &options());
            actual.run();
            assert_eq!(expected.cpu.regs, actual.vcpu.cpu().regs);
            assert_eq!(expected.cpu.rip, actual.vcpu.cpu().rip);
        }
    }
}

#[test]
fn the_cache_fills_and_is_emptied() {
    // Many blocks: jumps over jumps, through more code than fits.
    let mut code = vec![];
    for _ in 0..120_000 {
        code.extend([0xeb, 0x00, 0xff, 0xc0]);
    }
    code.push(0xf4);
    let machine = Machine::long();
    machine.load(&code);
    let mut actual = Translated::new(machine, &Options { cache_bytes: 4 << 20, ..options() });
    loop {
        match actual.vcpu.run(&actual.platform) {
            Ok(Exit::Halt) => break,
            Ok(Exit::Requested) => {
                actual.vcpu.cpu().exit_request.store(0, std::sync::atomic::Ordering::Relaxed);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(actual.vcpu.cpu().regs[reg::RAX], 120_000);
    assert!(actual.translator.epoch.load(std::sync::atomic::Ordering::Relaxed) > 0);
}

#[test]
fn an_exit_request_ends_any_loop() {
    for code in [b"\xeb\xfe\x90\x90".as_slice(), b"\xff\xe0", b"\xe8\xfb\xff\xff\xff"] {
        let mut machine = Machine::long();
        machine.load(code);
        machine.cpu.regs[reg::RAX] = CODE;
        machine.cpu.regs[reg::RSP] = DATA + 0x80_0000;
        let mut actual = Translated::new(machine, &options());
        let request = &raw const actual.vcpu.cpu().exit_request as usize;
        let asker = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            // SAFETY: the vCPU outlives the thread, which is joined below.
            unsafe { &*(request as *const std::sync::atomic::AtomicU32) }
                .store(1, std::sync::atomic::Ordering::Release);
        });
        assert_eq!(actual.vcpu.run(&actual.platform), Ok(Exit::Requested));
        asker.join().expect("the thread ends");
    }
}

#[test]
fn an_instruction_across_two_pages() {
    // l: add eax, 0x01020304 across the boundary; dec ecx; jnz l; hlt
    let mut code = vec![0x90; 0x1000 - 2];
    code.extend(b"\x05\x04\x03\x02\x01\xff\xc9\x75\xf7\xf4");
    let (_, mut actual) = both(&code, |machine| machine.cpu.regs[reg::RCX] = 1000);
    assert!(actual.vcpu.counters().steps < 10, "{:?}", actual.vcpu.counters());
    // A change in the second page is seen.
    actual.memory.write(CODE + 0x1002, &[0]).expect("RAM");
    let cpu = actual.vcpu.cpu_mut();
    cpu.halted = false;
    cpu.rip = CODE + 0xffe;
    cpu.regs[reg::RAX] = 0;
    cpu.regs[reg::RCX] = 1;
    actual.run();
    assert_eq!(actual.vcpu.cpu().regs[reg::RAX], 0x0002_0304);
}

#[test]
fn strings_are_copied_and_filled() {
    for (code, rcx) in [
        (b"\xf3\xa4\xf4".as_slice(), 100u64),
        (b"\xf3\xa4\xf4", 0),
        (b"\xf3\x48\xa5\xf4", 500),
        (b"\xf3\x48\xa5\xf4", 5000),
        (b"\xf3\xaa\xf4", 100),
        (b"\xf3\x48\xab\xf4", 512),
        (b"\xf3\x66\xab\xf4", 512),
        (b"\xfd\xf3\xa4\xf4", 64),
        (b"\xa4\x48\xa5\xaa\xab\xf4", 7),
    ] {
        for offset in [0, 1, 0x800, 0xfff] {
            let set_up = |machine: &mut Machine| {
                machine.cpu.regs[reg::RCX] = rcx;
                machine.cpu.regs[reg::RAX] = 0x1122_3344_5566_7788;
                machine.cpu.regs[reg::RSI] = DATA + offset;
                machine.cpu.regs[reg::RDI] = DATA + 0x1_0000 + offset / 2;
                let data: Vec<u8> = (0..0x1_0000u32).map(|at| ((at * 7) >> 3) as u8).collect();
                machine.memory.write(DATA, &data).expect("RAM");
            };
            let (expected, actual) = both(code, set_up);
            let (mut a, mut b) = (vec![0; 0x2_0000], vec![0; 0x2_0000]);
            expected.memory.read(DATA, &mut a).expect("RAM");
            actual.memory.read(DATA, &mut b).expect("RAM");
            assert!(a == b, "{code:x?} {offset:#x}");
        }
    }
}

#[test]
fn system_instructions() {
    // xor eax, eax; cli; pushfq; pop rbx; stc; sti; pushfq; pop rcx; push 0xd5; popfq; setc al; pushfq; pop rdx; hlt
    let code = b"\x31\xc0\xfa\x9c\x5b\xf9\xfb\x9c\x59\x68\xd5\x00\x00\x00\x9d\x0f\x92\xc0\x9c\x5a\xf4";
    let (_, actual) = both(code, |_| {});
    assert!(actual.vcpu.counters().interpreted.len() <= 1, "{:?}", actual.vcpu.counters());
    // IRET to the next instruction, as kernels do to serialize: mov eax, ss; push rax; push rsp;
    // add qword [rsp], 8; pushfq; mov eax, cs; push rax; lea rbx, [rip + 3]; push rbx; iretq; inc ecx; hlt
    let code = b"\x8c\xd0\x50\x54\x48\x83\x04\x24\x08\x9c\x8c\xc8\x50\x48\x8d\x1d\x03\x00\x00\x00\x53\x48\xcf\xff\xc1\xf4";
    let (_, actual) = both(code, |_| {});
    assert!(actual.vcpu.counters().interpreted.len() <= 1, "{:?}", actual.vcpu.counters());
    // swapgs; mov rax, gs:[0]; swapgs; mov rbx, gs:[0]; hlt
    let code = b"\x0f\x01\xf8\x65\x48\x8b\x04\x25\x00\x00\x00\x00\x0f\x01\xf8\x65\x48\x8b\x1c\x25\x00\x00\x00\x00\xf4";
    both(code, |machine| {
        machine.cpu.segments[5].base = DATA;
        machine.cpu.msrs.kernel_gs_base = DATA + 8;
        machine.poke(DATA, 1);
        machine.poke(DATA + 8, 2);
    });
}

#[test]
fn bit_strings() {
    for (rax, code) in [
        (0x1_0000_0007u64, b"\x0f\xa3\x07\x0f\x92\xc1\xf4".as_slice()),
        (0xffff_ffff_ffff_ffc1, b"\x48\x0f\xab\x07\x0f\x92\xc1\xf4"),
        (12345, b"\xf0\x48\x0f\xb3\x07\x0f\x92\xc1\xf4"),
        (0x8000_0003, b"\x0f\xbb\x07\x0f\x92\xc1\xf4"),
    ] {
        let (expected, actual) = both(code, |machine| {
            machine.cpu.regs[reg::RAX] = if rax == 0x8000_0003 { 0xffff_8003 } else { rax };
            machine.cpu.regs[reg::RDI] = DATA + 0x2000;
            machine.memory.write(DATA, &[0xa5; 0x4000]).expect("RAM");
        });
        let (mut a, mut b) = (vec![0; 0x4000], vec![0; 0x4000]);
        expected.memory.read(DATA, &mut a).expect("RAM");
        actual.memory.read(DATA, &mut b).expect("RAM");
        assert!(a == b, "{code:x?}");
    }
}

#[test]
fn user_code_in_two_pages_is_linked() {
    // At the end of one page: l: dec ecx; jmp next (in the next page); there: jnz back; ud2
    let mut code = vec![0x90; 0x1000 - 7];
    code.extend([0xff, 0xc9, 0xe9, 0x00, 0x00, 0x00, 0x00]);
    code.extend([0x75, 0xf7, 0x0f, 0x0b]);
    let prepare = |at: u64| {
        let mut machine = Machine::user();
        machine.cpu.rip = at;
        machine.load(&code);
        machine.cpu.rip = CODE;
        machine.load(&code);
        machine.cpu.regs[reg::RCX] = 10_000;
        machine
    };
    let mut actual = Translated::new(prepare(CODE + 0x10_0000), &options());
    actual.run();
    assert_eq!(actual.vcpu.cpu().regs[reg::RCX], 0);
    assert!(actual.vcpu.counters().entries < 100, "{:?}", actual.vcpu.counters());
    // The fault's frame says where it was: in the second page.
    let frame = actual.vcpu.cpu().regs[reg::RSP];
    let rip = |actual: &Translated, frame: u64| {
        let mut bytes = [0; 8];
        actual.memory.read(frame, &mut bytes).expect("RAM");
        u64::from_le_bytes(bytes)
    };
    assert_eq!(rip(&actual, frame), CODE + 0x1002);
    // The second page's code changes, and the jump leads to what is there now: nop; nop; ud2
    actual.memory.write(CODE + 0x1000, &[0x90, 0x90]).expect("RAM");
    let user = prepare(CODE + 0x10_0000).cpu;
    let cpu = actual.vcpu.cpu_mut();
    cpu.halted = false;
    cpu.regs = user.regs;
    cpu.rip = CODE;
    cpu.cpl = 3;
    cpu.segments = user.segments;
    actual.run();
    assert_eq!(actual.vcpu.cpu().regs[reg::RCX], 9_999);
    assert_eq!(rip(&actual, actual.vcpu.cpu().regs[reg::RSP]), CODE + 0x1002);
}

#[test]
fn checks_that_are_shared_survive_the_interpreter() {
    // What reads the device is left to the interpreter, in the midst of accesses that share checks.
    // mov ebx, 0x40ffffc5, which is no memory; then
    let programs: [&[u8]; 4] = [
        // push [rbx]; push rsp; hlt
        b"\xff\x33\xff\xf4\xf4",
        // push rax; push [rbx]; push rcx; push rdx; hlt
        b"\x50\xff\x33\x51\x52\xf4",
        // push [rbx]; push rax; push [rbx]; push rcx; mov [rsp + 8], rdx; hlt
        b"\xff\x33\x50\xff\x33\x51\x48\x89\x54\x24\x08\xf4",
        // mov ebx, DATA + 0xffd, which crosses pages; push rax; push [rbx]; push rcx; hlt
        b"\xbb\xfd\x0f\x40\x00\x50\xff\x33\x51\xf4",
    ];
    for program in programs {
        let code = [b"\xbb\xc5\xff\xff\x40", program].concat();
        let (expected, actual) = both(&code, |machine| {
            for (register, value) in machine.cpu.regs.iter_mut().zip(1..).take(3) {
                *register = value * 0x1111_2222_3333;
            }
        });
        let mut words = [[0; 64]; 2];
        let at = x86_core::testing::STACK - 64;
        expected.memory.read(at, &mut words[0]).expect("RAM");
        actual.memory.read(at, &mut words[1]).expect("RAM");
        assert_eq!(words[0], words[1], "{program:x?}");
    }
}

#[test]
fn checks_at_the_ends_of_displacements_are_of_what_is_accessed() {
    // A displacement that wraps around leads 4 GiB away: what is mapped there is the same memory.
    let far = |code: &[u8], base: u64| {
        let (expected, actual) = both(code, |machine| {
            machine.poke(PAGE_TABLES + 0x1000 + 4 * 8, machine.peek(PAGE_TABLES + 0x1000));
            machine.cpu.regs[reg::RBX] = base;
            machine.cpu.regs[reg::RDX] = 1 << 32 | (DATA + 0x10c0);
        });
        let mut bytes = [[0; 0x1000]; 2];
        expected.memory.read(DATA + 0x1000, &mut bytes[0]).expect("RAM");
        actual.memory.read(DATA + 0x1000, &mut bytes[1]).expect("RAM");
        assert!(bytes[0] == bytes[1], "{code:x?}");
        assert!(bytes[0].iter().any(|byte| *byte != 0), "the program stored something");
    };
    // mov [rdx], rdx; mov [rbx - 0x80000000], rbx; sub rbx, 0x40; mov [rbx - 0x80000000], rdx; hlt
    let code = b"\x48\x89\x12\x48\x89\x9b\x00\x00\x00\x80\x48\x83\xeb\x40\x48\x89\x93\x00\x00\x00\x80\xf4";
    far(code, (1 << 31) + DATA + 0x1100);
    // mov [rdx], rdx; mov [rbx + 0x7ffffffc], rbx; add rbx, 0x40; mov [rbx + 0x7ffffffc], rdx; hlt
    let code = b"\x48\x89\x12\x48\x89\x9b\xfc\xff\xff\x7f\x48\x83\xc3\x40\x48\x89\x93\xfc\xff\xff\x7f\xf4";
    far(code, (DATA + 0x1100).wrapping_sub(0x7fff_fffc));
}

#[test]
fn x87_and_mmx_run_on_the_host() {
    // fld1; fldpi; l: fadd st, st1; fsqrt; fst qword [rdi]; fldcw [rdi+16]; dec ecx; jnz l;
    // fistp dword [rdi+8]; fnstsw ax; emms; movd mm3, ecx; paddd mm3, mm0; emms; hlt
    let code = b"\xd9\xe8\xd9\xeb\xd8\xc1\xd9\xfa\xdd\x17\xd9\x6f\x10\xff\xc9\x75\xf3\
        \xdb\x5f\x08\xdf\xe0\x0f\x77\x0f\x6e\xd9\x0f\xfe\xd8\x0f\x77\xf4";
    let (expected, actual) = both(code, |machine| {
        machine.cpu.regs[reg::RCX] = 10_000;
        machine.cpu.regs[reg::RDI] = DATA;
        machine.poke(DATA + 16, 0xc7f);
    });
    let (mut a, mut b) = ([0; 32], [0; 32]);
    expected.memory.read(DATA, &mut a).expect("RAM");
    actual.memory.read(DATA, &mut b).expect("RAM");
    assert_eq!(a, b);
    let counters = actual.vcpu.counters();
    assert!(counters.interpreted.len() <= 1 && counters.slow_accesses == 0, "{counters:?}");
}

#[test]
fn x87_exceptions_are_taken_at_the_next_instruction() {
    // mov word [rdi], 0x37e; fldcw [rdi]; fldz; fldz; fdivp; (nop or inc eax); and then one that waits or not
    for (last, taken) in [
        (b"\x9b".as_slice(), true),
        (b"\xd9\xe8", true),
        (b"\x0f\x6e\xd9", true),
        (b"\xdf\xe0\xdb\xe2\xd9\xe8", false),
        (b"\xdb\xe3\x9b", false),
    ] {
        let mut code = b"\xd9\xe8\x66\xc7\x07\x7e\x03\xd9\x2f\xd9\xee\xd9\xee\xde\xf9\xff\xc0".to_vec();
        code.extend(last);
        code.push(0xf4);
        let (expected, _) = both(&code, |machine| machine.cpu.regs[reg::RDI] = DATA);
        assert_eq!(expected.cpu.rip < CODE, taken, "{last:x?}");
    }
}

#[test]
fn x87_instructions_fault_while_the_unit_is_off() {
    for bit in [2, 4, 8, 10] {
        // fld1; mov rax, cr0; or al, bit; mov cr0, rax; then one of several; hlt
        for last in [b"\xd9\xe8".as_slice(), b"\x9b", b"\x0f\x6e\xd9", b"\x0f\x77", b"\xd9\x3f", b"\xdb\xe3"]
        {
            let mut code = b"\xd9\xe8\x0f\x20\xc0\x0c".to_vec();
            code.push(bit);
            code.extend(b"\x0f\x22\xc0");
            code.extend(last);
            code.push(0xf4);
            both(&code, |machine| machine.cpu.regs[reg::RDI] = DATA);
        }
    }
}

#[test]
fn x87_state_is_saved_and_restored() {
    // fldpi; fld qword [rdi]; fxsave [rdi+64]; fninit; fld1; fnstenv [rdi+1024]; fxrstor [rdi+64]; fadd st, st1;
    // fnsave [rdi+2048]; frstor [rdi+2048]; fst qword [rdi+8]; hlt
    let code = b"\xd9\xeb\xdd\x07\x0f\xae\x47\x40\xdb\xe3\xd9\xe8\xd9\xb7\x00\x04\x00\x00\x0f\xae\x4f\x40\
        \xd8\xc1\xdd\xb7\x00\x08\x00\x00\xdd\xa7\x00\x08\x00\x00\xdd\x57\x08\xf4";
    let (expected, actual) = both(code, |machine| {
        machine.cpu.regs[reg::RDI] = DATA;
        machine.poke(DATA, 1.5f64.to_bits());
    });
    let (mut a, mut b) = (vec![0; 4096], vec![0; 4096]);
    expected.memory.read(DATA, &mut a).expect("RAM");
    actual.memory.read(DATA, &mut b).expect("RAM");
    assert_eq!(a, b);
}

#[test]
fn breakpoints_and_single_steps_are_noticed_at_once() {
    // lea rax, [rip + 11]; mov dr0, rax; mov eax, 1; mov dr7, rax; inc ecx; hlt
    let code = b"\x48\x8d\x05\x0b\x00\x00\x00\x0f\x23\xc0\xb8\x01\x00\x00\x00\x0f\x23\xf8\xff\xc1\xf4";
    let (expected, _) = both(code, |_| {});
    assert!(expected.cpu.rip < CODE && expected.cpu.regs[reg::RCX] == 0);
    // pushfq; or qword [rsp], 0x100; popfq; inc ecx; inc eax; hlt
    let (expected, _) = both(b"\x9c\x48\x81\x0c\x24\x00\x01\x00\x00\x9d\xff\xc1\xff\xc0\xf4", |_| {});
    assert!(expected.cpu.rip < CODE && expected.cpu.regs[reg::RAX] == 0);
}

#[test]
fn returns_that_are_no_returns() {
    // push rax; lea rbx, [rip + 9]; push rbx; ret; hlt; nop x6; there: pop rcx; hlt
    let code = b"\x50\x48\x8d\x1d\x09\x00\x00\x00\x53\xc3\xf4\x90\x90\x90\x90\x90\x90\x59\xf4";
    both(code, |machine| machine.cpu.regs[reg::RAX] = 77);
    // A call whose return address is changed: l: call f; inc eax; hlt; f: dec ecx; jz out; pop rbx; jmp l;
    // out: add qword [rsp], 2; ret
    let code = b"\xe8\x03\x00\x00\x00\xff\xc0\xf4\xff\xc9\x74\x03\x5b\xeb\xf1\x48\x83\x04\x24\x02\xc3";
    let (expected, _) = both(code, |machine| machine.cpu.regs[reg::RCX] = 100_000);
    assert_eq!(expected.cpu.regs[reg::RAX], 0);
    // The same without the change.
    let code = b"\xe8\x03\x00\x00\x00\xff\xc0\xf4\xff\xc9\x74\x03\x5b\xeb\xf1\x90\x90\x90\x90\x90\xc3";
    let (_, actual) = both(code, |machine| machine.cpu.regs[reg::RCX] = 100_000);
    assert!(actual.vcpu.counters().entries < 40, "{:?}", actual.vcpu.counters());
}

#[test]
fn recursion_deeper_than_the_frames() {
    // call f; hlt; f: dec ecx; jz out; call f; inc eax; out: ret; and the same through a register
    for code in [
        b"\xe8\x01\x00\x00\x00\xf4\xff\xc9\x74\x07\xe8\xf7\xff\xff\xff\xff\xc0\xc3".as_slice(),
        b"\x48\x8d\x1d\x03\x00\x00\x00\xff\xd3\xf4\xff\xc9\x74\x04\xff\xd3\xff\xc0\xc3",
    ] {
        let (_, actual) = both(code, |machine| {
            machine.cpu.regs[reg::RCX] = 20_000;
            machine.cpu.regs[reg::RSP] = DATA + 0x8_0000;
        });
        assert_eq!(actual.vcpu.cpu().regs[reg::RAX], 19_999);
        assert!(actual.vcpu.counters().entries < 80, "{:?}", actual.vcpu.counters());
    }
}

#[test]
fn a_call_whose_caller_changes_returns_to_the_new_code() {
    // mov ecx, 3; l: call f; inc eax; dec ecx; jnz l; hlt; f: cmp ecx, 2; jne skip;
    // mov byte [rip + to the modrm of inc eax], 0xc8; skip: ret
    let code = b"\xb9\x03\x00\x00\x00\xe8\x07\x00\x00\x00\xff\xc0\xff\xc9\x75\xf5\xf4\
        \x83\xf9\x02\x75\x07\xc6\x05\xee\xff\xff\xff\xc8\xc3";
    let (_, actual) = both(code, |_| {});
    assert_eq!(actual.vcpu.cpu().regs[reg::RAX] as u32, u32::MAX);
}

#[test]
fn misaligned_accesses_match_no_entry() {
    // movaps xmm0, [rax]; hlt and movaps [rax], xmm0; hlt, just above page 0, which is in no table yet, and in
    // one that holds a page without the right to write
    for code in [b"\x0f\x28\x00\xf4", b"\x0f\x29\x00\xf4"] {
        for misaligned in 1..16 {
            let (_, actual) = both(code, |machine| machine.cpu.regs[reg::RAX] = misaligned);
            assert_eq!(actual.vcpu.cpu().rip, HANDLERS + 16 * 13 + 1);
        }
    }
    // mov rcx, [rbx], which is read only; movaps [rax], xmm0; hlt
    let (_, actual) = both(b"\x48\x8b\x0b\x0f\x29\x00\xf4", |machine| {
        let page = 0x60_0000;
        machine.poke(PAGE_TABLES + 0x2000 + (page >> 21) * 8, page | 0xe5);
        machine.cpu.regs[reg::RAX] = 1;
        machine.cpu.regs[reg::RBX] = page;
    });
    assert_eq!(actual.vcpu.cpu().rip, HANDLERS + 16 * 13 + 1);
}

#[test]
fn misaligned_long_vectors_match_no_entry() {
    // vmovaps [rax], ymm0 and vmovaps [rax], zmm0
    let stores: [(bool, u64, &[u8]); 2] = [
        (is_x86_feature_detected!("avx"), 32, b"\xc5\xfc\x29\x00"),
        (host_has_avx512(), 64, b"\x62\xf1\x7c\x48\x29\x00"),
    ];
    for (_, size, store) in stores.into_iter().filter(|(there, ..)| *there) {
        // mov [rbx], rcx, which has page 0 in the TLB; mov rdx, cr3; mov cr3, rdx, so that it is there no more; the
        // store; hlt
        let code = [b"\x48\x89\x0b\x0f\x20\xda\x0f\x22\xda", store, b"\xf4"].concat();
        for misaligned in 1..size {
            let (_, actual) = both(&code, |machine| {
                machine.cpu.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
                machine.cpu.model = wide_model();
                machine.cpu.xcr0 = machine.cpu.model.xcr0_mask();
                machine.cpu.regs[reg::RBX] = 8;
                machine.cpu.regs[reg::RAX] = misaligned;
            });
            assert_eq!(actual.vcpu.cpu().rip, HANDLERS + 16 * 13 + 1, "{size} bytes at {misaligned:#x}");
        }
    }
}

#[test]
fn flags_are_exact_where_a_debugger_stops() {
    // add al, al; mov [rbx], ecx; xor edx, edx; jmp l; nop; l: xor edx, edx; hlt
    let code = b"\x00\xc0\x89\x0b\x31\xd2\xeb\x01\x90\x31\xd2\xf4";
    // Before an instruction that sets all flags, in what was one block; and that a jump leads to.
    for (at, instructions) in [(4, 2), (9, 4)] {
        for early in [false, true] {
            let prepare = || {
                let mut machine = Machine::long();
                machine.load(code);
                machine.cpu.regs[reg::RAX] = 0xc0;
                machine.cpu.regs[reg::RBX] = DATA;
                machine
            };
            let mut expected = prepare();
            for _ in 0..instructions {
                x86_interp::step(&mut expected.core()).expect("no fault");
            }
            let mut actual = Translated::new(prepare(), &options());
            if !early {
                actual.run();
                let (cpu, start) = (actual.vcpu.cpu_mut(), prepare().cpu);
                (cpu.regs, cpu.rip, cpu.rflags, cpu.halted) = (start.regs, start.rip, start.rflags, false);
            }
            actual.set_breakpoints(&[CODE + at]);
            let exit = actual.vcpu.run(&actual.platform);
            assert_eq!((exit, actual.vcpu.cpu().rip), (Ok(Exit::Breakpoint), CODE + at));
            assert_eq!(actual.vcpu.cpu().rflags, expected.cpu.rflags, "at {at}, {early}");
            actual.set_breakpoints(&[]);
            actual.run();
        }
    }
}

#[test]
fn full_turns_through_carry_write_flags() {
    // stc or clc; rcl byte [rbx], 9; seto al; rcr word [rbx], 17; seto cl; hlt, with OF set before or not
    for (start, overflow) in [(0xf8, 0), (0xf9, 0), (0xf8, 0x7f), (0xf9, 0x7f)] {
        for value in [0, 0x8001, 0x7f80, 0xffff] {
            let code = [
                &[0x04, 1, start, 0xc0, 0x13, 9, 0x0f, 0x90, 0xc0][..],
                &[0x66, 0xc1, 0x1b, 17, 0x0f, 0x90, 0xc1, 0xf4],
            ];
            for strict in [false, true] {
                let options = Options { strict, ..options() };
                both_with(&code.concat(), &options, |machine| {
                    machine.cpu.regs[reg::RAX] = overflow;
                    machine.cpu.regs[reg::RBX] = DATA;
                    machine.poke(DATA, value);
                });
            }
        }
    }
}

/// Code at CPL 3, and what SYSCALL leads to.
fn system_calls(user: &[u8], kernel: &[u8], set_up: impl Fn(&mut Machine)) -> (Machine, Translated) {
    let prepare = || {
        let mut machine = Machine::user();
        machine.load(user);
        machine.memory.write(CODE + 0x800, kernel).expect("RAM");
        machine.cpu.mxcsr = 0x1f80;
        machine.cpu.regs[reg::RBP] = 1000;
        machine.cpu.msrs.lstar = CODE + 0x800;
        machine.cpu.msrs.star = 0x0023_0010 << 32;
        machine.cpu.msrs.sfmask = flags::AC | flags::IF | flags::DF | flags::ARITHMETIC;
        set_up(&mut machine);
        machine
    };
    let mut expected = prepare();
    interpret(&mut expected, 1_000_000);
    let mut actual = Translated::new(prepare(), &options());
    actual.run();
    let (want, got) = (&expected.cpu, actual.vcpu.cpu());
    let differences = State::of(want).differences(&State::of(got), flags::AF);
    assert!(differences.is_empty(), "{differences:?}");
    assert_eq!((want.segments, want.cpl), (got.segments, got.cpl));
    assert_eq!(
        (want.data_bank, want.fast_bank, want.align_check),
        (got.data_bank, got.fast_bank, got.align_check)
    );
    (expected, actual)
}

#[test]
fn system_calls_stay_in_translated_code() {
    // l: call f; dec ebp; jnz l; ud2; f: stc; syscall; adc eax, 1; ret
    let user = b"\xe8\x06\x00\x00\x00\xff\xcd\x75\xf7\x0f\x0b\xf9\x0f\x05\x83\xd0\x01\xc3";
    // call g; add rbx, r11; inc edx; sysretq; g: mov rsi, rcx; ret
    let kernel = b"\xe8\x08\x00\x00\x00\x4c\x01\xdb\xff\xc2\x48\x0f\x07\x48\x89\xce\xc3";
    let (_, actual) = system_calls(user, kernel, |machine| machine.cpu.rflags |= flags::IF | flags::ID);
    let counters = actual.vcpu.counters();
    // The first SYSCALL comes to a mode that has no targets yet.
    assert!(counters.interpreted.values().sum::<u64>() <= 3 && counters.entries < 40, "{counters:?}");
    // The kernel's call and return in the user's place: its return address is where the user's frame leads.
    // l: call f; ud2; f: syscall; ret; and the kernel: pop rbx; push rbx; ret
    let user = b"\xe8\x02\x00\x00\x00\x0f\x0b\x0f\x05\xc3";
    let (expected, _) = system_calls(user, b"\x5b\x53\xc3", |_| {});
    assert_eq!(expected.cpu.regs[reg::RBX], CODE + 5);
}

#[test]
fn unusual_system_calls() {
    let user = b"\x0f\x05\xff\xcd\x75\xfa\x0f\x0b";
    // SCE is clear
    system_calls(user, b"\xf4", |machine| machine.cpu.msrs.efer &= !x86_core::efer::SCE);
    // AC stays set
    system_calls(user, b"\xff\xc2\x48\x0f\x07", |machine| {
        machine.cpu.msrs.sfmask = 0;
        machine.cpu.rflags |= flags::AC;
    });
    // or r11d, bit; sysretq
    for bit in [flags::AC, flags::TF, flags::NT, flags::RF, flags::OF | flags::CF, flags::IOPL] {
        let mut kernel = b"\x41\x81\xcb".to_vec();
        kernel.extend((bit as u32).to_le_bytes());
        kernel.extend(b"\x48\x0f\x07");
        system_calls(user, &kernel, |_| {});
    }
    // mov ecx, 0x1000 (where nothing is); sysretq
    system_calls(user, b"\xb9\x00\x10\x00\x00\x48\x0f\x07", |_| {});
}

#[test]
fn strings_are_loaded_and_scanned() {
    // l: lodsb; lodsw; lodsd; mov rbx, rax; lodsq; scasb; setz cl; scasw; adc ecx, 1; scasd; scasq; lahf; std; lodsb; scasb; hlt
    let code = b"\xac\x66\xad\xad\x48\x89\xc3\x48\xad\xae\x0f\x94\xc1\x66\xaf\x83\xd1\x01\xaf\x48\xaf\x9f\xfd\xac\xae\xf4";
    for offset in [0, 0xff8, 0xffd] {
        let (_, actual) = both(code, |machine| {
            machine.cpu.regs[reg::RSI] = DATA + offset;
            machine.cpu.regs[reg::RDI] = DATA + 0x4000 + offset;
            let data: Vec<u8> = (0..0x8000u32).map(|at| ((at * 7) >> 3) as u8).collect();
            machine.memory.write(DATA, &data).expect("RAM");
        });
        let interpreted = &actual.vcpu.counters().interpreted;
        assert!(interpreted.values().sum::<u64>() <= 3, "{interpreted:?}");
    }
}

#[test]
fn the_time_stamp_counter_is_read_in_translated_code() {
    // rdtsc; mov esi, eax; mov edi, edx; rdtscp; hlt
    let code = b"\x0f\x31\x89\xc6\x89\xd7\x0f\x01\xf9\xf4";
    for direct in [true, false] {
        let mut machine = Machine::long();
        machine.load(code);
        machine.cpu.msrs.tsc_offset = 1 << 62;
        machine.cpu.msrs.tsc_aux = 7;
        machine.platform.host_tsc_offset = direct.then_some(1 << 61);
        let mut actual = Translated::new(machine, &options());
        actual.run();
        let regs = &actual.vcpu.cpu().regs;
        let first = regs[reg::RDI] << 32 | regs[reg::RSI];
        let second = regs[reg::RDX] << 32 | regs[reg::RAX];
        assert!(regs[reg::RDX] >> 32 == 0 && regs[reg::RAX] >> 32 == 0 && regs[reg::RCX] == 7);
        assert!(second > first);
        assert_eq!(first >> 61, if direct { 3 } else { 2 });
        assert_eq!(actual.vcpu.counters().interpreted.len(), if direct { 1 } else { 3 });
    }
    // In user code TSD forbids it.
    let mut machine = Machine::user();
    machine.load(code);
    machine.cpu.cr4 |= cr4::TSD;
    machine.platform.host_tsc_offset = Some(0);
    let mut actual = Translated::new(machine, &options());
    actual.run();
    assert!(actual.vcpu.cpu().rip < CODE);
}
