//! Which extensions the guest may use: those that its CPU model announces and the host has.

use iced_x86::{Code, CpuidFeature};
use std::sync::OnceLock;

/// A set of instruction-set extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Features(u64);

/// Where CPUID tells an extension: its bit here, leaf, subleaf, register (EAX, EBX, ECX, EDX), bit.
type Place = (u32, u32, u32, usize, u32);

const FPU: u32 = 0;
const CMOV: u32 = 1;
const MMX: u32 = 2;
const FXSR: u32 = 3;
const SSE: u32 = 4;
const SSE2: u32 = 5;
const SSE3: u32 = 6;
const PCLMULQDQ: u32 = 7;
const SSSE3: u32 = 8;
const FMA: u32 = 9;
const SSE4_1: u32 = 10;
const SSE4_2: u32 = 11;
const AES: u32 = 12;
const XSAVE: u32 = 13;
const AVX: u32 = 14;
const F16C: u32 = 15;
const AVX2: u32 = 16;
const SHA: u32 = 17;
const GFNI: u32 = 18;
const VAES: u32 = 19;
const VPCLMULQDQ: u32 = 20;
const AVX_VNNI: u32 = 21;
const XSAVEOPT: u32 = 22;
const XSAVEC: u32 = 23;
const XSAVES: u32 = 24;
const SSE4A: u32 = 25;
const AVX512F: u32 = 26;
const AVX512DQ: u32 = 27;
const AVX512_IFMA: u32 = 28;
const AVX512CD: u32 = 29;
const AVX512BW: u32 = 30;
const AVX512VL: u32 = 31;
const AVX512_VBMI: u32 = 32;
const AVX512_VBMI2: u32 = 33;
const AVX512_VNNI: u32 = 34;
const AVX512_BITALG: u32 = 35;
const AVX512_VPOPCNTDQ: u32 = 36;
const AVX512_BF16: u32 = 37;

const PLACES: [Place; 38] = [
    (FPU, 1, 0, 3, 0),
    (CMOV, 1, 0, 3, 15),
    (MMX, 1, 0, 3, 23),
    (FXSR, 1, 0, 3, 24),
    (SSE, 1, 0, 3, 25),
    (SSE2, 1, 0, 3, 26),
    (SSE3, 1, 0, 2, 0),
    (PCLMULQDQ, 1, 0, 2, 1),
    (SSSE3, 1, 0, 2, 9),
    (FMA, 1, 0, 2, 12),
    (SSE4_1, 1, 0, 2, 19),
    (SSE4_2, 1, 0, 2, 20),
    (AES, 1, 0, 2, 25),
    (XSAVE, 1, 0, 2, 26),
    (AVX, 1, 0, 2, 28),
    (F16C, 1, 0, 2, 29),
    (AVX2, 7, 0, 1, 5),
    (SHA, 7, 0, 1, 29),
    (GFNI, 7, 0, 2, 8),
    (VAES, 7, 0, 2, 9),
    (VPCLMULQDQ, 7, 0, 2, 10),
    (AVX_VNNI, 7, 1, 0, 4),
    (XSAVEOPT, 0xd, 1, 0, 0),
    (XSAVEC, 0xd, 1, 0, 1),
    (XSAVES, 0xd, 1, 0, 3),
    (SSE4A, 0x8000_0001, 0, 2, 6),
    (AVX512F, 7, 0, 1, 16),
    (AVX512DQ, 7, 0, 1, 17),
    (AVX512_IFMA, 7, 0, 1, 21),
    (AVX512CD, 7, 0, 1, 28),
    (AVX512BW, 7, 0, 1, 30),
    (AVX512VL, 7, 0, 1, 31),
    (AVX512_VBMI, 7, 0, 2, 1),
    (AVX512_VBMI2, 7, 0, 2, 6),
    (AVX512_VNNI, 7, 0, 2, 11),
    (AVX512_BITALG, 7, 0, 2, 12),
    (AVX512_VPOPCNTDQ, 7, 0, 2, 14),
    (AVX512_BF16, 7, 1, 0, 5),
];

