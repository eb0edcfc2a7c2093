//! The cold parts of a block's code.

use crate::abi::calls::MissInfo;
use crate::abi::layout::{S0, S1, at, gs};
use crate::context::cold::{Cold, ColdKind};
use crate::context::insn::{GuestInsn, Plan};
use crate::context::link::NewLink;
use crate::context::translation::Translation;
use crate::emit::count::refund;
use crate::emit::interpret::write_interpret_info;
use crate::guest::class::Class;
use dbt_code::{Alu, Cond, Enc, Gpr, Mem, Rm, Width};
use std::collections::VecDeque;

impl Translation<'_> {
    /// Writes all that was put off.
    pub(super) fn emit_cold(&mut self) {
        let mut queue: VecDeque<Cold> = std::mem::take(&mut self.cold).into();
        while let Some(cold) = queue.pop_front() {
            let here = self.cold_code.address();
            let code = if self.e.contains(cold.field) { &mut *self.e } else { &mut *self.cold_code };
            code.link(cold.field, here);
            let end = self.ends.get(cold.instruction).copied().unwrap_or(0);
            match cold.kind {
                ColdKind::Miss(miss) => {
                    self.record_cold(cold.instruction);
                    miss.ea.compute(self.cold_code, miss.from);
                    if miss.group {
                        queue.push_back(self.ungrouped(cold.instruction, miss.access.size));
                    }
                    self.cold_code.call_to(self.stubs.miss);
                    let at = self.cold_code.address();
                    let guest = &self.guest[cold.instruction];
                    let ends = guest.ends_block() && guest.class != Class::Jcc;
                    // The interpreter does all of the instruction that is in memory now, which may be another than
                    // was translated. Where later accesses rely on a check that this would go past, or that was
                    // made before it, the block must be left.
                    let relied_on = self.is_relied_on(cold.instruction);
                    let info = MissInfo {
                        retry: miss.retry.wrapping_sub(at) as i32,
                        resume: if ends || relied_on { 0 } else { end.wrapping_sub(at) as i32 },
                        page_va: self.page_va,
                        offset: guest.offset,
                        size: miss.access.size as u16,
                        kind: (u8::from(miss.access.write) * MissInfo::WRITE)
                            | (u8::from(miss.access.aligned) * MissInfo::ALIGNED)
                            | (u8::from(miss.access.masked) * MissInfo::MASKED)
                            | (u8::from(miss.group) * MissInfo::GROUP)
                            | (u8::from(self.mode.is_relative()) * MissInfo::RELATIVE),
                        left: self.left(cold.instruction),
                    };
                    info.write(self.cold_code);
                }
                ColdKind::Link(link) => {
                    let stub =
                        if self.links[link].memory { self.stubs.link_mem } else { self.stubs.link_hot };
                    if self.links[link].slot.is_none() {
                        self.links[link].stub = here;
                    }
                    self.link_number(link);
                    self.cold_code.jmp_to(stub);
                }
                ColdKind::LinkBack(link, by) => {
                    self.links[link].stub = here;
                    self.cold_code.load(S0, gs(at!(page_va)));
                    let width = self.ip_width();
                    let back = Rm::Mem(Mem::base(S0, -by));
                    self.cold_code.op(Enc::one(0x8d).sized(width), S0.0, back);
                    self.cold_code.store(Width::B64, gs(at!(page_va)), S0);
                    self.link_number(link);
                    self.cold_code.jmp_to(self.stubs.link_mem);
                }
                ColdKind::Poll(link) => {
                    self.link_number(link);
                    self.cold_code.jmp_to(self.stubs.poll);
                }
                ColdKind::Indirect => {
                    self.cold_code.store(Width::B64, gs(at!(cpu.rip)), S0);
                    self.cold_code.jmp_to(self.stubs.indirect);
                }
                ColdKind::Step => self.leave_first(),
                ColdKind::OverBudget => {
                    refund(self.cold_code, self.left(0));
                    self.leave_first();
                }
                ColdKind::DropFrames(resume) => {
                    self.cold_code.load(Gpr::RSP, gs(at!(frames)));
                    self.cold_code.jmp_to(resume);
                }
                ColdKind::BeginWide(resume) => {
                    self.cold_code.call_to(self.stubs.begin_wide);
                    self.cold_code.jmp_to(resume);
                }
                ColdKind::LoadFpu(resume) => {
                    self.cold_code.call_to(self.stubs.load_fpu);
                    self.cold_code.jmp_to(resume);
                }
                ColdKind::Interpret | ColdKind::InterpretAndLeave => {
                    let leave = matches!(cold.kind, ColdKind::InterpretAndLeave);
                    self.record_cold(cold.instruction);
                    self.cold_code.call_to(self.stubs.interpret);
                    let at = self.cold_code.address();
                    let insn = self.guest[cold.instruction].insn;
                    let delta = if leave { 0 } else { end.wrapping_sub(at) as i32 };
                    let left = self.left(cold.instruction);
                    write_interpret_info(self.cold_code, &mut self.kept, insn, delta, self.mode, left);
                }
            }
        }
    }

    /// Leaves the first instruction of the block to the interpreter.
    fn leave_first(&mut self) {
        let offset = i32::from(self.guest[0].offset);
        match self.fixed_page() {
            Some(page_va) => {
                let va = page_va.wrapping_add(offset as u64) & self.mode.ip_mask();
                self.cold_code.mov_imm(S0, va);
            }
            None => {
                self.cold_code.load(S0, gs(at!(page_va)));
                self.cold_code.lea(S0, Mem::base(S0, offset));
            }
        }
        self.cold_code.store(Width::B64, gs(at!(cpu.rip)), S0);
        self.cold_code.jmp_to(self.stubs.step);
    }

    /// Whether an instruction after this one relies on a check of this one, or of one before it.
    fn is_relied_on(&self, index: usize) -> bool {
        let slots = |part: &[GuestInsn], lead: bool| {
            part.iter().flat_map(|guest| guest.plans).fold(0u64, |slots, plan| match plan {
                Plan::Lead { slot: Some(slot), .. } if lead => slots | 1 << slot,
                Plan::Follow { slot } if !lead => slots | 1 << slot,
                _ => slots,
            })
        };
        let (before, after) = self.guest.split_at(index + 1);
        slots(before, true) & slots(after, false) != 0
    }

    /// In the cold code of a shared check that failed, with the first address in S0: if the bytes cross a page,
    /// goes to a block that begins at the same instruction and shares no checks.
    fn ungrouped(&mut self, instruction: usize, size: u32) -> Cold {
        let left = self.left(instruction);
        let code = &mut *self.cold_code;
        code.lea(S1, Mem::base(S0, size as i32 - 1));
        code.alu(Alu::Xor, Width::B64, S1, Rm::Reg(S0.0));
        code.alu_imm(Alu::And, Width::B64, Rm::Reg(S1.0), -4096);
        let field = if self.settings.counting {
            let skip = code.jcc(Cond::E);
            refund(code, left);
            code.align_patch(1);
            let field = code.jmp();
            let here = code.address();
            code.link(skip, here);
            field
        } else {
            code.align_patch(2);
            code.jcc(Cond::NE)
        };
        let target = i64::from(self.guest[instruction].offset);
        let link = NewLink {
            field,
            stub: 0,
            target,
            memory: true,
            check: None,
            slot: None,
            ungrouped: true,
            numbers: vec![],
        };
        self.links.push(link);
        Cold { field, instruction, kind: ColdKind::Link(self.links.len() - 1) }
    }

    /// Loads the number of a link, which is not known yet.
    fn link_number(&mut self, link: usize) {
        self.cold_code.bytes(&[0x41, 0xb9]); // mov r9d, imm32
        let field = self.cold_code.address();
        self.links[link].numbers.push(field);
        self.cold_code.dword(0);
    }
}
