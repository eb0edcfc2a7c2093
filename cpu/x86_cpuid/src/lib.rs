//! CPU models: what CPUID announces, whatever executes the instructions.

pub mod feature;
mod names;

use feature::{Feature, WORDS};
pub use names::FeatureError;

/// What a processor is: its features, its place in the machine's topology, its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuModel {
    name: &'static str,
    brand: &'static str,
    signature: u32,
    words: [u32; WORDS],
    vcpus: u32,
    physical_bits: u32,
}

/// A model name that is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown CPU model \"{0}\"; known are {known}", known = CpuModel::names().join(", "))]
pub struct UnknownModel(pub String);

/// The AMD processor families and models announced (AMD APM volume 3, appendix E): family 0x1a, which
/// kernels know to need few mitigations; and the family 0xf of QEMU's basic model.
const MODERN: u32 = 0x00b0_0f10;
const BASIC: u32 = 0x0006_0fb1;

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
    feature::RDPID,
];

/// Vector extensions that run on the host's own units, where it has them.
fn host_vector_features() -> Vec<Feature> {
    let mut features = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("aes") {
            features.push(feature::AES);
        }
        if std::arch::is_x86_feature_detected!("pclmulqdq") {
            features.push(feature::PCLMUL);
        }
        if std::arch::is_x86_feature_detected!("sha") {
            features.push(feature::SHA);
        }
    }
    features
}

