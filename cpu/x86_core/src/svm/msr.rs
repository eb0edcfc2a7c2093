//! SVM's model-specific registers (AMD APM volume 2, 15.30).

use crate::cpuid::feature;
use crate::{Core, Trap};

const VM_CR: u32 = 0xc001_0114;
const HSAVE: u32 = 0xc001_0117;

/// VM_CR: INIT raises #SX; the bits that can be written at all; EFER.SVME cannot be set; the two bits above that
/// cannot be written any more.
const REDIRECT_INIT: u64 = 1 << 1;
const WRITABLE: u64 = 0x1f;
const LOCK: u64 = 1 << 3;
const DISABLE: u64 = 1 << 4;

impl Core<'_> {
    /// RDMSR of one of them; nothing if it is none.
    pub(crate) fn read_svm_msr(&self, msr: u32) -> Option<u64> {
        if !self.cpu.model.has(feature::SVM) {
            return None;
        }
        match msr {
            VM_CR => Some(self.cpu.svm.vm_cr),
            HSAVE => Some(self.cpu.svm.hsave),
            _ => None,
        }
    }

    /// WRMSR of one of them; nothing if it is none.
    pub(crate) fn write_svm_msr(&mut self, msr: u32, value: u64) -> Option<Result<(), Trap>> {
        if !self.cpu.model.has(feature::SVM) {
            return None;
        }
        let physical = self.cpu.model.physical_mask();
        let enabled = self.cpu.msrs.efer & crate::efer::SVME != 0;
        let svm = &mut self.cpu.svm;
        let valid = match msr {
            VM_CR => {
                let fixed = if svm.vm_cr & LOCK != 0 { LOCK | DISABLE } else { 0 };
                let new = value & !fixed | svm.vm_cr & fixed;
                let valid = value & !WRITABLE == 0 && !(enabled && new & DISABLE != 0);
                if valid {
                    svm.vm_cr = new;
                }
                valid
            }
            HSAVE => {
                let valid = value & 0xfff == 0 && value & !physical == 0;
                if valid {
                    svm.hsave = value;
                }
                valid
            }
            _ => return None,
        };
        Some(if valid { Ok(()) } else { Err(Trap::gp(0)) })
    }

    /// Whether EFER.SVME can be set.
    pub(crate) fn svm_can_be_enabled(&self) -> bool {
        self.cpu.model.has(feature::SVM) && self.cpu.svm.vm_cr & DISABLE == 0
    }

    /// Whether an INIT raises #SX in place of what else it does.
    pub(super) fn redirects_init(&self) -> bool {
        self.cpu.svm.vm_cr & REDIRECT_INIT != 0
    }
}
