//! Translation of one block: decoding, liveness, and the code for each instruction.

use crate::address::{Access, Ea};
use crate::flags::{ALL, Effect, Flags, effect};
use crate::fpu;
use crate::insn::{Class, CodeInfo, Raw, code_info};
use crate::layout::{S0, S1, at, fetch_entries, gs};
use crate::plan::{Plan, plan};
use crate::runtime::{InterpretInfo, MissInfo};
use crate::stubs::{Stubs, restore_flags, save_flags};
use dbt_code::{Alu, Cond, Emitter, Gpr, Mem, Rm, Shift, Width};
use iced_x86::{Decoder, FlowControl, Instruction, Mnemonic, OpKind};
use std::collections::VecDeque;
use std::sync::atomic::AtomicU32;
use x86_core::{FETCH_ENTRIES, Tlb};
use x86_interp::DECODER_OPTIONS;

/// Instructions in a block at most.
const MAX_INSTRUCTIONS: usize = 64;
/// Instructions that are looked at behind a jump, to see which flags are live there.
const MAX_PEEK: usize = 6;

/// What blocks depend on besides the code's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Mode(pub(crate) u8);

impl Mode {
    /// CPL 3. Such code is independent of the virtual address of its page.
    pub(crate) const USER: u8 = 1;
    /// Vector instructions are left to the interpreter: they would fault, or exceptions are unmasked.
    pub(crate) const NO_VECTOR: u8 = 2;
    /// Accesses share no checks.
    pub(crate) const UNGROUPED: u8 = 4;
    /// CR4.SMAP is set.
    pub(crate) const SMAP: u8 = 8;
    /// x87 and MMX instructions are left to the interpreter, for the same reasons.
    pub(crate) const NO_X87: u8 = 16;

    pub(crate) fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }
}

/// What translations depend on besides their mode: constant for a VM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) strict: bool,
    pub(crate) bmi2: bool,
    pub(crate) lock_needed: bool,
    pub(crate) max_instructions: usize,
    pub(crate) side_exits: usize,
}

/// One guest instruction.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) insn: Instruction,
    pub(crate) info: &'static CodeInfo,
    pub(crate) class: Class,
    pub(crate) raw: Option<Raw>,
    /// Offset in the page.
    pub(crate) offset: u16,
    pub(crate) effect: Effect,
    /// Flags live before it, and after it.
    pub(crate) live: Flags,
    pub(crate) live_after: Flags,
    pub(crate) plans: [Plan; 2],
    /// The x87 instruction before it that FOP and FIP are still to be stored of.
    pub(crate) fpu_last: Option<u16>,
}

/// Where the guest's arithmetic flags are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlagsAt {
    Host,
    Memory,
    Both,
}

/// Code that is written at the end, away from the hot path.
pub(crate) struct Cold {
    /// The displacement that leads to it.
    pub(crate) field: u64,
    pub(crate) instruction: usize,
    pub(crate) kind: ColdKind,
}

pub(crate) enum ColdKind {
    Miss(Miss),
    /// The exit of the link of that number.
    Link(usize),
    /// The same after the page that runs was changed by so much.
    LinkBack(usize, i32),
    /// The exit of a poll before that link.
    Poll(usize),
    /// The target of an indirect jump is in S0.
    Indirect,
    /// The current instruction is left to the interpreter.
    Interpret,
    /// The block, which has one instruction, is left to the interpreter.
    Step,
    /// The guest's x87 state is loaded; then the code goes on there.
    LoadFpu(u64),
    /// Frames of calls are forgotten, as there are too many; then the code goes on there.
    DropFrames(u64),
}

impl ColdKind {
    /// Whether the code goes on behind the instruction with what the interpreter made of it.
    fn may_resume(&self) -> bool {
        matches!(self, Self::Interpret | Self::Miss(Miss { group: false, .. }))
    }
}

pub(crate) struct Miss {
    pub(crate) ea: Ea,
    pub(crate) from: i32,
    pub(crate) access: Access,
    pub(crate) retry: u64,
    pub(crate) group: bool,
}

