//! A small machine for tests: some RAM, a platform that records, a processor in the mode of choice.
//!
//! In 64-bit mode the first 4 GiB are mapped one to one by 2 MiB pages that user code may access; the GDT,
//! the IDT, a TSS and a handler for each vector are in place (see the constants).

use crate::cpuid::CpuModel;
use crate::{Core, Cpu, Platform, Seg, Segment, TableRegister, cr0, cr4, efer, reg};
use guest_memory::GuestMemory;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes of RAM, from guest physical address 0.
pub const RAM: u64 = 16 << 20;
/// The level-4 page table; five more tables follow it.
pub const PAGE_TABLES: u64 = 0x1000;
/// The GDT, with room for 256 entries.
pub const GDT: u64 = 0x8000;
/// The IDT.
pub const IDT: u64 = 0x9000;
/// The 64-bit TSS: RSP0 is [`KERNEL_STACK`], IST1 [`IST1_STACK`].
pub const TSS: u64 = 0xa000;
/// The handlers: vector `n` at `HANDLERS + 16 * n`, each a HLT.
pub const HANDLERS: u64 = 0xb000;
/// Where RSP starts.
pub const STACK: u64 = 0x10_0000;
/// RSP0 of the TSS.
pub const KERNEL_STACK: u64 = 0x18_0000;
/// IST1 of the TSS; no vector uses it from the start.
pub const IST1_STACK: u64 = 0x1c_0000;
/// Where RIP starts.
pub const CODE: u64 = 0x20_0000;
/// For data of the test.
pub const DATA: u64 = 0x40_0000;
/// Nothing is there: accesses from here on are MMIO.
pub const MMIO: u64 = 0xd000_0000;

/// Selectors of the GDT.
pub mod selector {
    #![allow(missing_docs)]
    pub const CODE64: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const USER_CODE32: u16 = 0x1b;
    pub const USER_DATA: u16 = 0x23;
    pub const USER_CODE64: u16 = 0x2b;
    pub const TSS: u16 = 0x30;
    pub const CODE32: u16 = 0x40;
    pub const CODE16: u16 = 0x48;
    pub const DATA16: u16 = 0x50;
    /// The first entry that is free.
    pub const FREE: u16 = 0x58;
}

/// A platform whose ports and MMIO are plain storage, and whose clock the test sets.
#[derive(Debug, Default)]
pub struct FlatPlatform {
    /// Bytes of MMIO that were written.
    pub mmio: RefCell<HashMap<u64, u8>>,
    /// Every MMIO and port access: whether it was a write, address, data.
    pub log: RefCell<Vec<(bool, u64, Vec<u8>)>>,
    /// Bytes of ports that were written.
    pub ports: RefCell<HashMap<u16, u8>>,
    /// The time-stamp counter; every reading adds one.
    pub clock: Cell<u64>,
    /// What the clock is more than the host's counter, for code that reads that itself.
    pub host_tsc_offset: Option<u64>,
    /// CR8.
    pub priority: Cell<u8>,
    /// APIC MSRs that exist.
    pub apic: RefCell<HashMap<u32, u64>>,
}

impl Platform for FlatPlatform {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        let mmio = self.mmio.borrow();
        for (byte, at) in data.iter_mut().zip(gpa..) {
            *byte = mmio.get(&at).copied().unwrap_or(0xff);
        }
        self.log.borrow_mut().push((false, gpa, data.to_vec()));
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.mmio.borrow_mut().extend((gpa..).zip(data.iter().copied()));
        self.log.borrow_mut().push((true, gpa, data.to_vec()));
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        let ports = self.ports.borrow();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = ports.get(&port.wrapping_add(index as u16)).copied().unwrap_or(0xff);
        }
        self.log.borrow_mut().push((false, u64::from(port), data.to_vec()));
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        let mut ports = self.ports.borrow_mut();
        for (index, &byte) in data.iter().enumerate() {
            ports.insert(port.wrapping_add(index as u16), byte);
        }
        self.log.borrow_mut().push((true, u64::from(port), data.to_vec()));
    }

    fn tsc(&self) -> u64 {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }

    fn host_tsc_offset(&self) -> Option<u64> {
        self.host_tsc_offset
    }

    fn tsc_hertz(&self) -> u64 {
        1_000_000_000
    }

    fn cr8(&self) -> u8 {
        self.priority.get()
    }

    fn set_cr8(&self, priority: u8) {
        self.priority.set(priority);
    }

    fn apic_msr(&self, msr: u32) -> Option<u64> {
        self.apic.borrow().get(&msr).copied()
    }

    fn set_apic_msr(&self, msr: u32, value: u64) -> Option<()> {
        *self.apic.borrow_mut().get_mut(&msr)? = value;
        Some(())
    }
}

