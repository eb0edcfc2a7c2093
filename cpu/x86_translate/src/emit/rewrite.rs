//! Instructions that are written out again with the host's registers and addresses.

use super::flags::restore_flags;
use crate::abi::layout::{S0, S1, at, gs, host_register, slot};
use crate::context::address::{Access, Ea, Wrap};
use crate::context::translation::Translation;
use crate::guest::encoding::Raw;
use crate::guest::fpu::Unit;
use crate::guest::info::CodeInfo;
use crate::guest::operand::{Field, Operand, has_memory};
use dbt_code::{Alu, Cond, Enc, Gpr, Mem, Rm, Shift, Width};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// The registers that the encoding fields get.
struct Fields {
    reg: u8,
    rm: Option<Rm>,
    opcode: u8,
    vvvv: u8,
    /// Scratch registers to store when the instruction is done, with their slots.
    store: [Option<(Gpr, i32)>; 2],
    rex: bool,
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// The number of the register of an operand; of AH and its like the encoding, 4 to 7.
fn operand_number(register: Register) -> u8 {
    let full = register.full_register().number() as u8;
    if is_high_byte(register) { full | 4 } else { full }
}

/// The operands that are registers.
fn register_operands<'a>(
    insn: &'a Instruction,
    info: &'a CodeInfo,
) -> impl Iterator<Item = (&'a Operand, Register)> {
    let operands = info.operands.iter().enumerate().map(|(index, operand)| (index as u32, operand));
    operands
        .filter(|(index, _)| insn.op_kind(*index) == OpKind::Register)
        .filter_map(|(index, operand)| Some((operand.as_ref()?, insn.op_register(index))))
}

/// Whether there are scratch registers for all operands that have no host register.
pub(crate) fn registers_fit(insn: &Instruction, info: &CodeInfo, memory: bool) -> bool {
    let (mut scratch, mut high, mut renamed) = (0, false, false);
    for (operand, register) in register_operands(insn, info) {
        if is_high_byte(register) {
            high = true;
            continue;
        }
        let guest = operand_number(register);
        match host_register(guest) {
            Some(host) => renamed |= host.0 != guest,
            None if operand.field == Field::Rm && may_use_slot(operand, info) => {}
            None => scratch += 1,
        }
        renamed |= host_register(guest).is_none();
    }
    let available = if memory { 1 } else { 2 };
    // CMPXCHG compares with AL, which must stay where it is.
    let stuck = high && memory && insn.mnemonic() == Mnemonic::Cmpxchg;
    scratch <= available && !(high && renamed) && !stuck
}

/// The access that the memory operand makes.
fn operand_access(insn: &Instruction, info: &CodeInfo) -> Access {
    let size = insn.memory_size().size() as u32;
    let masked = insn.op_mask() != Register::None;
    Access { size, write: info.mem_write, aligned: info.aligned && size >= 16, masked }
}

