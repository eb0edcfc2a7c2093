//! One instruction, from fetch to what comes after it.

use crate::{decode, dispatch};
use iced_x86::{Instruction, Mnemonic};
use x86_core::flags::{RF, TF};
use x86_core::{CodeSize, Core, Exception, Flow, Trap, shadow, vector};

/// DR6: the exception is a single step.
const DR6_BS: u64 = 1 << 14;
/// DR6: which breakpoints were met, set anew by each #DB.
const DR6_MET: u64 = 0xf;
/// Beside TF and RF, which are low bits: data breakpoints are armed.
const WATCHED: u64 = 1 << 63;
/// Beside them: branches are recorded.
const RECORDED: u64 = 1 << 62;
/// Enable bits of the four breakpoints in DR7.
const DR7_ENABLED: u64 = 0xff;

/// Executes the instruction at CS:RIP, or a bounded part of a repeated string instruction
/// ([`Flow::Again`]), and advances RIP. Interrupt shadows of the instruction before end with it.
///
/// # Errors
/// The exception that is due, for the caller to deliver ([`Core::deliver`]). Faults leave RIP at the
/// instruction; a single-step #DB comes after it, with RIP past it and DR6.BS set.
#[inline]
pub fn step(core: &mut Core<'_>) -> Result<Flow, Trap> {
    let cpu = &mut *core.cpu;
    if cpu.dr[7] & DR7_ENABLED != 0 && cpu.rflags & RF == 0 {
        instruction_breakpoint(core)?;
    }
    decode::with_instruction(core, |core, insn, handler, trap| {
        let flagged = core.cpu.rflags & (TF | RF)
            | if core.cpu.watched { WATCHED } else { 0 }
            | if core.cpu.msrs.records_branches() { RECORDED } else { 0 };
        let before = core.cpu.interrupt_shadow;
        core.cpu.interrupt_shadow = before & shadow::NMI;
        let mut flow = match handler(core, insn) {
            Ok(flow) => flow,
            Err(fault) => {
                core.cpu.interrupt_shadow |= before;
                core.cpu.breakpoints_met = 0;
                core.cpu.take_watch_met();
                *trap = fault;
                return None;
            }
        };
        if flow == Flow::Next {
            core.cpu.rip = next_ip(core, insn);
        }
        if flagged != 0 {
            flow = match after_flagged(core, insn, flow, flagged) {
                Ok(flow) => flow,
                Err(debug) => {
                    *trap = debug;
                    return None;
                }
            };
        }
        Some(flow)
    })
}

/// Executes an instruction that the caller decoded with its address, [`DECODER_OPTIONS`], and RIP at it. RIP
/// moves only with [`Flow::Jump`].
///
/// [`DECODER_OPTIONS`]: crate::DECODER_OPTIONS
///
/// # Errors
/// The fault of the instruction, which then left the state as it was.
pub fn execute(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    dispatch::handler(insn)(core, insn)
}

/// RIP of the next instruction in sequence.
#[inline(always)]
fn next_ip(core: &Core<'_>, insn: &Instruction) -> u64 {
    match core.code_size() {
        CodeSize::Bits64 => insn.next_ip(),
        _ => insn.next_ip() & 0xffff_ffff,
    }
}

/// What follows an instruction that began with TF or RF set, or while data breakpoints are armed or branches recorded.
#[cold]
fn after_flagged(core: &mut Core<'_>, insn: &Instruction, flow: Flow, before: u64) -> Result<Flow, Trap> {
    if before & RECORDED != 0 && flow == Flow::Jump && insn.mnemonic() != Mnemonic::Vmrun {
        core.cpu.msrs.record_branch(insn.ip(), core.cpu.rip);
    }
    // RF holds off instruction breakpoints for one instruction, except that IRET and VMRUN load it.
    let loads_rf =
        matches!(insn.mnemonic(), Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq | Mnemonic::Vmrun);
    if before & RF != 0 && flow != Flow::Again && !loads_rf {
        core.set_rflags(core.cpu.rflags & !RF);
    }
    let step = match insn.mnemonic() {
        // These look at TF as they leave it.
        Mnemonic::Syscall | Mnemonic::Sysret | Mnemonic::Sysretq => core.cpu.rflags & TF != 0,
        // Delivery through a gate clears TF and forgets the trap.
        Mnemonic::Int | Mnemonic::Int1 | Mnemonic::Int3 => false,
        // It is the host's trap, which runs no longer.
        Mnemonic::Vmrun => false,
        Mnemonic::Into => before & TF != 0 && flow != Flow::Jump,
        _ => before & TF != 0,
    };
    // After a load of SS, debug exceptions wait for the next instruction too.
    if core.cpu.interrupt_shadow & shadow::MOV_SS != 0 {
        return Ok(flow);
    }
    let mut met = core.take_data_breakpoints();
    if insn.mnemonic() == Mnemonic::Int1 {
        // It has delivered a #DB already, which the waiting one merges with.
        met = 0;
    }
    if !step && met == 0 {
        return Ok(flow);
    }
    core.cpu.halted = false;
    core.cpu.dr[6] = core.cpu.dr[6] & !DR6_MET | met | if step { DR6_BS } else { 0 };
    Err(Trap::Exception(Exception { vector: vector::DB, error: None, address: 0 }))
}

/// #DB if a debug register asks for a breakpoint at this instruction (Intel SDM volume 3, 18.2.4).
#[cold]
fn instruction_breakpoint(core: &mut Core<'_>) -> Result<(), Trap> {
    let cpu = &mut *core.cpu;
    let base = cpu.segments[x86_core::Seg::Cs as usize].base;
    let address = base.wrapping_add(cpu.rip);
    let (control, mut hit) = (cpu.dr[7], 0);
    for breakpoint in 0..4 {
        let enabled = control >> (2 * breakpoint) & 3 != 0;
        let on_execution = control >> (16 + 4 * breakpoint) & 3 == 0;
        if enabled && on_execution && cpu.dr[breakpoint] == address {
            hit |= 1 << breakpoint;
        }
    }
    if hit == 0 {
        return Ok(());
    }
    cpu.dr[6] = cpu.dr[6] & !DR6_MET | hit;
    Err(Trap::plain(vector::DB))
}
