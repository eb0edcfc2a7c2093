//! Model-specific registers (Intel SDM volume 4, AMD APM volume 2 appendix A).

use crate::cpuid::feature;
use crate::{Core, Msrs, Seg, Trap};

/// MSR addresses.
mod index {
    pub(super) const TSC: u32 = 0x10;
    pub(super) const APIC_BASE: u32 = 0x1b;
    pub(super) const TSC_ADJUST: u32 = 0x3b;
    pub(super) const SPEC_CTRL: u32 = 0x48;
    pub(super) const PRED_CMD: u32 = 0x49;
    pub(super) const PATCH_LEVEL: u32 = 0x8b;
    pub(super) const MTRR_CAP: u32 = 0xfe;
    pub(super) const SYSENTER_CS: u32 = 0x174;
    pub(super) const SYSENTER_ESP: u32 = 0x175;
    pub(super) const SYSENTER_EIP: u32 = 0x176;
    pub(super) const MCG_CAP: u32 = 0x179;
    pub(super) const MCG_STATUS: u32 = 0x17a;
    pub(super) const MCG_CTL: u32 = 0x17b;
    pub(super) const MISC_ENABLE: u32 = 0x1a0;
    pub(super) const DEBUGCTL: u32 = 0x1d9;
    pub(super) const LAST_BRANCH: u32 = 0x1db;
    pub(super) const LAST_BRANCH_END: u32 = 0x1de;
    pub(super) const PAT: u32 = 0x277;
    pub(super) const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub(super) const MC_FIRST: u32 = 0x400;
    pub(super) const TSC_DEADLINE: u32 = 0x6e0;
    pub(super) const PKRS: u32 = 0x6e1;
    pub(super) const XSS: u32 = 0xda0;
    pub(super) const EFER: u32 = 0xc000_0080;
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const SFMASK: u32 = 0xc000_0084;
    pub(super) const FS_BASE: u32 = 0xc000_0100;
    pub(super) const GS_BASE: u32 = 0xc000_0101;
    pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(super) const TSC_AUX: u32 = 0xc000_0103;
    pub(super) const HWCR: u32 = 0xc001_0015;
}

/// HWCR.TscFreqSel: the TSC counts at the rate of P0.
const TSC_FREQUENCY_SELECT: u64 = 1 << 24;

/// The fixed-range MTRRs in the order of [`Msrs::mtrr_fixed`](crate::Msrs::mtrr_fixed).
fn fixed_mtrr(msr: u32) -> Option<usize> {
    match msr {
        0x250 => Some(0),
        0x258 | 0x259 => Some((msr - 0x257) as usize),
        0x268..=0x26f => Some((msr - 0x265) as usize),
        _ => None,
    }
}

/// Registers of AMD processors that configure what is not there: they read as zero, and what is written to
/// them is lost. Kernels touch them without asking CPUID first.
fn is_inert(msr: u32) -> bool {
    matches!(
        msr,
        0xc000_0410                 // MCA interrupt configuration
            | 0xc001_0000..=0xc001_0007 // performance counters that count nothing
            | 0xc001_0010           // SYSCFG
            | 0xc001_0016..=0xc001_0019 // IORRs
            | 0xc001_001a | 0xc001_001d // TOP_MEM, TOP_MEM2
            | 0xc001_001f           // NB_CFG
            | 0xc001_0020           // PATCH_LOADER
            | 0xc001_0055           // interrupt pending message
            | 0xc001_0058           // MMIO configuration base
            | 0xc001_0061..=0xc001_006b // P-states
            | 0xc001_0111..=0xc001_0113 // SMM
            | 0xc001_1020..=0xc001_1023 | 0xc001_1028..=0xc001_102e // LS_CFG to BP_CFG
    )
}

/// A memory type that PAT and MTRRs know; UC- is one of PAT alone.
fn is_memory_type(value: u64, pat: bool) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6) || (pat && value == 7)
}

fn require(condition: bool) -> Result<(), Trap> {
    if condition { Ok(()) } else { Err(Trap::gp(0)) }
}

