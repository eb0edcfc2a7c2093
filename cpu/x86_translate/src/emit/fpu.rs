//! x87 and MMX: executed as they are, on the host's own registers.
//!
//! While generated code runs the guest's state is in the host's unit from the first instruction on that needs
//! it there (`JitVcpu::fpu_loaded` says so), and in [`x86_core::Cpu::x87`] whenever Rust runs: the calling
//! convention wants the unit empty. Only code of guests that mask all exceptions is translated
//! (`Mode::NO_X87`), so none is ever pending in the host's unit: a hostile guest could raise it in Rust code.
//!
//! What the unit says of the last instruction (FOP, FIP and FDP) would be of the host's. The guest's own is
//! kept in memory: FDP with every access, FOP and FIP once for several instructions in a row, before anything
//! that could look.

use crate::abi::layout::{S0, at, gs, vector_slot};
use crate::context::address::{Access, Ea, Wrap};
use crate::context::cold::{Cold, ColdKind};
use crate::context::insn::GuestInsn;
use crate::context::translation::Translation;
use crate::guest::class::Class;
use crate::guest::encoding::Raw;
use crate::guest::fpu::Unit;
use crate::guest::mode::Mode;
use crate::guest::operand::has_memory;
use dbt_code::{Alu, Cond, Emitter, Enc, Gpr, Mem, Rm, Width};
use iced_x86::{Instruction, Register};
use x86_core::CodeSize;

/// Fields of the image.
const FOP: i32 = 6;
const FIP: i32 = 8;
const FDP: i32 = 16;
const MXCSR: i32 = 24;
const REGISTERS: i32 = 32;

/// Notes for each instruction which one FOP and FIP are to be stored of before anything looks at them while it
/// executes. At those that may look in any case they are stored in the hot code, and then nothing is left.
pub(crate) fn plan_records(guest: &mut [GuestInsn]) {
    let mut last = None;
    for (index, insn) in guest.iter_mut().enumerate() {
        insn.fpu_last = last;
        let unit = if insn.class == Class::Interpret { Unit::None } else { insn.info.unit };
        match unit {
            Unit::X87 { recorded: true } => last = Some(index as u16),
            _ if insn.may_leave() || insn.class == Class::Fninit => last = None,
            _ => {}
        }
    }
}

impl Translation<'_> {
    /// What is due before the code of an instruction.
    pub(crate) fn prepare_fpu(&mut self, index: usize) {
        let guest = &self.guest[index];
        if guest.may_leave()
            && let Some(last) = self.guest[index].fpu_last.take()
        {
            self.record(usize::from(last), false);
        }
        let guest = &self.guest[index];
        let unit =
            if matches!(guest.class, Class::Interpret | Class::Nop) { Unit::None } else { guest.info.unit };
        if unit != Unit::None && !self.fpu_ready {
            self.fpu_ready = true;
            self.clobber_flags();
            self.e.op(Enc::one(0x80), Alu::Cmp as u8, Rm::Mem(gs(at!(fpu_loaded))));
            self.e.byte(0);
            let field = self.e.jcc(Cond::E);
            let resume = self.e.address();
            self.cold.push(Cold { field, instruction: index, kind: ColdKind::LoadFpu(resume) });
        }
    }

    /// Stores FOP and FIP after the last instruction of a block that goes on elsewhere.
    pub(crate) fn finish_fpu(&mut self) {
        let last = self.guest.len() - 1;
        let recorded = matches!(self.guest[last].info.unit, Unit::X87 { recorded: true })
            && self.guest[last].class != Class::Interpret;
        let last = if recorded {
            Some(last)
        } else if self.guest[last].may_leave() || self.guest[last].class == Class::Fninit {
            None
        } else {
            self.guest[last].fpu_last.map(usize::from)
        };
        if let Some(last) = last {
            self.record(last, false);
        }
    }

    /// Stores FOP and FIP of the instruction `last`, in the cold code or the hot. Uses [`S0`], leaves the flags
    /// alone.
    pub(crate) fn record(&mut self, last: usize, cold: bool) {
        let guest = &self.guest[last];
        let (offset, fixed) = (i32::from(guest.offset), self.fixed_page());
        let start = usize::from(guest.offset);
        let bytes = &self.page[start..start + guest.insn.len()];
        let fop = guest.raw.map_or(0, |raw| last_opcode(self.mode, &guest.insn, &raw, bytes));
        let e = if cold { &mut *self.cold_code } else { &mut *self.e };
        match fixed {
            Some(page_va) => e.mov_imm(S0, page_va.wrapping_add(offset as u64) & self.mode.ip_mask()),
            None => {
                e.load(S0, gs(at!(page_va)));
                e.lea(S0, Mem::base(S0, offset));
            }
        }
        e.store(Width::B64, gs(at!(cpu.x87) + FIP), S0);
        e.op(Enc::one(0xc7).sized(Width::B16), 0, Rm::Mem(gs(at!(cpu.x87) + FOP)));
        e.bytes(&fop.to_le_bytes());
    }

    /// Stores them in the cold code of an instruction if they are still to be.
    pub(crate) fn record_cold(&mut self, index: usize) {
        if let Some(last) = self.guest[index].fpu_last {
            self.record(usize::from(last), true);
        }
    }

    /// Stores FDP when an x87 instruction has made its access.
    pub(crate) fn record_data(&mut self, index: usize) {
        let guest = &self.guest[index];
        if guest.info.unit != (Unit::X87 { recorded: true }) {
            return;
        }
        // It is an offset: segments do not count.
        let mut plain = guest.insn;
        plain.set_segment_prefix(Register::None);
        let Some(ea) = self.address_of(&plain).map(|ea| Ea { segment: None, ..ea }) else { return };
        if ea.wrap == Wrap::None {
            self.held = None;
        }
        ea.compute(self.e, 0);
        self.e.store(Width::B64, gs(at!(cpu.x87) + FDP), S0);
    }

    /// FLDCW of a word that masks all exceptions; others are left to the interpreter.
    pub(crate) fn fldcw(&mut self, index: usize) {
        let insn = self.guest[index].insn;
        let Some(ea) = self.address_of(&insn) else { return };
        self.clobber_flags();
        let mem = self.access(&ea, Access::read(2));
        // Other processors could change the word after it was looked at.
        self.e.load16(S0, mem);
        self.e.store(Width::B16, gs(at!(scratch)), S0);
        self.e.op(Enc::one(0xf7), 2, Rm::Reg(S0.0)); // not r9d
        self.e.op(Enc { rex: true, ..Enc::one(0xf6) }, 0, Rm::Reg(S0.0)); // test r9b, 0x3f
        self.e.byte(0x3f);
        self.interpret_if(Cond::NE);
        self.e.op(Enc::one(0xd9), 5, Rm::Mem(gs(at!(scratch))));
        self.flags_lost();
    }

    /// FNINIT, which also forgets the last instruction.
    pub(crate) fn fninit(&mut self) {
        self.e.bytes(&[0xdb, 0xe3]);
        for field in [FIP, FDP] {
            self.e.store_imm(gs(at!(cpu.x87) + field), 0);
        }
        self.e.op(Enc::one(0xc7).sized(Width::B16), 0, Rm::Mem(gs(at!(cpu.x87) + FOP)));
        self.e.bytes(&[0, 0]);
    }
}