/// A direct jump that was written.
#[derive(Debug, Clone)]
pub(crate) struct NewLink {
    /// The displacement that is patched.
    pub(crate) field: u64,
    /// Where it leads while it is not linked.
    pub(crate) stub: u64,
    /// Target, from the beginning of the page.
    pub(crate) target: i64,
    /// Whether the flags are in memory when it is taken.
    pub(crate) memory: bool,
    /// The number to compare with before a jump to another page.
    pub(crate) check: Option<u64>,
    /// The slot that says whether a jump between pages of user code is verified.
    pub(crate) slot: Option<u16>,
    /// Leads to a block whose accesses share no checks.
    pub(crate) ungrouped: bool,
    /// Where the link's number is loaded.
    pub(crate) numbers: Vec<u64>,
}

/// A block as it was written.
pub(crate) struct Output {
    pub(crate) entry_mem: u64,
    pub(crate) entry_hot: u64,
    pub(crate) links: Vec<NewLink>,
    /// Byte ranges of the page that the code depends on.
    pub(crate) depends: Vec<(u16, u16)>,
    pub(crate) instructions: usize,
    /// Instructions that the code points at.
    pub(crate) kept: Vec<Box<Instruction>>,
}

/// The state of a translation.
pub(crate) struct Translation<'a> {
    pub(crate) e: &'a mut Emitter,
    pub(crate) cold_code: &'a mut Emitter,
    /// The page, and 15 bytes of the next if the only instruction crosses.
    pub(crate) page: &'a [u8],
    /// What the page's address is taken as: the real one, or 0 if the code is independent of it.
    pub(crate) page_va: u64,
    pub(crate) mode: Mode,
    pub(crate) options: &'a Settings,
    pub(crate) stubs: &'a Stubs,
    pub(crate) guest: Vec<Guest>,
    pub(crate) current: usize,
    pub(crate) flags: FlagsAt,
    /// The group slot whose addend is in S1.
    pub(crate) held: Option<u8>,
    /// The guest's x87 state is in the host's unit.
    pub(crate) fpu_ready: bool,
    /// Jumps are to be calls of the host.
    pub(crate) calls: bool,
    pub(crate) cold: Vec<Cold>,
    pub(crate) links: Vec<NewLink>,
    pub(crate) depends: Vec<(u16, u16)>,
    pub(crate) kept: Vec<Box<Instruction>>,
    pub(crate) slots: &'a AtomicU32,
    next_access: usize,
    /// Where the code of each instruction ends.
    ends: Vec<u64>,
}

/// What is fixed for a translation.
pub(crate) struct Input<'a> {
    /// The page; and 15 bytes of the next if that is known.
    pub(crate) page: &'a [u8],
    /// The guest physical address of the next page, if the first instruction crosses into it.
    pub(crate) next_page: Option<u64>,
    pub(crate) page_va: u64,
    pub(crate) offset: u16,
    pub(crate) mode: Mode,
    /// Slots of jumps between pages given out.
    pub(crate) slots: &'a AtomicU32,
    /// Whether the guest's processor has the instruction.
    pub(crate) has: &'a dyn Fn(&Instruction) -> bool,
}

/// Translates the block at `input.offset`. `None` if its first instruction crosses the page's end.
pub(crate) fn translate(
    input: &Input<'_>,
    e: &mut Emitter,
    cold_code: &mut Emitter,
    options: &Settings,
    stubs: &Stubs,
) -> Option<Output> {
    let page_va = if input.mode.has(Mode::USER) { 0 } else { input.page_va };
    let mut translation = Translation {
        e,
        cold_code,
        page: input.page,
        page_va,
        mode: input.mode,
        options,
        stubs,
        guest: Vec::with_capacity(16),
        current: 0,
        flags: FlagsAt::Host,
        held: None,
        fpu_ready: false,
        calls: false,
        cold: vec![],
        links: vec![],
        depends: vec![],
        kept: vec![],
        slots: input.slots,
        next_access: 0,
        ends: vec![],
    };
    let end = translation.decode(input)?;
    translation.liveness(end);
    fpu::plan(&mut translation.guest);
    if !input.mode.has(Mode::UNGROUPED) {
        plan(&mut translation.guest, !input.mode.has(Mode::USER));
    }
    Some(translation.emit(input.next_page, end))
}

