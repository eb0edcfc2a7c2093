//! Names for the bits of CPUID's feature words.

/// A word of feature bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Word {
    Leaf1Ecx,
    Leaf1Edx,
    Leaf6Eax,
    Leaf7Ebx,
    Leaf7Ecx,
    Leaf7Edx,
    Ext1Ecx,
    Ext1Edx,
    Ext7Edx,
    Ext8Ebx,
    Ext21Eax,
    Ext21Ecx,
}

/// How many [`Word`]s there are.
pub(super) const WORDS: usize = 12;

/// A feature that CPUID announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    pub(super) word: Word,
    pub(super) bit: u8,
}

macro_rules! features {
    ($($word:ident { $($bit:literal $name:ident)* })*) => {
        $($(
            #[allow(missing_docs)]
            pub const $name: Feature = Feature { word: Word::$word, bit: $bit };
        )*)*
    };
}

features! {
    Leaf1Ecx {
        0 SSE3  1 PCLMUL  3 MONITOR  9 SSSE3  12 FMA  13 CX16  19 SSE41  20 SSE42  21 X2APIC  22 MOVBE
        23 POPCNT  24 TSC_DEADLINE  25 AES  26 XSAVE  27 OSXSAVE  28 AVX  29 F16C  30 RDRAND  31 HYPERVISOR
    }
    Leaf1Edx {
        0 FPU  1 VME  2 DE  3 PSE  4 TSC  5 MSR  6 PAE  7 MCE  8 CX8  9 APIC  11 SEP  12 MTRR  13 PGE
        14 MCA  15 CMOV  16 PAT  17 PSE36  19 CLFLUSH  23 MMX  24 FXSR  25 SSE  26 SSE2  28 HTT
    }
    Leaf6Eax { 2 ARAT }
    Leaf7Ebx {
        0 FSGSBASE  1 TSC_ADJUST  3 BMI1  5 AVX2  7 SMEP  8 BMI2  9 ERMS  18 RDSEED  19 ADX  20 SMAP
        23 CLFLUSHOPT  24 CLWB  29 SHA
    }
    Leaf7Ecx { 2 UMIP  22 RDPID }
    Leaf7Edx { 4 FSRM }
    Ext1Ecx {
        0 LAHF_LM  1 CMP_LEGACY  4 CR8_LEGACY  5 ABM  6 SSE4A  7 MISALIGN_SSE  8 PREFETCHW  22 TOPOEXT
    }
    Ext1Edx { 11 SYSCALL  20 NX  22 MMX_EXT  25 FFXSR  26 GIB_PAGES  27 RDTSCP  29 LM }
    Ext7Edx { 8 INVARIANT_TSC }
    Ext8Ebx { 12 AMD_IBPB  14 AMD_IBRS  24 AMD_SSBD  26 SSB_NO  29 BTC_NO }
    Ext21Eax { 0 NO_NESTED_DATA_BP  2 LFENCE_SERIALIZES  6 NULL_SELECTOR_CLEARS_BASE  8 AUTO_IBRS  29 SRSO_NO }
    Ext21Ecx { 1 TSA_SQ_NO  2 TSA_L1_NO }
}
