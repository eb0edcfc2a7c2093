//! Programs that try to get at what is not theirs, or at the host.

use super::generate::Random;
use super::{Translated, options};
use x86_core::testing::{CODE, DATA, MMIO, Machine, PAGE_TABLES, RAM};
use x86_core::{cr4, flags, reg};

#[test]
fn other_code_at_the_same_address_does_not_use_old_checks() {
    let mut machine = Machine::long();
    let code = CODE + 0x100;
    let elsewhere = CODE + 128 * 4096 + 0x20;
    let write = |machine: &Machine, at: u64, bytes: &[u8]| machine.memory.write(at, bytes).expect("RAM");
    // mov rax, [rbx]; mov [rdi], rsi (which maps the code's page anew); mov rcx, [rdx]; mov [rbx + 8], rcx; jmp rbp
    write(&machine, code, b"\x48\x8b\x03\x48\x89\x37\x48\x8b\x0a\x48\x89\x4b\x08\xff\xe5");
    // mov rdx, r9; mov rsi, r10; mov rbp, r11; mov rax, [r12] (both evict what is cached); jmp r13
    write(&machine, elsewhere, b"\x4c\x89\xca\x4c\x89\xd6\x4c\x89\xdd\x49\x8b\x04\x24\x41\xff\xe5");
    write(&machine, CODE + 0x200, b"\xf4");
    // In the page that is mapped then: add rbx, r8 in place of mov rcx, [rdx].
    write(&machine, 0x60_0106, b"\x4c\x01\xc3\x48\x89\x4b\x08\xff\xe5");
    write(&machine, 0x60_0200, b"\xf4");
    write(&machine, DATA + 0x2000, &[0x42; 8]);
    let mut outside = vec![0u64; 512];
    let host_data = machine.memory.host_page(DATA).expect("RAM").ptr as u64;
    let cpu = &mut *machine.cpu;
    cpu.rip = code;
    cpu.regs[reg::RBX] = DATA;
    cpu.regs[reg::RDI] = PAGE_TABLES + 0x2008;
    cpu.regs[reg::RSI] = 0x20_00e7;
    cpu.regs[reg::RDX] = DATA + 0x2000;
    cpu.regs[reg::RBP] = elsewhere;
    cpu.regs[reg::RCX] = 0x4141_4141_4141_4141;
    // From the guest's memory to what is not the guest's.
    cpu.regs[8] = (outside.as_mut_ptr() as u64).wrapping_sub(host_data).wrapping_sub(8);
    cpu.regs[9] = DATA + 0x2ffc;
    cpu.regs[10] = 0x60_00e7;
    cpu.regs[11] = CODE + 0x200;
    cpu.regs[12] = 0x820_0000;
    cpu.regs[13] = code;
    let mut actual = Translated::new(machine, &options());
    // Whatever becomes of the guest.
    let _ = actual.vcpu.run(&actual.platform);
    assert!(
        std::hint::black_box(&outside).iter().all(|word| *word == 0),
        "the guest wrote the host's memory"
    );
}

#[test]
fn long_chains_of_ungrouped_blocks_take_no_stack() {
    // mov eax, [rbx]; mov ecx, [rbx + 4]; jmp to the next: 20,000 times
    let mut code = b"\x8b\x03\x8b\x4b\x04\xeb\x00".repeat(20_000);
    // mov rbx, r8; xchg r12, r13; jmp r12; hlt
    code.extend(b"\x4c\x89\xc3\x4d\x87\xec\x41\xff\xe4");
    let end = CODE + code.len() as u64;
    code.push(0xf4);
    let mut machine = Machine::long();
    machine.load(&code);
    // First a device's registers, so that there are ungrouped blocks; then across pages, so that each is left for
    // the next.
    machine.cpu.regs[reg::RBX] = MMIO;
    machine.cpu.regs[8] = DATA + 0x40_fffd;
    machine.cpu.regs[12] = end;
    machine.cpu.regs[13] = CODE;
    let mut options = options();
    options.cache_bytes = 64 << 20;
    let mut actual = Translated::new(machine, &options);
    actual.run();
    assert_eq!(actual.vcpu.cpu().rip, end + 1);
}

#[test]
fn user_memory_is_closed_when_popf_closes_it() {
    let mut machine = Machine::long();
    // mov rax, [rbx]; popf, which clears AC; mov rcx, [rbx + 8]; hlt
    machine.load(b"\x48\x8b\x03\x9d\x48\x8b\x4b\x08\xf4");
    machine.cpu.cr4 |= cr4::SMAP;
    machine.cpu.rflags |= flags::AC;
    machine.cpu.regs[reg::RBX] = DATA;
    machine.poke(machine.cpu.regs[reg::RSP], flags::FIXED);
    machine.core().mode_changed();
    let mut actual = Translated::new(machine, &options());
    // The exception cannot be delivered, as the IDT's page is the user's, too.
    assert!(actual.vcpu.run(&actual.platform).is_err());
    assert_eq!(actual.vcpu.cpu().rip, CODE + 4, "the second load faults");
}

