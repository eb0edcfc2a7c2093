//! What a processor may lack, and cases are then not run for.

use crate::guest::{boot64, exit};
use crate::rig::{Rig, Target};
use accel::Tier;
use iced_x86::code_asm::*;

/// A feature as CPUID announces it: a bit of EBX or ECX of a leaf (Intel SDM, CPUID; AMD APM volume 3, appendix E).
#[derive(Clone, Copy)]
pub(crate) struct Feature {
    name: &'static str,
    leaf: u32,
    register: AsmRegister32,
    bit: i32,
}

impl Feature {
    pub(crate) const PCID: Self = Self { name: "PCID", leaf: 1, register: ecx, bit: 17 };
    pub(crate) const XSAVE: Self = Self { name: "XSAVE", leaf: 1, register: ecx, bit: 26 };
    pub(crate) const INVPCID: Self = Self { name: "INVPCID", leaf: 7, register: ebx, bit: 10 };
    pub(crate) const PKU: Self = Self { name: "PKU", leaf: 7, register: ecx, bit: 3 };
    pub(crate) const LA57: Self = Self { name: "LA57", leaf: 7, register: ecx, bit: 16 };
    pub(crate) const PKS: Self = Self { name: "PKS", leaf: 7, register: ecx, bit: 31 };
    pub(crate) const SVM: Self = Self { name: "SVM", leaf: 0x8000_0001, register: ecx, bit: 2 };

    fn is_announced(self, target: &Target<'_>) -> bool {
        let mut rig = Rig::new(target, 1);
        boot64(&mut rig, |a| {
            a.mov(eax, self.leaf)?;
            a.xor(ecx, ecx)?;
            a.cpuid()?;
            a.mov(eax, self.register)?;
            a.shr(eax, self.bit)?;
            a.and(eax, 1)?;
            exit(a)
        });
        rig.run() == 1
    }
}

/// Whether the target's processors have all of `features`. Says so if not; our own have everything.
pub(crate) fn has(target: &Target<'_>, features: &[Feature]) -> bool {
    let lacking = features.iter().find(|feature| !feature.is_announced(target));
    if let Some(feature) = lacking {
        assert_eq!(target.tier, Tier::Auto, "the translator's processors have {}", feature.name);
        eprintln!("NOT RUN: the processor has no {}", feature.name);
    }
    lacking.is_none()
}
