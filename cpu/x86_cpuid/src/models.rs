//! The models by name: those of levels of the architecture, and processors that were sold, as QEMU knows them too.
//!
//! A processor's features stand in layers, each what its generation added. What a generation took back, or only some
//! of its processors had, is left out: transactional memory first of all.

use crate::feature::{self as f, Feature};
use crate::{CpuModel, SYSTEM, V2, X86_64, XSAVE};

/// Whose processor it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// "AuthenticAMD".
    Amd,
    /// "GenuineIntel".
    Intel,
}

/// A model by name.
#[derive(Debug)]
pub(crate) struct Definition {
    pub(crate) name: &'static str,
    /// A line on it.
    pub(crate) description: &'static str,
    /// What the processor calls itself.
    pub(crate) brand: &'static str,
    pub(crate) vendor: Vendor,
    /// Leaf 1's EAX.
    pub(crate) signature: u32,
    /// The highest basic leaf.
    pub(crate) level: u32,
    pub(crate) physical_bits: u32,
    /// What it has beside what every 64-bit processor does.
    pub(crate) layers: &'static [&'static [Feature]],
}

/// EAX of leaf 1 (Intel SDM volume 2, CPUID).
const fn signature(family: u32, model: u32, stepping: u32) -> u32 {
    let (extended, base) = if family > 15 { (family - 15, 15) } else { (0, family) };
    extended << 20 | (model >> 4) << 16 | base << 8 | (model & 15) << 4 | stepping
}

/// Family 0x1a, model 2, stepping 1, which kernels know to need few mitigations.
pub(crate) const MODERN: u32 = 0x00b0_0f21;
/// The revision of its microcode: kernels know it to have a sound RDSEED from this one on.
const MODERN_MICROCODE: u64 = 0x0b00_215a;
/// A revision of which kernels know nothing, as AMD's processors and Intel's report theirs.
const AMD_MICROCODE: u64 = 0x0100_0065;
const INTEL_MICROCODE: u64 = 1 << 32;

const V3: &[Feature] = &[f::AVX, f::AVX2, f::BMI1, f::BMI2, f::F16C, f::FMA, f::ABM, f::MOVBE];
const V4: &[Feature] = &[f::AVX512F, f::AVX512BW, f::AVX512CD, f::AVX512DQ, f::AVX512VL];

const NEHALEM: &[Feature] = &[f::VME, f::SSE3, f::SSSE3, f::CX16, f::SSE41, f::SSE42, f::POPCNT, f::LAHF_LM];
const WESTMERE: &[Feature] = &[f::AES, f::PCLMUL, f::ARAT];
const SANDY_BRIDGE: &[Feature] = &[f::TSC_DEADLINE, f::XSAVE, f::XSAVEOPT, f::AVX, f::RDTSCP];
const IVY_BRIDGE: &[Feature] = &[f::F16C, f::RDRAND, f::FSGSBASE, f::SMEP, f::ERMS];
const HASWELL: &[Feature] = &[f::FMA, f::PCID, f::MOVBE, f::BMI1, f::AVX2, f::BMI2, f::INVPCID, f::ABM];
const BROADWELL: &[Feature] = &[f::RDSEED, f::ADX, f::SMAP, f::PREFETCHW];
const SKYLAKE: &[Feature] = &[f::XSAVEC, f::XGETBV1, f::XSAVES];
const SKYLAKE_SERVER: &[Feature] = &[
    f::AVX512F,
    f::AVX512DQ,
    f::AVX512CD,
    f::AVX512BW,
    f::AVX512VL,
    f::CLFLUSHOPT,
    f::CLWB,
    f::GIB_PAGES,
    f::PKU,
];
const CASCADE_LAKE: &[Feature] = &[f::AVX512VNNI, f::SPEC_CTRL, f::SSBD];
const ICE_LAKE: &[Feature] = &[
    f::AVX512VBMI,
    f::UMIP,
    f::AVX512VBMI2,
    f::GFNI,
    f::VAES,
    f::VPCLMULQDQ,
    f::AVX512BITALG,
    f::AVX512VPOPCNTDQ,
    f::AVX512IFMA,
    f::LA57,
    f::WBNOINVD,
    f::SHA,
    f::RDPID,
    f::FSRM,
];

