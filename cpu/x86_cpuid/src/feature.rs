//! Names for the bits of CPUID's feature words.

/// A word of feature bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Word {
    Leaf1Ecx,
    Leaf1Edx,
    Leaf6Eax,
    Leaf7Ebx,
    Leaf7Ecx,
    Leaf7Edx,
    Leaf7Sub1Eax,
    Leaf13Eax,
    Ext1Ecx,
    Ext1Edx,
    Ext7Edx,
    Ext8Ebx,
    Ext10Edx,
    Ext21Eax,
    Ext21Ecx,
}

/// How many [`Word`]s there are.
pub(crate) const WORDS: usize = WORD_LIST.len();

/// All of them.
const WORD_LIST: [Word; 15] = [
    Word::Leaf1Ecx,
    Word::Leaf1Edx,
    Word::Leaf6Eax,
    Word::Leaf7Ebx,
    Word::Leaf7Ecx,
    Word::Leaf7Edx,
    Word::Leaf7Sub1Eax,
    Word::Leaf13Eax,
    Word::Ext1Ecx,
    Word::Ext1Edx,
    Word::Ext7Edx,
    Word::Ext8Ebx,
    Word::Ext10Edx,
    Word::Ext21Eax,
    Word::Ext21Ecx,
];

/// Leaf, subleaf and register (EAX, EBX, ECX and EDX are 0 to 3) of every word of features.
pub fn words() -> impl Iterator<Item = (u32, u32, usize)> {
    WORD_LIST.iter().map(|word| word.place())
}

/// Where CPUID has a feature's bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeaturePlace {
    /// The leaf.
    pub leaf: u32,
    /// The subleaf; 0 where there are none.
    pub sub: u32,
    /// The register: EAX, EBX, ECX and EDX are 0 to 3.
    pub register: usize,
    /// The bit of the register.
    pub bit: u8,
}

impl Word {
    /// The leaf, the subleaf and the register.
    fn place(self) -> (u32, u32, usize) {
        match self {
            Self::Leaf1Ecx => (1, 0, 2),
            Self::Leaf1Edx => (1, 0, 3),
            Self::Leaf6Eax => (6, 0, 0),
            Self::Leaf7Ebx => (7, 0, 1),
            Self::Leaf7Ecx => (7, 0, 2),
            Self::Leaf7Edx => (7, 0, 3),
            Self::Leaf7Sub1Eax => (7, 1, 0),
            Self::Leaf13Eax => (0xd, 1, 0),
            Self::Ext1Ecx => (0x8000_0001, 0, 2),
            Self::Ext1Edx => (0x8000_0001, 0, 3),
            Self::Ext7Edx => (0x8000_0007, 0, 3),
            Self::Ext8Ebx => (0x8000_0008, 0, 1),
            Self::Ext10Edx => (0x8000_000a, 0, 3),
            Self::Ext21Eax => (0x8000_0021, 0, 0),
            Self::Ext21Ecx => (0x8000_0021, 0, 2),
        }
    }
}

/// A feature that CPUID announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    pub(crate) word: Word,
    pub(crate) bit: u8,
}

impl Feature {
    /// Where CPUID has its bit.
    pub fn place(self) -> FeaturePlace {
        let (leaf, sub, register) = self.word.place();
        FeaturePlace { leaf, sub, register, bit: self.bit }
    }
}

macro_rules! features {
    ($($word:ident { $($bit:literal $name:ident)* })*) => {
        impl Feature {
            /// Calls `act` with every feature.
            pub(crate) fn each(mut act: impl FnMut(Self)) {
                $($(act($name);)*)*
            }
        }

        $($(
            #[allow(missing_docs)]
            pub const $name: Feature = Feature { word: Word::$word, bit: $bit };
        )*)*
    };
}

features! {
    Leaf1Ecx {
        0 SSE3  1 PCLMUL  3 MONITOR  9 SSSE3  12 FMA  13 CX16  17 PCID  19 SSE41  20 SSE42  21 X2APIC  22 MOVBE
        23 POPCNT  24 TSC_DEADLINE  25 AES  26 XSAVE  27 OSXSAVE  28 AVX  29 F16C  30 RDRAND  31 HYPERVISOR
    }
    Leaf1Edx {
        0 FPU  1 VME  2 DE  3 PSE  4 TSC  5 MSR  6 PAE  7 MCE  8 CX8  9 APIC  11 SEP  12 MTRR  13 PGE
        14 MCA  15 CMOV  16 PAT  17 PSE36  19 CLFLUSH  23 MMX  24 FXSR  25 SSE  26 SSE2  28 HTT
    }
    Leaf6Eax { 2 ARAT }
    Leaf7Ebx {
        0 FSGSBASE  1 TSC_ADJUST  3 BMI1  5 AVX2  7 SMEP  8 BMI2  9 ERMS  10 INVPCID  16 AVX512F  17 AVX512DQ
        18 RDSEED  19 ADX  20 SMAP  21 AVX512IFMA  23 CLFLUSHOPT  24 CLWB  28 AVX512CD  29 SHA  30 AVX512BW
        31 AVX512VL
    }
    Leaf7Ecx {
        1 AVX512VBMI  2 UMIP  3 PKU  4 OSPKE  6 AVX512VBMI2  8 GFNI  9 VAES  10 VPCLMULQDQ  11 AVX512VNNI  12 AVX512BITALG
        14 AVX512VPOPCNTDQ  16 LA57  22 RDPID  31 PKS
    }
    Leaf7Edx { 4 FSRM  26 SPEC_CTRL  27 INTEL_STIBP  28 FLUSH_L1D  29 ARCH_CAPABILITIES  31 SSBD }
    Leaf7Sub1Eax { 4 AVX_VNNI  5 AVX512BF16 }
    Leaf13Eax { 0 XSAVEOPT  1 XSAVEC  2 XGETBV1  3 XSAVES }
    Ext1Ecx {
        0 LAHF_LM  1 CMP_LEGACY  2 SVM  4 CR8_LEGACY  5 ABM  6 SSE4A  7 MISALIGN_SSE  8 PREFETCHW  9 OSVW  22 TOPOEXT
        23 PERFCTR_CORE
    }
    Ext1Edx { 11 SYSCALL  20 NX  22 MMX_EXT  25 FFXSR  26 GIB_PAGES  27 RDTSCP  29 LM }
    Ext7Edx { 8 INVARIANT_TSC }
    Ext8Ebx {
        0 CLZERO  2 XSAVEERPTR  9 WBNOINVD  12 AMD_IBPB  14 AMD_IBRS  15 AMD_STIBP  24 AMD_SSBD  26 SSB_NO  29 BTC_NO
    }
    Ext10Edx {
        0 NPT  3 NRIPS  5 VMCB_CLEAN  6 FLUSH_BY_ASID  7 DECODE_ASSISTS  10 PAUSE_FILTER  12 PAUSE_THRESHOLD
        16 VGIF
    }
    Ext21Eax { 0 NO_NESTED_DATA_BP  2 LFENCE_SERIALIZES  6 NULL_SELECTOR_CLEARS_BASE  8 AUTO_IBRS  29 SRSO_NO }
    Ext21Ecx { 1 TSA_SQ_NO  2 TSA_L1_NO }
}
