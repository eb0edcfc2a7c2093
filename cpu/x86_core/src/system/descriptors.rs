//! Segment and table registers, and the instructions that look at descriptors.

use super::{operand, require_protected, require_supervisor, require_unhidden};
use crate::segments::{Descriptor, is_null, kind, rpl, selector_fault};
use crate::{Core, Flow, Seg, Segment, TableRegister, Trap, flags, reg, segment_index, shadow, vector};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// PUSH of a segment register.
pub(super) fn push(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let seg = segment_index(insn.op0_register()).ok_or(Trap::UD)?;
    let selector = u64::from(core.cpu.segments[seg as usize].selector);
    core.push(insn.stack_pointer_increment().unsigned_abs() as u8, selector)?;
    Ok(Flow::Next)
}

/// POP of a segment register.
pub(super) fn pop(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let seg = segment_index(insn.op0_register()).filter(|&seg| seg != Seg::Cs).ok_or(Trap::UD)?;
    let old_stack = core.cpu.regs[reg::RSP];
    let selector = core.pop(insn.stack_pointer_increment() as u8)? as u16;
    if let Err(trap) = core.load_segment(seg, selector) {
        core.cpu.regs[reg::RSP] = old_stack;
        return Err(trap);
    }
    if seg == Seg::Ss {
        core.cpu.interrupt_shadow |= shadow::MOV_SS;
    }
    Ok(Flow::Next)
}

/// LDS, LES, LSS, LFS and LGS.
pub(super) fn load_far_pointer(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    if insn.op1_kind() != OpKind::Memory {
        return Err(Trap::UD);
    }
    let seg = match insn.mnemonic() {
        Mnemonic::Lds => Seg::Ds,
        Mnemonic::Les => Seg::Es,
        Mnemonic::Lss => Seg::Ss,
        Mnemonic::Lfs => Seg::Fs,
        _ => Seg::Gs,
    };
    let (from, offset) = operand::address(core, insn);
    let size = insn.op0_register().size() as u8;
    let (selector, value) = operand::far_pointer(core, insn, from, offset, size)?;
    core.load_segment(seg, selector)?;
    operand::set_register(core.cpu, insn.op0_register(), value);
    Ok(Flow::Next)
}

/// LGDT and LIDT.
pub(super) fn load_table(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    require_supervisor(core)?;
    let (seg, offset) = operand::address(core, insn);
    let limit = core.read::<u16>(seg, offset)?;
    let at = operand::ahead(core, insn, offset, 2);
    let base = if core.cpu.long64 {
        core.read::<u64>(seg, at)?
    } else {
        let base = u64::from(core.read::<u32>(seg, at)?);
        // With 16-bit operands the base has 24 bits.
        let narrow = matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16);
        if narrow { base & 0xff_ffff } else { base }
    };
    if !core.cpu.is_canonical_base(base) {
        return Err(Trap::gp(0));
    }
    let table = TableRegister { base, limit };
    if insn.mnemonic() == Mnemonic::Lgdt {
        core.cpu.gdtr = table;
    } else {
        core.cpu.idtr = table;
    }
    Ok(Flow::Next)
}

/// SGDT and SIDT.
pub(super) fn store_table(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    require_unhidden(core)?;
    let table = if insn.mnemonic() == Mnemonic::Sgdt { core.cpu.gdtr } else { core.cpu.idtr };
    let mut data = [0; 10];
    data[..2].copy_from_slice(&table.limit.to_le_bytes());
    data[2..].copy_from_slice(&table.base.to_le_bytes());
    let (seg, offset) = operand::address(core, insn);
    let len = if core.cpu.long64 { 10 } else { 6 };
    core.write_bytes(seg, offset, &data[..len])?;
    Ok(Flow::Next)
}

/// LLDT and LTR.
pub(super) fn load_system_segment(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    require_protected(core)?;
    require_supervisor(core)?;
    let selector = operand::load16(core, insn, 0)?;
    let task = insn.mnemonic() == Mnemonic::Ltr;
    if is_null(selector) {
        if task {
            return Err(Trap::gp(0));
        }
        core.cpu.ldtr = Segment::null(selector);
        return Ok(Flow::Next);
    }
    if selector & 4 != 0 {
        return Err(selector_fault(vector::GP, selector));
    }
    let descriptor = core.descriptor(selector, vector::GP)?;
    let long = core.cpu.long_mode();
    let fits = match descriptor.kind() {
        kind::LDT => !task,
        kind::TSS => task,
        kind::TSS16 => task && !long,
        _ => false,
    };
    if descriptor.is_segment() || !fits {
        return Err(selector_fault(vector::GP, selector));
    }
    if !descriptor.is_present() {
        return Err(selector_fault(vector::NP, selector));
    }
    let base = core.system_base(selector, descriptor)?;
    if !core.cpu.is_canonical_base(base) {
        return Err(selector_fault(vector::GP, selector));
    }
    let mut segment = descriptor.segment(selector);
    segment.base = base;
    if task {
        core.or_attributes(descriptor, kind::BUSY as u8)?;
        segment.attributes |= kind::BUSY;
        core.cpu.tr = segment;
    } else {
        core.cpu.ldtr = segment;
    }
    Ok(Flow::Next)
}