impl Core<'_> {
    /// The guest's time-stamp counter.
    #[inline]
    pub fn tsc(&self) -> u64 {
        self.platform.tsc().wrapping_add(self.cpu.msrs.tsc_offset)
    }

    /// RDMSR.
    ///
    /// # Errors
    /// #GP if there is no such register.
    pub fn read_msr(&mut self, msr: u32) -> Result<u64, Trap> {
        let msrs = &self.cpu.msrs;
        let segments = &self.cpu.segments;
        Ok(match msr {
            index::TSC => self.tsc(),
            index::APIC_BASE | 0x800..=0x8ff => self.platform.apic_msr(msr).ok_or(Trap::gp(0))?,
            index::TSC_DEADLINE => match self.platform.apic_msr(msr).ok_or(Trap::gp(0))? {
                0 => 0,
                // The platform's clock is the TSC without the guest's offset.
                deadline => deadline.wrapping_add(msrs.tsc_offset),
            },
            index::TSC_ADJUST => {
                require(self.cpu.model.has(feature::TSC_ADJUST))?;
                msrs.tsc_adjust
            }
            index::SPEC_CTRL => {
                require(self.has_speculation_control())?;
                msrs.spec_ctrl
            }
            index::PATCH_LEVEL => self.cpu.model.microcode(),
            index::MTRR_CAP => 0x500 | msrs.mtrr_variable.len() as u64,
            index::SYSENTER_CS => msrs.sysenter_cs,
            index::SYSENTER_ESP => msrs.sysenter_esp,
            index::SYSENTER_EIP => msrs.sysenter_eip,
            index::MCG_CAP => 0x100 | msrs.mc_banks.len() as u64,
            index::MCG_STATUS => msrs.mcg_status,
            index::MCG_CTL => msrs.mcg_ctl,
            index::MISC_ENABLE => msrs.misc_enable,
            index::DEBUGCTL => msrs.debugctl,
            index::LAST_BRANCH..=index::LAST_BRANCH_END => {
                msrs.last_branch[(msr - index::LAST_BRANCH) as usize]
            }
            0x200..=0x20f => msrs.mtrr_variable[(msr - 0x200) as usize / 2][msr as usize % 2],
            index::PAT => msrs.pat,
            index::MTRR_DEF_TYPE => msrs.mtrr_def_type,
            index::XSS => {
                require(self.cpu.model.has(feature::XSAVE))?;
                msrs.xss
            }
            index::PKRS => {
                require(self.cpu.model.has(feature::PKS))?;
                msrs.pkrs
            }
            index::EFER => msrs.efer,
            index::STAR => msrs.star,
            index::LSTAR => msrs.lstar,
            index::CSTAR => msrs.cstar,
            index::SFMASK => msrs.sfmask,
            index::FS_BASE => segments[Seg::Fs as usize].base,
            index::GS_BASE => segments[Seg::Gs as usize].base,
            index::KERNEL_GS_BASE => msrs.kernel_gs_base,
            index::TSC_AUX => msrs.tsc_aux,
            index::HWCR => TSC_FREQUENCY_SELECT,
            _ => self.read_table_msr(msr)?,
        })
    }

    /// Registers of which there are many.
    fn read_table_msr(&self, msr: u32) -> Result<u64, Trap> {
        let msrs = &self.cpu.msrs;
        if let Some(slot) = fixed_mtrr(msr) {
            return Ok(msrs.mtrr_fixed[slot]);
        }
        let bank = msr.wrapping_sub(index::MC_FIRST) as usize;
        if bank < msrs.mc_banks.len() * 4 {
            return Ok(msrs.mc_banks[bank / 4][bank % 4]);
        }
        if let Some(value) = self.read_svm_msr(msr) {
            return Ok(value);
        }
        require(is_inert(msr))?;
        Ok(0)
    }

    fn has_speculation_control(&self) -> bool {
        self.cpu.model.has(feature::AMD_SSBD) || self.cpu.model.has(feature::AMD_IBRS)
    }

    /// WRMSR.
    ///
    /// # Errors
    /// #GP if there is no such register, or it does not take the value.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), Trap> {
        match msr {
            index::TSC => {
                // What a guest writes is the host's counter, without the guest's offset.
                let now = self.tsc().wrapping_sub(self.cpu.svm.control.tsc_offset);
                let delta = value.wrapping_sub(now);
                self.cpu.msrs.tsc_offset = self.cpu.msrs.tsc_offset.wrapping_add(delta);
                self.cpu.msrs.tsc_adjust = self.cpu.msrs.tsc_adjust.wrapping_add(delta);
            }
            index::TSC_ADJUST => {
                require(self.cpu.model.has(feature::TSC_ADJUST))?;
                let delta = value.wrapping_sub(self.cpu.msrs.tsc_adjust);
                self.cpu.msrs.tsc_offset = self.cpu.msrs.tsc_offset.wrapping_add(delta);
                self.cpu.msrs.tsc_adjust = value;
            }
            index::APIC_BASE | 0x800..=0x8ff => {
                /// IA32_APIC_BASE: the x2APIC mode.
                const EXTENDED: u64 = 1 << 10;
                let extended = msr != index::APIC_BASE || value & EXTENDED != 0;
                require(!extended || self.cpu.model.has(feature::X2APIC))?;
                self.platform.set_apic_msr(msr, value).ok_or(Trap::gp(0))?;
            }
            index::TSC_DEADLINE => {
                // Zero disarms the timer, so a deadline that comes out as zero has to be the next tick.
                let deadline = match value {
                    0 => 0,
                    _ => value.wrapping_sub(self.cpu.msrs.tsc_offset).max(1),
                };
                self.platform.set_apic_msr(msr, deadline).ok_or(Trap::gp(0))?;
            }
            index::SPEC_CTRL => {
                require(self.has_speculation_control() && value & !0x87 == 0)?;
                self.cpu.msrs.spec_ctrl = value;
            }
            index::PRED_CMD => require(self.cpu.model.has(feature::AMD_IBPB) && value & !1 == 0)?,
            index::EFER => self.set_efer(value)?,
            index::PKRS => {
                require(self.cpu.model.has(feature::PKS) && value >> 32 == 0)?;
                self.set_pkrs(value);
            }
            index::FS_BASE | index::GS_BASE | index::KERNEL_GS_BASE => self.write_base(msr, value)?,
            index::PAT | index::MTRR_DEF_TYPE | 0x200..=0x20f | 0x250..=0x26f => {
                self.write_memory_type(msr, value)?;
            }
            _ => match self.write_svm_msr(msr, value) {
                Some(result) => return result,
                None => self.write_plain_msr(msr, value)?,
            },
        }
        Ok(())
    }

    fn write_base(&mut self, msr: u32, value: u64) -> Result<(), Trap> {
        require(self.cpu.is_canonical_base(value))?;
        match msr {
            index::FS_BASE => self.cpu.segments[Seg::Fs as usize].base = value,
            index::GS_BASE => self.cpu.segments[Seg::Gs as usize].base = value,
            _ => self.cpu.msrs.kernel_gs_base = value,
        }
        Ok(())
    }

    /// PAT and MTRRs. Memory types have no effect here but to be read back.
    fn write_memory_type(&mut self, msr: u32, value: u64) -> Result<(), Trap> {
        let types_valid = |pat| value.to_le_bytes().iter().all(|&byte| is_memory_type(u64::from(byte), pat));
        let physical = self.cpu.model.physical_mask();
        let msrs = &mut self.cpu.msrs;
        match msr {
            index::PAT => {
                require(types_valid(true))?;
                msrs.pat = value;
            }
            index::MTRR_DEF_TYPE => {
                require(value & !0xcff == 0 && is_memory_type(value & 0xff, false))?;
                msrs.mtrr_def_type = value;
            }
            0x200..=0x20f => {
                let mask = msr % 2 == 1;
                let valid = if mask { value & 0x7ff == 0 } else { value & 0xf00 == 0 };
                require(valid && value & !physical == 0 && (mask || is_memory_type(value & 0xff, false)))?;
                msrs.mtrr_variable[(msr - 0x200) as usize / 2][msr as usize % 2] = value;
            }
            _ => {
                let slot = fixed_mtrr(msr).ok_or(Trap::gp(0))?;
                require(types_valid(false))?;
                msrs.mtrr_fixed[slot] = value;
            }
        }
        Ok(())
    }

    /// Registers that only hold what is written, within bounds.
    fn write_plain_msr(&mut self, msr: u32, value: u64) -> Result<(), Trap> {
        let has_xsave = self.cpu.model.has(feature::XSAVE);
        let canonical = self.cpu.is_canonical_base(value);
        let msrs = &mut self.cpu.msrs;
        match msr {
            index::SYSENTER_CS => msrs.sysenter_cs = value & 0xffff,
            index::SYSENTER_ESP | index::SYSENTER_EIP | index::LSTAR | index::CSTAR => {
                require(canonical)?;
                match msr {
                    index::SYSENTER_ESP => msrs.sysenter_esp = value,
                    index::SYSENTER_EIP => msrs.sysenter_eip = value,
                    index::LSTAR => msrs.lstar = value,
                    _ => msrs.cstar = value,
                }
            }
            index::STAR => msrs.star = value,
            index::SFMASK => msrs.sfmask = value & 0xffff_ffff,
            index::TSC_AUX => {
                require(value >> 32 == 0)?;
                msrs.tsc_aux = value;
            }
            index::MCG_STATUS => {
                require(value & !7 == 0)?;
                msrs.mcg_status = value;
            }
            index::MCG_CTL => {
                require(value == 0 || value == u64::MAX)?;
                msrs.mcg_ctl = value;
            }
            index::MISC_ENABLE => msrs.misc_enable = value,
            index::DEBUGCTL => {
                // Single-stepping on branches and the pins do not exist.
                require(value & !0x3f == 0)?;
                msrs.debugctl = value & Msrs::LAST_BRANCH_RECORDS;
            }
            // The processor alone writes them.
            index::LAST_BRANCH..=index::LAST_BRANCH_END => {}
            index::XSS => require(has_xsave && value == 0)?,
            index::PATCH_LEVEL => {}
            index::HWCR => require(value & !(TSC_FREQUENCY_SELECT | 0x7f_ffff) == 0)?,
            _ => {
                let bank = msr.wrapping_sub(index::MC_FIRST) as usize;
                if bank < msrs.mc_banks.len() * 4 {
                    let valid = match bank % 4 {
                        // CTL is all or nothing, but that kernels clear GART errors (bit 10) in it and
                        // leave bit 0 to chance.
                        0 => value == 0 || value | 1 << 10 | 1 == u64::MAX,
                        // STATUS can be cleared only; HWCR.McStatusWrEn is not offered.
                        1 => value == 0,
                        _ => true,
                    };
                    require(valid)?;
                    msrs.mc_banks[bank / 4][bank % 4] = value;
                } else {
                    require(is_inert(msr))?;
                }
            }
        }
        Ok(())
    }
}
