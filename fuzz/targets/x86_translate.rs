//! Any bytes as 64-bit code, with any registers: what the translator makes of it against the interpreter.
//!
//! Either block by block in lockstep, or linked and in one go, if the interpreter alone comes to an end soon.
//! The layout of an input begins like that of `x86_interp`, whose corpus is a good start.
#![no_main]

use guest_memory::{CodeWriteHook, GuestMemory};
use iced_x86::{Decoder, Instruction, Mnemonic, RflagsBits};
use libfuzzer_sys::fuzz_target;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Weak};
use vireo_fuzz::Input;
use x86_core::testing::{
    CODE, DATA, FlatPlatform, HANDLERS, IST1_STACK, KERNEL_STACK, Machine, STACK, selector,
};
use x86_core::{Flow, Platform, Trap, cr4, flags, reg};
use x86_lockstep::{Lockstep, Stop};
use x86_translate::{Exit, Options, Translator, TranslatorVcpu};

/// Instructions that the interpreter may take to come to an end.
const STEPS: usize = 2048;
/// Blocks that are run in lockstep.
const BLOCKS: u32 = 128;
/// What a guest can reach that is compared after a run in one go.
const COMPARED: [(u64, usize); 5] = [
    (0, 0x1_0000),
    (STACK - 0x8000, 0x1_0000),
    (KERNEL_STACK - 0x4000, 0x8000),
    (IST1_STACK - 0x1000, 0x2000),
    (CODE - 0x1000, 0x4000),
];
/// The same of data.
const DATA_LEN: usize = 0x2_0000;
/// Accessed and dirty bits.
const USED: u8 = 0x60;
/// Values at the edges of what instructions do.
const VALUES: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0x0000_7fff_ffff_fff9,
    0xffff_8000_0000_0001,
    u64::MAX,
];

/// The surroundings: always the same, random numbers included.
#[derive(Default)]
struct Outside {
    flat: FlatPlatform,
    /// What was said to it, and what it said: how often, and a hash of it all.
    said: RefCell<(u64, DefaultHasher)>,
    random: Cell<u64>,
    /// Entries of page tables that were marked used.
    marked: RefCell<BTreeSet<u64>>,
}

impl Outside {
    /// A log of all would take much memory.
    fn note(&self) {
        let (count, hasher) = &mut *self.said.borrow_mut();
        for entry in self.flat.log.borrow_mut().drain(..) {
            *count += 1;
            entry.hash(hasher);
        }
    }

    fn said(&self) -> (u64, u64) {
        let (count, hasher) = &*self.said.borrow();
        (*count, hasher.finish())
    }
}

impl Platform for Outside {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.flat.mmio_read(gpa, data);
        self.note();
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.flat.mmio_write(gpa, data);
        self.note();
    }
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.flat.pio_read(port, data);
        self.note();
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.flat.pio_write(port, data);
        self.note();
    }
    fn tsc(&self) -> u64 {
        self.flat.tsc()
    }
    fn tsc_hertz(&self) -> u64 {
        self.flat.tsc_hertz()
    }
    fn cr8(&self) -> u8 {
        self.flat.cr8()
    }
    fn set_cr8(&self, priority: u8) {
        self.flat.set_cr8(priority);
    }
    fn apic_msr(&self, msr: u32) -> Option<u64> {
        self.flat.apic_msr(msr)
    }
    fn set_apic_msr(&self, msr: u32, value: u64) -> Option<()> {
        self.flat.set_apic_msr(msr, value)
    }
    fn random(&self) -> Option<u64> {
        self.random.set(self.random.get().wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(3));
        Some(self.random.get())
    }
    fn entry_marked(&self, gpa: u64, len: u64) {
        self.marked.borrow_mut().extend(gpa..gpa + len);
    }
}

/// Tells the translator of writes, without keeping it alive.
struct CodeWrites(Weak<Translator>);

impl CodeWriteHook for CodeWrites {
    fn code_written(&self, gpa: u64, len: u64) {
        if let Some(translator) = self.0.upgrade() {
            translator.code_written(gpa, len);
        }
    }
}

fn translator(memory: &GuestMemory, options: &Options) -> Arc<Translator> {
    let translator = Translator::new(memory.clone(), options).expect("a code cache");
    memory.set_code_hook(Arc::new(CodeWrites(Arc::downgrade(&translator))));
    translator
}

/// What an input asks for.
struct Case {
    machine: Machine,
    options: Options,
    lockstep: bool,
}

