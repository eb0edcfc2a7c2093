//! Power-up, INIT and start-up (Intel SDM volume 3, table 11-1 and 10.4).

use crate::cpuid::CpuModel;
use crate::{Core, Cpu, Msrs, Seg, Segment, TableRegister, VecReg, X87Area, cr0, flags, reg, width};
use std::sync::atomic::Ordering;

/// The state of MTRRs and other MSRs that INIT leaves alone, after power-up.
const PAT: u64 = 0x0007_0406_0007_0406;

fn data_segment() -> Segment {
    Segment { base: 0, limit: 0xffff, attributes: 0x93, selector: 0 }
}

impl Cpu {
    /// What INIT and power-up have in common.
    fn reset_common(&mut self) {
        self.regs = [0; 16];
        self.regs[reg::RDX] = u64::from(self.model.signature());
        self.rip = 0xfff0;
        self.rflags = flags::FIXED;
        self.cpl = 0;
        self.interrupt_shadow = 0;
        self.halted = false;
        self.segments = [data_segment(); 6];
        self.segments[Seg::Cs as usize] =
            Segment { base: 0xffff_0000, limit: 0xffff, attributes: 0x9b, selector: 0xf000 };
        self.ldtr = Segment { base: 0, limit: 0xffff, attributes: 0x82, selector: 0 };
        self.tr = Segment { base: 0, limit: 0xffff, attributes: 0x8b, selector: 0 };
        self.gdtr = TableRegister { base: 0, limit: 0xffff };
        self.idtr = TableRegister { base: 0, limit: 0xffff };
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = 0;
        self.dr = [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400];
        self.pdpte = [0; 4];
        self.msrs.efer = 0;
    }

    pub(crate) fn power_up(&mut self) {
        self.msrs = Msrs { pat: PAT, misc_enable: 1, mcg_ctl: u64::MAX, ..Msrs::default() };
        self.mxcsr = 0x1f80;
        self.xcr0 = 1;
        self.pkru = 0;
        self.vectors = [VecReg::default(); 32];
        self.opmask = [0; 8];
        self.vector_width = width::XMM;
        self.x87 = X87Area::default();
        self.lock_needed = true;
        self.exit_request.store(0, Ordering::Relaxed);
        self.reset_common();
        self.cr0 = cr0::ET | cr0::NW | cr0::CD;
        self.svm.reset(false);
        self.flush_all_tlbs();
        self.rebind();
    }

    /// [`Core::mode_changed`] for a processor that nothing else is at hand with.
    fn rebind(&mut self) {
        self.long64 = false;
        self.align_check = false;
        self.watched = false;
        self.breakpoints_met = 0;
        self.data_bank = 0;
        self.fast_bank = u8::MAX;
        self.tlb_bank = self.tlb.bank(0);
    }

    /// Replaces what CPUID announces; for a processor that has not run.
    pub fn set_model(&mut self, model: std::sync::Arc<CpuModel>) {
        self.model = model;
        self.power_up();
    }
}

impl Core<'_> {
    /// Power-up or a reset of the machine.
    pub fn reset(&mut self) {
        let lock_needed = self.cpu.lock_needed;
        self.cpu.power_up();
        self.cpu.lock_needed = lock_needed;
        self.mode_changed();
    }

    /// INIT: as a reset, but that FPU and vector state, MTRRs and most MSRs stay, and CR0.CD and NW too.
    pub fn init(&mut self) {
        let cache = self.cpu.cr0 & (cr0::CD | cr0::NW);
        self.cpu.reset_common();
        self.cpu.svm.reset(true);
        self.cpu.cr0 = cr0::ET | cache;
        self.flush_all_tlbs();
        self.mode_changed();
    }

    /// A start-up IPI to a processor that waits for one after INIT: it begins at `vector` * 4096 in real
    /// mode.
    pub fn startup(&mut self, vector: u8) {
        let selector = u16::from(vector) << 8;
        let code = &mut self.cpu.segments[Seg::Cs as usize];
        code.selector = selector;
        code.base = u64::from(selector) << 4;
        self.cpu.rip = 0;
        self.cpu.halted = false;
        self.mode_changed();
    }
}
