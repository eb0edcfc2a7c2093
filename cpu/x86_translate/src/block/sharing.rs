//! Which accesses of a block share one check: those whose addresses differ by a constant. An index that is known to be
//! small counts as one: what it may select is checked at once, and the check does not wait for the index.

use crate::abi::layout::GROUP_SLOTS;
use crate::context::insn::{GuestInsn, Plan};
use crate::guest::class::Class;
use crate::guest::mode::Mode;
use crate::guest::operand::{Field, has_memory};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// The bytes that one check may span. The more, the likelier it crosses a page and fails.
const SPAN: i64 = 256;
/// The bytes that a small index may select from: tables of 256 entries.
const TABLE: u64 = 2048;

/// What an address is made of, besides a displacement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Root {
    /// Nothing.
    Constant,
    /// The page that runs.
    Page,
    /// A value that some register had, and a segment.
    Value(u32, Register),
}

/// What is known of the registers: each is some unknown value plus a constant.
struct Values {
    registers: [(u32, i64); 16],
    /// The most that each register can hold.
    bounds: [u64; 16],
    next: u32,
    mode: Mode,
}

impl Values {
    fn new(mode: Mode) -> Self {
        let registers = std::array::from_fn(|index| (index as u32, 0));
        Self { registers, bounds: [u64::MAX; 16], next: 16, mode }
    }

    /// A distance between addresses, which wrap at 4 GiB outside 64-bit mode.
    fn distance(&self, value: i64) -> i64 {
        if self.mode.bits() == 64 { value } else { i64::from(value as i32) }
    }

    /// Whether the register, as an operand, is all of an address.
    fn is_whole(&self, register: Register) -> bool {
        if self.mode.bits() == 64 { register.is_gpr64() } else { register.is_gpr32() }
    }

    /// Bytes that PUSH and its like move the stack pointer by.
    fn word(&self) -> i64 {
        i64::from(self.mode.bits() / 8)
    }

    fn forget(&mut self, register: usize) {
        self.set(register, (self.next, 0));
        self.next += 1;
    }

    fn set(&mut self, register: usize, value: (u32, i64)) {
        self.registers[register] = value;
        self.bounds[register] = u64::MAX;
    }

    fn add(&mut self, register: usize, by: i64) {
        if register == 4 && self.mode.has(Mode::STACK16) {
            // SP wraps alone.
            return self.forget(4);
        }
        let (value, offset) = self.registers[register];
        self.set(register, (value, self.distance(offset.wrapping_add(by))));
    }

    /// Notes how small the result of the instruction is: one that takes a byte, some low bits or some high ones.
    fn note_bound(&mut self, insn: &Instruction) {
        let to = insn.op0_register();
        if insn.op0_kind() != OpKind::Register || !(to.is_gpr32() || to.is_gpr64()) {
            return;
        }
        let bits = 8 * to.size() as u32;
        let bound = match insn.mnemonic() {
            Mnemonic::Movzx if insn.op1_kind() == OpKind::Register && insn.op1_register().is_gpr8() => 0xff,
            Mnemonic::Movzx if insn.op1_kind() == OpKind::Memory && insn.memory_size().size() == 1 => 0xff,
            Mnemonic::And if is_immediate(insn) => match insn.immediate(1) {
                low @ 0..=0xffff => low,
                _ => return,
            },
            Mnemonic::Shr if insn.op1_kind() == OpKind::Immediate8 => {
                u64::MAX >> (64 - bits) >> (u32::from(insn.immediate8()) & (bits - 1))
            }
            _ => return,
        };
        self.bounds[to.number()] = bound;
    }

    /// How far the index of a memory operand can be from zero, in bytes: 0 without one, `None` if far.
    fn reach(&self, insn: &Instruction) -> Option<i64> {
        let index = insn.memory_index();
        if index == Register::None {
            return Some(0);
        }
        if !self.is_whole(index) {
            return None;
        }
        let reach = self.bounds[index.number()].checked_mul(insn.memory_index_scale().into())?;
        (reach < TABLE).then_some(reach as i64)
    }
}

struct Group {
    root: Root,
    lead: (usize, usize),
    lead_offset: i64,
    low: i64,
    high: i64,
    write: bool,
    members: Vec<(usize, usize)>,
    /// Whether the check is worth it with one member, too.
    indexed: bool,
    /// Side exits before the lead.
    exits: usize,
}

/// One access: where, how much, whether a store, and whether it may share a check.
struct Site {
    root: Option<Root>,
    offset: i64,
    size: i64,
    write: bool,
    /// An index selects one of several places, which are all in `size`.
    indexed: bool,
}

