//! A guest whose address space looks like the host's arena, to run the same instruction in.

use crate::cases::Case;
use native_oracle::{CODE, End, Mode, NativeState, Outcome, SCRATCH, SCRATCH_LEN};
use x86_core::testing::{self, Machine};
use x86_core::{Flow, Seg, Trap, flags};

const PAGE_TABLE: u64 = 0x50_0000;
const CODE_PAGE: u64 = 0x51_0000;
const SCRATCH_PAGE: u64 = 0x52_0000;

pub(crate) struct Guest {
    machine: Machine,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let mut machine = Machine::user();
        // Nothing is mapped but the two pages of the arena.
        for slot in 0..512 {
            for table in 1..6 {
                machine.poke(testing::PAGE_TABLES + table * 0x1000 + slot * 8, 0);
            }
            machine.poke(PAGE_TABLE + slot * 8, 0);
        }
        let directory = testing::PAGE_TABLES + 0x2000;
        machine.poke(testing::PAGE_TABLES + 0x1000, directory | 7);
        machine.poke(directory + (CODE >> 21 & 511) * 8, PAGE_TABLE | 7);
        machine.poke(PAGE_TABLE + (CODE >> 12 & 511) * 8, CODE_PAGE | 7);
        machine.poke(PAGE_TABLE + (SCRATCH >> 12 & 511) * 8, SCRATCH_PAGE | 7);
        machine.core().flush_tlb(false);
        Self { machine }
    }

    fn set_mode(&mut self, mode: Mode) {
        let cs = &mut self.machine.cpu.segments[Seg::Cs as usize];
        let attributes = match mode {
            Mode::Bits64 => 0x0a0fb,
            Mode::Bits32 => 0x0c0fb,
        };
        if cs.attributes != attributes {
            cs.attributes = attributes;
            self.machine.core().mode_changed();
        }
    }

    pub(crate) fn run(&mut self, case: &Case) -> Outcome {
        self.set_mode(case.mode);
        let machine = &mut self.machine;
        machine.memory.write(CODE_PAGE + (CODE & 0xfff), &case.bytes).expect("RAM");
        machine.memory.write(SCRATCH_PAGE, &case.state.scratch).expect("RAM");
        machine.cpu.regs = case.state.regs;
        machine.cpu.rip = CODE;
        machine.cpu.rflags = case.state.rflags & native_oracle::LOADABLE_FLAGS | flags::FIXED;
        let result = loop {
            match x86_interp::step(&mut machine.core()) {
                Ok(Flow::Again) => {}
                result => break result,
            }
        };
        let cpu = &machine.cpu;
        let end = match result {
            Ok(_) if cpu.rip == CODE + case.bytes.len() as u64 => End::Next,
            Ok(_) => End::Jumped(cpu.rip),
            Err(Trap::Exception(exception)) => End::Fault {
                signal: 0,
                vector: exception.vector,
                error: exception.error.unwrap_or(0).into(),
                address: exception.address,
                rip: cpu.rip,
            },
            Err(Trap::TripleFault) => panic!("{:x?}: triple fault", case.bytes),
        };
        let mut scratch = [0; SCRATCH_LEN];
        machine.memory.read(SCRATCH_PAGE, &mut scratch).expect("RAM");
        Outcome {
            state: NativeState { regs: cpu.regs, rflags: cpu.rflags, scratch, ..case.state.clone() },
            end,
        }
    }
}
