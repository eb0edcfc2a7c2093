//! Any bytes as code of 64, 32 or 16 bits, with any registers: what the translator makes of it against the interpreter.
//!
//! Either block by block in lockstep, or linked and in one go, if the interpreter alone comes to an end soon.
//! Code is either bytes as they are, then the layout of an input begins like that of `x86_interp`, whose corpus is
//! a good start; or it is put together from instructions that are mostly valid. Registers mostly point into a
//! window of small pages of all sorts: absent, read only, MMIO, aliases of each other and of the code.
#![no_main]

use guest_memory::{CodeWriteHook, GuestMemory};
use iced_x86::{Decoder, FlowControl, Instruction, Mnemonic, RflagsBits};
use libfuzzer_sys::fuzz_target;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Weak};
use vireo_fuzz::{Input, Legacy, WINDOW, WINDOW_PAGES, legacy_program, place, program};
use x86_core::testing::{
    CODE, DATA, FlatPlatform, GDT, HANDLERS, IDT, IST1_STACK, KERNEL_STACK, MMIO, Machine, PAGE_TABLES, RAM,
    STACK, selector,
};
use x86_core::{Flow, Platform, Trap, cr4, flags, reg};
use x86_lockstep::{Lockstep, Stop};
use x86_translate::{Exit, Options, Translator, TranslatorVcpu};

/// Instructions that the interpreter may take to come to an end.
const STEPS: usize = 2048;
/// Blocks that are run in lockstep.
const BLOCKS: u32 = 128;
/// What a guest can reach that is compared after a run in one go.
const COMPARED: [(u64, usize); 6] = [
    (WINDOW, (WINDOW_PAGES * PAGE) as usize),
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
/// Bytes of a page.
const PAGE: u64 = 0x1000;
/// The page table of the window.
const WINDOW_TABLE: u64 = 0xe000;
/// The longest program, in bytes.
const PROGRAM: usize = 0x180;
/// Where interrupts go: back at once.
const RETURN: &[u8] = b"\x48\xcf";
/// Where exceptions go: some bytes on, and on with that. With an error code, and without.
const SKIP: [&[u8]; 2] = [b"\x48\x83\x04\x24\x04\x48\xcf", b"\x48\x83\xc4\x08\x48\x83\x04\x24\x04\x48\xcf"];
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
        data @ 128..192 => DATA + 0xa00 + 8 * u64::from(data),
        192..196 => CODE + u64::from(input.u8()),
        _ => u32::from_le_bytes(place(input)).into(),
    }
}

/// Maps the window by small pages, each of another sort.
fn map_window(machine: &Machine) {
    const NO_EXECUTE: u64 = 1 << 63;
    machine.poke(PAGE_TABLES + 0x2000 + (WINDOW >> 21) * 8, WINDOW_TABLE + 7);
    let entries: Vec<u8> = (0..512)
        .flat_map(|index| {
            let own = (WINDOW + index * PAGE) | 7;
            let entry = match index {
                // Read only, absent, for the supervisor, and beside that without accessed and dirty bits.
                2 => own & !2 | 0x60,
                4 => 0,
                6 => own & !4 | 0x60,
                7 => MMIO | 7,
                // What runs, a second time; data once more; one page twice in a row; the tables themselves.
                9 => CODE | 0x67,
                10 => DATA | 0x67 | NO_EXECUTE,
                11 | 12 => WINDOW | 0x67,
                13 => IDT & !(PAGE - 1) | 5,
                14 => (CODE + PAGE) | 0x67,
                _ if index < WINDOW_PAGES => own | ((index & 1) * 0x60),
                _ => 0,
            };
            entry.to_le_bytes()
        })
        .collect();
    machine.memory.write(WINDOW_TABLE, &entries).expect("RAM");
}

/// What comes back: breakpoints, overflows, and interrupts that the code asks for; other exceptions if `skip`.
fn set_handlers(machine: &Machine, skip: bool) {
    let (mut gates, mut handlers) = ([0; PAGE as usize], [0xf4; PAGE as usize]);
    for vector in 0..256usize {
        let at = HANDLERS + 16 * vector as u64;
        let code: &[u8] = match vector {
            3 | 4 | 32.. => RETURN,
            // A double fault is the end.
            8 => &[0xf4],
            10..=14 | 17 | 21 | 29 | 30 if skip => SKIP[1],
            _ if skip => SKIP[0],
            _ => &[0xf4],
        };
        handlers[16 * vector..][..code.len()].copy_from_slice(code);
        let kind = if vector == 3 || vector == 4 || vector >= 32 { 0xe + (vector as u64 & 1) } else { 0xe };
        let dpl = if kind == 0xe && vector < 32 && vector != 4 && vector != 3 { 0 } else { 3 };
        let low = at & 0xffff
            | u64::from(selector::CODE64) << 16
            | (0x80 | dpl << 5 | kind) << 40
            | (at >> 16 & 0xffff) << 48;
        gates[16 * vector..][..8].copy_from_slice(&low.to_le_bytes());
    }
    machine.memory.write(IDT, &gates).expect("RAM");
    machine.memory.write(HANDLERS, &handlers).expect("RAM");
}

/// How `choices` have it translated.
fn options(choices: u8) -> Options {
    let lockstep = choices & 1 == 0;
    Options {
        cache_bytes: 2 << 20,
        strict: lockstep || choices & 2 == 0,
        lock_needed: choices & 4 != 0,
        max_instructions: if choices & 0xc0 == 0xc0 { 1 } else { 64 },
        side_exits: if choices & 8 == 0 { 4 } else { 0 },
    }
}

