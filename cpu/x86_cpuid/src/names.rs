//! Features by name, as people switch them on and off.

use super::feature::{self, Feature};
use super::{CpuModel, X86_64};

/// Why a feature was not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeatureError {
    /// No feature has this name.
    #[error("there is no such feature; known are {known}", known = known())]
    Unknown,
    /// It is not implemented, or needs a unit that the host lacks.
    #[error("it is not available here")]
    Unavailable,
    /// 64-bit processors all have it.
    #[error("every 64-bit processor has it")]
    Needed,
}

/// The features that can be changed: Linux's name for each, then others that it goes by. Where names differ
/// only in `_`, `-` and `.`, one stands for all.
const NAMES: &[(&[&str], Feature)] = &[
    (&["pni", "sse3"], feature::SSE3),
    (&["pclmulqdq", "pclmul"], feature::PCLMUL),
    (&["ssse3"], feature::SSSE3),
    (&["fma"], feature::FMA),
    (&["cx16"], feature::CX16),
    (&["sse4_1"], feature::SSE41),
    (&["sse4_2"], feature::SSE42),
    (&["x2apic"], feature::X2APIC),
    (&["movbe"], feature::MOVBE),
    (&["popcnt"], feature::POPCNT),
    (&["tsc_deadline_timer", "tsc_deadline"], feature::TSC_DEADLINE),
    (&["aes"], feature::AES),
    (&["pcid"], feature::PCID),
    (&["xsave"], feature::XSAVE),
    (&["avx"], feature::AVX),
    (&["f16c"], feature::F16C),
    (&["rdrand"], feature::RDRAND),
    (&["hypervisor"], feature::HYPERVISOR),
    (&["arat"], feature::ARAT),
    (&["fsgsbase"], feature::FSGSBASE),
    (&["tsc_adjust"], feature::TSC_ADJUST),
    (&["bmi1"], feature::BMI1),
    (&["avx2"], feature::AVX2),
    (&["smep"], feature::SMEP),
    (&["bmi2"], feature::BMI2),
    (&["erms"], feature::ERMS),
    (&["invpcid"], feature::INVPCID),
    (&["avx512f"], feature::AVX512F),
    (&["avx512dq"], feature::AVX512DQ),
    (&["avx512ifma"], feature::AVX512IFMA),
    (&["avx512cd"], feature::AVX512CD),
    (&["avx512bw"], feature::AVX512BW),
    (&["avx512vl"], feature::AVX512VL),
    (&["avx512vbmi"], feature::AVX512VBMI),
    (&["avx512_vbmi2"], feature::AVX512VBMI2),
    (&["avx512_vnni"], feature::AVX512VNNI),
    (&["avx512_bitalg"], feature::AVX512BITALG),
    (&["avx512_vpopcntdq"], feature::AVX512VPOPCNTDQ),
    (&["gfni"], feature::GFNI),
    (&["vaes"], feature::VAES),
    (&["vpclmulqdq"], feature::VPCLMULQDQ),
    (&["pku"], feature::PKU),
    (&["la57"], feature::LA57),
    (&["xsaveopt"], feature::XSAVEOPT),
    (&["xsavec"], feature::XSAVEC),
    (&["xgetbv1"], feature::XGETBV1),
    (&["xsaves"], feature::XSAVES),
    (&["spec_ctrl"], feature::SPEC_CTRL),
    (&["stibp"], feature::INTEL_STIBP),
    (&["ssbd"], feature::SSBD),
    (&["flush_l1d"], feature::FLUSH_L1D),
    (&["arch_capabilities"], feature::ARCH_CAPABILITIES),
    (&["rdseed"], feature::RDSEED),
    (&["adx"], feature::ADX),
    (&["smap"], feature::SMAP),
    (&["clflushopt"], feature::CLFLUSHOPT),
    (&["clwb"], feature::CLWB),
    (&["sha_ni", "sha"], feature::SHA),
    (&["umip"], feature::UMIP),
    (&["rdpid"], feature::RDPID),
    (&["fsrm"], feature::FSRM),
    (&["lahf_lm"], feature::LAHF_LM),
    (&["abm", "lzcnt"], feature::ABM),
    (&["sse4a"], feature::SSE4A),
    (&["misalignsse"], feature::MISALIGN_SSE),
    (&["3dnowprefetch", "prefetchw"], feature::PREFETCHW),
    (&["topoext"], feature::TOPOEXT),
    (&["pdpe1gb"], feature::GIB_PAGES),
    (&["rdtscp"], feature::RDTSCP),
    (&["invtsc", "nonstop_tsc"], feature::INVARIANT_TSC),
    (&["ibpb"], feature::AMD_IBPB),
    (&["ibrs"], feature::AMD_IBRS),
    (&["amd_ssbd"], feature::AMD_SSBD),
    (&["cx8"], feature::CX8),
    (&["apic"], feature::APIC),
    (&["cmov"], feature::CMOV),
    (&["clflush"], feature::CLFLUSH),
    (&["mmx"], feature::MMX),
    (&["fxsr"], feature::FXSR),
    (&["sse"], feature::SSE),
    (&["sse2"], feature::SSE2),
    (&["syscall"], feature::SYSCALL),
    (&["nx"], feature::NX),
    (&["lm"], feature::LM),
];