/// Fills in the plans of all accesses. Only those share a check whose addresses are all that is to be looked at:
/// not where offsets are of 16 bits, or a segment has a base or a limit.
pub(super) fn plan_checks(guest: &mut [GuestInsn], mode: Mode) {
    if mode.bits() == 16 {
        return;
    }
    let mut values = Values::new(mode);
    let mut open: Vec<Group> = vec![];
    let mut done: Vec<Group> = vec![];
    let mut exits = 0;
    for (index, insn) in guest.iter().enumerate() {
        let class = insn.class;
        // These change what may be accessed, or where.
        if matches!(class, Class::Interpret | Class::Swapgs | Class::Stac | Class::Clac | Class::Popf) {
            done.append(&mut open);
        } else {
            for (which, site) in sites(insn, &values).into_iter().enumerate() {
                if let Some(site) = site {
                    join(&mut open, &mut done, &site, (index, which), exits);
                }
            }
        }
        if class == Class::Jcc {
            exits += 1;
        }
        advance(insn, &mut values);
    }
    done.append(&mut open);
    let mut slots = 0..GROUP_SLOTS as u8;
    for group in done {
        let slot = if group.members.len() > 1 {
            let Some(slot) = slots.next() else { continue };
            for &(insn, which) in &group.members {
                guest[insn].plans[which] = Plan::Follow { slot };
            }
            Some(slot)
        } else if group.indexed {
            None
        } else {
            continue;
        };
        let (low, high) = ((group.low - group.lead_offset) as i32, (group.high - group.lead_offset) as i32);
        let (insn, which) = group.lead;
        guest[insn].plans[which] = Plan::Lead { slot, low, high, write: group.write };
    }
}

fn join(open: &mut Vec<Group>, done: &mut Vec<Group>, site: &Site, at: (usize, usize), exits: usize) {
    let Some(root) = site.root else { return };
    let (low, high) = (site.offset, site.offset.wrapping_add(site.size));
    if root == Root::Constant && site.indexed && low >> 12 != high.wrapping_sub(1) >> 12 {
        return;
    }
    if let Some(position) = open.iter().position(|group| group.root == root) {
        let group = &mut open[position];
        let (new_low, new_high) = (group.low.min(low), group.high.max(high));
        // A constant page needs no luck; elsewhere the span must be short. A store that may not come to be
        // executed must not ask for the right to write.
        let near = match root {
            Root::Constant => new_low >> 12 == new_high.wrapping_sub(1) >> 12,
            // A table is as long as it is in any case.
            _ => {
                new_high.wrapping_sub(new_low) <= SPAN.max(group.high.wrapping_sub(group.low)).max(site.size)
            }
        };
        if near && (!site.write || group.write || group.exits == exits) {
            group.low = new_low;
            group.high = new_high;
            group.write |= site.write;
            group.indexed |= site.indexed;
            group.members.push(at);
            return;
        }
        done.push(open.swap_remove(position));
    }
    open.push(Group {
        root,
        lead: at,
        lead_offset: low,
        low,
        high,
        write: site.write,
        members: vec![at],
        indexed: site.indexed,
        exits,
    });
}

/// The accesses of an instruction, in the order in which code is written for them.
fn sites(guest: &GuestInsn, values: &Values) -> [Option<Site>; 2] {
    let insn = &guest.insn;
    let word = values.word();
    let flat = values.mode.bits() == 64 || !values.mode.has(Mode::STACK16) && values.mode.has(Mode::SS_FLAT);
    let at = |register: usize, disp: i64, write: bool| {
        let (value, offset) = values.registers[register];
        let root = flat.then_some(Root::Value(value, Register::None));
        let offset = values.distance(offset.wrapping_add(disp));
        Some(Site { root, offset, size: word, write, indexed: false })
    };
    let stack = |disp: i64, write: bool| at(4, disp, write);
    let memory = |write: bool| {
        let (root, offset) = address(insn, values);
        let size = insn.memory_size().size() as i64;
        // What a mask leaves out must not be asked for.
        let whole = !guest.info.aligned && insn.op_mask() == Register::None;
        let root = root.filter(|_| whole && (1..=64).contains(&size));
        let reach = values.reach(insn);
        let indexed = insn.memory_index() != Register::None;
        let root = root.filter(|_| reach.is_some());
        Some(Site { root, offset, size: size + reach.unwrap_or(0), write, indexed })
    };
    let has_memory = has_memory(insn);
    match guest.class {
        Class::Push if has_memory => [memory(false), stack(-word, true)],
        Class::CallIndirect if has_memory => [memory(false), stack(-word, true)],
        Class::Push | Class::PushImm | Class::Call | Class::CallIndirect | Class::Pushf => {
            [stack(-word, true), None]
        }
        Class::Pop | Class::Ret => [stack(0, false), None],
        Class::Leave => [at(5, 0, false), None],
        Class::Moffs => [memory(insn.op0_kind() == OpKind::Memory), None],
        Class::JmpIndirect | Class::Div | Class::Idiv | Class::Fldcw if has_memory => [memory(false), None],
        Class::Generic if has_memory => [memory(guest.info.mem_write), None],
        _ => [None, None],
    }
}

