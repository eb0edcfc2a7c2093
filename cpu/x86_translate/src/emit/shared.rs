//! Code that all blocks share: entering, leaving, and calling into Rust.

use super::flags::{restore_flags_from_rax, save_flags};
use super::{fpu, frames, syscall, vectors};
use crate::abi::calls::Entries;
use crate::abi::layout::{BANK, ExitReason, S0, TABLES, at, gs, host_register, slot};
use crate::abi::stubs::Stubs;
use dbt_code::{Alu, Cond, Emitter, Gpr, Mem, Rm, Width};

/// Registers that the C calling convention has a function keep.
const SAVED: [Gpr; 6] = [Gpr::RBX, Gpr::RBP, Gpr::R12, Gpr::R13, Gpr::R14, Gpr::R15];

/// Writes the shared code, which calls `entries`; with `avx`, vector registers are the host's YMM or ZMM registers.
pub(crate) fn shared_code(e: &mut Emitter, entries: &Entries, avx: bool) -> Stubs {
    let mut stubs = Stubs::default();
    let leave = e.address();
    leave_host(e);
    stubs.frames_end = e.address();
    e.store(Width::B64, gs(at!(cpu.rip)), S0);
    stubs.indirect = e.address();
    exit(e, ExitReason::Indirect, leave, avx);
    for table in 0..TABLES {
        stubs.return_missed[table] = e.address();
        frames::missed(e, table, &stubs);
    }
    for world in 0..x86_core::WORLDS {
        stubs.syscall[world] = e.address();
        syscall::syscall(e, world, &stubs);
        stubs.sysret[world] = e.address();
        syscall::sysret(e, world, &stubs);
    }
    let resume = e.address();
    resume_guest(e, &stubs, avx);
    let enter = e.address();
    for register in SAVED {
        e.push(register);
    }
    // Six registers and the return address: one more slot aligns the stack.
    e.lea(Gpr::RSP, Mem::base(Gpr::RSP, -8));
    e.store(Width::B64, gs(at!(host_rsp)), Gpr::RSP);
    e.stmxcsr(gs(at!(host_mxcsr)));
    e.store(Width::B64, gs(at!(jump_target)), Gpr::RDI);
    frames::begin(e, &stubs);
    e.jmp_to(resume);
    let link_hot = e.address();
    save_flags(e, Gpr::R10);
    let link_mem = e.address();
    exit(e, ExitReason::Link, leave, avx);
    let poll = e.address();
    exit(e, ExitReason::Poll, leave, avx);
    let step = e.address();
    exit(e, ExitReason::Step, leave, avx);
    let miss = e.address();
    call_rust(e, entries.miss, resume, leave, avx);
    let interpret = e.address();
    call_rust(e, entries.interpret, resume, leave, avx);
    let load_fpu = e.address();
    fpu::load_stub(e);
    let begin_wide = e.address();
    vectors::begin_wide(e);
    Stubs { enter, link_hot, link_mem, poll, step, miss, interpret, load_fpu, begin_wide, ..stubs }
}

/// Stores the guest's registers and gives MXCSR to Rust. Flags are in memory already.
fn store_guest(e: &mut Emitter, avx: bool) {
    for guest in 0..16 {
        if let Some(host) = host_register(guest) {
            e.store(Width::B64, gs(slot(guest)), host);
        }
    }
    vectors::store(e, avx);
    e.stmxcsr(gs(at!(cpu.mxcsr)));
    e.ldmxcsr(gs(at!(host_mxcsr)));
    fpu::unload(e);
}

/// Loads everything and jumps to the target in the block.
fn resume_guest(e: &mut Emitter, stubs: &Stubs, avx: bool) {
    frames::switch(e, stubs);
    fpu::reload(e);
    e.ldmxcsr(gs(at!(cpu.mxcsr)));
    vectors::load(e, avx);
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

/// Leaves generated code for that reason.
fn exit(e: &mut Emitter, reason: ExitReason, leave: u64, avx: bool) {
    e.store(Width::B64, gs(at!(exit_argument)), S0);
    e.store32_imm(gs(at!(exit_reason)), reason as u32);
    store_guest(e, avx);
    e.jmp_to(leave);
}

/// Calls `function(vcpu, S0, info)`, where `info` is the return address, and goes on where it says, or leaves
/// if it says 0.
fn call_rust(e: &mut Emitter, function: u64, resume: u64, leave: u64, avx: bool) {
    store_guest(e, avx);
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