fn register(input: &mut Input<'_>) -> u64 {
    match input.u8() {
        edge @ 0..64 => VALUES[usize::from(edge) % VALUES.len()],
        64..96 => input.u64(),
        small @ 96..128 => small.into(),
        place => DATA + 0xa00 + 8 * u64::from(place),
    }
}

/// Always the same for the same bytes.
fn case(data: &[u8]) -> Case {
    let mut input = Input::new(data);
    let mode = input.u8();
    let len = input.u8().into();
    let code = input.bytes(len);
    let rflags = u64::from(input.u32());
    let mut machine = if mode & 1 == 0 { Machine::long() } else { Machine::user() };
    machine.cpu.regs = std::array::from_fn(|_| register(&mut input));
    // Mostly there is a stack.
    let stack = input.u8();
    if stack % 8 != 7 {
        machine.cpu.regs[reg::RSP] = STACK - u64::from(stack);
    }
    let choices = input.u8();
    // What comes back: breakpoints, overflows, and interrupts that the code asks for.
    for vector in [vec![3, 4], (32..=255).collect()].concat() {
        let handler = HANDLERS + 16 * u64::from(vector);
        machine.memory.write(handler, b"\x48\xcf").expect("RAM");
        machine.gate64(vector, selector::CODE64, handler, 0xe + u64::from(vector & 1), 3, 0);
    }
    let call = HANDLERS + 0x1000;
    machine.memory.write(call, b"\x48\x0f\x07").expect("RAM");
    machine.cpu.msrs.lstar = call;
    machine.cpu.msrs.star = u64::from(selector::CODE64) << 32 | u64::from(selector::USER_CODE32) << 48;
    machine.cpu.msrs.sfmask = flags::IF | flags::DF;
    machine.cpu.mxcsr = 0x1f80;
    machine.cpu.segments[4].base = DATA + 0x40;
    machine.cpu.segments[5].base = DATA + 0x100;
    if choices & 0x10 != 0 {
        machine.cpu.cr4 |= cr4::SMAP;
    }
    // The end of a page now and then.
    machine.cpu.rip = if choices & 0x20 == 0 { CODE } else { CODE + 0x1000 - u64::from(choices % 16) };
    // HLT follows.
    machine.memory.write(CODE, &[0xf4; 0x2000]).expect("RAM");
    machine.load(code);
    machine.core().set_rflags(rflags & !(flags::VM | flags::TF));
    machine.core().mode_changed();
    let rest = input.rest();
    machine.memory.write(DATA + 0x1000, rest).expect("RAM");
    for (vector, bytes) in machine.cpu.vectors.iter_mut().zip(rest.chunks_exact(16)) {
        vector.0[..16].copy_from_slice(bytes);
    }
    let lockstep = choices & 1 == 0;
    let options = Options {
        cache_bytes: 2 << 20,
        strict: lockstep || choices & 2 == 0,
        lock_needed: choices & 4 != 0,
        max_instructions: if choices & 0xc0 == 0xc0 { 1 } else { 64 },
        side_exits: if choices & 8 == 0 { 4 } else { 0 },
    };
    machine.cpu.lock_needed = options.lock_needed;
    Case { machine, options, lockstep }
}

/// Each block on both processors.
fn side_by_side(case: Case) {
    let Machine { memory, cpu, .. } = case.machine;
    let outside = Outside::default();
    let translator = translator(&memory, &case.options);
    let mut lockstep = Lockstep::new(&memory, &translator, cpu).expect("memory for a copy");
    let rounds = Cell::new(0);
    let ready = |_: &x86_core::Cpu| rounds.replace(rounds.get() + 1) == BLOCKS;
    match lockstep.run(&outside, &ready) {
        Ok(()) | Err(Stop::Trap(_)) => {}
        Err(Stop::Mismatch(mismatch)) => panic!("{mismatch}"),
    }
    lockstep.finish().unwrap_or_else(|mismatch| panic!("{mismatch}"));
}

/// What the interpreter came to.
struct Finished {
    result: Result<(), Trap>,
    /// Flags that the manuals leave undefined, as the last that defined them did.
    undefined: u32,
    /// Whether results may depend on these, or on flags at an exception.
    inexact: bool,
}

