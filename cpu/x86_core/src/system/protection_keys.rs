//! Protection keys (Intel SDM volume 3, 4.6.2).

use crate::cpuid::feature;
use crate::{Core, Flow, Trap, cr4, reg};
use iced_x86::{Instruction, Mnemonic};

/// RDPKRU and WRPKRU.
pub(super) fn execute(core: &mut Core, insn: &Instruction) -> Result<Flow, Trap> {
    if !core.cpu.model.has(feature::PKU) || core.cpu.cr4 & cr4::PKE == 0 {
        return Err(Trap::UD);
    }
    let write = insn.mnemonic() == Mnemonic::Wrpkru;
    let must_be_zero = core.cpu.regs[reg::RCX] | if write { core.cpu.regs[reg::RDX] } else { 0 };
    if must_be_zero & 0xffff_ffff != 0 {
        return Err(Trap::gp(0));
    }
    if write {
        core.set_pkru(core.cpu.regs[reg::RAX] as u32);
    } else {
        core.cpu.regs[reg::RAX] = core.cpu.pkru.into();
        core.cpu.regs[reg::RDX] = 0;
    }
    Ok(Flow::Next)
}

impl Core<'_> {
    /// Sets PKRU, by which cached rights to user pages may change.
    pub fn set_pkru(&mut self, value: u32) {
        if std::mem::replace(&mut self.cpu.pkru, value) != value {
            self.rights_changed(cr4::PKE);
        }
    }

    /// The same for the register of supervisor pages.
    pub(super) fn set_pkrs(&mut self, value: u64) {
        if std::mem::replace(&mut self.cpu.msrs.pkrs, value) != value {
            self.rights_changed(cr4::PKS);
        }
    }

    /// Drops what was translated with other rights where that bit of CR4 is set. A guest and its host have the registers
    /// in common (AMD APM volume 2, 15.5.1).
    fn rights_changed(&mut self, bit: u64) {
        if self.cpu.cr4 & bit != 0 {
            self.flush_tlb(false);
        }
        self.flush_other_world(bit);
    }
}