/// FOP.
fn last_opcode(mode: Mode, insn: &Instruction, raw: &Raw, bytes: &[u8]) -> u16 {
    let memory = has_memory(insn);
    let modrm = if memory { raw.reg << 3 & 0x38 } else { bytes.last().copied().unwrap_or(0) };
    let size = if mode.bits() == 64 { CodeSize::Bits64 } else { CodeSize::Bits32 };
    x86_fpu::last_opcode(size, insn, raw.opcode, modrm)
}

/// In shared code: takes the guest's state out of the host's unit if it is there, and leaves the unit as Rust
/// wants it. Uses RAX and the flags; vector registers are in memory already.
pub(crate) fn unload(e: &mut Emitter) {
    e.op(Enc::one(0x8a), Gpr::RAX.0, Rm::Mem(gs(at!(fpu_loaded))));
    e.op(Enc::one(0x88), Gpr::RAX.0, Rm::Mem(gs(at!(fpu_resume))));
    e.op(Enc::one(0x84), Gpr::RAX.0, Rm::Reg(Gpr::RAX.0)); // test al, al
    let skip = e.jcc(Cond::E);
    e.op(Enc::m0f(0xae).wide(), 0, Rm::Mem(gs(at!(fx)))); // fxsave64
    let image = at!(cpu.x87);
    for register in 0..8 {
        e.load_xmm(register, gs(at!(fx) + REGISTERS + 16 * i32::from(register)));
        e.store_xmm(gs(image + REGISTERS + 16 * i32::from(register)), register);
    }
    e.load32(Gpr::RAX, gs(at!(fx)));
    e.store(Width::B32, gs(image), Gpr::RAX);
    e.load8(Gpr::RAX, gs(at!(fx) + 4));
    e.store(Width::B16, gs(image + 4), Gpr::RAX);
    e.bytes(&[0x0f, 0x77]); // emms
    e.op(Enc::one(0xd9), 5, Rm::Mem(gs(at!(host_control)))); // fldcw
    e.op(Enc::one(0xc6), 0, Rm::Mem(gs(at!(fpu_loaded))));
    e.byte(0);
    let here = e.address();
    e.link(skip, here);
}

/// In shared code: brings the state back if it was there when generated code called. Vector registers and MXCSR
/// are to be loaded after. Uses the flags.
pub(crate) fn reload(e: &mut Emitter) {
    e.op(Enc::one(0x80), Alu::Cmp as u8, Rm::Mem(gs(at!(fpu_resume))));
    e.byte(0);
    let skip = e.jcc(Cond::E);
    load(e);
    let here = e.address();
    e.link(skip, here);
}

/// FXRSTOR64, which loads vector registers and MXCSR, too.
fn load(e: &mut Emitter) {
    e.store32_imm(gs(at!(cpu.x87) + MXCSR), 0x1f80);
    e.op(Enc::m0f(0xae).wide(), 1, Rm::Mem(gs(at!(cpu.x87))));
    e.op(Enc::one(0xc6), 0, Rm::Mem(gs(at!(fpu_loaded))));
    e.byte(1);
}

/// Shared code that is called to load the state; changes no register and no flag.
pub(crate) fn load_stub(e: &mut Emitter) {
    e.stmxcsr(gs(at!(cpu.mxcsr)));
    for register in 0..16 {
        e.store_xmm(gs(vector_slot(register)), register);
    }
    load(e);
    e.ldmxcsr(gs(at!(cpu.mxcsr)));
    for register in 0..16 {
        e.load_xmm(register, gs(vector_slot(register)));
    }
    e.ret();
}
