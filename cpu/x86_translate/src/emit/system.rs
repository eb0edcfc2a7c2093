//! System instructions that kernels execute all the time: interrupt and access flags, SWAPGS, IRET within the
//! kernel, the time-stamp counter.

use crate::abi::layout::{
    BANK, GUEST_RSP, JitVcpu, S0, S1, at, bank_of, gs, host_register, segment_base, slot,
};
use crate::context::address::Access;
use crate::context::translation::{FlagsAt, Translation};
use crate::guest::mode::Mode;
use dbt_code::{Alu, Cond, Enc, Gpr, Mem, Rm, Shift, Width};
use iced_x86::Mnemonic;
use std::mem::{offset_of, size_of};
use x86_core::{Seg, Segment, Tlb, TlbEntry, cr4, flags};

/// The byte of RFLAGS with IF and DF, and the one with AC.
const FLAGS_1: i32 = at!(cpu.rflags) + 1;
const FLAGS_2: i32 = at!(cpu.rflags) + 2;
const IF_1: u8 = (flags::IF >> 8) as u8;
const AC_2: u8 = (flags::AC >> 16) as u8;
/// Bits of RFLAGS that POPF and IRET may change without the interpreter, and those that do not exist.
const EASY: u64 = flags::ARITHMETIC | flags::IF | flags::FIXED | 1 << 3 | 1 << 5 | 1 << 15;

fn selector(seg: usize) -> i32 {
    segment_base(seg) + (offset_of!(Segment, selector) - offset_of!(Segment, base)) as i32
}