/// The same for code of 32 and 16 bits.
fn legacy_case(mode: u8, mut input: Input<'_>) -> Case {
    let kind = Legacy::pick(mode >> 4);
    let choices = input.u8();
    let mut machine = kind.machine(mode & 4 != 0);
    if kind == Legacy::Compatibility {
        set_handlers(&machine, mode & 4 != 0);
        map_window(&machine);
    }
    machine.cpu.regs = std::array::from_fn(|_| {
        let value = register(&mut input);
        let pointer = u64::from(kind.pointer(value as u32));
        // What 64-bit code left above.
        if value & 0xf0 == 0x50 { pointer | value << 32 } else { pointer }
    });
    machine.cpu.regs[reg::RCX] &= 0x3fff;
    let stack = input.u8();
    if stack % 8 != 7 {
        machine.cpu.regs[reg::RSP] = kind.stack(stack);
    }
    machine.cpu.mxcsr = 0x1f80;
    let rflags = u64::from(input.u32());
    let end: &[u8] = if machine.cpu.cpl == 3 { &[0x0f, 0x0b] } else { &[0xf4, 0xf4] };
    machine.memory.write(CODE, &end.repeat(0x1000)).expect("RAM");
    if choices & 0x20 != 0 {
        // The end of a page.
        machine.cpu.rip += 0x1000 - u64::from(choices % 16);
    }
    let code =
        if mode & 2 != 0 { legacy_program(&mut input, kind, PROGRAM) } else { input.bytes(PROGRAM).to_vec() };
    machine.load(&code);
    let fixed = machine.cpu.rflags & flags::VM;
    machine.core().set_rflags(rflags & !(flags::VM | flags::TF) | fixed);
    machine.core().mode_changed();
    let options = options(choices);
    machine.cpu.lock_needed = options.lock_needed;
    Case { machine, lockstep: choices & 1 == 0, options }
}

/// Always the same for the same bytes.
fn case(data: &[u8]) -> Case {
    let mut input = Input::new(data);
    let mode = input.u8();
    if mode & 8 != 0 {
        return legacy_case(mode, input);
    }
    // Bytes as they are, or instructions that are made from what comes last.
    let made = mode & 2 != 0;
    let len = if made { 0 } else { input.u8().into() };
    let code = input.bytes(len);
    let rflags = u64::from(input.u32());
    let mut machine = if mode & 1 == 0 { Machine::long() } else { Machine::user() };
    machine.cpu.regs = std::array::from_fn(|_| register(&mut input));
    // Repetitions take long in lockstep.
    machine.cpu.regs[reg::RCX] &= 0x3fff;
    // Mostly there is a stack.
    let stack = input.u8();
    if stack % 8 != 7 {
        machine.cpu.regs[reg::RSP] = STACK - u64::from(stack);
    }
    let choices = input.u8();
    set_handlers(&machine, mode & 4 != 0);
    map_window(&machine);
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
    if made {
        let code = program(&mut input, PROGRAM);
        machine.load(&code);
    } else {
        machine.load(code);
    }
    machine.core().set_rflags(rflags & !(flags::VM | flags::TF));
    machine.core().mode_changed();
    let rest = input.rest();
    machine.memory.write(DATA + 0x1000, rest).expect("RAM");
    for (vector, bytes) in machine.cpu.vectors.iter_mut().zip(rest.chunks_exact(16)) {
        vector.0[..16].copy_from_slice(bytes);
    }
    let options = options(choices);
    machine.cpu.lock_needed = options.lock_needed;
    Case { machine, options, lockstep: choices & 1 == 0 }
}

fn is_canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

/// The instruction at RIP, if that is in memory: fetching it from a device would be another access.
fn next_instruction(core: &mut x86_core::Core<'_>) -> Option<Instruction> {
    core.fetch_physical().ok().filter(|fetch| !fetch.host.is_null())?;
    let mut bytes = [0; 15];
    let (bits, rip) = (core.code_size().bits(), core.cpu.rip);
    let len = core.fetch(&mut bytes).ok()?;
    Some(Decoder::with_ip(bits, &bytes[..len], rip, x86_interp::DECODER_OPTIONS).decode())
}

/// Whether the instruction at RIP takes its target from a register or memory.
fn jumps_anywhere(core: &mut x86_core::Core<'_>) -> bool {
    use FlowControl::{IndirectBranch, IndirectCall, Return};
    let flow = next_instruction(core).map(|insn| insn.flow_control());
    flow.is_none_or(|flow| matches!(flow, IndirectBranch | IndirectCall | Return))
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
        // A jump to such an address faults at the jump; in T1's code, behind it.
        Err(Stop::Mismatch(_)) if !is_canonical(lockstep.cpu().rip) => return,
        // Code that reaches into a device's registers: how often they are read to fetch it may differ.
        Err(Stop::Mismatch(_)) if (RAM - 16..=RAM + 16).contains(&lockstep.cpu().rip) => return,
        // Page tables as code: which accessed bits are set while it runs, and so what it does, may differ.
        Err(Stop::Mismatch(_)) if lockstep.cpu().rip < GDT => return,
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
    let Some(insn) = next_instruction(&mut core) else { return };
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
            if exception.vector == 13 && core.cpu.long64 && jumps_anywhere(&mut core) {
                // Perhaps because the target is not canonical: see `side_by_side`.
                return None;
            }
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