impl CpuModel {
    /// All names that [`CpuModel::by_name`] takes, the default first.
    pub fn names() -> &'static [&'static str] {
        &["max", "x86-64-v2", "x86-64-v1", "qemu64"]
    }

    /// The model of that name, for a machine of one processor.
    ///
    /// # Errors
    /// [`UnknownModel`] if there is none.
    pub fn by_name(name: &str) -> Result<Self, UnknownModel> {
        let known = Self::names().iter().find(|known| **known == name);
        let name = *known.ok_or_else(|| UnknownModel(name.to_owned()))?;
        let mut model =
            Self { name, brand: "Vireo", signature: MODERN, words: [0; WORDS], vcpus: 1, physical_bits: 46 };
        model.add(X86_64);
        match name {
            "qemu64" => {
                model.signature = BASIC;
                model.physical_bits = 40;
                model.brand = "Vireo qemu64";
                model.add(&[feature::SSE3, feature::CX16, feature::LAHF_LM, feature::RDTSCP, feature::ARAT]);
            }
            "x86-64-v1" => {
                model.brand = "Vireo x86-64-v1";
                model.add(SYSTEM);
            }
            "x86-64-v2" => {
                model.brand = "Vireo x86-64-v2";
                model.add(SYSTEM);
                model.add(V2);
            }
            _ => {
                model.add(SYSTEM);
                model.add(V2);
                model.add(BEYOND_V2);
                model.add(&host_vector_features());
            }
        }
        Ok(model)
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
        self.set(feature::CMP_LEGACY, self.vcpus > 1);
        self
    }

    /// The processors of a socket.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    fn add(&mut self, features: &[Feature]) {
        for &feature in features {
            self.set(feature, true);
        }
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

    /// The bits that XCR0 may have.
    pub fn xcr0_mask(&self) -> u64 {
        if self.has(feature::AVX) { 7 } else { 3 }
    }

    /// Bits of an APIC id within the socket.
    fn core_bits(&self) -> u32 {
        u32::BITS - (self.vcpus - 1).leading_zeros()
    }

    fn word(&self, word: feature::Word) -> u32 {
        self.words[word as usize]
    }

    /// The leaves that say something, each with how many subleaves do.
    pub const LEAVES: &[(u32, u32)] = &[
        (0, 1),
        (1, 1),
        (6, 1),
        (7, 1),
        (0xb, 3),
        (0x4000_0000, 1),
        (0x4000_0010, 1),
        (0x8000_0000, 1),
        (0x8000_0001, 1),
        (0x8000_0002, 1),
        (0x8000_0003, 1),
        (0x8000_0004, 1),
        (0x8000_0005, 1),
        (0x8000_0006, 1),
        (0x8000_0007, 1),
        (0x8000_0008, 1),
        (0x8000_001d, 4),
        (0x8000_001e, 1),
        (0x8000_0021, 1),
    ];

    /// EAX, EBX, ECX and EDX of a leaf, for the processor with APIC id `id` and a time-stamp counter of
    /// `tsc_hertz`, but for what depends on its state: OSXSAVE, and whether its APIC is on.
    pub fn leaf(&self, leaf: u32, sub: u32, id: u32, tsc_hertz: u64) -> [u32; 4] {
        use feature::Word;
        match leaf {
            0 => vendor(0x10),
            1 => [
                self.signature,
                (id & 0xff) << 24 | self.vcpus.min(255) << 16 | 8 << 8,
                self.word(Word::Leaf1Ecx),
                self.word(Word::Leaf1Edx),
            ],
            6 => [self.word(Word::Leaf6Eax), 0, 0, 0],
            7 if sub == 0 => {
                [0, self.word(Word::Leaf7Ebx), self.word(Word::Leaf7Ecx), self.word(Word::Leaf7Edx)]
            }
            0xb => self.topology_level(sub, id),
            0x4000_0000 => text4(0x4000_0010, b"VireoVireo\0\0"),
            0x4000_0010 => [kilohertz(tsc_hertz), kilohertz(APIC_BUS_HERTZ), 0, 0],
            0x8000_0000 => vendor(0x8000_0021),
            0x8000_0001 => [
                self.signature,
                0,
                self.word(Word::Ext1Ecx),
                // AMD processors repeat leaf 1 here, except for what has other meanings.
                self.word(Word::Ext1Edx) | self.word(Word::Leaf1Edx) & 0x0183_f3ff,
            ],
            0x8000_0002..=0x8000_0004 => self.brand_part(leaf - 0x8000_0002),
            // Caches as leaf 0x8000001D has them: L1 data and code, then L2 and L3.
            0x8000_0005 => {
                [0xff40_ff40, 0xff40_ff40, 48 << 24 | 12 << 16 | 0x140, 32 << 24 | 8 << 16 | 0x140]
            }
            0x8000_0006 => [0, 0x4200_4200, 1024 << 16 | 8 << 12 | 0x140, 64 << 18 | 9 << 12 | 0x140],
            0x8000_0007 => [0, 0, 0, self.word(Word::Ext7Edx)],
            0x8000_0008 => [
                self.physical_bits | 48 << 8,
                self.word(Word::Ext8Ebx),
                self.core_bits() << 12 | (self.vcpus - 1).min(255),
                0,
            ],
            0x8000_001d if self.has(feature::TOPOEXT) => self.cache(sub),
            0x8000_001e if self.has(feature::TOPOEXT) => [id, id & 0xff, 0, 0],
            0x8000_0021 => [self.word(Word::Ext21Eax), 0, self.word(Word::Ext21Ecx), 0],
            _ => [0; 4],
        }
    }

    /// Leaf 0xB: threads of a core, then cores of the socket.
    fn topology_level(&self, sub: u32, id: u32) -> [u32; 4] {
        match sub {
            0 => [0, 1, 1 << 8, id],
            1 => [self.core_bits(), self.vcpus, 2 << 8 | 1, id],
            _ => [0, 0, sub & 0xff, id],
        }
    }

    /// Leaf 0x8000001D: 48 KiB of L1 data, 32 KiB of L1 code, 1 MiB of L2, and 32 MiB of L3 for all.
    fn cache(&self, sub: u32) -> [u32; 4] {
        let describe = |kind: u32, level: u32, sharing: u32, ways: u32, sets: u32| {
            [kind | level << 5 | 1 << 8 | (sharing - 1).min(0xfff) << 14, (ways - 1) << 22 | 63, sets - 1, 0]
        };
        match sub {
            0 => describe(1, 1, 1, 12, 64),
            1 => describe(2, 1, 1, 8, 64),
            2 => describe(3, 2, 1, 16, 1024),
            3 => describe(3, 3, self.vcpus, 16, 32768),
            _ => [0; 4],
        }
    }

    fn brand_part(&self, part: u32) -> [u32; 4] {
        let mut text = [0; 48];
        let len = self.brand.len().min(47);
        text[..len].copy_from_slice(&self.brand.as_bytes()[..len]);
        let at = part as usize * 16;
        std::array::from_fn(|index| little(&text[at + index * 4..]))
    }
}

/// The rate of the APIC timer's input clock that the timing leaf announces.
pub const APIC_BUS_HERTZ: u64 = 1_000_000_000;

fn kilohertz(hertz: u64) -> u32 {
    u32::try_from(hertz / 1000).unwrap_or(u32::MAX)
}

fn little(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn text4(eax: u32, text: &[u8; 12]) -> [u32; 4] {
    [eax, little(text), little(&text[4..]), little(&text[8..])]
}

/// The vendor's name goes EBX, EDX, ECX.
fn vendor(eax: u32) -> [u32; 4] {
    let [eax, ebx, edx, ecx] = text4(eax, b"AuthenticAMD");
    [eax, ebx, ecx, edx]
}