impl Translation<'_> {
    /// Writes an instruction again.
    pub(crate) fn generic(&mut self, index: usize) {
        let guest = self.guest[index].clone();
        let (insn, info) = (guest.insn, guest.info);
        let Some(raw) = guest.raw else { return };
        let mut memory = None;
        if has_memory(&insn)
            && let Some(ea) = self.address_of(&insn)
        {
            let mut mem = self.access(&ea, operand_access(&insn, info));
            if self.needs_flags(index) {
                mem = self.free_scratch(mem);
            }
            memory = Some(mem);
        }
        self.flags_for(index);
        let high = (0..insn.op_count())
            .filter(|op| insn.op_kind(*op) == OpKind::Register)
            .map(|op| insn.op_register(op))
            .find(|register| is_high_byte(*register));
        let mut swap = None;
        if let (Some(mem), Some(register)) = (memory, high) {
            // No instruction can name such a register and the ones that the address is in: put the byte
            // where it can be named, for a moment.
            self.e.lea(S1, mem);
            self.held = None;
            memory = Some(Mem::base(S1, 0));
            swap = Some(operand_number(register));
            self.exchange_bytes(operand_number(register));
        }
        let mut fields = self.place(&insn, info, &raw, memory, swap);
        if let Some(mem) = memory {
            fields.rm = Some(Rm::Mem(mem));
        }
        self.write_again(&raw, info, &fields, &insn, usize::from(guest.offset));
        self.record_data(index);
        if let Some(register) = swap {
            self.exchange_bytes(register);
        }
        for (register, at) in fields.store.into_iter().flatten() {
            self.e.store(Width::B64, gs(at), register);
        }
    }

    /// `xchg ah, al` and its like.
    fn exchange_bytes(&mut self, high: u8) {
        self.e.bytes(&[0x86, 0xc0 | high << 3 | high & 3]);
    }

    /// Decides on the register for each field and loads those that have no host register.
    fn place(
        &mut self,
        insn: &Instruction,
        info: &CodeInfo,
        raw: &Raw,
        memory: Option<Mem>,
        swap: Option<u8>,
    ) -> Fields {
        let vector_reg = !info.operands.iter().flatten().any(|operand| operand.field == Field::Reg)
            && (info.vector || info.unit == Unit::Mmx);
        let mut fields = Fields {
            // An opcode extension, or a vector register.
            reg: if vector_reg && uses_reg(insn) { raw.reg } else { raw.reg & 7 },
            rm: raw.rm.map(Rm::Reg),
            opcode: raw.opcode,
            vvvv: raw.vvvv,
            store: [None; 2],
            rex: false,
        };
        let mut free = [Some(S0), memory.is_none().then_some(S1)].into_iter().flatten();
        let mut stored = 0;
        let mut taken: [Option<(Gpr, i32)>; 2] = [None; 2];
        let mut loaded = false;
        for (operand, register) in register_operands(insn, info) {
            if is_high_byte(register) {
                let number = operand_number(register);
                set(&mut fields, operand.field, if swap == Some(number) { number & 3 } else { number });
                continue;
            }
            let guest = operand_number(register);
            fields.rex |= operand.width == Width::B8 && guest >= 4;
            if let Some(host) = host_register(guest) {
                set(&mut fields, operand.field, host.0);
                continue;
            }
            let at = slot(guest);
            if operand.field == Field::Rm && may_use_slot(operand, info) {
                fields.rm = Some(Rm::Mem(gs(at)));
                continue;
            }
            // The same register twice is the same scratch register twice.
            let again = taken.iter().flatten().find(|(_, slot)| *slot == at);
            if let Some(&(scratch, _)) = again {
                set(&mut fields, operand.field, scratch.0);
                if operand.reads && !loaded {
                    // MOV R11D, R11D: only the second operand is read.
                    self.e.load(scratch, gs(at));
                    loaded = true;
                }
                continue;
            }
            let Some(scratch) = free.next() else { continue };
            if scratch == S1 {
                self.held = None;
            }
            taken[if scratch == S0 { 0 } else { 1 }] = Some((scratch, at));
            let partial = matches!(operand.width, Width::B8 | Width::B16);
            loaded = operand.reads || partial;
            if loaded {
                self.e.load(scratch, gs(at));
            }
            set(&mut fields, operand.field, scratch.0);
            if operand.writes {
                fields.store[stored] = Some((scratch, at));
                stored += 1;
            }
        }
        fields
    }

    fn write_again(
        &mut self,
        raw: &Raw,
        info: &CodeInfo,
        fields: &Fields,
        insn: &Instruction,
        offset: usize,
    ) {
        if let Some(evex) = raw.evex {
            let rm = fields.rm.unwrap_or(Rm::Reg(0));
            self.e.evex(evex, fields.reg, rm);
        } else if info.vex {
            let rm = fields.rm.unwrap_or(Rm::Reg(0));
            self.e.vex(raw.map, raw.pp, raw.vex_w, raw.vex_l, raw.opcode, fields.reg, fields.vvvv, rm);
        } else {
            let enc = Enc {
                lock: raw.lock && self.keeps_lock(insn),
                p66: self.prefix_66(raw, info),
                rep: raw.rep,
                w: raw.rex & 8 != 0,
                rex: fields.rex,
                map: raw.map,
                opcode: fields.opcode,
            };
            match fields.rm {
                Some(rm) if info.has_modrm => self.e.op(enc, fields.reg, rm),
                _ => self.write_opcode_register(enc, fields, info),
            }
        }
        let bytes = &self.page[offset + raw.imm..offset + insn.len()];
        self.e.bytes(bytes);
    }

    /// Whether the host's instruction has the prefix 0x66.
    fn prefix_66(&self, raw: &Raw, info: &CodeInfo) -> bool {
        if self.mode.bits() == 16 { info.prefix_66 } else { raw.p66 }
    }

    /// Whether LOCK is needed. With one processor atomicity is not; but a locked operation that changes
    /// nothing is there for the order of memory accesses, which the threads of devices see.
    fn keeps_lock(&self, insn: &Instruction) -> bool {
        let changes_nothing = matches!(insn.mnemonic(), Mnemonic::Or | Mnemonic::Add)
            && insn.op1_kind() != OpKind::Register
            && insn.immediate(1) == 0;
        self.settings.lock_needed || changes_nothing
    }

    /// An instruction without ModRM: its register, if any, is in the opcode.
    fn write_opcode_register(&mut self, enc: Enc, fields: &Fields, info: &CodeInfo) {
        let register = info.operands.iter().flatten().any(|operand| operand.field == Field::Opcode);
        let number = if register { fields.vvvv } else { 0 };
        if enc.p66 {
            self.e.byte(0x66);
        }
        if enc.rep != 0 {
            self.e.byte(enc.rep);
        }
        let rex = u8::from(enc.w) << 3 | number >> 3;
        if rex != 0 || enc.rex {
            self.e.byte(0x40 | rex);
        }
        if enc.map != dbt_code::Map::One {
            self.e.byte(0x0f);
        }
        self.e.byte(if register { enc.opcode & 0xf8 | number & 7 } else { enc.opcode });
    }

    /// LEA: no access is made.
    pub(crate) fn lea(&mut self, index: usize) {
        let insn = self.guest[index].insn;
        // Segments do not count.
        let mut plain = insn;
        plain.set_segment_prefix(Register::None);
        let Some(ea) = self.address_of(&plain).map(|ea| Ea { segment: None, ..ea }) else { return };
        let to = insn.op0_register();
        let guest = operand_number(to);
        self.held = None;
        let (wide, short) = (to.is_gpr64(), to.is_gpr16());
        let simple = ea.slots == [None, None]
            && ea.wrap != Wrap::At64K
            && ea.constant.is_none()
            && ea.index.is_none_or(|index| index.host.is_some());
        if let (true, false, Some(host)) = (simple, short, host_register(guest)) {
            let index = ea.index.and_then(|index| Some((index.host?, index.scale)));
            let mem = Mem { base: ea.base, index, disp: ea.disp, gs: false };
            let enc = Enc { w: wide, ..Enc::one(0x8d) };
            return self.e.op(enc, host.0, Rm::Mem(mem));
        }
        if let (true, Some(constant), Some(host)) = (wide, ea.constant, host_register(guest)) {
            return self.e.mov_imm(host, constant);
        }
        ea.compute(self.e, 0);
        if short {
            // Only the low half of the register's low half changes.
            match host_register(guest) {
                Some(host) => self.e.op(Enc::one(0x89).sized(Width::B16), S0.0, Rm::Reg(host.0)),
                None => self.e.store(Width::B16, gs(slot(guest)), S0),
            }
            return;
        }
        let width = if wide { Width::B64 } else { Width::B32 };
        match host_register(guest) {
            Some(host) => self.e.op(Enc::one(0x8b).sized(width), host.0, Rm::Reg(S0.0)),
            None => {
                if !wide {
                    self.e.op(Enc::one(0x8b), S0.0, Rm::Reg(S0.0));
                }
                self.e.store(Width::B64, gs(slot(guest)), S0);
            }
        }
    }

    /// DIV and IDIV of 32 and 64 bits: the cases that would fault are left to the interpreter.
    pub(crate) fn divide(&mut self, index: usize, signed: bool) {
        let guest = self.guest[index].clone();
        let insn = guest.insn;
        let wide = guest.raw.is_some_and(|raw| raw.rex & 8 != 0);
        let width = if wide { Width::B64 } else { Width::B32 };
        self.clobber_flags();
        if has_memory(&insn)
            && let Some(ea) = self.address_of(&insn)
        {
            let mem = self.access(&ea, Access::read(if wide { 8 } else { 4 }));
            self.e.op(Enc::one(0x8b).sized(width), S0.0, Rm::Mem(mem));
        } else if let Some(host) = host_register(operand_number(insn.op0_register())) {
            self.e.op(Enc::one(0x8b).sized(width), S0.0, Rm::Reg(host.0));
        } else {
            let at = slot(operand_number(insn.op0_register()));
            self.e.op(Enc::one(0x8b).sized(width), S0.0, Rm::Mem(gs(at)));
        }
        self.held = None;
        if signed {
            self.e.op(Enc::one(0x8b).sized(width), S1.0, Rm::Reg(Gpr::RAX.0));
            self.e.shift_imm(Shift::Sar, width, Rm::Reg(S1.0), if wide { 63 } else { 31 });
            self.e.alu(Alu::Cmp, width, S1, Rm::Reg(Gpr::RDX.0));
            self.interpret_if(Cond::NE);
            // Neither 0 nor -1.
            self.e.op(Enc { w: wide, ..Enc::one(0x8d) }, S1.0, Rm::Mem(Mem::base(S0, 1)));
            self.e.alu_imm(Alu::Cmp, width, Rm::Reg(S1.0), 1);
            self.interpret_if(Cond::BE);
        } else {
            self.e.alu(Alu::Cmp, width, Gpr::RDX, Rm::Reg(S0.0));
            self.interpret_if(Cond::AE);
        }
        if self.settings.strict {
            // AMD processors leave CF and OF as they were.
            restore_flags(self.e, S1);
        }
        self.e.op(Enc::one(0xf6).sized(width), if signed { 7 } else { 6 }, Rm::Reg(S0.0));
    }

    /// INC and DEC in the encoding with the register in the opcode.
    pub(crate) fn inc_dec(&mut self, index: usize) {
        self.flags_for(index);
        let insn = self.guest[index].insn;
        let register = insn.op0_register();
        let Some(host) = host_register(operand_number(register)) else { return };
        let width = if register.is_gpr16() { Width::B16 } else { Width::B32 };
        let down = u8::from(insn.mnemonic() == Mnemonic::Dec);
        self.e.op(Enc::one(0xff).sized(width), down, Rm::Reg(host.0));
    }

    /// MOV of the accumulator and memory at a constant address.
    pub(crate) fn constant_move(&mut self, index: usize) {
        let insn = self.guest[index].insn;
        let Some(ea) = self.address_of(&insn) else { return };
        let write = insn.op0_kind() == OpKind::Memory;
        let size = insn.memory_size().size() as u32;
        let mem = self.access(&ea, Access { size, write, aligned: false, masked: false });
        let width = match size {
            1 => Width::B8,
            2 => Width::B16,
            _ => Width::B32,
        };
        self.e.op(Enc::one(if write { 0x88 } else { 0x8a }).sized(width), Gpr::RAX.0, Rm::Mem(mem));
    }

    /// An instruction that is the same on the host.
    pub(crate) fn verbatim(&mut self, index: usize) {
        self.flags_for(index);
        let guest = &self.guest[index];
        let start = usize::from(guest.offset);
        let mut bytes = &self.page[start..start + guest.insn.len()];
        if self.mode.bits() == 16 {
            // Prefixes are others.
            while let [0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3, rest @ ..] = bytes {
                bytes = rest;
            }
            if guest.info.prefix_66 {
                self.e.byte(0x66);
            }
        }
        self.e.bytes(bytes);
    }

    /// CLD and STD.
    pub(crate) fn direction(&mut self, set: bool) {
        self.clobber_flags();
        let df = Rm::Mem(gs(at!(cpu.rflags) + 1));
        // Bit 10 of RFLAGS is bit 2 of its second byte.
        self.e.op(Enc::one(0x80), if set { Alu::Or as u8 } else { Alu::And as u8 }, df);
        self.e.byte(if set { 4 } else { !4 });
        self.flags_lost();
    }
}

/// Whether ModRM.reg is an operand, not an extension of the opcode, in an instruction with vector registers.
fn uses_reg(insn: &Instruction) -> bool {
    let kinds = insn.code().op_code().op_kinds();
    use iced_x86::OpCodeOperandKind::{k_reg, mm_reg, xmm_reg, ymm_reg, zmm_reg};
    kinds.iter().any(|kind| matches!(kind, xmm_reg | ymm_reg | zmm_reg | k_reg | mm_reg))
}

/// Whether a register in ModRM.rm can be taken from its slot in memory.
fn may_use_slot(operand: &Operand, info: &CodeInfo) -> bool {
    if operand.writes { info.slot_write && operand.width == Width::B64 } else { info.slot_read }
}

fn set(fields: &mut Fields, field: Field, number: u8) {
    match field {
        Field::Reg => fields.reg = number,
        Field::Rm => fields.rm = Some(Rm::Reg(number)),
        // No instruction has both.
        Field::Opcode | Field::Vvvv => fields.vvvv = number,
    }
}
