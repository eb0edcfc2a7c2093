//! MOVS, STOS, LODS, SCAS and CMPS with and without repeat prefixes (Intel SDM volume 2, REP).
//!
//! A repeated instruction works through runs that lie in one page at the speed of the host, falls back to
//! single elements elsewhere (devices, page crossings, downwards), and pauses with [`Flow::Again`] after a
//! bounded amount of work so that interrupts come in. Registers are kept up after every run: a fault leaves
//! them at the element that faulted.

mod host;

use crate::flags::{self, sub};
use crate::operand::{Width, numbered, segment, set_numbered};
use host::Span;
use iced_x86::{Instruction, OpKind};
use x86_core::flags::{DF, TF, ZF};
use x86_core::reg::{RAX, RCX, RDI, RSI};
use x86_core::{Core, Cpu, Flow, Seg, Trap};

/// Elements that are done in host speed before a pause, and those done one by one.
const FAST_ELEMENTS: u64 = 64 << 10;
const SLOW_COST: u64 = 64;

/// Until when a repetition goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Once,
    Count,
    WhileEqual,
    WhileUnequal,
}

/// What is the same for all iterations of one instruction.
#[derive(Clone, Copy)]
struct Plan {
    /// The source's segment; the destination's is ES.
    source: Seg,
    /// The bits of index registers and counter that the address size gives.
    mask: u64,
    down: bool,
    repeat: Repeat,
}

impl Plan {
    fn new(core: &Core<'_>, insn: &Instruction) -> Self {
        let memory = |kind| !matches!(kind, OpKind::Register);
        let kind = if memory(insn.op0_kind()) { insn.op0_kind() } else { insn.op1_kind() };
        let mask = match kind {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 0xffff,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 0xffff_ffff,
            _ => u64::MAX,
        };
        let repeat = if insn.has_repne_prefix() {
            Repeat::WhileUnequal
        } else if insn.has_rep_prefix() {
            Repeat::WhileEqual
        } else {
            Repeat::Once
        };
        let down = core.cpu.rflags & DF != 0;
        Self { source: segment(insn.memory_segment()), mask, down, repeat }
    }

    /// For instructions that compare nothing, either prefix just repeats.
    fn counted(mut self) -> Self {
        if self.repeat != Repeat::Once {
            self.repeat = Repeat::Count;
        }
        self
    }

    fn get(&self, cpu: &Cpu, register: usize) -> u64 {
        cpu.regs[register] & self.mask
    }

    fn set(&self, cpu: &mut Cpu, register: usize, value: u64) {
        match self.mask {
            0xffff => set_numbered::<u16>(cpu, register, value),
            mask => cpu.regs[register] = value & mask,
        }
    }

    /// Moves an index register over `count` elements.
    fn advance<W: Width>(&self, cpu: &mut Cpu, register: usize, count: u64) {
        let distance = count.wrapping_mul(W::BYTES as u64);
        let old = self.get(cpu, register);
        let new = if self.down { old.wrapping_sub(distance) } else { old.wrapping_add(distance) };
        self.set(cpu, register, new);
    }

    /// How many of `count` elements from `offset` on come before the offset wraps around.
    fn before_wrap<W: Width>(&self, offset: u64, count: u64) -> u64 {
        let room = (self.mask - offset).saturating_add(1) / W::BYTES as u64;
        room.min(count)
    }

    /// The host memory of as many whole elements as lie in one piece at `seg:offset`, at most `count`. None
    /// if there is not one such element.
    fn span<'m, W: Width>(
        &self,
        core: &mut Core<'m>,
        seg: Seg,
        offset: u64,
        count: u64,
        write: bool,
    ) -> Result<Option<Span<'m, W>>, Trap> {
        let count = self.before_wrap::<W>(offset, count);
        if self.down || count == 0 {
            return Ok(None);
        }
        Span::new(core, seg, offset, count, write)
    }
}

/// What one call of an iteration body did.
struct Progress {
    /// Elements done, at least 1.
    elements: u64,
    /// Whether they were done one by one.
    slow: bool,
    /// For comparing instructions: the flags after the last.
    flags: Option<u64>,
}

impl Progress {
    const ONE: Self = Self { elements: 1, slow: true, flags: None };

    fn fast(elements: usize) -> Self {
        Self { elements: elements as u64, slow: false, flags: None }
    }
}

