//! SYSCALL and SYSRET between 64-bit code, without leaving generated code (AMD APM volume 3).

use super::frames;
use super::jump::lookup;
use crate::abi::layout::{BANK, JitVcpu, S0, S1, at, bank_of, gs, segment_base, slot};
use crate::abi::stubs::Stubs;
use crate::context::translation::Translation;
use crate::guest::class::Class;
use crate::guest::mode::Mode;
use dbt_code::{Alu, Cond, Emitter, Enc, Gpr, Mem, Rm, Shift, Width};
use std::mem::offset_of;
use x86_core::{Cpu, Seg, Segment, Tlb, TlbEntry, efer, flags};

/// Attributes of the segments that are loaded, less their privilege.
const CODE64: u64 = 0xa09b;
const DATA: u64 = 0xc093;
/// Bits of RFLAGS that SYSRET may set here; with others the interpreter executes it.
const EASY: u64 = flags::ARITHMETIC | flags::IF | flags::DF | flags::ID | flags::FIXED;

impl Translation<'_> {
    fn leave_if_nonzero(&mut self, width: Width, at: i32) {
        if width == Width::B8 {
            self.e.op(Enc::one(0x80), Alu::Cmp as u8, Rm::Mem(gs(at)));
            self.e.byte(0);
        } else {
            self.e.alu_imm(Alu::Cmp, width, Rm::Mem(gs(at)), 0);
        }
        self.interpret_if(Cond::NE);
    }

    /// SYSCALL at CPL 3, SYSRET to 64-bit code at CPL 0. Whatever must be looked at in between, or makes more
    /// of a difference than usual, is left to the interpreter.
    pub(crate) fn system_call(&mut self, index: usize) {
        self.flags_to_memory();
        self.held = None;
        self.e.op(Enc::one(0xf6), 0, Rm::Mem(gs(at!(cpu.msrs.efer)))); // test
        self.e.byte(efer::SCE as u8);
        self.interpret_if(Cond::E);
        self.leave_if_nonzero(Width::B8, at!(cpu.interrupt_shadow));
        self.leave_if_nonzero(Width::B8, at!(interrupt_window));
        self.leave_if_nonzero(Width::B32, at!(cpu.exit_request));
        // The targets known on the other side must be those of this mode.
        let other = (self.mode.0 ^ Mode::USER) & !Mode::UNGROUPED;
        let place = at!(table_modes) + 4 * Mode(other).table() as i32;
        self.e.alu_imm(Alu::Cmp, Width::B32, Rm::Mem(gs(place)), other as i32);
        self.interpret_if(Cond::NE);
        if self.guest[index].class == Class::Syscall {
            // The kernel begins without the right to access what is the user's.
            self.e.op(Enc::one(0xf7), 0, Rm::Mem(gs(at!(cpu.msrs.sfmask)))); // test
            self.e.dword(flags::AC as u32);
            self.interpret_if(Cond::E);
            self.guest_va(self.guest[index].next());
            self.e.jmp_to(self.stubs.syscall[self.mode.world()]);
        } else {
            self.e.load(S1, gs(slot(11)));
            self.e.alu_imm(Alu::And, Width::B64, Rm::Reg(S1.0), !(EASY as i32));
            self.interpret_if(Cond::NE);
            self.e.jmp_to(self.stubs.sysret[self.mode.world()]);
        }
    }
}

/// Loads a flat segment of privilege `cpl`; its selector is in the low half of EAX.
fn load_flat(e: &mut Emitter, seg: Seg, attributes: u64, cpl: u64) {
    let at = segment_base(seg as usize) - offset_of!(Segment, base) as i32;
    e.store(Width::B16, gs(at + offset_of!(Segment, selector) as i32), Gpr::RAX);
    e.store_imm(gs(at + offset_of!(Segment, base) as i32), 0);
    e.store32_imm(gs(at + offset_of!(Segment, limit) as i32), u32::MAX);
    e.store32_imm(gs(at + offset_of!(Segment, attributes) as i32), (attributes | cpl << 5) as u32);
}

/// Sets CPL and what hangs on it, while no address or alignment is checked but by the TLB.
fn set_privilege(e: &mut Emitter, cpl: u8, bank: usize) {
    for (field, value) in [
        (at!(cpu.cpl), cpl),
        (at!(cpu.data_bank), bank as u8),
        (at!(cpu.fast_bank), bank as u8),
        (at!(cpu.align_check), 0),
    ] {
        e.op(Enc::one(0xc6), 0, Rm::Mem(gs(field)));
        e.byte(value);
    }
    let entries = offset_of!(JitVcpu, cpu) + offset_of!(Cpu, tlb) + offset_of!(Tlb, entries);
    let at = entries + bank * x86_core::TLB_ENTRIES * size_of::<TlbEntry>();
    e.load(BANK, gs(at!(this)));
    e.lea(BANK, Mem::base(BANK, at as i32));
    e.store(Width::B64, gs(at!(cpu.tlb_bank)), BANK);
}

