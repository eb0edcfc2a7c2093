//! Broken translations are reported, and whole ones not.

use crate::{Lockstep, Mismatch, Stop};
use guest_memory::GuestMemory;
use std::cell::RefCell;
use std::sync::Arc;
use x86_core::testing::{CODE, DATA, FlatPlatform, MMIO, Machine, STACK};
use x86_core::{Core, Platform, Seg, Trap, reg};
use x86_translate::{Options, Translator};

/// What breaks T1's results.
pub(crate) type Fault = Box<dyn FnMut(&mut Core<'_>) + Send>;

struct Rig {
    memory: GuestMemory,
    platform: FlatPlatform,
    lockstep: Lockstep,
    _translator: Arc<Translator>,
}

impl Rig {
    fn new(machine: Machine) -> Self {
        let Machine { memory, cpu, platform } = machine;
        let options =
            Options { cache_bytes: 8 << 20, strict: true, lock_needed: false, ..Options::default() };
        let translator = Translator::new(memory.clone(), &options).expect("a code cache");
        memory.set_code_hook(translator.clone());
        let lockstep = Lockstep::new(&memory, &translator, cpu).expect("memory for a copy");
        Self { memory, platform, lockstep, _translator: translator }
    }

    fn long(code: &[u8]) -> Self {
        let machine = Machine::long();
        machine.load(code);
        Self::new(machine)
    }

    fn run(&mut self) -> Result<(), Stop> {
        self.lockstep.run(&self.platform, &|_| false)
    }

    fn halts(&mut self) {
        self.run().unwrap_or_else(|stop| panic!("{stop}"));
        assert!(self.lockstep.cpu().halted);
        self.lockstep.finish().unwrap_or_else(|mismatch| panic!("{mismatch}"));
    }

    fn differs(&mut self) -> Mismatch {
        match self.run() {
            Err(Stop::Mismatch(mismatch)) => *mismatch,
            Err(stop) => panic!("{stop}"),
            Ok(()) => *self.lockstep.finish().expect_err("a mismatch"),
        }
    }
}

/// mov ecx, 1000; mov rdi, DATA; l: mov [rdi], rcx; add rax, rcx; add rdi, 8; dec ecx; jnz l; hlt
const LOOP: &[u8] = &[
    0xb9, 0xe8, 3, 0, 0, 0xbf, 0, 0, 0x40, 0, 0x48, 0x89, 0x0f, 0x48, 0x01, 0xc8, 0x48, 0x83, 0xc7, 8, 0xff,
    0xc9, 0x75, 0xf2, 0xf4,
];

#[test]
fn a_loop_is_compared() {
    let mut rig = Rig::long(LOOP);
    rig.halts();
    assert_eq!(rig.lockstep.cpu().regs[reg::RAX], 500_500);
    let summary = rig.lockstep.summary();
    assert!(summary.instructions >= 5000 && summary.blocks >= 1000 && summary.races == 0, "{summary}");
    assert!(summary.to_string().ends_with("no mismatch"), "{summary}");
}

#[test]
fn code_of_32_and_of_16_bits_is_compared() {
    // The numbers of Fibonacci by recursion: mov ax, 15; call f; hlt; f: cmp ax, 2; jb e; push ax; dec ax; call f; ...
    let wide =
        b"\xb8\x0f\x00\x00\x00\xe8\x01\x00\x00\x00\xf4\x83\xf8\x02\x72\x14\x50\x48\xe8\xf4\xff\xff\xff\
        \x59\x50\x8d\x41\xfe\xe8\xea\xff\xff\xff\x59\x01\xc8\xc3";
    let short = b"\xb8\x0f\x00\xe8\x01\x00\xf4\x83\xf8\x02\x72\x12\x50\x48\xe8\xf6\xff\x59\x50\x89\xc8\
        \x83\xe8\x02\xe8\xec\xff\x59\x01\xc8\xc3";
    for (machine, code) in [(Machine::protected(), &wide[..]), (Machine::real(), &short[..])] {
        machine.load(code);
        let mut rig = Rig::new(machine);
        rig.halts();
        assert_eq!(rig.lockstep.cpu().regs[reg::RAX], 610);
        let summary = rig.lockstep.summary();
        // In blocks of several instructions.
        assert!(summary.instructions >= 2 * summary.blocks && summary.races == 0, "{summary}");
    }
}

#[test]
fn wrong_registers_flags_and_vectors_are_reported() {
    type Fault = fn(&mut Core<'_>);
    let faults: [(Fault, &str); 6] = [
        (|core| core.cpu.regs[reg::RAX] ^= 0x100, "rax"),
        (|core| core.cpu.rflags ^= 0x10, "rflags"),
        (|core| core.cpu.vectors[3].0[5] ^= 1, "vector 3"),
        (|core| core.cpu.vectors[31].0[63] ^= 1, "vector 31"),
        (|core| core.cpu.pkru ^= 4, "pkru"),
        (|core| core.cpu.mxcsr ^= 1, "mxcsr"),
    ];
    for (fault, name) in faults {
        let mut rig = Rig::long(LOOP);
        let mut rounds = 0;
        rig.lockstep.fault = Some(Box::new(move |core| {
            rounds += 1;
            if rounds == 50 {
                fault(core);
            }
        }));
        let mismatch = rig.differs();
        assert_eq!(mismatch.blocks, 50);
        assert!(mismatch.differences.len() == 1, "{mismatch}");
        assert!(mismatch.differences[0].starts_with(name), "{mismatch}");
        assert_eq!(mismatch.executed.len(), 5, "{mismatch}");
        #[cfg(feature = "disassembly")]
        assert!(mismatch.executed[0].contains("mov [rdi],rcx"), "{mismatch}");
        assert!(!mismatch.history.is_empty());
    }
}

#[test]
fn wrong_jumps_are_reported() {
    let mut rig = Rig::long(LOOP);
    rig.lockstep.fault = Some(Box::new(|core| core.cpu.rip += 1));
    let mismatch = rig.differs();
    assert!(mismatch.differences.iter().any(|line| line.starts_with("rip")), "{mismatch}");
}

#[test]
fn wrong_stores_are_reported_at_once_and_stray_ones_at_the_end() {
    for (stray, blocks) in [(0, Some(10)), (0x10_0000, None)] {
        let mut rig = Rig::long(LOOP);
        let mut rounds = 0u64;
        rig.lockstep.fault = Some(Box::new(move |core| {
            rounds += 1;
            if rounds == 10 {
                let at = core.cpu.regs[reg::RDI] - 8 + stray;
                core.write(Seg::Ds, at, 0x55u8).expect("mapped");
            }
        }));
        let mismatch = rig.differs();
        assert!(mismatch.differences[0].starts_with("memory at 0x"), "{mismatch}");
        assert!(blocks.is_none_or(|blocks| blocks == mismatch.blocks), "{mismatch}");
    }
}

/// rdtsc; mov ebx, 0xd0000000; mov [rbx], eax; mov ecx, [rbx+4]; in al, 0x60; out 0x61, al; rdrand rdx; hlt
const OUTSIDE: &[u8] = &[
    0x0f, 0x31, 0xbb, 0, 0, 0, 0xd0, 0x89, 0x03, 0x8b, 0x4b, 4, 0xe4, 0x60, 0xe6, 0x61, 0x48, 0x0f, 0xc7,
    0xf2, 0xf4,
];

#[test]
fn both_hear_the_same_from_outside() {
    let mut rig = Rig::long(OUTSIDE);
    rig.platform.clock.set(77);
    rig.halts();
    // Nothing was asked twice of the real surroundings.
    let log = rig.platform.log.borrow();
    assert_eq!(log.len(), 4);
    assert_eq!(log[0], (true, MMIO, 78u32.to_le_bytes().to_vec()));
    assert_eq!(log[1].1, MMIO + 4);
    assert_eq!(log[2].1, 0x60);
    assert_eq!(log[3].1, 0x61);
}

#[test]
fn repeated_strings_pause_alike() {
    for (prefix, opcode) in [(0xf3, 0xaa), (0xf3, 0xa4), (0xf3, 0xab), (0xf3, 0xa6), (0xf2, 0xae)] {
        // mov ecx, 200000; mov edi, DATA; mov esi, DATA + 0x30_0000; rep ...; mov ecx, 3; rep ...; hlt
        let mut code = vec![0xb9, 0x40, 0x0d, 0x03, 0x00, 0xbf, 0, 0, 0x40, 0, 0xbe, 0, 0, 0x70, 0];
        code.extend([prefix, opcode, 0xb9, 3, 0, 0, 0, prefix, opcode, 0xf4]);
        let mut rig = Rig::long(&code);
        // The compared strings differ late.
        rig.memory.write(DATA + 150_000, &[1]).unwrap();
        rig.lockstep.core(&rig.platform).cpu.regs[reg::RAX] = 1;
        rig.halts();
    }
}

#[test]
fn exceptions_are_compared() {
    // A page fault in user code, whose handler (the rig's) halts.
    let machine = Machine::user();
    machine.load(&[0x48, 0xb8, 0, 0, 0, 0, 0, 0x40, 0, 0, 0x48, 0x8b, 0x08]);
    let mut rig = Rig::new(machine);
    rig.halts();
    assert_eq!(rig.lockstep.cpu().cr2, 0x4000_0000_0000);
    assert_eq!(rig.lockstep.cpu().cpl, 0);
}

#[test]
fn interrupts_are_delivered_to_both() {
    let mut rig = Rig::long(LOOP);
    rig.lockstep.act(&rig.platform, &mut |core| core.interrupt(0x40)).unwrap();
    assert_eq!(rig.lockstep.cpu().rip, x86_core::testing::HANDLERS + 0x400);
    rig.halts();
    let mut broken = 0;
    let result = rig.lockstep.act(&rig.platform, &mut |core| {
        broken += 1;
        core.cpu.regs[reg::RBX] = broken;
        Ok(())
    });
    assert!(matches!(result, Err(Stop::Mismatch(mismatch)) if mismatch.differences[0].starts_with("rbx")));
}

#[test]
fn traps_of_the_run_loop_come_back() {
    let mut rig = Rig::long(LOOP);
    let result = rig.lockstep.act(&rig.platform, &mut |_| Err(Trap::UD));
    assert!(matches!(result, Err(Stop::Trap(Trap::UD))));
}

#[test]
fn what_devices_write_reaches_both() {
    // l: mov rax, [DATA]; test rax, rax; jz l; hlt, with the word written between rounds.
    let mut rig = Rig::long(&[0x48, 0x8b, 0x04, 0x25, 0, 0, 0x40, 0, 0x48, 0x85, 0xc0, 0x74, 0xf3, 0xf4]);
    let memory = rig.memory.clone();
    let rounds = RefCell::new(0);
    let ready = |_: &x86_core::Cpu| {
        *rounds.borrow_mut() += 1;
        if *rounds.borrow() == 20 {
            memory.write(DATA, &[9]).unwrap();
        }
        false
    };
    rig.lockstep.run(&rig.platform, &ready).unwrap_or_else(|stop| panic!("{stop}"));
    assert_eq!(rig.lockstep.cpu().regs[reg::RAX], 9);
    assert_eq!(rig.lockstep.finish().unwrap().races, 0);
}

/// A device that answers a port write by writing memory.
struct Dma(GuestMemory);

impl Platform for Dma {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0);
    }
    fn pio_write(&self, _: u16, data: &[u8]) {
        self.0.write(DATA, data).unwrap();
    }
    fn tsc(&self) -> u64 {
        0
    }
    fn tsc_hertz(&self) -> u64 {
        1
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _: u8) {}
    fn apic_msr(&self, _: u32) -> Option<u64> {
        None
    }
    fn set_apic_msr(&self, _: u32, _: u64) -> Option<()> {
        None
    }
}

