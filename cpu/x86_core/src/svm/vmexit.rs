//! #VMEXIT: from a guest back to the host (AMD APM volume 2, 15.6).

use super::vmcb::{Vmcb, at};
use super::{Control, Exit};
use crate::{Core, Exception, Trap, flags, reg, shadow, vector};
use std::sync::atomic::Ordering;

/// DR6: a single step.
pub(super) const STEP: u64 = 1 << 14;

impl Core<'_> {
    /// Leaves the guest for that reason.
    ///
    /// # Errors
    /// [`Trap::TripleFault`] of the host.
    pub(crate) fn exit_guest(&mut self, exit: Exit) -> Result<(), Trap> {
        self.cpu.svm.exit = exit;
        self.leave_guest()
    }

    /// Leaves the guest for the reason that [`Svm::exit`](super::Svm) says, with the guest's state as it is.
    ///
    /// # Errors
    /// [`Trap::TripleFault`] of the host.
    pub(crate) fn leave_guest(&mut self) -> Result<(), Trap> {
        if !self.cpu.svm.guest {
            return Ok(());
        }
        let exit = self.cpu.svm.exit;
        let (bytes, length) = self.instruction_bytes(exit);
        let vmcb = Vmcb::new(self, self.cpu.svm.vmcb);
        vmcb.write(at::EXIT_CODE, exit.code);
        vmcb.write(at::EXIT_INFO1, exit.info1);
        vmcb.write(at::EXIT_INFO2, exit.info2);
        vmcb.write(at::EXIT_INT_INFO, self.cpu.svm.delivering);
        vmcb.write(at::NEXT_RIP, exit.next_rip);
        vmcb.write(at::INSTRUCTION, bytes << 8 | u128::from(length));
        self.store_guest(vmcb);
        vmcb.written(self);
        self.cpu.svm.cached = self.cached_tag();
        self.load_host();
        // VMRUN is done: a host that steps is told.
        if self.cpu.rflags & flags::TF == 0 {
            return Ok(());
        }
        self.cpu.dr[6] |= STEP;
        self.deliver(Exception { vector: vector::DB, error: None, address: 0 })
    }

    /// The bytes of the instruction whose access to data faulted, and how many there are.
    fn instruction_bytes(&mut self, exit: Exit) -> (u128, u8) {
        if !exit.data_access {
            return (0, 0);
        }
        let mut buffer = [0; 15];
        match self.fetch(&mut buffer) {
            Ok(length) => {
                let mut all = [0; 16];
                all[..length].copy_from_slice(&buffer[..length]);
                (u128::from_le_bytes(all), length as u8)
            }
            // Another processor has just taken the page.
            Err(_) => (0, 0),
        }
    }

    fn store_guest(&mut self, vmcb: Vmcb) {
        let cpu = &*self.cpu;
        for (segment, offset) in cpu.segments[..4].iter().zip((at::ES..).step_by(16)) {
            vmcb.write_segment(offset, segment);
        }
        vmcb.write_table(at::GDTR, &cpu.gdtr);
        vmcb.write_table(at::IDTR, &cpu.idtr);
        vmcb.write(at::CPL, cpu.cpl);
        vmcb.write(at::EFER, cpu.msrs.efer);
        vmcb.write(at::CR0, cpu.cr0);
        vmcb.write(at::CR2, cpu.cr2);
        vmcb.write(at::CR3, cpu.cr3);
        vmcb.write(at::CR4, cpu.cr4);
        vmcb.write(at::DR6, cpu.dr[6]);
        vmcb.write(at::DR7, cpu.dr[7]);
        vmcb.write(at::RFLAGS, cpu.rflags);
        vmcb.write(at::RIP, cpu.rip);
        vmcb.write(at::RSP, cpu.regs[reg::RSP]);
        vmcb.write(at::RAX, cpu.regs[reg::RAX]);
        let shadowed = cpu.interrupt_shadow & (shadow::STI | shadow::MOV_SS) != 0;
        vmcb.write(at::INTERRUPT_SHADOW, u64::from(shadowed));
        vmcb.write(at::INTERRUPTS, cpu.svm.control.interrupts.0);
        vmcb.write(at::EVENT_INJECTION, 0u64);
        if cpu.svm.control.nested_paging {
            vmcb.write(at::PAT, cpu.msrs.pat);
        }
    }

    fn load_host(&mut self) {
        let cpu = &mut *self.cpu;
        let host = cpu.svm.host;
        cpu.msrs.tsc_offset = cpu.msrs.tsc_offset.wrapping_sub(cpu.svm.control.tsc_offset);
        cpu.svm.guest = false;
        cpu.svm.gif = false;
        cpu.svm.control = Control::default();
        cpu.svm.delivering = 0;
        cpu.segments[..4].copy_from_slice(&host.segments);
        cpu.gdtr = host.gdtr;
        cpu.idtr = host.idtr;
        cpu.msrs.efer = host.efer;
        cpu.msrs.pat = host.pat;
        cpu.cr0 = host.cr0;
        cpu.cr3 = host.cr3;
        cpu.cr4 = host.cr4;
        cpu.pdpte = host.pdpte;
        cpu.rflags = host.rflags & !flags::VM;
        cpu.rip = host.rip;
        cpu.regs[reg::RSP] = host.rsp;
        cpu.regs[reg::RAX] = host.rax;
        cpu.dr[7] = 0x400;
        cpu.cpl = 0;
        cpu.interrupt_shadow &= shadow::NMI;
        cpu.halted = false;
        cpu.breakpoints_met = 0;
        // Interrupts are other ones now: the run loop is to look.
        cpu.exit_request.store(1, Ordering::Relaxed);
        self.mode_changed();
    }
}
