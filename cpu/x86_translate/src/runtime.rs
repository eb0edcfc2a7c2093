//! What generated code calls.

use crate::abi::calls::{Entries, InterpretInfo, MissInfo};
use crate::abi::layout::{ExitReason, FrameSwitch, IBTC_ENTRIES, JitVcpu};
use crate::guest::mode::Mode;
use iced_x86::{Instruction, OpKind};
use std::sync::atomic::Ordering;
use x86_core::{Core, Fill, Flow, Trap};

/// The functions of this module that generated code calls.
pub(crate) fn entries() -> Entries {
    Entries { miss: tlb_miss as *const () as u64, interpret: interpret as *const () as u64 }
}

/// Ends the process if a function here panics: there is no way to unwind through generated code.
struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl JitVcpu {
    /// Everything that an instruction needs to be executed.
    ///
    /// # Safety
    /// `memory` and `platform` must be valid, as they are while the vCPU runs.
    pub(crate) unsafe fn core(&mut self) -> Core<'_> {
        // SAFETY: as the caller says.
        unsafe {
            let platform = self.platform.expect("only called while the vCPU runs").as_ref();
            Core { cpu: &mut self.cpu, memory: &*self.memory, platform }
        }
    }

    /// Says what the count is, at an instruction that may look outside. `left` are the instructions from it on that its
    /// block has taken from the budget.
    pub(crate) fn at_instruction(&mut self, left: u8) {
        if self.counting
            && let Some(platform) = self.platform
        {
            let ahead = self.budget + i64::from(left);
            // SAFETY: the surroundings are valid while the vCPU runs.
            unsafe { platform.as_ref() }.at_instruction(self.count_end.wrapping_sub(ahead as u64));
        }
    }

    fn leave(&mut self, reason: ExitReason) -> u64 {
        self.exit_reason = reason as u32;
        0
    }

    /// What generated code relies on while it runs: when one of these changes it must be left.
    fn surroundings(&self) -> (u32, u64, u64, u64) {
        (
            Mode::of(&self.cpu).0,
            self.cpu.generation().all,
            self.invalidations.load(Ordering::Acquire),
            self.cpu.rflags & (x86_core::flags::IF | x86_core::flags::TF | x86_core::flags::RF),
        )
    }

    /// Executes one instruction, which leaves RIP where it goes on, and says where code goes on: at `resume` if
    /// that is the next instruction, or 0 to leave. `left` instructions of the block, from this one on, are not done
    /// yet: those that it is left before are given back to the budget.
    fn execute(
        &mut self,
        resume: u64,
        left: u8,
        execute: impl FnOnce(&mut Core<'_>) -> Result<Flow, Trap>,
    ) -> u64 {
        let before = self.surroundings();
        let (refund, rest) = (i64::from(left), i64::from(left) - 1);
        self.at_instruction(left);
        // SAFETY: generated code runs only while the vCPU does.
        let result = execute(&mut unsafe { self.core() });
        self.segments_changed();
        // Those in memory are what counts, wherever it goes on.
        self.flags_from_rflags();
        match result {
            Ok(Flow::Next) => {}
            Ok(Flow::Halt) => {
                self.budget += rest;
                return self.leave(ExitReason::Halt);
            }
            Ok(Flow::Jump) => {
                self.budget += rest;
                return self.chain(before.0, before.1);
            }
            Ok(Flow::Again) => {
                self.budget += refund;
                self.paused = true;
                return self.leave(ExitReason::Dispatch);
            }
            Err(trap) => {
                self.budget += refund;
                self.cpu.take_watch_met();
                self.trap = Some(trap);
                return self.leave(ExitReason::Trap);
            }
        }
        let stay = resume != 0
            && self.cpu.interrupt_shadow & !x86_core::shadow::NMI == 0
            && self.cpu.exit_request.load(Ordering::Relaxed) == 0
            && self.cpu.dr[7] & 0xff == 0
            && !self.cpu.is_watch_met()
            && before == self.surroundings();
        if !stay {
            self.budget += rest;
            return self.leave(ExitReason::Dispatch);
        }
        resume
    }

    /// Goes on at RIP, where a jump led, without leaving generated code if the block there is known.
    fn chain(&mut self, mode: u32, generation: u64) -> u64 {
        self.fpu_resume = false;
        let cpu = &mut self.cpu;
        let interruptible = self.interrupt_window && cpu.rflags & x86_core::flags::IF != 0;
        let now = Mode::of(cpu);
        let stay = cpu.exit_request.load(Ordering::Relaxed) == 0
            && !interruptible
            && !now.has(Mode::INTERPRETED)
            && cpu.interrupt_shadow & !x86_core::shadow::NMI == 0
            && cpu.rflags & x86_core::flags::TF == 0
            && cpu.dr[7] & 0xff == 0
            && !cpu.is_watch_met()
            && self.table_modes[now.table()] == now.0
            && Mode(mode).world() == now.world()
            && cpu.generation().all == generation;
        let rip = cpu.rip;
        let entry = &self.ibtc[now.table()][rip as usize & (IBTC_ENTRIES - 1)];
        if !stay || entry.va.load(Ordering::Relaxed) != self.tag(now) {
            return self.leave(ExitReason::Dispatch);
        }
        let host = entry.host.load(Ordering::Relaxed);
        self.frames_switch = match (mode & Mode::USER != 0, now.has(Mode::USER)) {
            (true, false) => FrameSwitch::ToKernel,
            (false, true) => FrameSwitch::ToUser,
            _ => FrameSwitch::Stay,
        } as u8;
        self.cpu.rflags &= !x86_core::flags::RF;
        self.page_va = rip & !0xfff;
        host
    }

    /// Whether an access would find its entry in the TLB now.
    fn hits(&self, address: u64, write: bool) -> bool {
        let index = x86_core::Tlb::index(address);
        // SAFETY: the bank is an array of that many entries, in this vCPU or for ever.
        let entry = unsafe { &*self.cpu.tlb_bank.add(index) };
        let tag = if write { &entry.write } else { &entry.read };
        tag.load(Ordering::Relaxed) == address & !0xfff
    }
}