#[test]
fn devices_that_answer_at_once_are_replayed_in_order() {
    // mov al, 5; out 0x80, al; mov bl, [DATA]; mov al, 6; out 0x80, al; mov cl, [DATA]; hlt
    let load = [0x04, 0x25, 0, 0, 0x40, 0];
    let mut code = vec![0xb0, 5, 0xe6, 0x80, 0x8a, 0x1c];
    code.extend(&load[1..]);
    code.extend([0xb0, 6, 0xe6, 0x80, 0x8a, 0x0c]);
    code.extend(&load[1..]);
    code.push(0xf4);
    let mut rig = Rig::long(&code);
    let dma = Dma(rig.memory.clone());
    rig.lockstep.run(&dma, &|_| false).unwrap_or_else(|stop| panic!("{stop}"));
    assert_eq!((rig.lockstep.cpu().regs[reg::RBX], rig.lockstep.cpu().regs[reg::RCX]), (5, 6));
    assert_eq!(rig.lockstep.finish().unwrap().races, 0);
}

#[test]
fn a_state_that_was_loaded_is_taken_over() {
    let mut rig = Rig::long(LOOP);
    rig.halts();
    let core = rig.lockstep.core(&rig.platform);
    core.cpu.halted = false;
    core.cpu.rip = CODE;
    core.cpu.regs[reg::RSP] = STACK - 64;
    rig.memory.write(DATA, &[0; 64]).unwrap();
    rig.halts();
}

