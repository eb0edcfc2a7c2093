//! CPUID: what the processor's model announces.

#[cfg(test)]
mod tests;

use crate::Core;
pub use x86_cpuid::{
    APIC_BUS_HERTZ, AVX512, CpuModel, FeatureError, UnknownModel, Vendor, XSAVE_COMPONENTS, XSAVE_FIXED,
    XSAVE_MAX, XsaveComponent, feature, host_has_avx512, xsave_area_size,
};

impl Core<'_> {
    /// CPUID: EAX, EBX, ECX and EDX.
    pub fn cpuid(&self, leaf: u32, sub: u32) -> [u32; 4] {
        let model = &self.cpu.model;
        let mut out = model.leaf(leaf, sub, self.cpu.apic_id, self.platform.tsc_hertz());
        if leaf == 1 {
            if self.cpu.cr4 & crate::cr4::OSXSAVE != 0 {
                out[2] |= 1 << feature::OSXSAVE.place().bit;
            }
            // The APIC can be switched off in APIC_BASE; then it is not announced.
            if self.platform.apic_msr(0x1b).is_some_and(|base| base & 1 << 11 == 0) {
                out[3] &= !(1 << feature::APIC.place().bit);
            }
        }
        if leaf == 0xd && model.has(feature::XSAVE) {
            match sub {
                0 => out[1] = xsave_area_size(self.cpu.xcr0, false),
                1 => out[1] = xsave_area_size(self.cpu.xcr0 | self.cpu.msrs.xss, true),
                _ => {}
            }
        }
        if (leaf, sub) == (7, 0) && self.cpu.cr4 & crate::cr4::PKE != 0 {
            out[2] |= 1 << feature::OSPKE.place().bit;
        }
        out
    }
}
