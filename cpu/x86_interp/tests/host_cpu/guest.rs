//! A guest whose address space looks like the host's arena, to run the same instruction in.

use crate::cases::Case;
use native_oracle::{CODE, End, Mode, NativeState, Outcome, SCRATCH, SCRATCH_LEN};
use x86_core::testing::{self, Machine};
use x86_core::{Flow, Seg, Segment, Trap, cr4, flags};

const PAGE_TABLE: u64 = 0x50_0000;
const CODE_PAGE: u64 = 0x51_0000;
const SCRATCH_PAGE: u64 = 0x52_0000;

pub(crate) struct Guest {
    machine: Machine,
    mode: Option<Mode>,
    /// ES, CS, SS, DS, FS and GS of 64-bit code, if they count.
    selectors: Option<[u16; 6]>,
}

fn segment(base: u64, limit: u32, attributes: u32) -> Segment {
    Segment { base, limit, attributes, selector: 3 }
}

impl Guest {
    pub(crate) fn new() -> Self {
        let mut machine = Machine::user();
        // Nothing is mapped but the two pages of the arena.
        for slot in 0..512 {
            for table in 1..6 {
                machine.poke(testing::PAGE_TABLES + table * 0x1000 + slot * 8, 0);
            }
        }
        let directory = testing::PAGE_TABLES + 0x2000;
        for (address, page, table) in
            [(CODE, CODE_PAGE, PAGE_TABLE), (SCRATCH, SCRATCH_PAGE, PAGE_TABLE + 0x1000)]
        {
            let directory = directory + (address >> 30) * 0x1000;
            machine.poke(testing::PAGE_TABLES + 0x1000 + (address >> 30) * 8, directory | 7);
            machine.poke(directory + (address >> 21 & 511) * 8, table | 7);
            machine.poke(table + (address >> 12 & 511) * 8, page | 7);
        }
        machine.cpu.cr4 |= cr4::FSGSBASE | cr4::OSXSAVE;
        machine.core().flush_tlb(false);
        Self { machine, mode: None, selectors: None }
    }

    /// Gives 64-bit code the descriptors and the selectors that Linux gives it.
    pub(crate) fn make_linux_segments(&mut self) {
        let descriptors: [u64; 5] = [
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
        ];
        for (index, descriptor) in (2..).zip(descriptors) {
            self.machine.poke(testing::GDT + 8 * index, descriptor);
        }
        // The table is for the supervisor, beyond what other instructions reach.
        let linear = SCRATCH + 0x2_0000;
        self.machine.poke(PAGE_TABLE + 0x1000 + (linear >> 12 & 511) * 8, testing::GDT | 3);
        self.machine.cpu.gdtr.base = linear;
        self.machine.core().flush_tlb(false);
        self.selectors = Some([0, 0x33, 0x2b, 0, 0, 0]);
    }

    fn set_mode(&mut self, mode: Mode) {
        if self.mode == Some(mode) && self.selectors.is_none() {
            return;
        }
        self.mode = Some(mode);
        let (code, data) = match mode {
            Mode::Bits64 => (segment(0, u32::MAX, 0x0a0fb), segment(0, u32::MAX, 0x0c0f3)),
            Mode::Bits32 => (segment(0, u32::MAX, 0x0c0fb), segment(0, u32::MAX, 0x0c0f3)),
            Mode::Bits16 => {
                (segment(CODE & !0xfff, 0xffff, 0xfb), segment(SCRATCH, SCRATCH_LEN as u32 - 1, 0xf3))
            }
        };
        self.machine.cpu.segments = [data; 6];
        self.machine.cpu.segments[Seg::Cs as usize] = code;
        if let Some(selectors) = self.selectors {
            for (segment, selector) in self.machine.cpu.segments.iter_mut().zip(selectors) {
                segment.selector = selector;
            }
        }
        self.machine.core().mode_changed();
    }

    /// Sets what RDPID gives.
    pub(crate) fn set_processor_number(&mut self, number: u64) {
        self.machine.cpu.msrs.tsc_aux = number;
    }

    /// Sets what XGETBV gives.
    pub(crate) fn set_xcr0(&mut self, xcr0: u64) {
        self.machine.cpu.xcr0 = xcr0;
    }

    /// Executes the instruction of `case`.
    pub(crate) fn run(&mut self, case: &Case) -> Outcome {
        self.run_all(case, 1)
    }

    /// Executes the code of `case`, which is `count` instructions.
    pub(crate) fn run_all(&mut self, case: &Case, count: usize) -> Outcome {
        self.set_mode(case.mode);
        let machine = &mut self.machine;
        machine.memory.write(CODE_PAGE + (CODE & 0xfff), &case.bytes).expect("RAM");
        machine.memory.write(SCRATCH_PAGE, &case.state.scratch).expect("RAM");
        machine.cpu.regs = case.state.regs;
        let start = case.mode.start();
        machine.cpu.rip = start;
        machine.cpu.rflags = case.state.rflags & native_oracle::LOADABLE_FLAGS | flags::FIXED | flags::IF;
        let mut left = count;
        let result = loop {
            match x86_interp::step(&mut machine.core()) {
                Ok(Flow::Again) => {}
                Ok(_) if left > 1 => left -= 1,
                result => break result,
            }
        };
        let cpu = &machine.cpu;
        let end = match result {
            Ok(_) if cpu.rip == start + case.bytes.len() as u64 => End::Next,
            Ok(_) => End::Jumped(cpu.rip),
            Err(Trap::Exception(exception)) => End::Fault {
                signal: 0,
                vector: exception.vector,
                error: exception.error.unwrap_or(0).into(),
                address: exception.address,
                rip: cpu.rip,
            },
            Err(trap) => panic!("{:x?}: {trap:?}", case.bytes),
        };
        let mut scratch = [0; SCRATCH_LEN];
        machine.memory.read(SCRATCH_PAGE, &mut scratch).expect("RAM");
        Outcome {
            state: NativeState { regs: cpu.regs, rflags: cpu.rflags, scratch, ..case.state.clone() },
            end,
        }
    }
}
