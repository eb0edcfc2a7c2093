//! Identification, time, MSRs, caches, halting.

use super::{operand, require_supervisor};
use crate::cpuid::feature;
use crate::{Core, Flow, Seg, Trap, cr4, effective_address, reg};
use iced_x86::{Instruction, Mnemonic, OpKind};

fn pair(value: u64) -> (u64, u64) {
    (value & 0xffff_ffff, value >> 32)
}

/// RDMSR and WRMSR.
pub(super) fn model_specific(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    require_supervisor(core)?;
    let msr = core.cpu.regs[reg::RCX] as u32;
    if insn.mnemonic() == Mnemonic::Rdmsr {
        let (low, high) = pair(core.read_msr(msr)?);
        core.cpu.regs[reg::RAX] = low;
        core.cpu.regs[reg::RDX] = high;
    } else {
        let value = core.cpu.regs[reg::RDX] << 32 | core.cpu.regs[reg::RAX] & 0xffff_ffff;
        core.write_msr(msr, value)?;
    }
    Ok(Flow::Next)
}

/// RDTSC and RDTSCP.
pub(super) fn time_stamp(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let with_id = insn.mnemonic() == Mnemonic::Rdtscp;
    if with_id && !core.cpu.model.has(feature::RDTSCP) {
        return Err(Trap::UD);
    }
    if core.cpu.cpl > 0 && core.cpu.cr4 & cr4::TSD != 0 {
        return Err(Trap::gp(0));
    }
    let (low, high) = pair(core.tsc());
    core.cpu.regs[reg::RAX] = low;
    core.cpu.regs[reg::RDX] = high;
    if with_id {
        core.cpu.regs[reg::RCX] = core.cpu.msrs.tsc_aux & 0xffff_ffff;
    }
    Ok(Flow::Next)
}

/// RDPMC: there are no performance counters.
pub(super) fn performance_counter(_: &mut Core) -> Result<Flow, Trap> {
    Err(Trap::gp(0))
}

/// CPUID.
pub(super) fn cpuid(core: &mut Core) -> Result<Flow, Trap> {
    let (leaf, sub) = (core.cpu.regs[reg::RAX] as u32, core.cpu.regs[reg::RCX] as u32);
    let [eax, ebx, ecx, edx] = core.cpuid(leaf, sub).map(u64::from);
    core.cpu.regs[reg::RAX] = eax;
    core.cpu.regs[reg::RBX] = ebx;
    core.cpu.regs[reg::RCX] = ecx;
    core.cpu.regs[reg::RDX] = edx;
    Ok(Flow::Next)
}

/// HLT.
pub(super) fn halt(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    require_supervisor(core)?;
    core.cpu.rip = insn.next_ip();
    core.cpu.halted = true;
    Ok(Flow::Halt)
}

/// SWAPGS.
pub(super) fn swapgs(core: &mut Core) -> Result<Flow, Trap> {
    if !core.cpu.long64 {
        return Err(Trap::UD);
    }
    require_supervisor(core)?;
    let gs = &mut core.cpu.segments[Seg::Gs as usize].base;
    std::mem::swap(gs, &mut core.cpu.msrs.kernel_gs_base);
    Ok(Flow::Next)
}

/// RDFSBASE, RDGSBASE, WRFSBASE and WRGSBASE.
pub(super) fn segment_base(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    if !core.cpu.long64 || core.cpu.cr4 & cr4::FSGSBASE == 0 || insn.op0_kind() != OpKind::Register {
        return Err(Trap::UD);
    }
    let (seg, write) = match insn.mnemonic() {
        Mnemonic::Rdfsbase => (Seg::Fs, false),
        Mnemonic::Rdgsbase => (Seg::Gs, false),
        Mnemonic::Wrfsbase => (Seg::Fs, true),
        _ => (Seg::Gs, true),
    };
    if write {
        let base = operand::register(core.cpu, insn.op0_register());
        if !core.cpu.is_canonical_base(base) {
            return Err(Trap::gp(0));
        }
        core.cpu.segments[seg as usize].base = base;
    } else {
        let base = core.cpu.segments[seg as usize].base;
        operand::set_register(core.cpu, insn.op0_register(), base);
    }
    Ok(Flow::Next)
}

/// RDPID.
pub(super) fn processor_id(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    if !core.cpu.model.has(feature::RDPID) {
        return Err(Trap::UD);
    }
    let id = core.cpu.msrs.tsc_aux & 0xffff_ffff;
    operand::set_register(core.cpu, insn.op0_register(), id);
    Ok(Flow::Next)
}