/// Takes note of what the next instruction leaves undefined.
fn note(machine: &mut Machine, outside: &Outside, finished: &mut Finished) {
    let Machine { memory, cpu, .. } = machine;
    let mut core = x86_core::Core { cpu, memory, platform: outside };
    let mut bytes = [0; 15];
    let (bits, rip) = (core.code_size().bits(), core.cpu.rip);
    let Ok(len) = core.fetch(&mut bytes) else { return };
    let mut insn = Instruction::default();
    Decoder::with_ip(bits, &bytes[..len], rip, x86_interp::DECODER_OPTIONS).decode_out(&mut insn);
    finished.inexact |= insn.rflags_read() & finished.undefined != 0;
    let vague = insn.rflags_undefined();
    // Counts of zero leave everything as it is.
    if vague == RflagsBits::NONE && insn.mnemonic() != Mnemonic::INVALID {
        finished.undefined &= !(insn.rflags_written() | insn.rflags_cleared() | insn.rflags_set());
    }
    finished.undefined |= vague;
}

/// Runs the interpreter until it halts. `None` if it does not.
fn interpret(machine: &mut Machine, outside: &Outside, exact: bool) -> Option<Finished> {
    let mut finished = Finished { result: Ok(()), undefined: 0, inexact: false };
    for _ in 0..STEPS {
        if !exact {
            note(machine, outside, &mut finished);
        }
        let Machine { memory, cpu, .. } = &mut *machine;
        let mut core = x86_core::Core { cpu, memory, platform: outside };
        let mut result = x86_interp::step(&mut core);
        if let Err(Trap::Exception(exception)) = result {
            finished.inexact = true;
            result = core.deliver(exception).map(|()| Flow::Jump);
        }
        match result {
            Ok(Flow::Halt) => return Some(finished),
            Ok(_) => {}
            Err(trap) => return Some(Finished { result: Err(trap), ..finished }),
        }
    }
    None
}

/// All blocks, linked, against the interpreter's result.
fn in_one_go(case: Case, expected: &mut Machine) {
    let (told, outside) = (Outside::default(), Outside::default());
    let strict = case.options.strict;
    let Some(finished) = interpret(expected, &told, strict) else { return };
    let Machine { memory, cpu, .. } = case.machine;
    let translator = translator(&memory, &case.options);
    let mut vcpu = TranslatorVcpu::new(&translator, cpu);
    // Where undefined flags decide, this may run for ever.
    if !strict && finished.inexact {
        return;
    }
    match vcpu.run(&outside) {
        Ok(Exit::Halt) => assert_eq!(finished.result, Ok(())),
        Ok(exit) => panic!("{exit:?} at {:#x}", vcpu.cpu().rip),
        Err(trap) => {
            // What a processor is when it has shut down does not count.
            assert_eq!(finished.result, Err(trap));
            return;
        }
    }
    let cpu = vcpu.cpu_mut();
    if !strict {
        // Flags have the same bits in RFLAGS, which iced numbers in its own way.
        const NAMES: [(u32, u64); 6] = [
            (RflagsBits::OF, flags::OF),
            (RflagsBits::SF, flags::SF),
            (RflagsBits::ZF, flags::ZF),
            (RflagsBits::AF, flags::AF),
            (RflagsBits::CF, flags::CF),
            (RflagsBits::PF, flags::PF),
        ];
        let named = NAMES.iter().filter(|(name, _)| finished.undefined & name != 0);
        let ignored = named.fold(0, |all, (_, flag)| all | flag);
        cpu.rflags = cpu.rflags & !ignored | expected.cpu.rflags & ignored;
    }
    let mut differences = x86_lockstep::differences(cpu, &expected.cpu);
    let marked = [told.marked.take(), outside.marked.take()];
    for (start, len) in COMPARED.into_iter().chain([(DATA - 0x1000, DATA_LEN)]) {
        let (mut t1, mut t0) = (vec![0; len], vec![0; len]);
        memory.read(start, &mut t1).expect("RAM");
        expected.memory.read(start, &mut t0).expect("RAM");
        if t1 == t0 {
            continue;
        }
        for ((at, a), b) in (start..).zip(&t1).zip(&t0) {
            let ignored = if marked.iter().any(|marked| marked.contains(&at)) { USED } else { 0 };
            if (a ^ b) & !ignored != 0 && differences.len() < 64 {
                differences.push(format!("memory at {at:#x}: T1 {a:#x}, T0 {b:#x}"));
            }
        }
    }
    if told.said() != outside.said() {
        differences.push(format!("outside: T1 {:x?}, T0 {:x?}", outside.said(), told.said()));
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

fuzz_target!(|data: &[u8]| {
    let first = case(data);
    if first.lockstep {
        side_by_side(first);
    } else {
        in_one_go(first, &mut case(data).machine);
    }
});
