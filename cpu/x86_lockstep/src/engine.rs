//! The two processors, and how they go on together.

use crate::memory::Memories;
use crate::replay::{Log, Recorder, Replayer};
use crate::report::{Mismatch, Trace};
use crate::state;
use guest_memory::{GuestMemory, MemoryError};
use iced_x86::{Decoder, Instruction, OpKind};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use x86_core::{Core, Cpu, Flow, Platform, Trap, reg};
use x86_translate::{Exit, Translator, TranslatorVcpu};

/// Instructions that T0 takes for a round at most: blocks have up to 64, and T1 goes from one to the next where
/// it checks each access by itself.
const MOST_STEPS: usize = 4096;
/// Pauses of string instructions in a block at most.
const MOST_PAUSES: usize = 1 << 22;
/// Blocks between comparisons of the pages that T0 stored to, and of all memory.
const PAGES_EVERY: u64 = 1 << 13;
const ALL_EVERY: u64 = 1 << 23;
/// Rounds that a report names.
const HISTORY: usize = 16;

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
pub enum Stop {
    /// What the run loop asked for came to a trap, on both processors alike; or a triple fault.
    #[error("trap: {0:?}")]
    Trap(Trap),
    /// The processors differ.
    #[error(transparent)]
    Mismatch(Box<Mismatch>),
}

/// What was compared so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// T1's blocks, or instructions that it left to its interpreter outside of blocks.
    pub blocks: u64,
    /// T0's instructions.
    pub instructions: u64,
    /// Interrupts, exceptions and other things that the run loop did.
    pub deliveries: u64,
    /// Blocks that were not compared, as a device wrote memory meanwhile.
    pub races: u64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} blocks, {} instructions and {} deliveries compared, no mismatch",
            self.blocks, self.instructions, self.deliveries
        )?;
        match self.races {
            0 => Ok(()),
            races => write!(f, " ({races} blocks not compared: devices wrote meanwhile)"),
        }
    }
}

/// Where a round of T1 began and ended.
#[derive(Debug, Clone, Copy)]
struct Round {
    from: u64,
    to: u64,
    cpl: u8,
}

/// A vCPU that runs translated code and compares it with the interpreter. There can be only one in a VM.
pub struct Lockstep {
    t1: TranslatorVcpu,
    t0: Box<Cpu>,
    memory: Memories,
    log: Log,
    /// Whether T0 has T1's state, and its memory what the real one has.
    in_step: bool,
    trace: Vec<Trace>,
    history: VecDeque<Round>,
    summary: Summary,
    /// What tests do to T1 after each block.
    #[cfg(test)]
    pub(crate) fault: Option<crate::tests::Fault>,
}

impl Lockstep {
    /// A vCPU in the state `cpu`. `translator`, whose options must be strict, is that of `memory`; the hook of
    /// devices' writes becomes this vCPU's.
    ///
    /// # Errors
    /// [`MemoryError`] if the host has no memory for a copy of the VM's.
    pub fn new(
        memory: &GuestMemory,
        translator: &Arc<Translator>,
        cpu: Box<Cpu>,
    ) -> Result<Self, MemoryError> {
        let mut t0 = Cpu::new(cpu.model.clone(), cpu.apic_id);
        t0.lock_needed = cpu.lock_needed;
        Ok(Self {
            t1: TranslatorVcpu::new(translator, cpu),
            t0,
            memory: Memories::new(memory)?,
            log: Log::default(),
            in_step: false,
            trace: Vec::new(),
            history: VecDeque::new(),
            summary: Summary::default(),
            #[cfg(test)]
            fault: None,
        })
    }

    /// The processor: T1's.
    pub fn cpu(&self) -> &Cpu {
        self.t1.cpu()
    }

    /// The processor, for those who want its place: what is changed through this is a mismatch.
    pub fn cpu_mut(&mut self) -> &mut Cpu {
        self.t1.cpu_mut()
    }

    /// The processor with its surroundings, to do what is not to be compared: load a state, reset.
    pub fn core<'a>(&'a mut self, platform: &'a dyn Platform) -> Core<'a> {
        self.in_step = false;
        self.t1.core(platform)
    }

