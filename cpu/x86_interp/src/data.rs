//! Data movement between registers and memory.

use crate::flags;
use crate::operand::{Width, address_mask, segment, set_numbered, source, store};
use iced_x86::{Instruction, OpKind};
use x86_core::flags::{AF, CF, PF, SF, ZF};
use x86_core::reg::{RAX, RBX, RDX};
use x86_core::{Core, Flow, Trap, effective_address};

/// MOV between general registers, memory and immediates; MOVNTI.
pub(crate) fn mov<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?;
    store::<W>(core, insn, 0, value)?;
    Ok(Flow::Next)
}

/// MOVZX.
pub(crate) fn movzx<D: Width, S: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<S>(core, insn, 1)?;
    D::set(core.cpu, insn.op0_register(), D::of(value.wide()));
    Ok(Flow::Next)
}

/// MOVSX and MOVSXD.
pub(crate) fn movsx<D: Width, S: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<S>(core, insn, 1)?;
    D::set(core.cpu, insn.op0_register(), D::of(value.signed() as u64));
    Ok(Flow::Next)
}

/// MOVBE.
pub(crate) fn movbe<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?;
    store::<W>(core, insn, 0, W::of(value.wide().swap_bytes() >> (64 - W::BITS)))?;
    Ok(Flow::Next)
}

/// BSWAP. Of 16 bits it is undefined; processors clear them.
pub(crate) fn bswap<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let register = insn.op0_register();
    let value = W::get(core.cpu, register).wide();
    let swapped = if W::BITS == 16 { 0 } else { value.swap_bytes() >> (64 - W::BITS) };
    W::set(core.cpu, register, W::of(swapped));
    Ok(Flow::Next)
}

/// LEA.
pub(crate) fn lea<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let (_, offset) = effective_address(core.cpu, insn, 1);
    W::set(core.cpu, insn.op0_register(), W::of(offset));
    Ok(Flow::Next)
}

/// XCHG. With memory it is always locked (Intel SDM volume 3, 9.1.2.1).
pub(crate) fn xchg<W: Width>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    // Either operand may be the memory one.
    let (memory, register) = match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Memory, _) => (0, insn.op1_register()),
        (_, OpKind::Memory) => (1, insn.op0_register()),
        _ => {
            let (a, b) = (insn.op0_register(), insn.op1_register());
            let (old_a, old_b) = (W::get(core.cpu, a), W::get(core.cpu, b));
            W::set(core.cpu, a, old_b);
            W::set(core.cpu, b, old_a);
            return Ok(Flow::Next);
        }
    };
    let new = W::get(core.cpu, register);
    let (seg, offset) = effective_address(core.cpu, insn, memory);
    let old = core.update::<W>(seg, offset, true, |_| Some(new))?;
    W::set(core.cpu, register, old);
    Ok(Flow::Next)
}

/// CMOVcc. The source is read, and a 32-bit destination zero-extended, whether the condition holds or not.
pub(crate) fn cmov<W: Width, const CONDITION: u8>(
    core: &mut Core<'_>,
    insn: &Instruction,
) -> Result<Flow, Trap> {
    let value = source::<W>(core, insn, 1)?;
    let register = insn.op0_register();
    let holds = flags::condition(core.cpu.rflags, CONDITION);
    let value = if holds { value } else { W::get(core.cpu, register) };
    W::set(core.cpu, register, value);
    Ok(Flow::Next)
}

/// SETcc.
pub(crate) fn set<const CONDITION: u8>(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let holds = flags::condition(core.cpu.rflags, CONDITION);
    store::<u8>(core, insn, 0, u8::from(holds))?;
    Ok(Flow::Next)
}

/// XLATB.
pub(crate) fn xlat(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    let cpu = &core.cpu;
    let offset = cpu.regs[RBX].wrapping_add(cpu.regs[RAX] & 0xff) & address_mask(insn);
    let value = core.read::<u8>(segment(insn.memory_segment()), offset)?;
    set_numbered::<u8>(core.cpu, RAX, value.into());
    Ok(Flow::Next)
}

/// CBW, CWDE, CDQE: the accumulator of size `W` from its lower half `H`.
pub(crate) fn widen<W: Width, H: Width>(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    let value = H::of(core.cpu.regs[RAX]).signed() as u64;
    set_numbered::<W>(core.cpu, RAX, value);
    Ok(Flow::Next)
}

/// CWD, CDQ, CQO.
pub(crate) fn widen_to_rdx<W: Width>(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    let sign = W::of(core.cpu.regs[RAX]).signed() >> 63;
    set_numbered::<W>(core.cpu, RDX, sign as u64);
    Ok(Flow::Next)
}

const AH_FLAGS: u64 = SF | ZF | AF | PF | CF;

/// LAHF.
pub(crate) fn lahf(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    let ah = core.cpu.rflags & AH_FLAGS | x86_core::flags::FIXED;
    core.cpu.regs[RAX] = core.cpu.regs[RAX] & !0xff00 | ah << 8;
    Ok(Flow::Next)
}

/// SAHF.
pub(crate) fn sahf(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    let ah = core.cpu.regs[RAX] >> 8;
    flags::set(core.cpu, AH_FLAGS, ah);
    Ok(Flow::Next)
}

/// SALC, undocumented: AL from CF.
pub(crate) fn salc(core: &mut Core<'_>, _: &Instruction) -> Result<Flow, Trap> {
    let carry = core.cpu.rflags & CF != 0;
    set_numbered::<u8>(core.cpu, RAX, if carry { 0xff } else { 0 });
    Ok(Flow::Next)
}