/// SLDT and STR.
pub(super) fn store_system_segment(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    require_protected(core)?;
    require_unhidden(core)?;
    let segment = if insn.mnemonic() == Mnemonic::Str { &core.cpu.tr } else { &core.cpu.ldtr };
    let selector = segment.selector;
    operand::store16(core, insn, 0, selector)?;
    Ok(Flow::Next)
}

/// LAR, LSL, VERR and VERW: ZF says whether the descriptor can be used.
pub(super) fn inspect(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    require_protected(core)?;
    let mnemonic = insn.mnemonic();
    let two = matches!(mnemonic, Mnemonic::Lar | Mnemonic::Lsl);
    let selector = operand::load16(core, insn, u32::from(two))?;
    let descriptor = visible_descriptor(core, selector)?;
    let usable = descriptor.filter(|&descriptor| is_usable_by(core, mnemonic, selector, descriptor));
    let Some(descriptor) = usable else {
        core.cpu.rflags &= !flags::ZF;
        return Ok(Flow::Next);
    };
    core.cpu.rflags |= flags::ZF;
    let register = insn.op0_register();
    match mnemonic {
        Mnemonic::Lar => {
            // A 16-bit register takes the low half. The limit's part is undefined on Intel's processors; AMD's leave it.
            operand::set_register(core.cpu, register, descriptor.raw >> 32 & 0x00ff_ff00);
        }
        Mnemonic::Lsl => {
            let limit = u64::from(descriptor.limit());
            operand::set_register(core.cpu, register, limit);
        }
        _ => {}
    }
    Ok(Flow::Next)
}

/// The descriptor, or none if the selector is null or outside its table.
fn visible_descriptor(core: &mut Core, selector: u16) -> Result<Option<Descriptor>, Trap> {
    if is_null(selector) {
        return Ok(None);
    }
    let outside = selector_fault(vector::GP, selector);
    match core.descriptor(selector, vector::GP) {
        Ok(descriptor) => Ok(Some(descriptor)),
        Err(trap) if trap == outside => Ok(None),
        Err(trap) => Err(trap),
    }
}

fn is_usable_by(core: &Core, mnemonic: Mnemonic, selector: u16, descriptor: Descriptor) -> bool {
    let reachable = descriptor.is_conforming() || descriptor.dpl() >= core.cpu.cpl.max(rpl(selector));
    let long = core.cpu.long_mode();
    let kind = descriptor.kind();
    match mnemonic {
        Mnemonic::Verr => descriptor.is_segment() && reachable && (descriptor.is_data() || kind & 2 != 0),
        Mnemonic::Verw => descriptor.is_writable_data() && reachable,
        _ if descriptor.is_segment() => reachable,
        Mnemonic::Lar => {
            let known =
                if long { matches!(kind, 2 | 9 | 0xb | 0xc) } else { matches!(kind, 1..=5 | 9 | 0xb | 0xc) };
            known && reachable
        }
        _ => {
            let known = if long { matches!(kind, 2 | 9 | 0xb) } else { matches!(kind, 1..=3 | 9 | 0xb) };
            known && reachable
        }
    }
}

/// ARPL: raises the RPL of a selector to that of another.
pub(super) fn arpl(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    require_protected(core)?;
    let wanted = operand::register(core.cpu, insn.op1_register()) as u16 & 3;
    let adjust = |old: u16| (old & 3 < wanted).then_some(old & !3 | wanted);
    let old = if insn.op0_kind() == OpKind::Register {
        let old = operand::register(core.cpu, insn.op0_register()) as u16;
        if let Some(new) = adjust(old) {
            // Of 16 bits, whatever the operand size.
            let slot = &mut core.cpu.regs[insn.op0_register().number()];
            *slot = *slot & !0xffff | u64::from(new);
        }
        old
    } else {
        // It is read alone, and written if need be: a selector that stays may be in a segment that is read only.
        let (seg, offset) = operand::address(core, insn);
        let old = core.read::<u16>(seg, offset)?;
        if let Some(new) = adjust(old) {
            core.write(seg, offset, new)?;
        }
        old
    };
    if adjust(old).is_some() {
        core.cpu.rflags |= flags::ZF;
    } else {
        core.cpu.rflags &= !flags::ZF;
    }
    Ok(Flow::Next)
}
