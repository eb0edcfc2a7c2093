//! Guests: assembling them, and the state they start in.

use crate::rig::{EXIT_PORT, LOG_PORT, Rig};
use accel::{Segment, TableRegister, X86State};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, dx, eax};

/// Where the guests' code is.
pub(crate) const CODE: u64 = 0x10_0000;
/// The stack of vCPU n ends here, plus n times [`STACK_LEN`].
const STACK: u64 = 0x20_0000;
const STACK_LEN: u64 = 0x1_0000;
/// For the guests' data.
pub(crate) const DATA: u64 = 0x40_0000;
/// The level-4 page table; five more tables follow it. The first 4 GiB are mapped one to one.
pub(crate) const PAGE_TABLES: u64 = 0x1000;
/// The GDT.
const GDT: u64 = 0x8000;
/// The IDT.
const IDT: u64 = 0x9000;
/// Code that a SIPI starts in real mode.
pub(crate) const TRAMPOLINE: u64 = 0xa000;

/// Selectors in the GDT.
pub(crate) const CODE64: u16 = 0x08;
pub(crate) const DATA_SEGMENT: u16 = 0x10;
pub(crate) const CODE32: u16 = 0x18;

/// The registers of the local APIC.
pub(crate) const APIC: u64 = 0xfee0_0000;

pub(crate) type Asm = Result<(), IcedError>;

/// Assembles code for `bits` at `address`.
pub(crate) fn assemble(bits: u32, address: u64, listing: impl FnOnce(&mut CodeAssembler) -> Asm) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bits).expect("16, 32 or 64");
    listing(&mut assembler).expect("the listing has no mistakes");
    assembler.assemble(address).expect("the listing can be encoded")
}

/// Ends the guest with EAX as its result. The loop behind is for the time until the stop arrives.
pub(crate) fn exit(a: &mut CodeAssembler) -> Asm {
    let mut again = a.create_label();
    a.mov(dx, u32::from(EXIT_PORT))?;
    a.out(dx, eax)?;
    a.set_label(&mut again)?;
    a.cli()?;
    a.hlt()?;
    a.jmp(again)
}

/// Reports EAX as progress.
pub(crate) fn progress(a: &mut CodeAssembler) -> Asm {
    a.mov(dx, u32::from(LOG_PORT))?;
    a.out(dx, eax)
}

/// The flat 64-bit code segment.
pub(crate) fn code64() -> Segment {
    Segment { selector: CODE64, base: 0, limit: u32::MAX, rights: 0xa09b, unusable: false }
}

/// A flat data segment.
pub(crate) fn data_segment() -> Segment {
    Segment { selector: DATA_SEGMENT, base: 0, limit: u32::MAX, rights: 0xc093, unusable: false }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Writes page tables, GDT and an empty IDT.
pub(crate) fn write_tables(rig: &Rig) {
    let mut tables = vec![0u64; 512 * 6];
    tables[0] = (PAGE_TABLES + 0x1000) | 3;
    for gigabyte in 0..4 {
        tables[512 + gigabyte] = (PAGE_TABLES + 0x2000 + gigabyte as u64 * 0x1000) | 3;
    }
    for (index, entry) in tables[1024..].iter_mut().enumerate() {
        *entry = (index as u64) << 21 | 0x83;
    }
    rig.write(PAGE_TABLES, &words(&tables));
    rig.write(GDT, &words(&[0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffff]));
}

/// Has `vector` handled at `handler`, with interrupts off.
pub(crate) fn set_handler(rig: &Rig, vector: u8, handler: u64) {
    let low = handler & 0xffff | u64::from(CODE64) << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    rig.write(IDT + u64::from(vector) * 16, &words(&[low, handler >> 32]));
}

/// Where interrupts' handlers are.
const HANDLERS: u64 = CODE + 0x1_0000;

/// Installs a handler for `vector`; `listing` must end with IRETQ.
pub(crate) fn interrupt_handler(rig: &Rig, vector: u8, listing: impl FnOnce(&mut CodeAssembler) -> Asm) {
    let at = HANDLERS + u64::from(vector) * 0x100;
    let code = assemble(64, at, listing);
    assert!(code.len() <= 0x100, "the handler has room");
    rig.write(at, &code);
    set_handler(rig, vector, at);
}

/// GDTR and IDTR of the tables.
pub(crate) fn table_registers() -> (TableRegister, TableRegister) {
    (TableRegister { base: GDT, limit: 31 }, TableRegister { base: IDT, limit: 0xfff })
}

/// A processor in 64-bit mode at `rip`, interrupts off.
pub(crate) fn long_mode(state: &mut X86State, id: u64, rip: u64) {
    state.cr0 = 0x8000_0031;
    state.cr3 = PAGE_TABLES;
    state.cr4 = 1 << 5 | 3 << 9;
    state.efer = 1 << 8 | 1 << 10;
    state.segments = [data_segment(); 6];
    state.segments[X86State::CS] = code64();
    (state.gdtr, state.idtr) = table_registers();
    state.regs[X86State::RSP] = STACK + (id + 1) * STACK_LEN;
    state.rip = rip;
    state.rflags = 2;
}

/// A processor in real mode at `address`, below 64 KiB.
pub(crate) fn real_mode(state: &mut X86State, address: u64) {
    let code = &mut state.segments[X86State::CS];
    code.selector = 0;
    code.base = 0;
    state.rip = address;
}

/// A rig whose first processor executes `listing` in 64-bit mode.
pub(crate) fn boot64(rig: &mut Rig, listing: impl FnOnce(&mut CodeAssembler) -> Asm) {
    write_tables(rig);
    let code = assemble(64, CODE, listing);
    rig.write(CODE, &code);
    rig.edit(0, |state| long_mode(state, 0, CODE));
}