const K8: &[Feature] = &[f::SSE3, f::CX16, f::LAHF_LM];
const ZEN: &[Feature] = &[
    f::VME,
    f::SSE3,
    f::SSSE3,
    f::CX16,
    f::SSE41,
    f::SSE42,
    f::POPCNT,
    f::LAHF_LM,
    f::PCLMUL,
    f::MONITOR,
    f::FMA,
    f::MOVBE,
    f::AES,
    f::XSAVE,
    f::AVX,
    f::F16C,
    f::RDRAND,
    f::ARAT,
    f::FSGSBASE,
    f::BMI1,
    f::AVX2,
    f::SMEP,
    f::BMI2,
    f::RDSEED,
    f::ADX,
    f::SMAP,
    f::CLFLUSHOPT,
    f::SHA,
    f::XSAVEOPT,
    f::XSAVEC,
    f::XGETBV1,
    f::XSAVES,
    f::CR8_LEGACY,
    f::ABM,
    f::SSE4A,
    f::MISALIGN_SSE,
    f::PREFETCHW,
    f::OSVW,
    f::TOPOEXT,
    f::PERFCTR_CORE,
    f::MMX_EXT,
    f::FFXSR,
    f::GIB_PAGES,
    f::RDTSCP,
    f::CLZERO,
    f::XSAVEERPTR,
    f::AMD_IBPB,
];
const ZEN2: &[Feature] = &[f::CLWB, f::RDPID, f::UMIP, f::WBNOINVD, f::AMD_STIBP, f::AMD_IBRS, f::AMD_SSBD];
const ZEN3: &[Feature] =
    &[f::PCID, f::INVPCID, f::PKU, f::ERMS, f::FSRM, f::VAES, f::VPCLMULQDQ, f::LFENCE_SERIALIZES];
const ZEN4: &[Feature] = &[
    f::AVX512F,
    f::AVX512DQ,
    f::AVX512IFMA,
    f::AVX512CD,
    f::AVX512BW,
    f::AVX512VL,
    f::AVX512VBMI,
    f::AVX512VBMI2,
    f::GFNI,
    f::AVX512VNNI,
    f::AVX512BITALG,
    f::AVX512VPOPCNTDQ,
    f::AVX512BF16,
    f::LA57,
    f::NO_NESTED_DATA_BP,
    f::NULL_SELECTOR_CLEARS_BASE,
    f::AUTO_IBRS,
];

/// What a model goes without where it is not to be had: nothing that programs rely on.
const SPARED: &[Feature] = &[
    f::VME,
    f::MONITOR,
    f::OSVW,
    f::PERFCTR_CORE,
    f::MMX_EXT,
    f::FFXSR,
    f::XSAVEERPTR,
    f::MISALIGN_SSE,
    f::AMD_STIBP,
];

const fn level(
    name: &'static str,
    brand: &'static str,
    description: &'static str,
    layers: &'static [&'static [Feature]],
) -> Definition {
    Definition {
        name,
        description,
        brand,
        vendor: Vendor::Amd,
        signature: MODERN,
        level: 0x10,
        physical_bits: 46,
        layers,
    }
}

const fn intel(
    name: &'static str,
    brand: &'static str,
    (model, stepping): (u32, u32),
    layers: &'static [&'static [Feature]],
) -> Definition {
    Definition {
        name,
        description: "",
        brand,
        vendor: Vendor::Intel,
        signature: signature(6, model, stepping),
        level: 0xd,
        physical_bits: 46,
        layers,
    }
}

const fn epyc(
    name: &'static str,
    brand: &'static str,
    signature: u32,
    layers: &'static [&'static [Feature]],
) -> Definition {
    Definition {
        name,
        description: "",
        brand,
        vendor: Vendor::Amd,
        signature,
        level: 0xd,
        physical_bits: 48,
        layers,
    }
}

