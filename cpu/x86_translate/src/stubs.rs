//! Code that all blocks share: entering, leaving, and calling into Rust.

use crate::fpu;
use crate::layout::{BANK, ExitReason, S0, at, gs, host_register, slot, vector_slot};
use crate::returns;
use crate::runtime::{helper_interpret, helper_miss};
use crate::syscall;
use dbt_code::{Alu, Cond, Emitter, Gpr, Mem, Rm, Width};

/// Addresses of the shared code.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Stubs {
    /// `extern "C" fn(target)`: enters generated code at `target`, with the flags in memory.
    pub(crate) enter: u64,
    /// Leaves for an unlinked direct jump; the link's number is in [`S0`], the flags in EFLAGS.
    pub(crate) link_hot: u64,
    /// The same with the flags in memory.
    pub(crate) link_mem: u64,
    /// Leaves because a poll at a direct jump said so; the same registers, flags in memory.
    pub(crate) poll: u64,
    /// Leaves with RIP set and the flags in memory.
    pub(crate) indirect: u64,
    /// Leaves with RIP set to an instruction for the interpreter, and the flags in memory.
    pub(crate) step: u64,
    /// Called: a TLB miss at the address in [`S0`]; a [`crate::runtime::MissInfo`] follows the call.
    pub(crate) miss: u64,
    /// Called: has an instruction interpreted; an [`crate::runtime::InterpretInfo`] follows the call.
    pub(crate) interpret: u64,
    /// Leaves for the guest address in [`S0`], with the flags in memory.
    pub(crate) frames_end: u64,
    /// Goes to the guest address in [`S0`], with the flags in memory and no frames: of supervisor code, of user
    /// code.
    pub(crate) return_missed: [u64; 2],
    /// SYSCALL with the address of the next instruction in [`S0`], and SYSRET, with the flags in memory.
    pub(crate) syscall: u64,
    pub(crate) sysret: u64,
    /// Called: loads the guest's x87 state.
    pub(crate) load_fpu: u64,
}

const SAVED: [Gpr; 6] = [Gpr::RBX, Gpr::RBP, Gpr::R12, Gpr::R13, Gpr::R14, Gpr::R15];

impl Stubs {
    /// Writes the shared code.
    pub(crate) fn emit(e: &mut Emitter) -> Self {
        let mut stubs = Self::default();
        let leave = e.address();
        leave_host(e);
        stubs.frames_end = e.address();
        e.store(Width::B64, gs(at!(cpu.rip)), S0);
        stubs.indirect = e.address();
        exit(e, ExitReason::Indirect, leave);
        for (user, stub) in [false, true].into_iter().zip(0..) {
            stubs.return_missed[stub] = e.address();
            returns::missed(e, user, &stubs);
        }
        stubs.syscall = e.address();
        syscall::syscall(e, &stubs);
        stubs.sysret = e.address();
        syscall::sysret(e, &stubs);
        let resume = e.address();
        resume_guest(e, &stubs);
        let enter = e.address();
        for register in SAVED {
            e.push(register);
        }
        // Six registers and the return address: one more slot aligns the stack.
        e.lea(Gpr::RSP, Mem::base(Gpr::RSP, -8));
        e.store(Width::B64, gs(at!(host_rsp)), Gpr::RSP);
        e.stmxcsr(gs(at!(host_mxcsr)));
        e.store(Width::B64, gs(at!(jump_target)), Gpr::RDI);
        returns::begin(e, &stubs);
        e.jmp_to(resume);
        let link_hot = e.address();
        save_flags(e, Gpr::R10);
        let link_mem = e.address();
        exit(e, ExitReason::Link, leave);
        let poll = e.address();
        exit(e, ExitReason::Poll, leave);
        let step = e.address();
        exit(e, ExitReason::Step, leave);
        let miss = e.address();
        call_rust(e, helper_miss as *const () as u64, resume, leave);
        let interpret = e.address();
        call_rust(e, helper_interpret as *const () as u64, resume, leave);
        let load_fpu = e.address();
        fpu::load_stub(e);
        Self { enter, link_hot, link_mem, poll, step, miss, interpret, load_fpu, ..stubs }
    }
}