/// Runs `body` (given the number of elements left) as the prefix says. `body` moves the index registers
/// itself; the counter and the flags are kept here.
#[inline(always)]
fn run(
    core: &mut Core<'_>,
    plan: Plan,
    mut body: impl FnMut(&mut Core<'_>, u64) -> Result<Progress, Trap>,
) -> Result<Flow, Trap> {
    if plan.repeat == Repeat::Once {
        let progress = body(core, 1)?;
        if let Some(after) = progress.flags {
            flags::set_all(core.cpu, after);
        }
        return Ok(Flow::Next);
    }
    let single = core.cpu.rflags & TF != 0;
    let mut budget = FAST_ELEMENTS;
    loop {
        let count = plan.get(core.cpu, RCX);
        if count == 0 {
            return Ok(Flow::Next);
        }
        if budget == 0 {
            return Ok(Flow::Again);
        }
        let limit = if single { 1 } else { count.min(budget) };
        let progress = body(core, limit)?;
        let left = count.wrapping_sub(progress.elements);
        plan.set(core.cpu, RCX, left);
        if let Some(after) = progress.flags {
            flags::set_all(core.cpu, after);
            if (plan.repeat == Repeat::WhileEqual) != (after & ZF != 0) {
                return Ok(Flow::Next);
            }
        }
        budget = match single {
            true => 0,
            false => budget.saturating_sub(progress.elements * if progress.slow { SLOW_COST } else { 1 }),
        };
    }
}

/// MOVS.
pub(crate) fn movs<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let plan = Plan::new(core, insn).counted();
    run(core, plan, |core, limit| {
        let (from, to) = (plan.get(core.cpu, RSI), plan.get(core.cpu, RDI));
        let mut progress = Progress::ONE;
        let mut done = false;
        if limit > 1
            && let Some(source) = plan.span::<W>(core, plan.source, from, limit, false)?
            && let Some(target) = plan.span::<W>(core, Seg::Es, to, source.len() as u64, true)?
        {
            progress = Progress::fast(target.copy_from(&source));
            done = true;
        }
        if !done {
            let value = core.read::<W>(plan.source, from)?;
            core.write::<W>(Seg::Es, to, value)?;
        }
        plan.advance::<W>(core.cpu, RSI, progress.elements);
        plan.advance::<W>(core.cpu, RDI, progress.elements);
        Ok(progress)
    })
}

/// STOS.
pub(crate) fn stos<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let plan = Plan::new(core, insn).counted();
    let value = W::of(core.cpu.regs[RAX]);
    run(core, plan, |core, limit| {
        let to = plan.get(core.cpu, RDI);
        let mut progress = Progress::ONE;
        let span = if limit > 1 { plan.span::<W>(core, Seg::Es, to, limit, true)? } else { None };
        match span {
            Some(target) => progress = Progress::fast(target.fill(value)),
            None => core.write::<W>(Seg::Es, to, value)?,
        }
        plan.advance::<W>(core.cpu, RDI, progress.elements);
        Ok(progress)
    })
}

/// LODS.
pub(crate) fn lods<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let plan = Plan::new(core, insn).counted();
    run(core, plan, |core, _| {
        let value = core.read::<W>(plan.source, plan.get(core.cpu, RSI))?;
        set_numbered::<W>(core.cpu, RAX, value.wide());
        plan.advance::<W>(core.cpu, RSI, 1);
        Ok(Progress::ONE)
    })
}

/// SCAS.
pub(crate) fn scas<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let plan = Plan::new(core, insn);
    let key = W::of(numbered::<W>(core.cpu, RAX));
    run(core, plan, |core, limit| {
        let from = plan.get(core.cpu, RDI);
        let mut progress = Progress::ONE;
        let span = if limit > 1 { plan.span::<W>(core, Seg::Es, from, limit, false)? } else { None };
        let last = match span {
            Some(span) => {
                let (elements, last) = span.scan(key, plan.repeat == Repeat::WhileEqual);
                progress = Progress::fast(elements);
                last
            }
            None => core.read::<W>(Seg::Es, from)?,
        };
        progress.flags = Some(sub::<W>(key.wide(), last.wide(), 0).1);
        plan.advance::<W>(core.cpu, RDI, progress.elements);
        Ok(progress)
    })
}

/// CMPS.
pub(crate) fn cmps<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let plan = Plan::new(core, insn);
    run(core, plan, |core, limit| {
        let (from, to) = (plan.get(core.cpu, RSI), plan.get(core.cpu, RDI));
        let mut progress = Progress::ONE;
        let mut fast = None;
        if limit > 1
            && let Some(a) = plan.span::<W>(core, plan.source, from, limit, false)?
            && let Some(b) = plan.span::<W>(core, Seg::Es, to, a.len() as u64, false)?
        {
            fast = Some(a.compare(&b, plan.repeat == Repeat::WhileEqual));
        }
        let (a, b) = match fast {
            Some((elements, a, b)) => {
                progress = Progress::fast(elements);
                (a, b)
            }
            None => {
                let b = core.read::<W>(Seg::Es, to)?;
                (core.read::<W>(plan.source, from)?, b)
            }
        };
        progress.flags = Some(sub::<W>(a.wide(), b.wide(), 0).1);
        plan.advance::<W>(core.cpu, RSI, progress.elements);
        plan.advance::<W>(core.cpu, RDI, progress.elements);
        Ok(progress)
    })
}
