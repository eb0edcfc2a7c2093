//! The XSAVE area's components and what CPUID leaf 0xD says of them (Intel SDM volume 1, 13.4 and 13.5; AMD APM
//! volume 2, 11.5).

use crate::CpuModel;
use crate::feature::{self, Feature};

/// A state component in the extended region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XsaveComponent {
    /// Its bit in XCR0.
    pub bit: u32,
    /// Bytes (CPUID leaf 0xD, EAX).
    pub size: u32,
    /// Place in the standard format (EBX), where AMD's processors have it.
    pub offset: u32,
    /// What brings it.
    pub feature: Feature,
}

impl XsaveComponent {
    /// Its bit, as a mask.
    pub const fn mask(&self) -> u64 {
        1 << self.bit
    }
}

/// Length of the legacy region and the header.
pub const XSAVE_FIXED: u32 = 576;

/// The components beyond x87 (bit 0) and SSE (bit 1), in ascending order: upper halves of YMM, mask registers,
/// upper halves of ZMM 0 to 15, ZMM 16 to 31, and PKRU. None has to be aligned in the compacted format.
pub const XSAVE_COMPONENTS: [XsaveComponent; 5] = [
    XsaveComponent { bit: 2, size: 256, offset: XSAVE_FIXED, feature: feature::AVX },
    XsaveComponent { bit: 5, size: 64, offset: 832, feature: feature::AVX512F },
    XsaveComponent { bit: 6, size: 512, offset: 896, feature: feature::AVX512F },
    XsaveComponent { bit: 7, size: 1024, offset: 1408, feature: feature::AVX512F },
    XsaveComponent { bit: 9, size: 8, offset: 2432, feature: feature::PKU },
];

/// The longest area in either format.
pub const XSAVE_MAX: usize = 2440;

/// Bytes of an XSAVE area for the components in `mask`, in standard or compacted format.
pub fn xsave_area_size(mask: u64, compacted: bool) -> u32 {
    let present = XSAVE_COMPONENTS.iter().filter(|component| component.mask() & mask != 0);
    present.fold(XSAVE_FIXED, |end, component| {
        if compacted { end + component.size } else { end.max(component.offset + component.size) }
    })
}

impl CpuModel {
    /// The bits that XCR0 may have.
    pub fn xcr0_mask(&self) -> u64 {
        let components = XSAVE_COMPONENTS.iter().filter(|component| self.has(component.feature));
        components.fold(3, |mask, component| mask | component.mask())
    }

    /// Whether XCR0 can be set to `value`: x87 always, AVX state only with SSE's, and that of AVX-512 all at once
    /// and with AVX's (Intel SDM volume 2, XSETBV).
    pub fn xcr0_valid(&self, value: u64) -> bool {
        const SSE: u64 = 1 << 1;
        const AVX: u64 = 1 << 2;
        const AVX512: u64 = 7 << 5;
        value & !self.xcr0_mask() == 0
            && value & 1 != 0
            && (value & AVX == 0 || value & SSE != 0)
            && (value & AVX512 == 0 || value & (AVX512 | AVX) == AVX512 | AVX)
    }

    /// Leaf 0xD. EBX of the first two subleaves is as after reset: sizes of the area with x87 alone enabled.
    pub(crate) fn xsave_leaf(&self, sub: u32) -> [u32; 4] {
        if !self.has(feature::XSAVE) {
            return [0; 4];
        }
        let mask = self.xcr0_mask();
        match sub {
            0 => [mask as u32, XSAVE_FIXED, xsave_area_size(mask, false), (mask >> 32) as u32],
            1 => [self.word(feature::Word::Leaf13Eax), XSAVE_FIXED, 0, 0],
            _ => XSAVE_COMPONENTS
                .iter()
                .find(|component| component.bit == sub && component.mask() & mask != 0)
                .map_or([0; 4], |component| [component.size, component.offset, 0, 0]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn area_sizes() {
        assert_eq!(xsave_area_size(3, false), 576);
        assert_eq!(xsave_area_size(7, false), 832);
        assert_eq!(xsave_area_size(7, true), 832);
        assert_eq!(xsave_area_size(0x23, false), 896);
        assert_eq!(xsave_area_size(0x23, true), 640);
        assert_eq!(xsave_area_size(!0, true), 2440);
        assert_eq!(xsave_area_size(!0, false) as usize, XSAVE_MAX);
    }
}