/// All of them, but `max`, which is made of what there is.
pub(crate) const DEFINITIONS: &[Definition] = &[
    level("x86-64-v4", "Vireo x86-64-v4", "x86-64-v4: up to AVX-512", &[SYSTEM, V2, XSAVE, V3, V4]),
    level("x86-64-v3", "Vireo x86-64-v3", "x86-64-v3: up to AVX2, BMI2 and FMA", &[SYSTEM, V2, XSAVE, V3]),
    level("x86-64-v2", "Vireo x86-64-v2", "x86-64-v2: up to SSE4.2 and POPCNT", &[SYSTEM, V2]),
    level("x86-64-v1", "Vireo x86-64-v1", "the x86-64 baseline", &[SYSTEM]),
    Definition {
        name: "qemu64",
        description: "the least that 64-bit systems need",
        brand: "Vireo qemu64",
        vendor: Vendor::Amd,
        signature: signature(15, 107, 1),
        level: 0xd,
        physical_bits: 40,
        layers: &[K8, &[f::RDTSCP, f::ARAT]],
    },
    Definition {
        name: "kvm64",
        description: "the least, as an Intel processor",
        brand: "Common KVM processor",
        vendor: Vendor::Intel,
        signature: signature(15, 6, 1),
        level: 0xd,
        physical_bits: 40,
        layers: &[&[f::VME, f::SSE3, f::CX16, f::ARAT]],
    },
    intel("Nehalem", "Intel Core i7 9xx (Nehalem Class Core i7)", (26, 3), &[NEHALEM]),
    intel("Westmere", "Westmere E56xx/L56xx/X56xx (Nehalem-C)", (44, 1), &[NEHALEM, WESTMERE]),
    intel("SandyBridge", "Intel Xeon E312xx (Sandy Bridge)", (42, 1), &[NEHALEM, WESTMERE, SANDY_BRIDGE]),
    intel(
        "IvyBridge",
        "Intel Xeon E3-12xx v2 (Ivy Bridge)",
        (58, 9),
        &[NEHALEM, WESTMERE, SANDY_BRIDGE, IVY_BRIDGE],
    ),
    intel(
        "Haswell",
        "Intel Core Processor (Haswell, no TSX)",
        (60, 1),
        &[NEHALEM, WESTMERE, SANDY_BRIDGE, IVY_BRIDGE, HASWELL],
    ),
    intel(
        "Broadwell",
        "Intel Core Processor (Broadwell, no TSX)",
        (61, 2),
        &[NEHALEM, WESTMERE, SANDY_BRIDGE, IVY_BRIDGE, HASWELL, BROADWELL],
    ),
    intel(
        "Skylake-Client",
        "Intel Core Processor (Skylake, no TSX)",
        (94, 3),
        &[NEHALEM, WESTMERE, SANDY_BRIDGE, IVY_BRIDGE, HASWELL, BROADWELL, SKYLAKE],
    ),
    intel(
        "Skylake-Server",
        "Intel Xeon Processor (Skylake, no TSX)",
        (85, 4),
        &[NEHALEM, WESTMERE, SANDY_BRIDGE, IVY_BRIDGE, HASWELL, BROADWELL, SKYLAKE, SKYLAKE_SERVER],
    ),
    intel(
        "Cascadelake-Server",
        "Intel Xeon Processor (Cascadelake)",
        (85, 6),
        &[
            NEHALEM,
            WESTMERE,
            SANDY_BRIDGE,
            IVY_BRIDGE,
            HASWELL,
            BROADWELL,
            SKYLAKE,
            SKYLAKE_SERVER,
            CASCADE_LAKE,
        ],
    ),
    intel(
        "Icelake-Server",
        "Intel Xeon Processor (Icelake)",
        (106, 6),
        &[
            NEHALEM,
            WESTMERE,
            SANDY_BRIDGE,
            IVY_BRIDGE,
            HASWELL,
            BROADWELL,
            SKYLAKE,
            SKYLAKE_SERVER,
            CASCADE_LAKE,
            ICE_LAKE,
        ],
    ),
    epyc("EPYC", "AMD EPYC Processor", signature(23, 1, 2), &[ZEN]),
    epyc("EPYC-Rome", "AMD EPYC-Rome Processor", signature(23, 49, 0), &[ZEN, ZEN2]),
    epyc("EPYC-Milan", "AMD EPYC-Milan Processor", signature(25, 1, 1), &[ZEN, ZEN2, ZEN3]),
    epyc("EPYC-Genoa", "AMD EPYC-Genoa Processor", signature(25, 17, 0), &[ZEN, ZEN2, ZEN3, ZEN4]),
];