/// A machine.
pub struct Machine {
    /// Its RAM.
    pub memory: GuestMemory,
    /// Its processor.
    pub cpu: Box<Cpu>,
    /// Everything else.
    pub platform: FlatPlatform,
}

/// A descriptor's 8 bytes from base, limit (20 bits) and attributes as [`Segment::attributes`] has them.
pub fn descriptor(base: u32, limit: u32, attributes: u32) -> u64 {
    let (base, limit, attributes) = (u64::from(base), u64::from(limit), u64::from(attributes));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | (attributes & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | (attributes >> 12 & 0xf) << 52
        | (base >> 24) << 56
}

impl Machine {
    /// A processor after power-up, in real mode.
    ///
    /// # Panics
    /// If the host has no 16 MiB for it.
    pub fn reset() -> Self {
        let memory = GuestMemory::new(std::slice::from_ref(&(0..RAM))).expect("RAM for a test");
        let model = Arc::new(CpuModel::by_name("max").expect("the model exists"));
        let cpu = Cpu::new(model, 0);
        Self { memory, cpu, platform: FlatPlatform::default() }
    }

    /// Real mode with code at `CODE & 0xffff`-like low addresses: all segments based at 0, SP 0x7000, IP
    /// 0x7c00.
    pub fn real() -> Self {
        let mut machine = Self::reset();
        machine.cpu.segments[Seg::Cs as usize].base = 0;
        machine.cpu.segments[Seg::Cs as usize].selector = 0;
        machine.cpu.rip = 0x7c00;
        machine.cpu.regs[reg::RSP] = 0x7000;
        machine.core().mode_changed();
        machine
    }

    /// 64-bit mode at CPL 0.
    pub fn long() -> Self {
        let mut machine = Self::reset();
        machine.write_page_tables();
        machine.write_tables(true);
        let cpu = &mut *machine.cpu;
        cpu.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
        cpu.cr3 = PAGE_TABLES;
        cpu.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        cpu.msrs.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        machine.enter(selector::CODE64, 0x0a09b, selector::DATA, 0x0c093, 0);
        machine
    }

    /// 64-bit mode at CPL 3.
    pub fn user() -> Self {
        let mut machine = Self::long();
        machine.enter(selector::USER_CODE64, 0x0a0fb, selector::USER_DATA, 0x0c0f3, 3);
        machine
    }

    /// 32-bit protected mode at CPL 0 without paging; the IDT has 32-bit gates.
    pub fn protected() -> Self {
        let mut machine = Self::reset();
        machine.write_tables(false);
        machine.cpu.cr0 = cr0::PE | cr0::ET | cr0::NE;
        machine.enter(selector::CODE32, 0x0c09b, selector::DATA, 0x0c093, 0);
        machine
    }

    fn enter(&mut self, code: u16, code_attributes: u32, data: u16, data_attributes: u32, cpl: u8) {
        let cpu = &mut *self.cpu;
        let segment = |selector, attributes| Segment { base: 0, limit: 0xffff_ffff, attributes, selector };
        cpu.segments = [segment(data, data_attributes); 6];
        cpu.segments[Seg::Cs as usize] = segment(code, code_attributes);
        cpu.tr = Segment { base: TSS, limit: 0x67, attributes: 0x8b, selector: selector::TSS };
        cpu.ldtr = Segment { attributes: Segment::UNUSABLE, ..Segment::default() };
        cpu.gdtr = TableRegister { base: GDT, limit: 0xfff };
        cpu.idtr = TableRegister { base: IDT, limit: 0xfff };
        cpu.cpl = cpl;
        cpu.rip = CODE;
        cpu.regs[reg::RSP] = STACK;
        self.core().mode_changed();
    }

    /// Writes a 64-bit word of RAM.
    ///
    /// # Panics
    /// If there is no RAM.
    pub fn poke(&self, gpa: u64, value: u64) {
        self.memory.write(gpa, &value.to_le_bytes()).expect("RAM");
    }

    /// Reads a 64-bit word of RAM.
    ///
    /// # Panics
    /// If there is no RAM.
    pub fn peek(&self, gpa: u64) -> u64 {
        let mut data = [0; 8];
        self.memory.read(gpa, &mut data).expect("RAM");
        u64::from_le_bytes(data)
    }

    fn write_page_tables(&self) {
        self.poke(PAGE_TABLES, PAGE_TABLES + 0x1007);
        for gigabyte in 0..4 {
            let directory = PAGE_TABLES + 0x2000 + gigabyte * 0x1000;
            self.poke(PAGE_TABLES + 0x1000 + gigabyte * 8, directory + 7);
            let entries = (0..512).flat_map(|index| (gigabyte << 30 | index << 21 | 0xe7u64).to_le_bytes());
            self.memory.write(directory, &entries.collect::<Vec<_>>()).expect("RAM");
        }
    }

    fn write_tables(&self, long: bool) {
        let gdt = [
            0,
            descriptor(0, 0xf_ffff, 0x0a09b),
            descriptor(0, 0xf_ffff, 0x0c093),
            descriptor(0, 0xf_ffff, 0x0c0fb),
            descriptor(0, 0xf_ffff, 0x0c0f3),
            descriptor(0, 0xf_ffff, 0x0a0fb),
            descriptor(TSS as u32, 0x67, 0x8b),
            0,
            descriptor(0, 0xf_ffff, 0x0c09b),
            descriptor(0, 0xffff, 0x9b),
            descriptor(0, 0xffff, 0x93),
        ];
        for (index, entry) in gdt.into_iter().enumerate() {
            self.poke(GDT + 8 * index as u64, entry);
        }
        for vector in 0..256 {
            let handler = HANDLERS + vector * 16;
            self.memory.write(handler, &[0xf4]).expect("RAM");
            if long {
                self.gate64(vector as u8, selector::CODE64, handler, 0xe, 0, 0);
            } else {
                let code = u64::from(selector::CODE32);
                let gate = handler & 0xffff | code << 16 | 0x8e00 << 32 | (handler >> 16) << 48;
                self.poke(IDT + vector * 8, gate);
            }
        }
        // The port bitmap begins past the limit: user code has no ports.
        self.memory.write(TSS + 0x66, &0x68u16.to_le_bytes()).expect("RAM");
        if long {
            self.poke(TSS + 4, KERNEL_STACK);
            self.poke(TSS + 0x24, IST1_STACK);
        } else {
            self.poke(TSS + 4, KERNEL_STACK | u64::from(selector::DATA) << 32);
        }
    }

    /// Writes a 64-bit IDT gate: `kind` is 0xe for an interrupt gate, 0xf for a trap gate.
    pub fn gate64(&self, vector: u8, selector: u16, handler: u64, kind: u64, dpl: u64, ist: u64) {
        let low = handler & 0xffff
            | u64::from(selector) << 16
            | ist << 32
            | (0x80 | dpl << 5 | kind) << 40
            | (handler >> 16 & 0xffff) << 48;
        self.poke(IDT + u64::from(vector) * 16, low);
        self.poke(IDT + u64::from(vector) * 16 + 8, handler >> 32);
    }

    /// The processor at work.
    pub fn core(&mut self) -> Core<'_> {
        Core { cpu: &mut self.cpu, memory: &self.memory, platform: &self.platform }
    }

    /// Writes `code` at CS:RIP (without translation: physical addresses).
    ///
    /// # Panics
    /// If there is no RAM.
    pub fn load(&self, code: &[u8]) {
        let base = self.cpu.segments[Seg::Cs as usize].base;
        self.memory.write(base + self.cpu.rip, code).expect("RAM");
    }
}