/// Puts the arithmetic flags into memory; uses `scratch`.
pub(crate) fn save_flags(e: &mut Emitter, scratch: Gpr) {
    e.mov(scratch, Gpr::RAX);
    e.lahf();
    e.setcc(Cond::O, Gpr::RAX);
    e.store(Width::B16, gs(at!(fl)), Gpr::RAX);
    e.mov(Gpr::RAX, scratch);
}

/// Takes the arithmetic flags from memory; uses `scratch`.
pub(crate) fn restore_flags(e: &mut Emitter, scratch: Gpr) {
    e.mov(scratch, Gpr::RAX);
    restore_flags_from_rax(e);
    e.mov(Gpr::RAX, scratch);
}

fn restore_flags_from_rax(e: &mut Emitter) {
    e.load16(Gpr::RAX, gs(at!(fl)));
    e.bytes(&[0x04, 0x7f]); // add al, 0x7f: OF again
    e.sahf();
}

/// Stores the guest's registers and gives MXCSR to Rust. Flags are in memory already.
fn store_guest(e: &mut Emitter) {
    for guest in 0..16 {
        if let Some(host) = host_register(guest) {
            e.store(Width::B64, gs(slot(guest)), host);
        }
    }
    for register in 0..16 {
        e.store_xmm(gs(vector_slot(register)), register);
    }
    e.stmxcsr(gs(at!(cpu.mxcsr)));
    e.ldmxcsr(gs(at!(host_mxcsr)));
    fpu::unload(e);
}

/// Loads everything and jumps to the target in the block.
fn resume_guest(e: &mut Emitter, stubs: &Stubs) {
    returns::switch(e, stubs);
    fpu::reload(e);
    e.ldmxcsr(gs(at!(cpu.mxcsr)));
    for register in 0..16 {
        e.load_xmm(register, gs(vector_slot(register)));
    }
    restore_flags_from_rax(e);
    for guest in 0..16 {
        if let Some(host) = host_register(guest) {
            e.load(host, gs(slot(guest)));
        }
    }
    e.load(BANK, gs(at!(cpu.tlb_bank)));
    e.jmp_rm(Rm::Mem(gs(at!(jump_target))));
}

/// Returns to Rust.
fn leave_host(e: &mut Emitter) {
    e.load(Gpr::RSP, gs(at!(host_rsp)));
    e.lea(Gpr::RSP, Mem::base(Gpr::RSP, 8));
    for register in SAVED.iter().rev() {
        e.pop(*register);
    }
    e.ret();
}

fn exit(e: &mut Emitter, reason: ExitReason, leave: u64) {
    e.store(Width::B64, gs(at!(exit_argument)), S0);
    e.store32_imm(gs(at!(exit_reason)), reason as u32);
    store_guest(e);
    e.jmp_to(leave);
}

/// Calls `function(vcpu, S0, info)`, where `info` is the return address, and goes on where it says, or leaves
/// if it says 0.
fn call_rust(e: &mut Emitter, function: u64, resume: u64, leave: u64) {
    store_guest(e);
    e.load(Gpr::RDI, gs(at!(this)));
    e.mov(Gpr::RSI, S0);
    e.load(Gpr::RDX, Mem::base(Gpr::RSP, 0));
    e.lea(Gpr::RSP, Mem::base(Gpr::RSP, -8));
    e.mov_imm(Gpr::RAX, function);
    e.call_rm(Rm::Reg(Gpr::RAX.0));
    e.lea(Gpr::RSP, Mem::base(Gpr::RSP, 16));
    e.store(Width::B64, gs(at!(jump_target)), Gpr::RAX);
    e.alu_imm(Alu::Cmp, Width::B64, Rm::Reg(Gpr::RAX.0), 0);
    e.jcc_to(Cond::NE, resume);
    e.jmp_to(leave);
}