/// Changed by people's wish, though every processor in use has them.
const DISPENSABLE: [Feature; 2] = [feature::X2APIC, feature::HYPERVISOR];

fn known() -> String {
    NAMES.iter().map(|(names, _)| names[0]).collect::<Vec<_>>().join(", ")
}

impl Feature {
    /// The feature of that name: Linux's, or another that it goes by. `-` and `.` are as `_`.
    ///
    /// # Errors
    /// [`FeatureError::Unknown`] if there is none.
    pub fn by_name(name: &str) -> Result<Self, FeatureError> {
        let name = name.to_ascii_lowercase().replace(['-', '.'], "_");
        let found = NAMES.iter().find(|(names, _)| names.contains(&name.as_str()));
        found.map(|(_, feature)| *feature).ok_or(FeatureError::Unknown)
    }

    /// Whether no 64-bit processor can be without it.
    pub fn is_needed(self) -> bool {
        X86_64.contains(&self) && !DISPENSABLE.contains(&self)
    }
}

impl CpuModel {
    /// Switches a feature on or off by its name. What the model `max` lacks cannot be switched on.
    ///
    /// # Errors
    /// [`FeatureError`]; the model is then as before.
    pub fn change_feature(&mut self, name: &str, on: bool) -> Result<(), FeatureError> {
        let feature = Feature::by_name(name)?;
        let most = Self::by_name("max").map_err(|_| FeatureError::Unavailable)?;
        if on && !most.has(feature) {
            return Err(FeatureError::Unavailable);
        }
        if !on && feature.is_needed() {
            return Err(FeatureError::Needed);
        }
        self.set(feature, on);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_go_on_and_off_by_any_of_their_names() {
        let mut model = CpuModel::by_name("max").unwrap();
        for (on, name) in [(false, "sse4.2"), (true, "SSE4-2"), (false, "sse4_2"), (false, "lzcnt")] {
            model.change_feature(name, on).unwrap();
            let feature = if name == "lzcnt" { feature::ABM } else { feature::SSE42 };
            assert_eq!(model.has(feature), on);
        }
        let mut model = CpuModel::by_name("qemu64").unwrap();
        model.change_feature("rdrand", true).unwrap();
        assert!(model.has(feature::RDRAND));
    }

    #[test]
    fn what_cannot_be_changed_says_why() {
        let mut model = CpuModel::by_name("qemu64").unwrap();
        let before = model.clone();
        assert_eq!(model.change_feature("mmx512", true), Err(FeatureError::Unknown));
        assert_eq!(model.change_feature("sse2", false), Err(FeatureError::Needed));
        let missing = !CpuModel::by_name("max").unwrap().has(feature::SSE4A);
        if missing {
            assert_eq!(model.change_feature("sse4a", true), Err(FeatureError::Unavailable));
        }
        assert_eq!(model, before);
        assert!(FeatureError::Unknown.to_string().contains("sse4_2"));
    }

    #[test]
    fn each_name_stands_for_one_feature() {
        let mut all: Vec<_> = NAMES.iter().flat_map(|(names, _)| names.iter()).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
        assert!(all.iter().all(|name| **name == name.to_ascii_lowercase().replace(['-', '.'], "_")));
    }
}