#[test]
fn undefined_flags_are_the_hosts() {
    // mov eax, 3; imul ecx, eax, 5 and mul ecx after a comparison of memory's page was made; shl and friends
    // with a count: stc; cmp eax, 3; imul rsi, [DATA]; pushfq; sub eax, 7; mul qword [DATA]; pushfq; stc;
    // shl eax, 5; pushfq; bsf ecx, eax; pushfq; and eax, ecx; hlt
    let data = [0x04, 0x25, 0, 0, 0x40, 0];
    let mut code = vec![0xb8, 3, 0, 0, 0, 0xf9, 0x83, 0xf8, 3, 0x48, 0x0f, 0xaf, 0x34];
    code.extend(&data[1..]);
    code.extend([0x9c, 0x83, 0xe8, 7, 0x48, 0xf7, 0x24]);
    code.extend(&data[1..]);
    code.extend([0x9c, 0xf9, 0xc1, 0xe0, 5, 0x9c, 0x0f, 0xbc, 0xc8, 0x9c, 0x21, 0xc8, 0xf4]);
    Rig::long(&code).halts();
}

#[test]
fn only_one_may_look_at_the_apics_base() {
    // mov esi, DATA; lock cmpxchg16b [rsi]; mov eax, 1; cpuid; mov ecx, 0x1b; rdmsr; hlt
    let code = b"\xbe\0\0\x40\0\xf0\x48\x0f\xc7\x0e\xb8\x01\0\0\0\x0f\xa2\xb9\x1b\0\0\0\x0f\x32\xf4";
    let mut rig = Rig::long(code);
    rig.platform.apic.borrow_mut().insert(0x1b, 0xfee0_0900);
    rig.halts();
    assert_eq!(rig.lockstep.cpu().regs[reg::RAX], 0xfee0_0900);
}

#[test]
fn divisions_give_the_hosts_flags() {
    // mov eax, 100; mov ecx, 7; mov r9d, 5; stc; div ecx; cmc; div r9d; mov eax, 100; cdq; stc; idiv r9; add al,
    // 0x7f; cdq; idiv ecx; hlt
    let code = b"\xb8\x64\0\0\0\xb9\x07\0\0\0\x41\xb9\x05\0\0\0\xf9\xf7\xf1\xf5\x41\xf7\xf1\
        \xb8\x64\0\0\0\x99\xf9\x49\xf7\xf9\x04\x7f\x99\xf7\xf9\xf4";
    let mut rig = Rig::long(code);
    rig.halts();
}