impl Features {
    /// Whether all of `other` are in this set.
    pub(crate) fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Those in both sets.
    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What CPUID tells, given by leaf and subleaf.
    pub(crate) fn from_cpuid(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Self {
        let highest = [cpuid(0, 0)[0], cpuid(0x8000_0000, 0)[0]];
        let mut set = 0;
        let mut last = ((0, 0), [0; 4]);
        for (bit, leaf, subleaf, register, place) in PLACES {
            if leaf > highest[(leaf >> 31) as usize] {
                continue;
            }
            if last.0 != (leaf, subleaf) {
                last = ((leaf, subleaf), cpuid(leaf, subleaf));
            }
            set |= u64::from(last.1[register] >> place & 1) << bit;
        }
        Self(set)
    }

    /// What the host has, and its operating system lets us use.
    pub(crate) fn host() -> Self {
        static HOST: OnceLock<Features> = OnceLock::new();
        *HOST.get_or_init(host)
    }

    /// What `code` needs; `None` if it is of an extension that is not in the list.
    pub(crate) fn needed_by(code: Code) -> Option<Self> {
        let mut set = 0;
        for feature in code.cpuid_features() {
            set |= 1
                << match feature {
                    CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 => FPU,
                    CpuidFeature::CMOV => CMOV,
                    CpuidFeature::MMX => MMX,
                    CpuidFeature::FXSR => FXSR,
                    CpuidFeature::SSE => SSE,
                    CpuidFeature::SSE2 => SSE2,
                    CpuidFeature::SSE3 => SSE3,
                    CpuidFeature::PCLMULQDQ => PCLMULQDQ,
                    CpuidFeature::SSSE3 => SSSE3,
                    CpuidFeature::FMA => FMA,
                    CpuidFeature::SSE4_1 => SSE4_1,
                    CpuidFeature::SSE4_2 => SSE4_2,
                    CpuidFeature::AES => AES,
                    CpuidFeature::XSAVE => XSAVE,
                    CpuidFeature::AVX => AVX,
                    CpuidFeature::F16C => F16C,
                    CpuidFeature::AVX2 => AVX2,
                    CpuidFeature::SHA => SHA,
                    CpuidFeature::GFNI => GFNI,
                    CpuidFeature::VAES => VAES,
                    CpuidFeature::VPCLMULQDQ => VPCLMULQDQ,
                    CpuidFeature::AVX_VNNI => AVX_VNNI,
                    CpuidFeature::XSAVEOPT => XSAVEOPT,
                    CpuidFeature::XSAVEC => XSAVEC,
                    CpuidFeature::XSAVES => XSAVES,
                    CpuidFeature::SSE4A => SSE4A,
                    CpuidFeature::AVX512F => AVX512F,
                    CpuidFeature::AVX512DQ => AVX512DQ,
                    CpuidFeature::AVX512_IFMA => AVX512_IFMA,
                    CpuidFeature::AVX512CD => AVX512CD,
                    CpuidFeature::AVX512BW => AVX512BW,
                    CpuidFeature::AVX512VL => AVX512VL,
                    CpuidFeature::AVX512_VBMI => AVX512_VBMI,
                    CpuidFeature::AVX512_VBMI2 => AVX512_VBMI2,
                    CpuidFeature::AVX512_VNNI => AVX512_VNNI,
                    CpuidFeature::AVX512_BITALG => AVX512_BITALG,
                    CpuidFeature::AVX512_VPOPCNTDQ => AVX512_VPOPCNTDQ,
                    CpuidFeature::AVX512_BF16 => AVX512_BF16,
                    _ => return None,
                };
        }
        Some(Self(set))
    }
}

#[cfg(target_arch = "x86_64")]
fn host() -> Features {
    let mut set = Features::from_cpuid(|leaf, subleaf| {
        let answer = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        [answer.eax, answer.ebx, answer.ecx, answer.edx]
    });
    // The XSAVE family is done in Rust.
    set.0 |= 1 << XSAVE | 1 << XSAVEOPT | 1 << XSAVEC | 1 << XSAVES | 1 << FXSR;
    // This asks XCR0, too.
    if !std::arch::is_x86_feature_detected!("avx") {
        for bit in [AVX, AVX2, FMA, F16C, VAES, VPCLMULQDQ, AVX_VNNI] {
            set.0 &= !(1 << bit);
        }
    }
    if !x86_core::cpuid::host_has_avx512() {
        set.0 &= !(!0 << AVX512F);
    }
    set
}

#[cfg(not(target_arch = "x86_64"))]
fn host() -> Features {
    Features::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_come_from_the_code() {
        let only = |leaf: u32, register: usize, bit: u32| {
            Features::from_cpuid(move |asked, _| {
                let mut answer = [0; 4];
                if asked == 0 || asked == 0x8000_0000 {
                    answer[0] = asked + 0x20;
                } else if asked == leaf {
                    answer[register] = 1 << bit;
                }
                answer
            })
        };
        let sse2 = only(1, 3, 26);
        assert!(sse2.contains(Features::needed_by(Code::Paddq_xmm_xmmm128).unwrap()));
        assert!(!sse2.contains(Features::needed_by(Code::Pshufb_xmm_xmmm128).unwrap()));
        assert!(!sse2.contains(Features::needed_by(Code::VEX_Vpaddb_xmm_xmm_xmmm128).unwrap()));
        assert_eq!(Features::needed_by(Code::VEX_Andn_r32_r32_rm32), None);
        assert_eq!(Features::needed_by(Code::Xgetbv), Some(only(1, 2, 26)));
        assert_eq!(Features::needed_by(Code::EVEX_Vaddph_zmm_k1z_zmm_zmmm512b16_er), None);
        assert!(!sse2.contains(Features::needed_by(Code::EVEX_Vpaddb_xmm_k1z_xmm_xmmm128).unwrap()));
        assert!(only(7, 2, 8).contains(Features::needed_by(Code::Gf2p8mulb_xmm_xmmm128).unwrap()));
        assert_eq!(Features::from_cpuid(|_, _| [0, !0, !0, !0]), Features::default());
    }
}