impl Translation<'_> {
    fn byte_op(&mut self, op: Alu, at: i32, value: u8) {
        self.e.op(Enc::one(0x80), op as u8, Rm::Mem(gs(at)));
        self.e.byte(value);
    }

    /// CLI at CPL 0.
    pub(crate) fn cli(&mut self) {
        self.clobber_flags();
        self.byte_op(Alu::And, FLAGS_1, !IF_1);
        self.flags_lost();
    }

    /// STI at CPL 0 with an instruction behind it in the block: nothing is delivered before that has
    /// completed. If an interrupt waits the interpreter executes it.
    pub(crate) fn sti(&mut self) {
        self.clobber_flags();
        self.leave_if_window();
        self.byte_op(Alu::Or, FLAGS_1, IF_1);
        self.flags_lost();
    }

    fn leave_if_window(&mut self) {
        self.byte_op(Alu::Cmp, at!(interrupt_window), 0);
        self.interpret_if(Cond::NE);
    }

    /// PUSHF.
    pub(crate) fn pushf(&mut self) {
        self.clobber_flags();
        let (s0, s1) = (Rm::Reg(S0.0), Rm::Reg(S1.0));
        self.held = None;
        self.e.load16(S0, gs(at!(flags)));
        self.e.op(Enc::one(0x8b), S1.0, s0);
        self.e.shift_imm(Shift::Shr, Width::B32, s1, 8);
        self.e.alu_imm(Alu::And, Width::B32, s0, 1);
        self.e.shift_imm(Shift::Shl, Width::B32, s0, 11);
        self.e.alu(Alu::Or, Width::B32, S1, s0);
        self.e.load32(S0, gs(at!(cpu.rflags)));
        let hidden = flags::ARITHMETIC | flags::RF | flags::VM;
        self.e.alu_imm(Alu::And, Width::B32, s0, !(hidden as i32));
        self.e.alu(Alu::Or, Width::B32, S1, s0);
        self.e.store(Width::B64, gs(at!(scratch)), S1);
        let size = self.word();
        let mem = self.access(&self.at_stack(-(size as i32)), Access::write(size));
        let mem = self.free_scratch(mem);
        self.e.load(S0, gs(at!(scratch)));
        self.e.store(self.word_width(), mem, S0);
        self.move_stack(-(size as i32));
        self.flags_lost();
    }

    /// Leaves the instruction to the interpreter unless the flags image in [`S0`] differs from RFLAGS in easy
    /// bits only. Uses [`S1`].
    fn leave_unless_easy(&mut self) {
        self.e.load32(S1, gs(at!(cpu.rflags)));
        self.e.alu(Alu::Xor, Width::B32, S1, Rm::Reg(S0.0));
        self.e.alu_imm(Alu::And, Width::B32, Rm::Reg(S1.0), !(EASY as i32));
        self.interpret_if(Cond::NE);
    }

    /// Takes over the easy bits of the image in `scratch[1]`.
    fn take_flags(&mut self) {
        let image = gs(at!(scratch) + 8);
        let (s0, s1) = (Rm::Reg(S0.0), Rm::Reg(S1.0));
        self.e.load32(S0, image);
        self.e.load32(S1, gs(at!(cpu.rflags)));
        self.e.alu_imm(Alu::And, Width::B32, s0, flags::IF as i32);
        self.e.alu_imm(Alu::And, Width::B32, s1, !(flags::IF as i32));
        self.e.alu(Alu::Or, Width::B32, S1, s0);
        self.e.store(Width::B32, gs(at!(cpu.rflags)), S1);
        self.e.load32(S0, image);
        self.e.op(Enc::one(0x8b), S1.0, s0);
        self.e.shift_imm(Shift::Shl, Width::B32, s1, 8);
        self.e.shift_imm(Shift::Shr, Width::B32, s0, 11);
        self.e.alu_imm(Alu::And, Width::B32, s0, 1);
        self.e.alu(Alu::Or, Width::B32, S1, s0);
        self.e.store(Width::B16, gs(at!(flags)), S1);
        self.flags = FlagsAt::Memory;
    }

    /// POPF at CPL 0.
    pub(crate) fn popf(&mut self) {
        self.flags_to_memory();
        let size = self.word();
        let mem = self.access(&self.at_stack(0), Access::read(size));
        self.load_word(S0, mem);
        self.held = None;
        self.e.store(Width::B64, gs(at!(scratch) + 8), S0);
        self.leave_unless_easy();
        self.leave_if_window();
        self.take_flags();
        self.move_stack(size as i32);
    }

    /// IRET from the kernel to itself.
    pub(crate) fn iret(&mut self) {
        self.flags_to_memory();
        let mem = self.access(&self.at_stack(0), Access::read(40));
        self.held = None;
        let slot = |at: i32| Mem { disp: mem.disp + at, ..mem };
        self.e.load(S0, slot(16));
        self.e.store(Width::B64, gs(at!(scratch) + 8), S0);
        self.e.load(S0, slot(0));
        self.e.store(Width::B64, gs(at!(scratch)), S0);
        for (at, seg) in [(8, Seg::Cs), (32, Seg::Ss)] {
            self.e.load(S0, slot(at));
            self.e.op(Enc::one(0x38).sized(Width::B16), S0.0, Rm::Mem(gs(selector(seg as usize))));
            self.interpret_if(Cond::NE);
        }
        self.e.load(S0, slot(24));
        self.e.store(Width::B64, gs(at!(scratch) + 16), S0);
        self.byte_op(Alu::Cmp, at!(cpu.interrupt_shadow), 0);
        self.interpret_if(Cond::NE);
        // With NT set IRET faults.
        self.e.op(Enc::one(0xf6), 0, Rm::Mem(gs(FLAGS_1)));
        self.e.byte((flags::NT >> 8) as u8);
        self.interpret_if(Cond::NE);
        self.e.load(S0, gs(at!(scratch) + 8));
        self.leave_unless_easy();
        self.leave_if_window();
        self.take_flags();
        self.e.load(GUEST_RSP, gs(at!(scratch) + 16));
        self.e.load(S0, gs(at!(scratch)));
        self.indirect();
    }

    /// MOV of a segment register to a general one of 32 or 64 bits.
    pub(crate) fn mov_from_segment(&mut self, index: usize) {
        let insn = self.guest[index].insn;
        let guest = insn.op0_register().full_register().number() as u8;
        let from = gs(selector(insn.op1_register().number()));
        match host_register(guest) {
            Some(host) => self.e.load16(host, from),
            None => {
                self.e.load16(S0, from);
                self.e.store(Width::B64, gs(slot(guest)), S0);
            }
        }
    }

    /// SWAPGS at CPL 0.
    pub(crate) fn swapgs(&mut self) {
        self.held = None;
        let (base, other) = (gs(segment_base(Seg::Gs as usize)), gs(at!(cpu.msrs.kernel_gs_base)));
        self.e.load(S0, base);
        self.e.load(S1, other);
        self.e.store(Width::B64, base, S1);
        self.e.store(Width::B64, other, S0);
    }

    /// STAC and CLAC at CPL 0 with SMAP on.
    pub(crate) fn access_flag(&mut self, set: bool) {
        self.clobber_flags();
        let bank = bank_of(if set { Tlb::SUPERVISOR_AC } else { Tlb::SUPERVISOR }, self.mode.world());
        if set {
            self.byte_op(Alu::Or, FLAGS_2, AC_2);
        } else {
            self.byte_op(Alu::And, FLAGS_2, !AC_2);
        }
        let entries = offset_of!(JitVcpu, cpu) + offset_of!(x86_core::Cpu, tlb) + offset_of!(Tlb, entries);
        let at = (entries + bank * x86_core::TLB_ENTRIES * size_of::<TlbEntry>()) as i32;
        self.e.load(BANK, gs(at!(this)));
        self.e.lea(BANK, Mem::base(BANK, at));
        self.e.store(Width::B64, gs(at!(cpu.tlb_bank)), BANK);
        for field in [at!(cpu.data_bank), at!(cpu.fast_bank)] {
            self.e.op(Enc::one(0xc6), 0, Rm::Mem(gs(field)));
            self.e.byte(bank as u8);
        }
        self.flags_lost();
    }

    /// RDTSC and RDTSCP, where the guest's counter is the host's plus a constant.
    pub(crate) fn time_stamp(&mut self, index: usize) {
        self.clobber_flags();
        self.byte_op(Alu::Cmp, at!(tsc_direct), 0);
        self.interpret_if(Cond::E);
        if self.mode.has(Mode::USER) {
            self.e.op(Enc::one(0xf6), 0, Rm::Mem(gs(at!(cpu.cr4)))); // test
            self.e.byte(cr4::TSD as u8);
            self.interpret_if(Cond::NE);
        }
        let with_id = self.guest[index].insn.mnemonic() == Mnemonic::Rdtscp;
        self.e.bytes(if with_id { &[0x0f, 0x01, 0xf9] } else { &[0x0f, 0x31] });
        let (rax, rdx) = (Rm::Reg(Gpr::RAX.0), Rm::Reg(Gpr::RDX.0));
        self.e.shift_imm(Shift::Shl, Width::B64, rdx, 32);
        self.e.alu(Alu::Or, Width::B64, Gpr::RAX, rdx);
        for term in [at!(tsc_base), at!(cpu.msrs.tsc_offset)] {
            self.e.alu(Alu::Add, Width::B64, Gpr::RAX, Rm::Mem(gs(term)));
        }
        self.e.mov(Gpr::RDX, Gpr::RAX);
        self.e.shift_imm(Shift::Shr, Width::B64, rdx, 32);
        self.e.op(Enc::one(0x8b), Gpr::RAX.0, rax);
        if with_id {
            self.e.load32(Gpr::RCX, gs(at!(cpu.msrs.tsc_aux)));
        }
        self.flags_lost();
    }
}
