//! CPU models: what CPUID announces, whatever executes the instructions.

mod dependencies;
pub mod feature;
mod leaves;
mod models;
mod names;
mod xsave;

pub use dependencies::unsupported;
use feature::{Feature, WORDS};
use models::DEFINITIONS;
pub use models::{Listed, Vendor};
pub use names::FeatureError;
pub use xsave::{XSAVE_COMPONENTS, XSAVE_FIXED, XSAVE_MAX, XsaveComponent, xsave_area_size};

/// What a processor is: its features, its place in the machine's topology, its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuModel {
    name: &'static str,
    brand: &'static str,
    vendor: Vendor,
    signature: u32,
    /// The highest basic leaf.
    level: u32,
    words: [u32; WORDS],
    vcpus: u32,
    physical_bits: u32,
}

/// Why there is no such model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnknownModel {
    /// None has this name.
    #[error("there is no CPU model {name:?}; did you mean {nearest}? (`vireo cpu list` lists all)")]
    Name {
        /// The name asked for.
        name: String,
        /// The name that is most like it.
        nearest: &'static str,
    },
    /// It announces what cannot be had here.
    #[error("the CPU model {name} cannot be had here: it has {missing}")]
    Missing {
        /// The model.
        name: &'static str,
        /// The features, separated by commas.
        missing: String,
    },
}

/// Every 64-bit processor has these.
const X86_64: &[Feature] = &[
    feature::FPU,
    feature::DE,
    feature::PSE,
    feature::TSC,
    feature::MSR,
    feature::PAE,
    feature::MCE,
    feature::CX8,
    feature::APIC,
    feature::SEP,
    feature::MTRR,
    feature::PGE,
    feature::MCA,
    feature::CMOV,
    feature::PAT,
    feature::PSE36,
    feature::CLFLUSH,
    feature::MMX,
    feature::FXSR,
    feature::SSE,
    feature::SSE2,
    feature::SYSCALL,
    feature::NX,
    feature::LM,
    feature::X2APIC,
    feature::HYPERVISOR,
];

/// What user programs may not see a difference of, but kernels gain by.
const SYSTEM: &[Feature] = &[
    feature::TSC_DEADLINE,
    feature::ARAT,
    feature::FSGSBASE,
    feature::TSC_ADJUST,
    feature::SMEP,
    feature::SMAP,
    feature::UMIP,
    feature::ERMS,
    feature::FSRM,
    feature::RDRAND,
    feature::RDSEED,
    feature::PCID,
    feature::INVPCID,
    feature::RDTSCP,
    feature::GIB_PAGES,
    feature::INVARIANT_TSC,
    feature::CR8_LEGACY,
    feature::PREFETCHW,
    feature::TOPOEXT,
    feature::SSB_NO,
    feature::BTC_NO,
    feature::NO_NESTED_DATA_BP,
    feature::LFENCE_SERIALIZES,
    feature::NULL_SELECTOR_CLEARS_BASE,
    feature::AUTO_IBRS,
    feature::SRSO_NO,
    feature::TSA_SQ_NO,
    feature::TSA_L1_NO,
];

/// The microarchitecture level x86-64-v2 of the System V psABI.
const V2: &[Feature] = &[
    feature::SSE3,
    feature::SSSE3,
    feature::CX16,
    feature::SSE41,
    feature::SSE42,
    feature::POPCNT,
    feature::LAHF_LM,
];

/// What else the interpreter and the translator execute.
const BEYOND_V2: &[Feature] = &[
    feature::MOVBE,
    feature::BMI1,
    feature::BMI2,
    feature::ADX,
    feature::ABM,
    feature::CLFLUSHOPT,
    feature::CLWB,
    feature::CLZERO,
    feature::WBNOINVD,
    feature::RDPID,
    feature::PKU,
    feature::PKS,
    feature::LA57,
];