    /// What was compared so far.
    pub fn summary(&self) -> Summary {
        self.summary
    }

    /// Does something to both processors, and compares what comes of it.
    ///
    /// # Errors
    /// [`Stop::Trap`] if that is what `act` returned for both.
    pub fn act(
        &mut self,
        platform: &dyn Platform,
        act: &mut dyn FnMut(&mut Core<'_>) -> Result<(), Trap>,
    ) -> Result<(), Stop> {
        self.begin(platform);
        self.summary.deliveries += 1;
        let recorder = recorder(&self.log, &self.memory, platform);
        let result = act(&mut self.t1.core(&recorder));
        self.share_marks();
        let replayer = Replayer { inner: platform, log: &self.log, memory: &self.memory };
        let copied = act(&mut Core { cpu: &mut self.t0, memory: &self.memory.copy, platform: &replayer });
        let mut differences = Vec::new();
        if result != copied {
            differences.push(format!("result: T1 {result:?}, T0 {copied:?}"));
        }
        if !state::equal(self.t1.cpu(), &self.t0) {
            differences.extend(state::differences(self.t1.cpu(), &self.t0));
        }
        differences.extend(self.log.divergence());
        differences.extend(self.log.left());
        self.end(platform, differences)?;
        result.map_err(Stop::Trap)
    }

    /// Runs until the exit flag is set, the processor halts, or `ready` says so of it, which is asked between
    /// blocks.
    ///
    /// # Errors
    /// A triple fault, or a mismatch.
    pub fn run(&mut self, platform: &dyn Platform, ready: &dyn Fn(&Cpu) -> bool) -> Result<(), Stop> {
        loop {
            let cpu = self.t1.cpu();
            if cpu.exit_request.load(Ordering::Acquire) != 0 || cpu.halted || ready(cpu) {
                return Ok(());
            }
            self.round(platform)?;
        }
    }

    /// Compares all memory, and gives what was compared in all.
    ///
    /// # Errors
    /// A mismatch.
    pub fn finish(&mut self) -> Result<Summary, Box<Mismatch>> {
        if self.in_step {
            self.memory.check_all().map_err(|differences| self.mismatch(differences))?;
        }
        Ok(self.summary)
    }

    /// One block.
    fn round(&mut self, platform: &dyn Platform) -> Result<(), Stop> {
        self.begin(platform);
        let from = self.t1.cpu().rip;
        let recorder = recorder(&self.log, &self.memory, platform);
        let result = self.t1.run_block(&recorder);
        #[cfg(test)]
        if let Some(fault) = &mut self.fault {
            fault(&mut self.t1.core(platform));
        }
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        let cpu = self.t1.cpu();
        self.history.push_back(Round { from, to: cpu.rip, cpl: cpu.cpl });
        if matches!(result, Ok(Some(Exit::Requested))) && self.has_arrived() {
            // It was asked to stop before it began.
            return Ok(());
        }
        self.share_marks();
        let differences = self.follow(platform, result.is_err());
        self.summary.blocks += 1;
        self.end(platform, differences)?;
        let checked = if self.summary.blocks.is_multiple_of(ALL_EVERY) {
            self.memory.check_all()
        } else if self.summary.blocks.is_multiple_of(PAGES_EVERY) {
            self.memory.check_touched()
        } else {
            Ok(())
        };
        checked.map_err(|differences| Stop::Mismatch(self.mismatch(differences)))?;
        result.map(|_| ()).map_err(Stop::Trap)
    }

    fn begin(&mut self, platform: &dyn Platform) {
        if self.in_step {
            self.memory.take_device_writes();
        } else {
            self.synchronise(platform);
        }
        self.log.clear();
        self.trace.clear();
    }

    /// Makes T0 as T1.
    fn synchronise(&mut self, platform: &dyn Platform) {
        self.memory.synchronise();
        state::copy(self.t1.cpu(), &mut self.t0);
        let mut core = Core { cpu: &mut self.t0, memory: &self.memory.copy, platform };
        core.flush_all_tlbs();
        core.mode_changed();
        self.in_step = true;
    }

    /// Deals with what was found to differ, and compares what T0 stored.
    fn end(&mut self, platform: &dyn Platform, mut differences: Vec<String>) -> Result<(), Stop> {
        if !self.log.marks.get_mut().is_empty() {
            self.share_marks();
        }
        let stores = self.memory.check_stores();
        // If T0 did something else altogether, so did its stores.
        if let (Err(stores), true) = (stores, differences.is_empty()) {
            differences = stores;
        }
        if differences.is_empty() {
            return Ok(());
        }
        if self.memory.devices_write() {
            self.summary.races += 1;
            self.synchronise(platform);
            return Ok(());
        }
        Err(Stop::Mismatch(self.mismatch(differences)))
    }

    fn share_marks(&mut self) {
        let marks = self.log.marks.get_mut();
        if !marks.is_empty() {
            self.memory.share_marks(marks);
        }
    }

    fn mismatch(&self, mut differences: Vec<String>) -> Box<Mismatch> {
        differences.truncate(64);
        let executed = self.trace.iter().map(ToString::to_string).collect();
        let line = |round: &Round| format!("{:#x} -> {:#x} (CPL {})", round.from, round.to, round.cpl);
        let history = self.history.iter().map(line).collect();
        Box::new(Mismatch { differences, executed, history, blocks: self.summary.blocks })
    }

    /// Has T0 execute until it is where T1 is. Gives what differs if it does not get there.
    fn follow(&mut self, platform: &dyn Platform, triple_fault: bool) -> Vec<String> {
        let paused = self.t1.paused();
        // What differed when T0 was first at T1's RIP.
        let mut first = None;
        let (mut steps, mut pauses) = (0, 0);
        let mut divergence = None;
        while steps < MOST_STEPS && pauses < MOST_PAUSES {
            if paused && self.t0.rip == self.t1.cpu().rip {
                self.step_to_pause(platform);
                self.summary.instructions += 1;
                return match self.has_arrived() {
                    true => Vec::new(),
                    false => self.differences(),
                };
            }
            let (flow, exception) = self.step(platform);
            match flow {
                Ok(Flow::Again) => pauses += 1,
                Ok(_) => steps += 1,
                Err(_) if triple_fault => return Vec::new(),
                Err(trap) => return vec![format!("T0 came to {trap:?}")],
            }
            if let (Some(vector), Some(last)) = (exception, self.trace.last_mut()) {
                last.exception = Some(vector);
            }
            if self.t0.rip == self.t1.cpu().rip {
                if self.has_arrived() {
                    self.summary.instructions += steps as u64;
                    return Vec::new();
                }
                if first.is_none() {
                    first = Some((self.differences(), self.trace.len()));
                }
            }
            divergence = self.log.divergence();
            if divergence.is_some() {
                break;
            }
        }
        let mut differences = Vec::new();
        match first {
            Some((found, length)) => {
                self.trace.truncate(length);
                differences.extend(found);
            }
            None => {
                differences.push(divergence.unwrap_or_else(|| "T0 does not come to where T1 is".into()));
                differences.extend(self.differences());
            }
        }
        differences
    }

    fn differences(&mut self) -> Vec<String> {
        let mut differences = state::differences(self.t1.cpu(), &self.t0);
        differences.extend(self.log.left());
        differences
    }

    /// Whether T0 is where T1 is.
    fn has_arrived(&mut self) -> bool {
        state::equal(self.t1.cpu(), &self.t0) && self.log.is_used_up()
    }

    /// One instruction of T0, and the delivery of its exception.
    fn step(&mut self, platform: &dyn Platform) -> (Result<Flow, Trap>, Option<u8>) {
        let replayer = Replayer { inner: platform, log: &self.log, memory: &self.memory };
        let mut core = Core { cpu: &mut self.t0, memory: &self.memory.copy, platform: &replayer };
        // Code in a device's registers is not looked at: that would be another access.
        let in_memory = core.fetch_physical().is_ok_and(|fetch| !fetch.host.is_null());
        let bytes = if in_memory { core.fetch_word().map_or(0, |(word, _)| word) } else { 0 };
        let (rip, bits) = (core.cpu.rip, core.code_size().bits());
        self.trace.push(Trace { rip, bytes, bits, exception: None });
        let mut result = x86_interp::step(&mut core);
        if result == Ok(Flow::Again) {
            // T1, whose stores are faster, did it in one go: even if it overwrites the instruction.
            let insn =
                Decoder::with_ip(bits, &bytes.to_le_bytes()[..15], rip, x86_interp::DECODER_OPTIONS).decode();
            for _ in 0..MOST_PAUSES {
                result = x86_interp::execute(&mut core, &insn);
                if result != Ok(Flow::Again) {
                    break;
                }
            }
            if result == Ok(Flow::Next) {
                // What ends with an instruction.
                core.cpu.rflags &= !x86_core::flags::RF;
                core.cpu.rip =
                    rip.wrapping_add(insn.len() as u64) & if bits == 64 { u64::MAX } else { 0xffff_ffff };
            }
        }
        match result {
            Err(trap) => {
                let vector = match trap {
                    Trap::Exception(exception) => Some(exception.vector),
                    Trap::TripleFault | Trap::Intercepted => None,
                };
                (core.deliver_trap(trap).map(|()| Flow::Jump), vector)
            }
            Ok(flow) => (Ok(flow), None),
        }
    }

    /// T1 paused in the repeated instruction that T0 is at: executes as many repetitions, even if they overwrite
    /// the instruction.
    fn step_to_pause(&mut self, platform: &dyn Platform) {
        let (rip, left) = (self.t0.rip, self.t1.cpu().regs[reg::RCX]);
        let Some(insn) = self.next_instruction(platform) else { return };
        let mask = count_mask(&insn);
        let count = (self.t0.regs[reg::RCX] & mask).wrapping_sub(left & mask) & mask;
        if count == 0 {
            return;
        }
        let rest = self.t0.regs[reg::RCX] & !mask;
        self.t0.regs[reg::RCX] = rest | count;
        // What begins with an instruction, as T1's run loop has it.
        self.t0.interrupt_shadow &= x86_core::shadow::NMI;
        if self.t0.dr[7] & 0xff == 0 {
            self.t0.rflags &= !x86_core::flags::RF;
        }
        for _ in 0..MOST_PAUSES {
            let replayer = Replayer { inner: platform, log: &self.log, memory: &self.memory };
            let mut core = Core { cpu: &mut self.t0, memory: &self.memory.copy, platform: &replayer };
            match x86_interp::execute(&mut core, &insn) {
                Ok(Flow::Again) => {}
                Ok(Flow::Next) if self.t0.regs[reg::RCX] & mask == 0 => {
                    self.t0.rip = rip;
                    self.t0.regs[reg::RCX] = self.t0.regs[reg::RCX] & !mask | left & mask;
                    return;
                }
                // T1 paused and this ended: they differ.
                _ => return,
            }
        }
    }

    /// The instruction at T0's RIP, which goes into the trace.
    fn next_instruction(&mut self, platform: &dyn Platform) -> Option<Instruction> {
        let mut core = Core { cpu: &mut self.t0, memory: &self.memory.copy, platform };
        let mut bytes = [0; 15];
        let (bits, rip) = (core.code_size().bits(), core.cpu.rip);
        let len = core.fetch(&mut bytes).ok()?;
        let mut word = [0; 16];
        word[..len].copy_from_slice(&bytes[..len]);
        self.trace.push(Trace { rip, bytes: u128::from_le_bytes(word), bits, exception: None });
        Some(Decoder::with_ip(bits, &bytes[..len], rip, x86_interp::DECODER_OPTIONS).decode())
    }
}

/// The bits of RCX that a string instruction counts with.
fn count_mask(insn: &Instruction) -> u64 {
    let kinds = (0..insn.op_count()).map(|operand| insn.op_kind(operand));
    let mut mask = u64::MAX;
    for kind in kinds {
        match kind {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => mask = 0xffff,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => mask = 0xffff_ffff,
            _ => {}
        }
    }
    mask
}

fn recorder<'a>(log: &'a Log, memory: &'a Memories, platform: &'a dyn Platform) -> Recorder<'a> {
    Recorder { inner: platform, log, memory: &memory.real, device_writes: &memory.device_writes }
}