/// INVLPG.
pub(super) fn invalidate_page(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    require_supervisor(core)?;
    let (seg, offset) = effective_address(core.cpu, insn, 0);
    let base = core.cpu.segments[seg as usize].base;
    let va = if core.cpu.long64 {
        offset.wrapping_add(if matches!(seg, Seg::Fs | Seg::Gs) { base } else { 0 })
    } else {
        base.wrapping_add(offset) & 0xffff_ffff
    };
    core.invlpg(va);
    Ok(Flow::Next)
}

/// INVPCID (Intel SDM volume 2). What is cached belongs to the current context: a load of CR3 drops all others.
pub(super) fn invalidate_context(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    if !core.cpu.model.has(feature::INVPCID) || insn.op1_kind() != OpKind::Memory {
        return Err(Trap::UD);
    }
    require_supervisor(core)?;
    let kind = operand::register(core.cpu, insn.op0_register());
    let (seg, offset) = effective_address(core.cpu, insn, 1);
    let descriptor: u128 = core.read(seg, offset)?;
    let (context, va) = (descriptor as u64, (descriptor >> 64) as u64);
    let no_contexts = core.cpu.cr4 & cr4::PCIDE == 0;
    if kind > 3 || context >> 12 != 0 || (kind < 2 && context != 0 && no_contexts) {
        return Err(Trap::gp(0));
    }
    match kind {
        0 if !core.cpu.is_canonical_base(va) => return Err(Trap::gp(0)),
        0 => core.invlpg(va),
        2 => core.flush_tlb(false),
        _ => core.flush_tlb(true),
    }
    Ok(Flow::Next)
}

/// VMCALL and VMMCALL, where a hypervisor is announced: it has no calls, and says so as KVM says it of those that it
/// lacks, by a negative error number in RAX. On bare metal there are no such instructions.
pub(super) fn hypercall(core: &mut Core) -> Result<Flow, Trap> {
    const NO_SUCH_CALL: i64 = -1000;
    const NOT_PERMITTED: i64 = -1;
    if !core.cpu.model.has(feature::HYPERVISOR) || !core.protected() {
        return Err(Trap::UD);
    }
    let result = if core.cpu.cpl == 0 { NO_SUCH_CALL } else { NOT_PERMITTED };
    let mask = if core.cpu.long64 { u64::MAX } else { 0xffff_ffff };
    core.cpu.regs[reg::RAX] = result as u64 & mask;
    Ok(Flow::Next)
}

/// INVD, WBINVD and WBNOINVD: guest memory is always coherent.
pub(super) fn flush_caches(core: &mut Core) -> Result<Flow, Trap> {
    require_supervisor(core)?;
    Ok(Flow::Next)
}

/// CLFLUSH, CLFLUSHOPT and CLWB fault as a load of a byte does.
pub(super) fn flush_line(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let feature = match insn.mnemonic() {
        Mnemonic::Clflush => feature::CLFLUSH,
        Mnemonic::Clflushopt => feature::CLFLUSHOPT,
        _ => feature::CLWB,
    };
    if !core.cpu.model.has(feature) {
        return Err(Trap::UD);
    }
    let (seg, offset) = effective_address(core.cpu, insn, 0);
    core.host_span(seg, offset, 1, false)?;
    Ok(Flow::Next)
}

/// CLZERO: a store of zeros to the cache line that rAX points into (AMD APM volume 3).
pub(super) fn clear_line(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    const LINE: u64 = 64;
    if !core.cpu.model.has(feature::CLZERO) {
        return Err(Trap::UD);
    }
    let mask = match insn.op0_register().size() {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    let seg = crate::segment_index(insn.segment_prefix()).unwrap_or(Seg::Ds);
    let offset = core.cpu.regs[reg::RAX] & mask & !(LINE - 1);
    core.check_write(seg, offset, LINE)?;
    core.write_bytes(seg, offset, &[0; LINE as usize])?;
    Ok(Flow::Next)
}

/// XGETBV and XSETBV.
pub(super) fn extended_control(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    if core.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Trap::UD);
    }
    let index = core.cpu.regs[reg::RCX] as u32;
    if insn.mnemonic() == Mnemonic::Xgetbv {
        let value = match index {
            0 => core.cpu.xcr0,
            1 if core.cpu.model.has(feature::XGETBV1) => core.cpu.xcr0 & core.cpu.components_in_use(),
            _ => return Err(Trap::gp(0)),
        };
        let (low, high) = pair(value);
        core.cpu.regs[reg::RAX] = low;
        core.cpu.regs[reg::RDX] = high;
        return Ok(Flow::Next);
    }
    require_supervisor(core)?;
    let value = core.cpu.regs[reg::RDX] << 32 | core.cpu.regs[reg::RAX] & 0xffff_ffff;
    if index != 0 || !core.cpu.model.xcr0_valid(value) {
        return Err(Trap::gp(0));
    }
    core.cpu.xcr0 = value;
    Ok(Flow::Next)
}