impl Translation<'_> {
    /// The page's virtual address, if the code may depend on it.
    pub(crate) fn fixed_page(&self) -> Option<u64> {
        (!self.mode.has(Mode::USER)).then_some(self.page_va)
    }

    /// Decodes the block; gives where it ends in the page.
    fn decode(&mut self, input: &Input<'_>) -> Option<u16> {
        let offset = input.offset;
        let start = usize::from(offset);
        let ip = self.page_va.wrapping_add(u64::from(offset));
        let mut decoder = Decoder::with_ip(64, &self.page[start..], ip, DECODER_OPTIONS);
        let mut at = start;
        let mut side_exits = 0;
        let most =
            if input.next_page.is_some() { 1 } else { self.options.max_instructions.min(MAX_INSTRUCTIONS) };
        while self.guest.len() < most && at < 4096 {
            let insn = decoder.decode();
            if decoder.last_error() == iced_x86::DecoderError::NoMoreBytes {
                break;
            }
            let info = code_info(&insn);
            let len = insn.len();
            let bytes = &self.page[at..at + len];
            let raw = Raw::parse(bytes, info);
            let mut class = info.class;
            if raw.is_none_or(|raw| !self.can_translate(&insn, info, &raw)) || !(input.has)(&insn) {
                class = Class::Interpret;
            }
            if class == Class::Generic
                && matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
                && Self::has_memory(&insn)
                && insn.op1_kind() == OpKind::Register
            {
                class = Class::BitString;
            }
            let mut described = effect(&insn, info);
            if self.options.strict && insn.rflags_undefined() != 0 {
                // The host may leave such flags as they are: they must be the guest's.
                described.reads = ALL;
            }
            if class == Class::Interpret {
                described = Effect { reads: ALL, conditional: true, ..described };
            }
            self.guest.push(Guest {
                insn,
                info,
                class,
                raw,
                offset: at as u16,
                effect: described,
                live: ALL,
                live_after: ALL,
                plans: [Plan::Single; 2],
                fpu_last: None,
            });
            at += len;
            match insn.flow_control() {
                FlowControl::Next if insn.mnemonic() == Mnemonic::Hlt => break,
                FlowControl::Next => {}
                FlowControl::ConditionalBranch
                    if class == Class::Jcc && side_exits < self.options.side_exits =>
                {
                    side_exits += 1;
                }
                _ => break,
            }
        }
        if let Some(last) = self.guest.last_mut()
            && last.class == Class::Sti
        {
            // Interrupts wait for the end of the next instruction, which is not here.
            last.class = Class::Interpret;
            last.effect = Effect { reads: ALL, conditional: true, ..last.effect };
        }
        self.depends.push((offset, at as u16));
        (!self.guest.is_empty()).then_some(at as u16)
    }

    pub(crate) fn ends_block(guest: &Guest) -> bool {
        guest.insn.flow_control() != FlowControl::Next || guest.insn.mnemonic() == Mnemonic::Hlt
    }

    fn liveness(&mut self, end: u16) {
        let last = self.guest.len() - 1;
        let mut live = match self.guest[last].class {
            _ if self.options.strict => ALL,
            Class::Jcc => self.peek(i64::from(end)),
            Class::Jmp => self.peek(self.target(last)),
            _ if Self::ends_block(&self.guest[last]) => ALL,
            _ => self.peek(i64::from(end)),
        };
        for index in (0..=last).rev() {
            if self.guest[index].class == Class::Jcc {
                live |= self.peek(self.target(index));
            }
            let guest = &mut self.guest[index];
            guest.live_after = live;
            live = guest.effect.before(live);
            if self.options.strict {
                live = ALL;
            }
            self.guest[index].live = live;
        }
    }

    /// The target of a direct jump, from the beginning of the page.
    pub(crate) fn target(&self, index: usize) -> i64 {
        self.guest[index].insn.near_branch_target().wrapping_sub(self.page_va) as i64
    }

    /// The flags that may be live at `target`, from a look at the code there. What was looked at becomes part
    /// of what the block depends on.
    pub(crate) fn peek(&mut self, target: i64) -> Flags {
        if self.options.strict || !(0..4096).contains(&target) {
            return ALL;
        }
        let start = target as usize;
        let mut live = ALL;
        let mut killed: Flags = 0;
        let mut decoder = Decoder::with_ip(64, &self.page[start..4096], target as u64, DECODER_OPTIONS);
        let mut needed: Flags = 0;
        for _ in 0..MAX_PEEK {
            let insn = decoder.decode();
            if insn.is_invalid() {
                break;
            }
            let info = code_info(&insn);
            let effect = effect(&insn, info);
            needed |= effect.reads & !killed;
            if !effect.conditional {
                killed |= effect.writes;
            }
            live = (ALL & !killed) | needed;
            if killed | needed == ALL || insn.flow_control() != FlowControl::Next {
                break;
            }
        }
        if live != ALL {
            self.depends.push((target as u16, decoder.position() as u16 + target as u16));
        }
        live
    }

    fn emit(mut self, next_page: Option<u64>, end: u16) -> Output {
        self.e.align(16);
        let (entry_mem, entry_hot) = match next_page {
            Some(gpa) => self.check_next_page(gpa),
            None => {
                let memory = self.e.address();
                if self.guest[0].live != 0 {
                    restore_flags(self.e, S0);
                }
                (memory, self.e.address())
            }
        };
        for index in 0..self.guest.len() {
            self.current = index;
            self.next_access = 0;
            let last = index + 1 == self.guest.len();
            self.prepare_fpu(index);
            let cold = self.cold.len();
            self.instruction(index, last);
            if self.cold[cold..].iter().any(|cold| cold.kind.may_resume()) {
                // Who comes back from the interpreter to the next instruction holds nothing.
                self.held = None;
            }
            let sets = !matches!(self.guest[index].class, Class::Interpret | Class::Popf | Class::Iret);
            if self.guest[index].effect.writes != 0 && sets {
                self.flags = FlagsAt::Host;
            }
            let here = self.e.address();
            self.ends.push(here);
        }
        let last = self.guest.len() - 1;
        if !Self::ends_block(&self.guest[last]) {
            self.finish_fpu();
            self.edge(i64::from(end), false);
        }
        self.emit_cold();
        Output {
            entry_mem,
            entry_hot,
            links: self.links,
            depends: self.depends,
            instructions: self.guest.len(),
            kept: self.kept,
        }
    }

    /// Whether later instructions rely on a check of this one.
    fn leads(&self, index: usize) -> bool {
        self.guest[index].plans.iter().any(|plan| matches!(plan, Plan::Lead { .. }))
    }

    fn instruction(&mut self, index: usize, last: bool) {
        let insn = self.guest[index].insn;
        match self.guest[index].class {
            Class::Nop => {}
            Class::Verbatim => {
                self.flags_for(index);
                let start = usize::from(self.guest[index].offset);
                let bytes = &self.page[start..start + insn.len()];
                self.e.bytes(bytes);
            }
            Class::Generic => self.generic(index),
            Class::Lea => self.lea(index),
            Class::Push => self.push(index),
            Class::PushImm => self.push_immediate(index),
            Class::Pop => self.pop(index),
            Class::Leave => self.leave(),
            Class::Call => self.call(index),
            Class::CallIndirect => self.call_indirect(index),
            Class::Jmp => {
                let target = self.target(index);
                let backward = target <= i64::from(self.guest[index].offset);
                self.edge(target, backward);
            }
            Class::JmpIndirect => self.jmp_indirect(index),
            Class::Jcc => self.jcc(index, last),
            Class::Ret => self.ret(index),
            Class::Div => self.divide(index, false),
            Class::Idiv => self.divide(index, true),
            Class::Cld => self.direction(false),
            Class::Std => self.direction(true),
            Class::Movs => self.string(index, true),
            Class::Stos => self.string(index, false),
            Class::Cli => self.cli(),
            Class::Sti => self.sti(),
            Class::Pushf => self.pushf(),
            Class::Popf => self.popf(),
            Class::Iret => self.iret(),
            Class::MovSeg => self.mov_from_segment(index),
            Class::Swapgs => self.swapgs(),
            Class::Stac => self.access_flag(true),
            Class::Clac => self.access_flag(false),
            Class::BitString => self.bit_string(index),
            Class::Fldcw => self.fldcw(index),
            Class::Fninit => self.fninit(),
            Class::Syscall | Class::Sysret => self.system_call(index),
            Class::Rdtsc => self.time_stamp(index),
            Class::Lods => self.load_string(index),
            Class::Scas => self.scan_string(index),
            Class::Interpret => self.interpret(index, last),
        }
    }

    /// The plan of the current instruction's next access.
    pub(crate) fn next_plan(&mut self) -> Plan {
        let plan = self.guest[self.current].plans.get(self.next_access).copied().unwrap_or(Plan::Single);
        self.next_access += 1;
        plan
    }

    /// Brings the flags to the host if the instruction needs them there.
    pub(crate) fn flags_for(&mut self, index: usize) {
        let guest = &self.guest[index];
        if self.flags == FlagsAt::Memory && guest.effect.needs_host(guest.live_after) {
            restore_flags(self.e, S0);
            self.flags = FlagsAt::Both;
        }
    }

    /// Has the flags in memory, live or not.
    pub(crate) fn flags_to_memory(&mut self) {
        if self.flags == FlagsAt::Host {
            save_flags(self.e, S0);
            self.flags = FlagsAt::Both;
        }
    }

    /// Leaves the instruction to the interpreter.
    fn interpret(&mut self, index: usize, last: bool) {
        if self.guest[index].live != 0 {
            self.flags_to_memory();
        }
        self.e.call_to(self.stubs.interpret);
        let resume = !(last && Self::ends_block(&self.guest[index]));
        let delta = if resume { size_of::<InterpretInfo>() as i32 } else { 0 };
        let insn = self.guest[index].insn;
        write_interpret_info(self.e, &mut self.kept, insn, delta, self.mode);
        self.flags = FlagsAt::Both;
        self.held = None;
    }

    fn emit_cold(&mut self) {
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
                    let ends = Self::ends_block(guest) && guest.class != Class::Jcc;
                    // The interpreter does all of the instruction. Where that would go past another access'
                    // check, which later ones rely on, the block must be left.
                    let leads = self.leads(cold.instruction);
                    let info = MissInfo {
                        retry: miss.retry.wrapping_sub(at) as i32,
                        resume: if ends || leads { 0 } else { end.wrapping_sub(at) as i32 },
                        page_va: self.page_va,
                        offset: guest.offset,
                        size: miss.access.size as u16,
                        kind: (u8::from(miss.access.write) * MissInfo::WRITE)
                            | (u8::from(miss.access.aligned) * MissInfo::ALIGNED)
                            | (u8::from(miss.group) * MissInfo::GROUP)
                            | (u8::from(self.mode.has(Mode::USER)) * MissInfo::RELATIVE),
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
                    self.cold_code.lea(S0, Mem::base(S0, -by));
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
                ColdKind::Step => {
                    let offset = i32::from(self.guest[0].offset);
                    match self.fixed_page() {
                        Some(page_va) => self.cold_code.mov_imm(S0, page_va.wrapping_add(offset as u64)),
                        None => {
                            self.cold_code.load(S0, gs(at!(page_va)));
                            self.cold_code.lea(S0, Mem::base(S0, offset));
                        }
                    }
                    self.cold_code.store(Width::B64, gs(at!(cpu.rip)), S0);
                    self.cold_code.jmp_to(self.stubs.step);
                }
                ColdKind::DropFrames(resume) => {
                    self.cold_code.load(Gpr::RSP, gs(at!(frames)));
                    self.cold_code.jmp_to(resume);
                }
                ColdKind::LoadFpu(resume) => {
                    self.cold_code.call_to(self.stubs.load_fpu);
                    self.cold_code.jmp_to(resume);
                }
                ColdKind::Interpret => {
                    self.record_cold(cold.instruction);
                    self.cold_code.call_to(self.stubs.interpret);
                    let at = self.cold_code.address();
                    let insn = self.guest[cold.instruction].insn;
                    let delta = end.wrapping_sub(at) as i32;
                    write_interpret_info(self.cold_code, &mut self.kept, insn, delta, self.mode);
                }
            }
        }
    }

    /// In the cold code of a shared check that failed, with the first address in S0: if the bytes cross a page,
    /// goes to a block that begins at the same instruction and shares no checks.
    fn ungrouped(&mut self, instruction: usize, size: u32) -> Cold {
        let code = &mut *self.cold_code;
        code.lea(S1, Mem::base(S0, size as i32 - 1));
        code.alu(Alu::Xor, Width::B64, S1, Rm::Reg(S0.0));
        code.alu_imm(Alu::And, Width::B64, Rm::Reg(S1.0), -4096);
        code.align_patch(2);
        let field = code.jcc(Cond::NE);
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

    /// The entries of a block whose instruction crosses into the page at `gpa`: they check that it is the one
    /// that is mapped next.
    fn check_next_page(&mut self, gpa: u64) -> (u64, u64) {
        let hot = self.e.address();
        save_flags(self.e, S0);
        let memory = self.e.address();
        self.flags = FlagsAt::Memory;
        let table = fetch_entries(self.mode.has(Mode::USER));
        let (tag, physical) = match self.fixed_page() {
            Some(page_va) => {
                let va = page_va.wrapping_add(4096);
                self.e.mov_imm(S0, va);
                let at = table + (Tlb::fetch_index(va) * 24) as i32;
                (gs(at), gs(at + 8))
            }
            None => {
                self.e.load(S0, gs(at!(page_va)));
                self.e.lea(S0, Mem::base(S0, 4096));
                self.e.mov(S1, S0);
                self.e.shift_imm(Shift::Shr, Width::B64, Rm::Reg(S1.0), 12);
                self.e.alu_imm(Alu::And, Width::B32, Rm::Reg(S1.0), FETCH_ENTRIES as i32 - 1);
                self.e.lea(S1, Mem::indexed(S1, S1, 1, 0));
                (Mem::gs_indexed(S1, 3, table), Mem::gs_indexed(S1, 3, table + 8))
            }
        };
        self.e.alu(Alu::Cmp, Width::B64, S0, Rm::Mem(tag));
        let field = self.e.jcc(Cond::NE);
        self.cold.push(Cold { field, instruction: 0, kind: ColdKind::Step });
        self.e.load(S0, physical);
        self.e.alu_imm(Alu::And, Width::B64, Rm::Reg(S0.0), -4096);
        self.e.mov_imm(S1, gpa);
        self.e.alu(Alu::Cmp, Width::B64, S0, Rm::Reg(S1.0));
        let field = self.e.jcc(Cond::NE);
        self.cold.push(Cold { field, instruction: 0, kind: ColdKind::Step });
        (memory, hot)
    }

    /// Loads the number of a link, which is not known yet.
    fn link_number(&mut self, link: usize) {
        self.cold_code.bytes(&[0x41, 0xb9]); // mov r9d, imm32
        let field = self.cold_code.address();
        self.links[link].numbers.push(field);
        self.cold_code.dword(0);
    }

    /// Whether an operand of the instruction is in memory.
    pub(crate) fn has_memory(insn: &Instruction) -> bool {
        (0..insn.op_count()).any(|op| insn.op_kind(op) == OpKind::Memory)
    }
}

fn write_interpret_info(
    e: &mut Emitter,
    kept: &mut Vec<Box<Instruction>>,
    insn: Instruction,
    resume: i32,
    mode: Mode,
) {
    let insn = Box::new(insn);
    let info = InterpretInfo { insn: &raw const *insn, resume, relative: u32::from(mode.has(Mode::USER)) };
    kept.push(insn);
    info.write(e);
}