/// RFLAGS becomes what is in [`S1`], the arithmetic flags included. Uses RAX.
fn set_flags(e: &mut Emitter) {
    let (rax, s1) = (Rm::Reg(Gpr::RAX.0), Rm::Reg(S1.0));
    e.store(Width::B64, gs(at!(cpu.rflags)), S1);
    e.op(Enc::one(0x8b), Gpr::RAX.0, s1);
    e.shift_imm(Shift::Shl, Width::B32, rax, 8);
    e.shift_imm(Shift::Shr, Width::B32, s1, 11);
    e.alu_imm(Alu::And, Width::B32, s1, 1);
    e.alu(Alu::Or, Width::B32, Gpr::RAX, s1);
    e.store(Width::B16, gs(at!(flags)), Gpr::RAX);
}

/// Shared code of a world: SYSCALL with the address of the next instruction in [`S0`], flags in memory, all checks done.
pub(super) fn syscall(e: &mut Emitter, world: usize, stubs: &Stubs) {
    let (rax, s1) = (Rm::Reg(Gpr::RAX.0), Rm::Reg(S1.0));
    e.store(Width::B64, gs(at!(scratch)), Gpr::RAX);
    e.mov(Gpr::RCX, S0);
    // RFLAGS with the arithmetic flags.
    e.load16(Gpr::RAX, gs(at!(flags)));
    e.op(Enc::one(0x8b), S1.0, rax);
    e.shift_imm(Shift::Shr, Width::B32, s1, 8);
    e.alu_imm(Alu::And, Width::B32, s1, (flags::ARITHMETIC & !flags::OF) as i32);
    e.alu_imm(Alu::And, Width::B32, rax, 1);
    e.shift_imm(Shift::Shl, Width::B32, rax, 11);
    e.alu(Alu::Or, Width::B32, S1, rax);
    e.load32(Gpr::RAX, gs(at!(cpu.rflags)));
    e.alu_imm(Alu::And, Width::B32, rax, !((flags::ARITHMETIC | flags::RF) as i32));
    e.alu(Alu::Or, Width::B32, Gpr::RAX, s1);
    e.store(Width::B64, gs(slot(11)), Gpr::RAX);
    e.load32(S1, gs(at!(cpu.msrs.sfmask)));
    e.op(Enc::one(0xf7), 2, s1); // not
    e.alu(Alu::And, Width::B32, S1, rax);
    e.alu_imm(Alu::Or, Width::B32, s1, flags::FIXED as i32);
    set_flags(e);
    e.load32(Gpr::RAX, gs(at!(cpu.msrs.star) + 4));
    e.alu_imm(Alu::And, Width::B32, rax, 0xfffc);
    load_flat(e, Seg::Cs, CODE64, 0);
    e.alu_imm(Alu::Add, Width::B32, rax, 8);
    load_flat(e, Seg::Ss, DATA, 0);
    set_privilege(e, 0, bank_of(Tlb::SUPERVISOR, world));
    frames::enter_kernel(e, stubs);
    e.load(Gpr::RAX, gs(at!(scratch)));
    e.load(S0, gs(at!(cpu.msrs.lstar)));
    let field = lookup(e, 2 * world, false);
    e.link(field, stubs.frames_end);
}

/// Shared code of a world: SYSRET with the flags in memory, all checks done.
pub(super) fn sysret(e: &mut Emitter, world: usize, stubs: &Stubs) {
    let rax = Rm::Reg(Gpr::RAX.0);
    e.store(Width::B64, gs(at!(scratch)), Gpr::RAX);
    e.load(S1, gs(slot(11)));
    e.alu_imm(Alu::And, Width::B32, Rm::Reg(S1.0), flags::EXIST as i32);
    e.alu_imm(Alu::Or, Width::B32, Rm::Reg(S1.0), flags::FIXED as i32);
    set_flags(e);
    e.load16(Gpr::RAX, gs(at!(cpu.msrs.star) + 6));
    e.alu_imm(Alu::Add, Width::B32, rax, 8);
    e.alu_imm(Alu::Or, Width::B32, rax, 3);
    load_flat(e, Seg::Ss, DATA, 3);
    e.load16(Gpr::RAX, gs(at!(cpu.msrs.star) + 6));
    e.alu_imm(Alu::Add, Width::B32, rax, 16);
    e.alu_imm(Alu::Or, Width::B32, rax, 3);
    load_flat(e, Seg::Cs, CODE64, 3);
    set_privilege(e, 3, bank_of(Tlb::USER, world));
    frames::enter_user(e);
    e.load(Gpr::RAX, gs(at!(scratch)));
    e.mov(S0, Gpr::RCX);
    let field = lookup(e, 2 * world + 1, false);
    e.link(field, stubs.frames_end);
}