/// Whether the host has as much of AVX-512 as is made use of: with less than bytes, words, doublewords, quadwords and
/// all vector lengths there is none for guests.
pub fn host_has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") && has!("avx512cd")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Controls of speculation: there is nothing to control, and kernels that find them are slower.
const CONTROLS: &[Feature] = &[
    feature::AMD_IBPB,
    feature::AMD_IBRS,
    feature::AMD_STIBP,
    feature::AMD_SSBD,
    feature::SPEC_CTRL,
    feature::INTEL_STIBP,
    feature::SSBD,
];

/// AVX-512, which models have that are asked for by name, and `max` if its parts are: four times the registers are to
/// be moved whenever generated code is left, and C libraries use them for copying memory.
pub const AVX512: &[Feature] = &[
    feature::AVX512F,
    feature::AVX512DQ,
    feature::AVX512CD,
    feature::AVX512BW,
    feature::AVX512VL,
    feature::AVX512IFMA,
    feature::AVX512VBMI,
    feature::AVX512VBMI2,
    feature::AVX512VNNI,
    feature::AVX512BITALG,
    feature::AVX512VPOPCNTDQ,
    feature::AVX512BF16,
];

/// The XSAVE family, which is done without the host's.
const XSAVE: &[Feature] =
    &[feature::XSAVE, feature::XSAVEOPT, feature::XSAVEC, feature::XGETBV1, feature::XSAVES];

/// Secure Virtual Machine: guests of the guest.
const VIRTUALIZATION: &[Feature] = &[
    feature::SVM,
    feature::NPT,
    feature::NRIPS,
    feature::VMCB_CLEAN,
    feature::FLUSH_BY_ASID,
    feature::DECODE_ASSISTS,
    feature::PAUSE_FILTER,
    feature::PAUSE_THRESHOLD,
    feature::VGIF,
];

/// Vector extensions that run on the host's own units, where it has them.
fn host_vector_features() -> Vec<Feature> {
    let mut features = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let all = [
            (feature::AES, has!("aes")),
            (feature::PCLMUL, has!("pclmulqdq")),
            (feature::SHA, has!("sha")),
            (feature::GFNI, has!("gfni")),
            (feature::SSE4A, has!("sse4a")),
            (feature::AVX, has!("avx")),
            (feature::AVX2, has!("avx2")),
            (feature::FMA, has!("fma")),
            (feature::F16C, has!("f16c")),
            (feature::VAES, has!("vaes")),
            (feature::VPCLMULQDQ, has!("vpclmulqdq")),
        ];
        features.extend(all.into_iter().filter(|(_, has)| *has).map(|(feature, _)| feature));
        let all = [
            (feature::AVX512F, true),
            (feature::AVX512DQ, true),
            (feature::AVX512CD, true),
            (feature::AVX512BW, true),
            (feature::AVX512VL, true),
            (feature::AVX512IFMA, has!("avx512ifma")),
            (feature::AVX512VBMI, has!("avx512vbmi")),
            (feature::AVX512VBMI2, has!("avx512vbmi2")),
            (feature::AVX512VNNI, has!("avx512vnni")),
            (feature::AVX512BITALG, has!("avx512bitalg")),
            (feature::AVX512VPOPCNTDQ, has!("avx512vpopcntdq")),
            (feature::AVX512BF16, has!("avx512bf16")),
        ];
        let wide = all.into_iter().filter(|(_, has)| *has && host_has_avx512());
        features.extend(wide.map(|(feature, _)| feature));
    }
    features
}

impl CpuModel {
    /// The model of that name, of which upper and lower case are alike, for a machine of one processor: of what can be
    /// executed here.
    ///
    /// # Errors
    /// [`UnknownModel`] if there is none, or not here.
    pub fn by_name(name: &str) -> Result<Self, UnknownModel> {
        if name.eq_ignore_ascii_case("max") {
            let mut model = Self::blank();
            Feature::each(|feature| {
                let wanted = ![CONTROLS, AVX512].iter().any(|list| list.contains(&feature));
                model.set(feature, wanted && Self::available(feature));
            });
            return Ok(model);
        }
        let model = Self::named(name, Self::available)?;
        let missing: Vec<_> = model.missing(Self::available).filter_map(Feature::name).collect();
        if missing.is_empty() {
            Ok(model)
        } else {
            Err(UnknownModel::Missing { name: model.name, missing: missing.join(", ") })
        }
    }

