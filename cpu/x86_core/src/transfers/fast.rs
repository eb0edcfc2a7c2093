//! SYSCALL, SYSRET, SYSENTER and SYSEXIT.

use crate::{Core, Seg, Segment, Trap, cr0, efer, flags, reg};

/// Attributes of the flat segments that these instructions load without looking at a descriptor.
const CODE64: u32 = 0xa09b;
const CODE32: u32 = 0xc09b;
const DATA: u32 = 0xc093;

impl Core<'_> {
    fn load_flat(&mut self, seg: Seg, selector: u16, attributes: u32, cpl: u8) {
        self.cpu.segments[seg as usize] =
            Segment { base: 0, limit: 0xffff_ffff, attributes: attributes | u32::from(cpl) << 5, selector };
    }

    /// SYSCALL (AMD APM volume 3). In legacy mode too, as AMD processors have it.
    ///
    /// # Errors
    /// #UD if EFER.SCE is clear.
    pub fn syscall(&mut self, next_rip: u64) -> Result<(), Trap> {
        let msrs = self.cpu.msrs;
        if msrs.efer & efer::SCE == 0 || self.cpu.cr0 & cr0::PE == 0 {
            return Err(Trap::UD);
        }
        let selector = (msrs.star >> 32) as u16 & 0xfffc;
        if self.cpu.long_mode() {
            let from64 = self.cpu.long64;
            self.cpu.regs[reg::RCX] = next_rip;
            self.cpu.regs[11] = self.cpu.rflags & !flags::RF;
            self.cpu.rip = if from64 { msrs.lstar } else { msrs.cstar };
            self.cpu.rflags = self.cpu.rflags & !(msrs.sfmask | flags::RF) | flags::FIXED;
            self.load_flat(Seg::Cs, selector, CODE64, 0);
        } else {
            self.cpu.regs[reg::RCX] = next_rip & 0xffff_ffff;
            self.cpu.rip = msrs.star & 0xffff_ffff;
            self.cpu.rflags &= !(flags::VM | flags::IF | flags::RF);
            self.load_flat(Seg::Cs, selector, CODE32, 0);
        }
        self.load_flat(Seg::Ss, selector.wrapping_add(8), DATA, 0);
        self.cpu.cpl = 0;
        self.mode_changed();
        Ok(())
    }

    /// SYSRET to 64-bit code (`size` 8) or 32-bit code.
    ///
    /// # Errors
    /// #UD if EFER.SCE is clear, #GP outside of level 0.
    pub fn sysret(&mut self, size: u8) -> Result<(), Trap> {
        let msrs = self.cpu.msrs;
        if msrs.efer & efer::SCE == 0 {
            return Err(Trap::UD);
        }
        if self.cpu.cr0 & cr0::PE == 0 || self.cpu.cpl != 0 {
            return Err(Trap::gp(0));
        }
        let selector = (msrs.star >> 48) as u16;
        let long = self.cpu.long_mode();
        if long && size == 8 {
            // A return address that is not canonical faults when user code is fetched from it, as on AMD
            // processors.
            self.cpu.rip = self.cpu.regs[reg::RCX];
            self.load_flat(Seg::Cs, selector.wrapping_add(16) | 3, CODE64, 3);
        } else {
            self.cpu.rip = self.cpu.regs[reg::RCX] & 0xffff_ffff;
            self.load_flat(Seg::Cs, selector | 3, CODE32, 3);
        }
        self.load_flat(Seg::Ss, selector.wrapping_add(8) | 3, DATA, 3);
        self.cpu.cpl = 3;
        if long {
            self.set_rflags(self.cpu.regs[11] & !(flags::VM | flags::RF));
        } else {
            self.set_rflags(self.cpu.rflags | flags::IF);
        }
        self.mode_changed();
        Ok(())
    }

    /// SYSENTER.
    ///
    /// # Errors
    /// #GP outside of protected mode, or if no kernel entry was set up.
    pub fn sysenter(&mut self) -> Result<(), Trap> {
        let msrs = self.cpu.msrs;
        let selector = msrs.sysenter_cs as u16 & 0xfffc;
        if self.cpu.cr0 & cr0::PE == 0 || selector == 0 {
            return Err(Trap::gp(0));
        }
        let long = self.cpu.long_mode();
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        self.cpu.rflags &= !(flags::VM | flags::IF | flags::RF);
        self.cpu.regs[reg::RSP] = msrs.sysenter_esp & mask;
        self.cpu.rip = msrs.sysenter_eip & mask;
        self.load_flat(Seg::Cs, selector, if long { CODE64 } else { CODE32 }, 0);
        self.load_flat(Seg::Ss, selector.wrapping_add(8), DATA, 0);
        self.cpu.cpl = 0;
        self.mode_changed();
        Ok(())
    }

    /// SYSEXIT to 64-bit code (`size` 8) or 32-bit code.
    ///
    /// # Errors
    /// #GP outside of protected mode and level 0, if no kernel entry was set up, or if the target is not
    /// canonical.
    pub fn sysexit(&mut self, size: u8) -> Result<(), Trap> {
        let selector = self.cpu.msrs.sysenter_cs as u16 & 0xfffc;
        if self.cpu.cr0 & cr0::PE == 0 || self.cpu.cpl != 0 || selector == 0 {
            return Err(Trap::gp(0));
        }
        let (rip, rsp) = (self.cpu.regs[reg::RDX], self.cpu.regs[reg::RCX]);
        let base = if size == 8 {
            if !self.cpu.is_canonical(rip) || !self.cpu.is_canonical(rsp) {
                return Err(Trap::gp(0));
            }
            self.cpu.rip = rip;
            self.cpu.regs[reg::RSP] = rsp;
            self.load_flat(Seg::Cs, selector.wrapping_add(32) | 3, CODE64, 3);
            selector.wrapping_add(40)
        } else {
            self.cpu.rip = rip & 0xffff_ffff;
            self.cpu.regs[reg::RSP] = rsp & 0xffff_ffff;
            self.load_flat(Seg::Cs, selector.wrapping_add(16) | 3, CODE32, 3);
            selector.wrapping_add(24)
        };
        self.load_flat(Seg::Ss, base | 3, DATA, 3);
        self.cpu.cpl = 3;
        self.mode_changed();
        Ok(())
    }
}