impl Definition {
    /// Its features, but for those that are spared where `available` says that there are none.
    pub(crate) fn features(&self, available: impl Fn(Feature) -> bool) -> impl Iterator<Item = Feature> {
        let layers = std::iter::once(X86_64).chain(self.layers.iter().copied());
        layers.flatten().copied().filter(move |feature| available(*feature) || !SPARED.contains(feature))
    }
}

/// A model that people can name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: &'static str,
    /// A line on it.
    pub description: &'static str,
    /// Features that it announces and that cannot be had here; with any of them the model cannot.
    pub missing: Vec<Feature>,
}

impl CpuModel {
    /// The revision of the microcode as MSR 0x8b has it: PATCH_LEVEL (AMD APM volume 2, appendix A), or IA32_BIOS_SIGN_ID
    /// (Intel SDM volume 4).
    pub fn microcode(&self) -> u64 {
        match (self.vendor(), self.signature()) {
            (_, MODERN) => MODERN_MICROCODE,
            (Vendor::Amd, _) => AMD_MICROCODE,
            (Vendor::Intel, _) => INTEL_MICROCODE,
        }
    }

    /// All models, the default first, on a host or an accelerator that has the features that `available` says.
    pub fn list(available: impl Fn(Feature) -> bool) -> Vec<Listed> {
        let max = Listed { name: "max", description: "everything that can be had here", missing: Vec::new() };
        let rest = DEFINITIONS.iter().map(|definition| {
            let missing = definition.features(&available).filter(|feature| !available(*feature)).collect();
            let description =
                if definition.description.is_empty() { definition.brand } else { definition.description };
            Listed { name: definition.name, description, missing }
        });
        std::iter::once(max).chain(rest).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_those_of_the_processors() {
        let of = |name: &str| DEFINITIONS.iter().find(|model| model.name == name).unwrap().signature;
        assert_eq!(of("qemu64"), 0x0006_0fb1);
        assert_eq!(of("Haswell"), 0x0003_06c1);
        assert_eq!(of("Skylake-Client"), 0x0005_06e3);
        assert_eq!(of("EPYC"), 0x0080_0f12);
        assert_eq!(of("EPYC-Rome"), 0x0083_0f10);
        assert_eq!(of("EPYC-Genoa"), 0x00a1_0f10);
    }

    #[test]
    fn microcode_is_where_the_vendor_has_it() {
        let of = |name: &str| CpuModel::named(name, |_| true).unwrap().microcode();
        assert_eq!(of("x86-64-v3"), 0x0b00_215a);
        assert_eq!((of("EPYC") >> 32, of("Haswell") as u32), (0, 0));
    }

    #[test]
    fn names_are_unique_and_features_consistent() {
        let mut names: Vec<_> = DEFINITIONS.iter().map(|model| model.name.to_ascii_lowercase()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), DEFINITIONS.len());
        for model in DEFINITIONS {
            let features: Vec<_> = model.features(|_| true).collect();
            let dropped = crate::unsupported(|feature| features.contains(&feature), &features);
            assert_eq!(dropped, Ok(vec![]), "{}", model.name);
            // All can be told by name, but for what every processor has.
            for feature in features.iter().filter(|feature| !X86_64.contains(feature)) {
                assert!(
                    feature.name().is_some() || SYSTEM.contains(feature),
                    "{feature:?} of {}",
                    model.name
                );
            }
        }
    }

    #[test]
    fn what_cannot_be_had_is_told() {
        let list = CpuModel::list(|feature| feature != f::AVX && feature != f::MONITOR);
        let missing = |name: &str| list.iter().find(|model| model.name == name).unwrap().missing.clone();
        assert_eq!(missing("max"), []);
        assert_eq!(missing("x86-64-v2"), []);
        assert_eq!(missing("EPYC"), [f::AVX]);
        assert!(missing("Haswell").contains(&f::AVX));
    }
}