    /// The model of that name (not `max`) as it is where the features are that `available` says, if some of them are
    /// others than [`CpuModel::available`] says. It has what it is defined to have even so, but for a few.
    ///
    /// # Errors
    /// [`UnknownModel::Name`].
    pub fn named(name: &str, available: impl Fn(Feature) -> bool) -> Result<Self, UnknownModel> {
        let found = DEFINITIONS.iter().find(|definition| definition.name.eq_ignore_ascii_case(name));
        let definition = found.ok_or_else(|| {
            let names = DEFINITIONS.iter().map(|definition| definition.name).chain(["max"]);
            UnknownModel::Name { name: name.to_owned(), nearest: nearest(name, names) }
        })?;
        let mut model = Self {
            name: definition.name,
            brand: definition.brand,
            vendor: definition.vendor,
            signature: definition.signature,
            level: definition.level,
            physical_bits: definition.physical_bits,
            ..Self::blank()
        };
        definition.features(available).for_each(|feature| model.set(feature, true));
        Ok(model)
    }

    /// `max` without features.
    fn blank() -> Self {
        Self {
            name: "max",
            brand: "Vireo",
            vendor: Vendor::Amd,
            signature: models::MODERN,
            level: 0x10,
            words: [0; WORDS],
            vcpus: 1,
            physical_bits: 46,
        }
    }

    /// Whether processors that are executed here (not by the host's KVM) can have the feature.
    pub fn available(feature: Feature) -> bool {
        let plain = [X86_64, SYSTEM, V2, BEYOND_V2, XSAVE, CONTROLS, VIRTUALIZATION];
        plain.iter().any(|features| features.contains(&feature)) || host_vector_features().contains(&feature)
    }

    /// Those of its features that are not there where `available` says which are.
    fn missing(&self, available: impl Fn(Feature) -> bool) -> impl Iterator<Item = Feature> {
        Feature::all().filter(move |feature| self.has(*feature) && !available(*feature))
    }

    /// Whose processor it is.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// The name that it was made by.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The model in a machine with sockets of `vcpus` processors, each a core.
    #[must_use]
    pub fn with_vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus.max(1);
        self.set(feature::HTT, self.vcpus > 1);
        self.set(feature::CMP_LEGACY, self.vcpus > 1 && self.vendor == Vendor::Amd);
        self
    }

    /// The processors of a socket.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    fn set(&mut self, feature: Feature, on: bool) {
        let word = &mut self.words[feature.word as usize];
        *word = *word & !(1 << feature.bit) | u32::from(on) << feature.bit;
    }

    /// Whether it has `feature`.
    #[inline]
    pub fn has(&self, feature: Feature) -> bool {
        self.words[feature.word as usize] >> feature.bit & 1 != 0
    }

    /// Family, model and stepping as CPUID leaf 1 has them in EAX.
    pub fn signature(&self) -> u32 {
        self.signature
    }

    /// The bits that physical addresses have.
    #[inline]
    pub fn physical_mask(&self) -> u64 {
        (1 << self.physical_bits) - 1
    }

    /// How many bits physical addresses have.
    pub fn physical_bits(&self) -> u32 {
        self.physical_bits
    }

    /// Whether 1 GiB pages exist.
    pub fn gigabyte_pages(&self) -> bool {
        self.has(feature::GIB_PAGES)
    }

    /// Bits of an APIC id within the socket.
    fn core_bits(&self) -> u32 {
        u32::BITS - (self.vcpus - 1).leading_zeros()
    }

    fn word(&self, word: feature::Word) -> u32 {
        self.words[word as usize]
    }
}

/// The rate of the APIC timer's input clock that the timing leaf announces.
pub const APIC_BUS_HERTZ: u64 = 1_000_000_000;

/// The one of `names` that is most like `name`.
fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> &'a str {
    let distance = |other: &str| strsim::damerau_levenshtein(&name.to_lowercase(), &other.to_lowercase());
    names.min_by_key(|other| distance(other)).unwrap_or_default()
}