fn address(insn: &Instruction, values: &Values) -> (Option<Root>, i64) {
    let disp = values.distance(insn.memory_displacement64() as i64);
    if values.mode.bits() != 64 {
        let flat = match insn.memory_segment() {
            Register::DS => values.mode.has(Mode::DS_FLAT),
            Register::SS => values.mode.has(Mode::SS_FLAT),
            Register::ES => values.mode.has(Mode::ES_FLAT),
            _ => false,
        };
        return match insn.memory_base() {
            _ if !flat => (None, 0),
            Register::None => (Some(Root::Constant), disp),
            base if base.is_gpr32() => {
                let (value, offset) = values.registers[base.number()];
                (Some(Root::Value(value, Register::None)), values.distance(offset.wrapping_add(disp)))
            }
            _ => (None, 0),
        };
    }
    let segment = match insn.segment_prefix() {
        segment @ (Register::FS | Register::GS) => segment,
        _ => Register::None,
    };
    match insn.memory_base() {
        Register::RIP | Register::None if segment == Register::None => {
            let page = insn.memory_base() == Register::RIP && values.mode.is_relative();
            (Some(if page { Root::Page } else { Root::Constant }), disp)
        }
        Register::None => (Some(Root::Value(u32::MAX, segment)), disp),
        base if base.is_gpr64() => {
            let (value, offset) = values.registers[base.number()];
            (Some(Root::Value(value, segment)), offset.wrapping_add(disp))
        }
        _ => (None, 0),
    }
}

/// Follows what the instruction does to the registers.
fn advance(guest: &GuestInsn, values: &mut Values) {
    let insn = &guest.insn;
    let word = values.word();
    match guest.class {
        Class::Push | Class::PushImm | Class::Call | Class::CallIndirect | Class::Pushf => {
            return values.add(4, -word);
        }
        Class::Popf => return values.add(4, word),
        Class::Pop => {
            values.add(4, word);
            return values.forget(insn.op0_register().number());
        }
        Class::Leave => {
            values.set(4, values.registers[5]);
            values.add(4, word);
            return values.forget(5);
        }
        Class::Ret | Class::Jmp | Class::JmpIndirect | Class::Jcc | Class::Nop | Class::Iret => return,
        Class::Cli | Class::Sti | Class::Swapgs | Class::Stac | Class::Clac | Class::BitString => return,
        Class::Fldcw | Class::Fninit | Class::Syscall | Class::Sysret => return,
        Class::Interpret => {
            for register in 0..16 {
                values.forget(register);
            }
            return;
        }
        Class::Rdtsc => {
            for register in [0, 1, 2] {
                values.forget(register);
            }
            return;
        }
        Class::Lods => {
            values.forget(0);
            return values.forget(6);
        }
        Class::Scas => return values.forget(7),
        Class::Movs | Class::Stos => {
            for register in [1, 6, 7] {
                values.forget(register);
            }
            return;
        }
        Class::Div | Class::Idiv | Class::Verbatim => {
            values.forget(0);
            return values.forget(2);
        }
        Class::MovSeg => return values.forget(insn.op0_register().full_register().number()),
        Class::IncDec if values.is_whole(insn.op0_register()) => {
            let by = if insn.mnemonic() == Mnemonic::Inc { 1 } else { -1 };
            return values.add(insn.op0_register().number(), by);
        }
        Class::Generic | Class::Lea | Class::Cld | Class::Std | Class::IncDec | Class::Moffs => {}
    }
    if insn.op_count() >= 2 && insn.op0_kind() == OpKind::Register && values.is_whole(insn.op0_register()) {
        let to = insn.op0_register().number();
        let from_register = insn.op1_kind() == OpKind::Register && values.is_whole(insn.op1_register());
        match insn.mnemonic() {
            Mnemonic::Mov if from_register => {
                return values.set(to, values.registers[insn.op1_register().number()]);
            }
            Mnemonic::Add | Mnemonic::Sub if is_immediate(insn) => {
                let by = insn.immediate(1) as i64;
                return values.add(to, if insn.mnemonic() == Mnemonic::Add { by } else { by.wrapping_neg() });
            }
            Mnemonic::Lea if insn.memory_index() == Register::None && values.is_whole(insn.memory_base()) => {
                let (value, offset) = values.registers[insn.memory_base().number()];
                let offset = offset.wrapping_add(insn.memory_displacement64() as i64);
                return values.set(to, (value, values.distance(offset)));
            }
            _ => {}
        }
    }
    // Everything that may be written implicitly, and every operand that is.
    if matches!(
        insn.mnemonic(),
        Mnemonic::Mul | Mnemonic::Imul | Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b
    ) || guest.info.vector
    {
        for register in [0, 1, 2] {
            values.forget(register);
        }
    }
    for op in 0..insn.op_count() {
        if insn.op_kind(op) != OpKind::Register {
            continue;
        }
        let register = insn.op_register(op);
        let written = match guest.info.operands.get(op as usize) {
            Some(Some(operand)) => operand.writes || operand.field == Field::Opcode,
            _ => true,
        };
        if written && register.is_gpr() {
            values.forget(register.full_register().number());
        }
    }
    if guest.class == Class::Generic {
        values.note_bound(insn);
    }
}

fn is_immediate(insn: &Instruction) -> bool {
    matches!(
        insn.op1_kind(),
        OpKind::Immediate8
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
            | OpKind::Immediate8to32
            | OpKind::Immediate32
            | OpKind::Immediate64
    )
}
