//! CR0 to CR8, the debug registers, and MOV to and from them and segment registers.

use super::{operand, require_supervisor, require_unhidden};
use crate::cpuid::feature;
use crate::{Core, Flow, Seg, Segment, Trap, cr0, cr4, efer, segment_index, shadow, vector};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use std::sync::atomic::Ordering;

/// Debug register bits that always read as one.
const DR6_ONES: u64 = 0xffff_0ff0;
const DR7_ONES: u64 = 0x400;
/// DR7.GD: accesses to debug registers raise #DB.
const GENERAL_DETECT: u64 = 1 << 13;

/// MOV with a control, debug or segment register.
pub(super) fn mov(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    let (to, from) = (insn.op0_register(), insn.op1_register());
    if let Some(seg) = segment_index(to).filter(|_| insn.op0_kind() == OpKind::Register) {
        if seg == Seg::Cs {
            return Err(Trap::UD);
        }
        let selector = operand::load16(core, insn, 1)?;
        core.load_segment(seg, selector)?;
        if seg == Seg::Ss {
            core.cpu.interrupt_shadow |= shadow::MOV_SS;
        }
        return Ok(Flow::Next);
    }
    if let Some(seg) = segment_index(from).filter(|_| insn.op1_kind() == OpKind::Register) {
        let selector = core.cpu.segments[seg as usize].selector;
        operand::store16(core, insn, 0, selector)?;
        return Ok(Flow::Next);
    }
    if insn.op0_kind() != OpKind::Register || insn.op1_kind() != OpKind::Register {
        return Err(Trap::UD);
    }
    if to.is_cr() {
        let value = operand::register(core.cpu, from);
        require_supervisor(core)?;
        write_control(core, to, value)?;
    } else if from.is_cr() {
        require_supervisor(core)?;
        let value = read_control(core, from)?;
        operand::set_register(core.cpu, to, value);
    } else if to.is_dr() {
        let index = debug_register(core, to)?;
        let value = operand::register(core.cpu, from);
        write_debug(core, index, value)?;
    } else if from.is_dr() {
        let index = debug_register(core, from)?;
        let value = core.cpu.dr[index];
        operand::set_register(core.cpu, to, value);
    } else {
        return Err(Trap::UD);
    }
    Ok(Flow::Next)
}

fn read_control(core: &Core, register: Register) -> Result<u64, Trap> {
    Ok(match register {
        Register::CR0 => core.cpu.cr0,
        Register::CR2 => core.cpu.cr2,
        Register::CR3 => core.cpu.cr3,
        Register::CR4 => core.cpu.cr4,
        Register::CR8 if core.cpu.svm.control.interrupts.masking() => {
            u64::from(core.cpu.svm.control.interrupts.tpr())
        }
        Register::CR8 => u64::from(core.platform.cr8()),
        _ => return Err(Trap::UD),
    })
}

fn write_control(core: &mut Core, register: Register, value: u64) -> Result<(), Trap> {
    match register {
        Register::CR0 => core.set_cr0(value),
        Register::CR2 => {
            core.cpu.cr2 = value;
            Ok(())
        }
        Register::CR3 => core.set_cr3(value),
        Register::CR4 => core.set_cr4(value),
        Register::CR8 => {
            if value & !0xf != 0 {
                return Err(Trap::gp(0));
            }
            if core.cpu.svm.control.interrupts.masking() {
                core.cpu.svm.control.interrupts.set_tpr(value as u8);
                // A virtual interrupt may be due now, or not any more.
                core.cpu.exit_request.store(1, Ordering::Relaxed);
            } else {
                core.platform.set_cr8(value as u8);
            }
            Ok(())
        }
        _ => Err(Trap::UD),
    }
}

/// The index of a debug register, if it can be accessed now (Intel SDM volume 3, 18.2).
fn debug_register(core: &mut Core, register: Register) -> Result<usize, Trap> {
    let mut index = register.number();
    if index > 7 || (matches!(index, 4 | 5) && core.cpu.cr4 & cr4::DE != 0) {
        return Err(Trap::UD);
    }
    require_supervisor(core)?;
    if core.cpu.dr[7] & GENERAL_DETECT != 0 {
        core.cpu.dr[6] |= GENERAL_DETECT;
        return Err(Trap::plain(vector::DB));
    }
    if matches!(index, 4 | 5) {
        index += 2;
    }
    Ok(index)
}

fn write_debug(core: &mut Core, index: usize, value: u64) -> Result<(), Trap> {
    if index >= 6 && value >> 32 != 0 {
        return Err(Trap::gp(0));
    }
    core.cpu.dr[index] = match index {
        6 => value & 0xe00f | DR6_ONES,
        7 => value & 0xffff_2bff | DR7_ONES,
        _ => value,
    };
    core.mode_changed();
    Ok(())
}