/// The address `delta` bytes from the information at `info`; 0 stays 0.
fn from_info(info: u64, delta: i32) -> u64 {
    if delta == 0 { 0 } else { info.wrapping_add(delta as i64 as u64) }
}

/// A TLB miss at `address`: fills the entry, or has the instruction interpreted.
///
/// # Safety
/// To be called by generated code only.
pub(crate) unsafe extern "C" fn tlb_miss(vcpu: *mut JitVcpu, address: u64, info: *const MissInfo) -> u64 {
    let _guard = AbortOnUnwind;
    // SAFETY: generated code passes its own vCPU, which nothing else refers to now, and its information.
    let (vcpu, at_info, info) = unsafe { (&mut *vcpu, info as u64, info.read_unaligned()) };
    let page_va = if info.kind & MissInfo::RELATIVE != 0 { vcpu.page_va } else { info.page_va };
    vcpu.cpu.rip = page_va.wrapping_add(u64::from(info.offset));
    if !vcpu.cpu.long64 {
        vcpu.cpu.rip &= 0xffff_ffff;
    }
    vcpu.flags_to_rflags();
    let write = info.kind & MissInfo::WRITE != 0;
    let last = address.wrapping_add(u64::from(info.size.max(1) - 1));
    let crosses = address >> 12 != last >> 12;
    let misaligned =
        info.kind & MissInfo::ALIGNED != 0 && address & u64::from(info.size.saturating_sub(1)) != 0;
    let masked = info.kind & MissInfo::MASKED != 0;
    if !crosses && !misaligned && !masked {
        // SAFETY: generated code runs only while the vCPU does.
        let filled = unsafe { vcpu.core() }.fill(address, write);
        if filled == Ok(Fill::Direct) && vcpu.hits(address, write) {
            vcpu.counters.fills += 1;
            return from_info(at_info, info.retry);
        }
    }
    if info.kind & MissInfo::GROUP != 0 {
        vcpu.counters.ungrouped += 1;
        vcpu.budget += i64::from(info.left);
        return vcpu.leave(ExitReason::Ungrouped);
    }
    vcpu.counters.slow_accesses += 1;
    vcpu.execute(from_info(at_info, info.resume), info.left, x86_interp::step)
}

/// Has the interpreter execute the instruction that the information names.
///
/// # Safety
/// To be called by generated code only.
pub(crate) unsafe extern "C" fn interpret(vcpu: *mut JitVcpu, _: u64, info: *const InterpretInfo) -> u64 {
    let _guard = AbortOnUnwind;
    // SAFETY: as for `tlb_miss`; the instruction lives as long as the code.
    let (vcpu, at_info, info) = unsafe { (&mut *vcpu, info as u64, info.read_unaligned()) };
    // SAFETY: as above.
    let mut insn = unsafe { *info.insn };
    if info.relative != 0 {
        relocate(&mut insn, vcpu.page_va);
    }
    vcpu.cpu.rip = insn.ip();
    vcpu.flags_to_rflags();
    *vcpu.counters.interpreted.entry(insn.mnemonic()).or_default() += 1;
    let (resume, left) = (from_info(at_info, info.resume), info.left as u8);
    if insn.is_invalid() {
        // Which exception that is depends on how many bytes there are.
        return vcpu.execute(resume, left, x86_interp::step);
    }
    vcpu.execute(resume, left, |core| {
        let flow = x86_interp::execute(core, &insn)?;
        if flow == Flow::Next {
            let mask = if core.cpu.long64 { u64::MAX } else { 0xffff_ffff };
            core.cpu.rip = insn.next_ip() & mask;
        }
        Ok(flow)
    })
}

/// Moves an instruction that was decoded at an offset in a page to the page's address.
fn relocate(insn: &mut Instruction, page_va: u64) {
    if insn.is_ip_rel_memory_operand() {
        insn.set_memory_displacement64(insn.memory_displacement64().wrapping_add(page_va));
    }
    match insn.op0_kind() {
        OpKind::NearBranch64 => insn.set_near_branch64(insn.near_branch64().wrapping_add(page_va)),
        OpKind::NearBranch32 => insn.set_near_branch32(insn.near_branch32().wrapping_add(page_va as u32)),
        // The upper half of the address is lost in any case.
        OpKind::NearBranch16 => insn.set_near_branch16(insn.near_branch16().wrapping_add(page_va as u16)),
        _ => {}
    }
    insn.set_ip(insn.ip().wrapping_add(page_va));
}
