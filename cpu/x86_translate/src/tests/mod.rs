//! Translated code against the interpreter.

mod counted;
mod differential;
mod generate;
mod hostile;
mod programs;
mod segments;
mod svm;
mod tables;

use crate::{Exit, Options, Translator, TranslatorVcpu};
use iced_x86::RflagsBits;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use x86_core::testing::{FlatPlatform, Machine};
use x86_core::{Cpu, Flow, VecReg, flags};

/// A machine whose processor runs translated code.
pub(crate) struct Translated {
    pub(crate) memory: guest_memory::GuestMemory,
    pub(crate) platform: FlatPlatform,
    pub(crate) vcpu: TranslatorVcpu,
    pub(crate) translator: Arc<Translator>,
}

/// Arithmetic flags in RFLAGS, of the decoder's bits for them.
pub(crate) fn rflags(bits: u32) -> u64 {
    let pairs = [
        (RflagsBits::OF, flags::OF),
        (RflagsBits::SF, flags::SF),
        (RflagsBits::ZF, flags::ZF),
        (RflagsBits::AF, flags::AF),
        (RflagsBits::CF, flags::CF),
        (RflagsBits::PF, flags::PF),
    ];
    pairs.into_iter().filter(|(bit, _)| bits & bit != 0).fold(0, |all, (_, flag)| all | flag)
}

pub(crate) fn options() -> Options {
    Options { cache_bytes: 8 << 20, ..Options::default() }
}

impl Translated {
    pub(crate) fn new(machine: Machine, options: &Options) -> Self {
        let Machine { memory, cpu, platform } = machine;
        let translator = Translator::new(memory.clone(), options).expect("a code cache");
        memory.set_code_hook(translator.clone());
        let vcpu = TranslatorVcpu::new(&translator, cpu);
        Self { memory, platform, vcpu, translator }
    }

    /// Has runs stop at these linear addresses.
    pub(crate) fn set_breakpoints(&mut self, addresses: &[u64]) {
        self.translator.set_breakpoints(addresses.iter().copied());
        self.vcpu.set_breakpoints(addresses.to_vec());
        // All were asked to leave generated code.
        self.vcpu.cpu().exit_request.store(0, Ordering::Relaxed);
    }

    /// Runs until HLT.
    pub(crate) fn run(&mut self) {
        match self.vcpu.run(&self.platform) {
            Ok(Exit::Halt) => {}
            other => panic!("{other:?} at {:#x}", self.vcpu.cpu().rip),
        }
    }
}

/// Runs the interpreter until HLT, delivering exceptions; gives the number of instructions.
pub(crate) fn interpret(machine: &mut Machine, limit: usize) -> usize {
    for count in 1..=limit {
        match x86_interp::step(&mut machine.core()) {
            Ok(Flow::Halt) => return count,
            Ok(_) => {}
            Err(trap) => machine.core().deliver_trap(trap).expect("no triple fault"),
        }
    }
    panic!("no HLT after {limit} instructions, at {:#x}", machine.cpu.rip);
}

/// A copy of the general state: registers, RIP, RFLAGS, vectors, MXCSR, x87.
#[derive(PartialEq, Clone)]
pub(crate) struct State {
    pub(crate) regs: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) vectors: [VecReg; 32],
    pub(crate) opmask: [u64; 8],
    pub(crate) mxcsr: u32,
    pub(crate) x87: Vec<u8>,
}

impl State {
    pub(crate) fn of(cpu: &Cpu) -> Self {
        Self {
            regs: cpu.regs,
            rip: cpu.rip,
            rflags: cpu.rflags,
            vectors: cpu.vectors,
            opmask: cpu.opmask,
            mxcsr: cpu.mxcsr,
            x87: cpu.x87.0.to_vec(),
        }
    }

    /// What differs, in words.
    pub(crate) fn differences(&self, other: &Self, ignored_flags: u64) -> Vec<String> {
        let mut list = vec![];
        for index in 0..16 {
            if self.regs[index] != other.regs[index] {
                list.push(format!("r{index}: {:#x} is {:#x}", self.regs[index], other.regs[index]));
            }
        }
        for (index, (a, b)) in self.vectors.iter().zip(&other.vectors).enumerate() {
            if a != b {
                list.push(format!("vector {index}: {:02x?} is {:02x?}", a.0, b.0));
            }
        }
        if self.opmask != other.opmask {
            list.push(format!("mask registers: {:x?} is {:x?}", self.opmask, other.opmask));
        }
        if self.rip != other.rip {
            list.push(format!("rip: {:#x} is {:#x}", self.rip, other.rip));
        }
        if (self.rflags ^ other.rflags) & !ignored_flags != 0 {
            list.push(format!("rflags: {:#x} is {:#x}", self.rflags, other.rflags));
        }
        for (index, (a, b)) in self.x87.chunks(8).zip(other.x87.chunks(8)).enumerate() {
            if a != b {
                list.push(format!("x87 image at {}: {a:x?} is {b:x?}", index * 8));
            }
        }
        if self.mxcsr != other.mxcsr {
            list.push(format!("mxcsr: {:#x} is {:#x}", self.mxcsr, other.mxcsr));
        }
        list
    }
}