#[test]
fn the_longest_jump_backward() {
    let mut machine = Machine::user();
    machine.load(b"\xe9\x00\x00\x00\x80");
    machine.core().mode_changed();
    let mut actual = Translated::new(machine, &options());
    let _ = actual.vcpu.run(&actual.platform);
    assert_eq!(actual.vcpu.cpu().cr2, (CODE + 5).wrapping_sub(1 << 31));
}

#[test]
fn no_more_is_read_than_an_instruction_needs() {
    // movsxd cx, [rax]; hlt, at the end of memory
    let mut machine = Machine::long();
    machine.load(b"\x66\x63\x08\xf4");
    machine.cpu.regs[reg::RAX] = RAM - 2;
    let mut actual = Translated::new(machine, &options());
    actual.run();
    assert_eq!(actual.vcpu.cpu().rip, CODE + 4);
}

/// Stores and loads of 32-bit code with sums that wrap at 4 GiB now and then, all of them of a few registers that
/// are moved about: what shares a check is what they were made for.
#[test]
fn sums_that_wrap_stay_in_memory() {
    let mut random = Random::new(7);
    for round in 0..150 {
        let start = random.next() as u32;
        let (mut code, mut ebx, mut esi) = (vec![], 0u32, start);
        code.push(0xbb);
        code.extend(ebx.to_le_bytes());
        for _ in 0..24 {
            let target = DATA as u32 + 0xff0 + random.below(0x20) as u32;
            match random.below(8) {
                // add ebx, by; lea esi, [ebx + by]; mov ebx, esi; inc ebx
                0 => {
                    let by = [0x7fff_ffff, 0x8000_0000, random.next() as u32][random.below(3) as usize];
                    code.extend([0x81, 0xc3]);
                    code.extend(by.to_le_bytes());
                    ebx = ebx.wrapping_add(by);
                }
                1 => {
                    let by = random.next() as u32;
                    code.extend([0x8d, 0xb3]);
                    code.extend(by.to_le_bytes());
                    esi = ebx.wrapping_add(by);
                }
                2 => {
                    code.extend([0x89, 0xf3]);
                    ebx = esi;
                }
                3 => {
                    code.push(0x43);
                    ebx = ebx.wrapping_add(1);
                }
                // mov [ebx + distance], eax; mov eax, [ebx + distance]; mov byte [esi + distance], cl
                kind => {
                    let from = if kind == 7 { esi } else { ebx };
                    code.extend([
                        [0x89, 0x8b, 0x89, 0x88][kind as usize - 4],
                        if kind == 7 { 0x8e } else { 0x83 },
                    ]);
                    code.extend(target.wrapping_sub(from).to_le_bytes());
                }
            }
        }
        code.push(0xf4);
        let set = |machine: &mut Machine| {
            machine.load(&code);
            machine.cpu.regs[reg::RSI] = start.into();
            machine.cpu.regs[reg::RAX] = 0x1234_5678;
        };
        let mut expected = Machine::protected();
        set(&mut expected);
        super::interpret(&mut expected, 100);
        let mut machine = Machine::protected();
        set(&mut machine);
        let mut actual = Translated::new(machine, &options());
        actual.run();
        assert_eq!(actual.vcpu.cpu().regs, expected.cpu.regs, "round {round}");
        let (mut want, mut got) = (vec![0; RAM as usize], vec![0; RAM as usize]);
        expected.memory.read(0, &mut want).expect("RAM");
        actual.memory.read(0, &mut got).expect("RAM");
        assert!(want == got, "round {round}");
        assert_eq!(*expected.platform.log.borrow(), *actual.platform.log.borrow(), "round {round}");
    }
}

#[test]
fn aligned_vectors_of_32_bit_code_are_aligned_to_their_size() {
    if !is_x86_feature_detected!("avx") {
        return;
    }
    // vmovaps ymm0, [ebx]; vmovaps [ebx], ymm0; hlt, where EBX is a multiple of 16 only: in a page, and at its end
    for (at, faults) in [(DATA, false), (DATA + 0x10, true), (DATA + 0xff0, true), (DATA + 0xfe0, false)] {
        for warm in [false, true] {
            let mut machine = Machine::protected();
            // mov eax, [ebx], which has the page in the TLB
            let before: &[u8] = if warm { b"\x8b\x03\x89\x03" } else { b"" };
            machine.load(&[before, b"\xc5\xfc\x28\x03\xc5\xfc\x29\x03\xf4"].concat());
            machine.cpu.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
            machine.cpu.xcr0 = 7;
            machine.cpu.mxcsr = 0x1f80;
            machine.cpu.regs[reg::RBX] = at;
            machine.core().mode_changed();
            let mut actual = Translated::new(machine, &options());
            actual.run();
            assert_eq!(actual.vcpu.cpu().rip < CODE, faults, "{at:#x}");
        }
    }
}
