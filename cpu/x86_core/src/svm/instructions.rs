//! VMRUN, VMLOAD, VMSAVE, VMMCALL, STGI, CLGI, SKINIT and INVLPGA (AMD APM volume 3, chapter 4).

use super::vmcb::{Vmcb, at};
use super::{Exit, code, intercepts};
use crate::cpuid::feature;
use crate::mmu::canonical_base;
use crate::{Core, Flow, Seg, Segment, Trap, efer, reg};
use iced_x86::{Code, Instruction, Mnemonic};
use std::sync::atomic::Ordering;

/// Executes one of them.
pub(crate) fn execute(core: &mut Core<'_>, insn: &Instruction) -> Result<Flow, Trap> {
    if !core.cpu.model.has(feature::SVM) {
        return Err(Trap::UD);
    }
    let exit_code = match insn.mnemonic() {
        Mnemonic::Vmmcall => {
            // It exists for guests alone.
            intercepts::instruction(core, insn, code::VMMCALL)?;
            return Err(Trap::UD);
        }
        Mnemonic::Vmrun => code::VMRUN,
        Mnemonic::Vmload => code::VMLOAD,
        Mnemonic::Vmsave => code::VMSAVE,
        Mnemonic::Stgi => code::STGI,
        Mnemonic::Clgi => code::CLGI,
        Mnemonic::Invlpga => code::INVLPGA,
        // There is no secure loader.
        _ => return Err(Trap::UD),
    };
    if core.cpu.msrs.efer & efer::SVME == 0 || !core.protected() {
        return Err(Trap::UD);
    }
    if core.cpu.cpl != 0 {
        return Err(Trap::gp(0));
    }
    if core.cpu.svm.guest {
        let info1 = if exit_code == code::INVLPGA { core.cpu.regs[reg::RAX] } else { 0 };
        intercepts::instruction_with(core, insn, Exit { info1, ..Exit::plain(exit_code) })?;
    }
    match insn.mnemonic() {
        Mnemonic::Vmrun => {
            let pa = vmcb_address(core, insn)?;
            return core.vmrun(pa, insn.next_ip());
        }
        Mnemonic::Vmload => {
            let pa = vmcb_address(core, insn)?;
            core.vmload(pa);
        }
        Mnemonic::Vmsave => {
            let pa = vmcb_address(core, insn)?;
            core.vmsave(pa);
        }
        Mnemonic::Stgi => core.set_gif(true),
        Mnemonic::Clgi => core.set_gif(false),
        _ => core.invlpga(rax(core, insn), core.cpu.regs[reg::RCX] as u32),
    }
    Ok(Flow::Next)
}

/// rAX at the instruction's address size.
fn rax(core: &Core<'_>, insn: &Instruction) -> u64 {
    let rax = core.cpu.regs[reg::RAX];
    match insn.code() {
        Code::Vmrunw | Code::Vmloadw | Code::Vmsavew | Code::Invlpgaw => rax & 0xffff,
        Code::Vmrund | Code::Vmloadd | Code::Vmsaved | Code::Invlpgad => rax & 0xffff_ffff,
        _ => rax,
    }
}

/// The address of a VMCB, which must be that of a page that can exist.
fn vmcb_address(core: &Core<'_>, insn: &Instruction) -> Result<u64, Trap> {
    let pa = rax(core, insn);
    if pa & 0xfff != 0 || pa & !core.cpu.model.physical_mask() != 0 {
        return Err(Trap::gp(0));
    }
    Ok(pa)
}

impl Core<'_> {
    fn vmload(&mut self, pa: u64) {
        let vmcb = Vmcb::new(self, pa);
        let cpu = &mut *self.cpu;
        let model = cpu.model.clone();
        let address = |va| canonical_base(&model, va);
        let segment = |offset| {
            let read = vmcb.read_segment(offset);
            Segment { base: address(read.base), ..read }
        };
        cpu.segments[Seg::Fs as usize] = segment(at::FS);
        cpu.segments[Seg::Gs as usize] = segment(at::GS);
        cpu.tr = segment(at::TR);
        cpu.ldtr = segment(at::LDTR);
        let msrs = &mut cpu.msrs;
        msrs.kernel_gs_base = address(vmcb.read(at::KERNEL_GS_BASE));
        msrs.star = vmcb.read(at::STAR);
        msrs.lstar = address(vmcb.read(at::LSTAR));
        msrs.cstar = address(vmcb.read(at::CSTAR));
        msrs.sfmask = vmcb.read::<u64>(at::SFMASK) & 0xffff_ffff;
        msrs.sysenter_cs = vmcb.read::<u64>(at::SYSENTER_CS) & 0xffff;
        msrs.sysenter_esp = address(vmcb.read(at::SYSENTER_ESP));
        msrs.sysenter_eip = address(vmcb.read(at::SYSENTER_EIP));
    }

    fn vmsave(&mut self, pa: u64) {
        let vmcb = Vmcb::new(self, pa);
        let cpu = &*self.cpu;
        vmcb.write_segment(at::FS, &cpu.segments[Seg::Fs as usize]);
        vmcb.write_segment(at::GS, &cpu.segments[Seg::Gs as usize]);
        vmcb.write_segment(at::TR, &cpu.tr);
        vmcb.write_segment(at::LDTR, &cpu.ldtr);
        let msrs = &cpu.msrs;
        vmcb.write(at::KERNEL_GS_BASE, msrs.kernel_gs_base);
        vmcb.write(at::STAR, msrs.star);
        vmcb.write(at::LSTAR, msrs.lstar);
        vmcb.write(at::CSTAR, msrs.cstar);
        vmcb.write(at::SFMASK, msrs.sfmask);
        vmcb.write(at::SYSENTER_CS, msrs.sysenter_cs);
        vmcb.write(at::SYSENTER_ESP, msrs.sysenter_esp);
        vmcb.write(at::SYSENTER_EIP, msrs.sysenter_eip);
        vmcb.written(self);
    }

    /// STGI and CLGI. A guest may have a flag of its own.
    fn set_gif(&mut self, on: bool) {
        let svm = &mut self.cpu.svm;
        if svm.guest && svm.control.interrupts.has_gif() {
            svm.control.interrupts.set_gif(on);
        } else {
            svm.gif = on;
        }
        // What interrupts the run loop waits for has changed.
        self.cpu.exit_request.store(1, Ordering::Relaxed);
    }

    /// INVLPGA: drops the translations of a page in the address space of an ASID, the host's being 0.
    fn invlpga(&mut self, va: u64, asid: u32) {
        if asid == 0 {
            self.invalidate_page(0, va);
        } else if asid == self.cpu.svm.cached_asid() {
            self.invalidate_page(1, va);
        }
    }
}

impl super::Svm {
    /// Whose translations the guest's banks hold.
    fn cached_asid(&self) -> u32 {
        if self.guest { self.control.asid } else { self.cached.asid }
    }
}