/// CLTS, LMSW and SMSW.
pub(super) fn status_word(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    match insn.mnemonic() {
        Mnemonic::Clts => {
            require_supervisor(core)?;
            core.cpu.cr0 &= !cr0::TS;
        }
        Mnemonic::Lmsw => {
            require_supervisor(core)?;
            let value = u64::from(operand::load16(core, insn, 0)?);
            // PE can be set this way, but not cleared.
            let changed = cr0::MP | cr0::EM | cr0::TS | (cr0::PE & !core.cpu.cr0);
            core.set_cr0(core.cpu.cr0 & !changed | value & (changed | cr0::PE) | core.cpu.cr0 & cr0::PE)?;
        }
        _ => {
            require_unhidden(core)?;
            if insn.op0_kind() == OpKind::Register {
                let value = core.cpu.cr0;
                operand::set_register(core.cpu, insn.op0_register(), value);
            } else {
                let value = core.cpu.cr0 as u16;
                operand::store16(core, insn, 0, value)?;
            }
        }
    }
    Ok(Flow::Next)
}

impl Core<'_> {
    /// MOV to CR0 (Intel SDM volume 3, 2.5).
    ///
    /// # Errors
    /// #GP for combinations that are not allowed.
    pub fn set_cr0(&mut self, value: u64) -> Result<(), Trap> {
        let old = self.cpu.cr0;
        let new = value & cr0::EXIST | cr0::ET;
        let set = |bits: u64| new & bits == bits;
        let paging = set(cr0::PG);
        if value >> 32 != 0 || (paging && !set(cr0::PE)) || (set(cr0::NW) && !set(cr0::CD)) {
            return Err(Trap::gp(0));
        }
        let mut efer = self.cpu.msrs.efer;
        if paging && old & cr0::PG == 0 && efer & efer::LME != 0 {
            let code = &self.cpu.segments[Seg::Cs as usize];
            if self.cpu.cr4 & cr4::PAE == 0 || code.attributes & Segment::LONG != 0 {
                return Err(Trap::gp(0));
            }
            efer |= efer::LMA;
        }
        if !paging && old & cr0::PG != 0 {
            if self.cpu.long64 || self.cpu.cr4 & cr4::PCIDE != 0 {
                return Err(Trap::gp(0));
            }
            efer &= !efer::LMA;
        }
        if paging && self.cpu.cr4 & cr4::PAE != 0 && efer & efer::LMA == 0 && (old ^ new) & cr0::PG != 0 {
            self.load_page_directory_pointers(self.cpu.cr3)?;
        }
        self.cpu.msrs.efer = efer;
        self.cpu.cr0 = new;
        if (old ^ new) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.flush_tlb(false);
        }
        self.mode_changed();
        Ok(())
    }

    /// MOV to CR3. Translations that are not global go, those of all process-context identifiers: a processor may drop
    /// more than it is told to (Intel SDM volume 3, 4.10.4).
    ///
    /// # Errors
    /// #GP for addresses that do not exist, and PAE page-directory pointers with reserved bits.
    pub fn set_cr3(&mut self, value: u64) -> Result<(), Trap> {
        /// With process-context identifiers: that translations may be kept. It is not stored.
        const KEEP: u64 = 1 << 63;
        let value = if self.cpu.cr4 & cr4::PCIDE != 0 { value & !KEEP } else { value };
        if self.cpu.long_mode() {
            if value & !self.cpu.model.physical_mask() != 0 {
                return Err(Trap::gp(0));
            }
        } else if self.cpu.cr0 & cr0::PG != 0 && self.cpu.cr4 & cr4::PAE != 0 {
            self.load_page_directory_pointers(value)?;
        }
        self.cpu.cr3 = value;
        self.flush_tlb(true);
        Ok(())
    }

    /// Loads the four page-directory pointers of PAE paging (Intel SDM volume 3, 4.4.1). With nested paging they
    /// are read when they are needed (AMD APM volume 2, 15.25.10).
    fn load_page_directory_pointers(&mut self, cr3: u64) -> Result<(), Trap> {
        if self.cpu.svm.control.nested_paging {
            return Ok(());
        }
        let entries = self.page_directory_pointers(cr3);
        if !entries.iter().all(|entry| self.is_page_directory_pointer(*entry)) {
            return Err(Trap::gp(0));
        }
        self.cpu.pdpte = entries;
        Ok(())
    }

    /// The four page-directory pointers of PAE paging in memory.
    pub(crate) fn page_directory_pointers(&self, cr3: u64) -> [u64; 4] {
        let table = cr3 & 0xffff_ffe0;
        std::array::from_fn(|index| self.read_entry(table + 8 * index as u64, 8))
    }

    /// Whether one of them, if it is present, has no reserved bits.
    pub(crate) fn is_page_directory_pointer(&self, entry: u64) -> bool {
        let reserved = !self.cpu.model.physical_mask() | 0x1e6;
        entry & 1 == 0 || entry & reserved == 0
    }

    /// MOV to CR4.
    ///
    /// # Errors
    /// #GP for bits that the model lacks, and for leaving PAE in IA-32e mode.
    pub fn set_cr4(&mut self, value: u64) -> Result<(), Trap> {
        let old = self.cpu.cr4;
        if value & !self.supported_cr4() != 0 || (self.cpu.long_mode() && value & cr4::PAE == 0) {
            return Err(Trap::gp(0));
        }
        let changed = old ^ value;
        let to_pcid = changed & value & cr4::PCIDE != 0;
        if (to_pcid && (!self.cpu.long_mode() || self.cpu.cr3 & 0xfff != 0))
            || (changed & cr4::LA57 != 0 && self.cpu.long_mode())
        {
            return Err(Trap::gp(0));
        }
        let pae = self.cpu.cr0 & cr0::PG != 0 && value & cr4::PAE != 0 && !self.cpu.long_mode();
        if pae && changed & (cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP) != 0 {
            self.load_page_directory_pointers(self.cpu.cr3)?;
        }
        self.cpu.cr4 = value;
        const PAGING: u64 = cr4::PSE
            | cr4::PAE
            | cr4::PGE
            | cr4::LA57
            | cr4::PCIDE
            | cr4::SMEP
            | cr4::SMAP
            | cr4::PKE
            | cr4::PKS;
        if changed & PAGING != 0 {
            self.flush_tlb(false);
        }
        self.mode_changed();
        Ok(())
    }

    /// The bits of CR4 that the model has.
    pub(crate) fn supported_cr4(&self) -> u64 {
        let optional = [
            (feature::VME, cr4::VME | cr4::PVI),
            (feature::DE, cr4::DE),
            (feature::PSE, cr4::PSE),
            (feature::PAE, cr4::PAE),
            (feature::MCE, cr4::MCE),
            (feature::PGE, cr4::PGE),
            (feature::FXSR, cr4::OSFXSR),
            (feature::SSE, cr4::OSXMMEXCPT),
            (feature::UMIP, cr4::UMIP),
            (feature::FSGSBASE, cr4::FSGSBASE),
            (feature::XSAVE, cr4::OSXSAVE),
            (feature::SMEP, cr4::SMEP),
            (feature::SMAP, cr4::SMAP),
            (feature::LA57, cr4::LA57),
            (feature::PCID, cr4::PCIDE),
            (feature::PKU, cr4::PKE),
            (feature::PKS, cr4::PKS),
        ];
        let has = |&(feature, _): &(feature::Feature, u64)| self.cpu.model.has(feature);
        optional.iter().filter(|entry| has(entry)).fold(cr4::TSD | cr4::PCE, |all, (_, bits)| all | bits)
    }

    /// Writes EFER.
    ///
    /// # Errors
    /// #GP for bits that the model lacks, and for a change of LME while paging is on.
    pub fn set_efer(&mut self, value: u64) -> Result<(), Trap> {
        let old = self.cpu.msrs.efer;
        let paging = self.cpu.cr0 & cr0::PG != 0;
        if value & !self.supported_efer() != 0 || (paging && (old ^ value) & efer::LME != 0) {
            return Err(Trap::gp(0));
        }
        self.cpu.msrs.efer = value & !efer::LMA | old & efer::LMA;
        if (old ^ value) & efer::NXE != 0 {
            self.flush_tlb(false);
        }
        if value & efer::SVME == 0 && old & efer::SVME != 0 {
            // Nobody could set it any more.
            self.cpu.svm.gif = true;
            self.cpu.exit_request.store(1, Ordering::Relaxed);
        }
        self.mode_changed();
        Ok(())
    }

    /// The bits of EFER that the model has.
    pub(crate) fn supported_efer(&self) -> u64 {
        let mut supported = efer::SCE | efer::LMA;
        for (feature, bit) in [
            (feature::LM, efer::LME),
            (feature::NX, efer::NXE),
            (feature::FFXSR, efer::FFXSR),
            (feature::AUTO_IBRS, efer::AUTOIBRS),
        ] {
            if self.cpu.model.has(feature) {
                supported |= bit;
            }
        }
        if self.svm_can_be_enabled() {
            supported |= efer::SVME;
        }
        supported
    }
}
