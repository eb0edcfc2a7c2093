//! Features by name, as people switch them on and off.

use super::dependencies;
use super::feature::{self, Feature};
use super::{CpuModel, X86_64};

/// Why a feature was not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeatureError {
    /// No feature has this name.
    #[error("there is no such feature; did you mean {nearest}? (`vireo cpu show max` lists those there are)")]
    Unknown {
        /// The feature whose name is most like it.
        nearest: &'static str,
    },
    /// It is not implemented, or needs a unit that the host lacks.
    #[error("it is not available here")]
    Unavailable,
    /// 64-bit processors all have it.
    #[error("every 64-bit processor has it")]
    Needed,
    /// It is nothing without another, which is off.
    #[error("it needs {0}, which is off")]
    Needs(&'static str),
}

/// The features that can be changed: Linux's name for each, then others that it goes by. Where names differ
/// only in `_`, `-` and `.`, one stands for all.
const NAMES: &[(&[&str], Feature)] = &[
    (&["vme"], feature::VME),
    (&["monitor"], feature::MONITOR),
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
    (&["avx_vnni"], feature::AVX_VNNI),
    (&["avx512_bf16"], feature::AVX512BF16),
    (&["gfni"], feature::GFNI),
    (&["vaes"], feature::VAES),
    (&["vpclmulqdq"], feature::VPCLMULQDQ),
    (&["pku"], feature::PKU),
    (&["pks"], feature::PKS),
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
    (&["svm"], feature::SVM),
    (&["npt"], feature::NPT),
    (&["nrip_save"], feature::NRIPS),
    (&["vmcb_clean"], feature::VMCB_CLEAN),
    (&["flushbyasid"], feature::FLUSH_BY_ASID),
    (&["decodeassists"], feature::DECODE_ASSISTS),
    (&["pausefilter"], feature::PAUSE_FILTER),
    (&["pfthreshold"], feature::PAUSE_THRESHOLD),
    (&["vgif"], feature::VGIF),
    (&["abm", "lzcnt"], feature::ABM),
    (&["sse4a"], feature::SSE4A),
    (&["misalignsse"], feature::MISALIGN_SSE),
    (&["3dnowprefetch", "prefetchw"], feature::PREFETCHW),
    (&["topoext"], feature::TOPOEXT),
    (&["pdpe1gb"], feature::GIB_PAGES),
    (&["rdtscp"], feature::RDTSCP),
    (&["invtsc", "nonstop_tsc"], feature::INVARIANT_TSC),
    (&["osvw"], feature::OSVW),
    (&["perfctr_core"], feature::PERFCTR_CORE),
    (&["clzero"], feature::CLZERO),
    (&["xsaveerptr"], feature::XSAVEERPTR),
    (&["wbnoinvd"], feature::WBNOINVD),
    (&["ibpb"], feature::AMD_IBPB),
    (&["ibrs"], feature::AMD_IBRS),
    (&["amd_stibp"], feature::AMD_STIBP),
    (&["amd_ssbd"], feature::AMD_SSBD),
    (&["amd_ssb_no"], feature::SSB_NO),
    (&["btc_no"], feature::BTC_NO),
    (&["no_nested_data_bp"], feature::NO_NESTED_DATA_BP),
    (&["lfence_always_serializing"], feature::LFENCE_SERIALIZES),
    (&["null_sel_clr_base"], feature::NULL_SELECTOR_CLEARS_BASE),
    (&["auto_ibrs"], feature::AUTO_IBRS),
    (&["srso_no"], feature::SRSO_NO),
    (&["cr8legacy", "cr8_legacy"], feature::CR8_LEGACY),
    (&["mmxext"], feature::MMX_EXT),
    (&["fxsr_opt", "ffxsr"], feature::FFXSR),
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

impl Feature {
    /// The feature of that name: Linux's, or another that it goes by. `-` and `.` are as `_`.
    ///
    /// # Errors
    /// [`FeatureError::Unknown`] if there is none.
    pub fn by_name(name: &str) -> Result<Self, FeatureError> {
        let name = name.to_ascii_lowercase().replace(['-', '.'], "_");
        let found = NAMES.iter().find(|(names, _)| names.contains(&name.as_str()));
        found.map(|(_, feature)| *feature).ok_or_else(|| {
            let names = NAMES.iter().flat_map(|(names, _)| names.iter().copied());
            FeatureError::Unknown { nearest: crate::nearest(&name, names) }
        })
    }

    /// Its name: Linux's. Features that nobody changes by name have none.
    pub fn name(self) -> Option<&'static str> {
        NAMES.iter().find(|(_, feature)| *feature == self).map(|(names, _)| names[0])
    }

    /// All that have names.
    pub fn all() -> impl Iterator<Item = Self> {
        NAMES.iter().map(|(_, feature)| *feature)
    }

    /// Whether no 64-bit processor can be without it.
    pub fn is_needed(self) -> bool {
        X86_64.contains(&self) && !DISPENSABLE.contains(&self)
    }
}

impl CpuModel {
    /// Switches features on or off by their names, in order. What is not available cannot be switched on, and what needs
    /// another feature not without it; what needed one that was switched off goes with it.
    ///
    /// # Errors
    /// The name and the reason.
    pub fn change_features(&mut self, changes: &[(String, bool)]) -> Result<(), (String, FeatureError)> {
        let mut wanted = Vec::new();
        for (name, on) in changes {
            let feature = Feature::by_name(name).map_err(|error| (name.clone(), error))?;
            if *on && !Self::available(feature) {
                return Err((name.clone(), FeatureError::Unavailable));
            }
            if !on && feature.is_needed() {
                return Err((name.clone(), FeatureError::Needed));
            }
            wanted.retain(|(before, _)| *before != feature);
            if *on {
                wanted.push((feature, name));
            }
            self.set(feature, *on);
        }
        let asked: Vec<Feature> = wanted.iter().map(|(feature, _)| *feature).collect();
        let dropped = dependencies::unsupported(|feature| self.has(feature), &asked);
        for feature in dropped.map_err(|(feature, needs)| {
            let name = wanted.iter().find(|(wanted, _)| *wanted == feature).map(|(_, name)| (*name).clone());
            (name.unwrap_or_default(), FeatureError::Needs(needs.name().unwrap_or_default()))
        })? {
            self.set(feature, false);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(model: &mut CpuModel, changes: &[(&str, bool)]) -> Result<(), (String, FeatureError)> {
        let changes: Vec<_> = changes.iter().map(|(name, on)| ((*name).to_owned(), *on)).collect();
        model.change_features(&changes)
    }

    #[test]
    fn features_go_on_and_off_by_any_of_their_names() {
        let mut model = CpuModel::by_name("max").unwrap();
        for (on, name) in [(false, "sse4.2"), (true, "SSE4-2"), (false, "sse4_2"), (false, "lzcnt")] {
            change(&mut model, &[(name, on)]).unwrap();
            let feature = if name == "lzcnt" { feature::ABM } else { feature::SSE42 };
            assert_eq!(model.has(feature), on);
        }
        let mut model = CpuModel::by_name("qemu64").unwrap();
        change(&mut model, &[("rdrand", true)]).unwrap();
        assert!(model.has(feature::RDRAND));
    }

    #[test]
    fn what_cannot_be_changed_says_why() {
        let reason = |name: &str, on| {
            let mut model = CpuModel::by_name("qemu64").unwrap();
            change(&mut model, &[(name, on)]).unwrap_err().1
        };
        assert_eq!(reason("mmx2", true), FeatureError::Unknown { nearest: "mmx" });
        assert_eq!(reason("sse43", true), FeatureError::Unknown { nearest: "sse3" });
        assert_eq!(reason("avx512-vnnni", true), FeatureError::Unknown { nearest: "avx512_vnni" });
        assert_eq!(reason("sse2", false), FeatureError::Needed);
        assert_eq!(reason("arch_capabilities", true), FeatureError::Unavailable);
    }

    #[test]
    fn what_needs_another_feature_is_not_without_it() {
        let mut model = CpuModel::by_name("qemu64").unwrap();
        let error = change(&mut model, &[("xsaveopt", true)]).unwrap_err();
        assert_eq!(error, ("xsaveopt".to_owned(), FeatureError::Needs("xsave")));
        let mut model = CpuModel::by_name("qemu64").unwrap();
        change(&mut model, &[("xsaveopt", true), ("xsave", true)]).unwrap();
        assert!(model.has(feature::XSAVEOPT));
        change(&mut model, &[("xsave", false)]).unwrap();
        assert!(!model.has(feature::XSAVEOPT) && model.xcr0_mask() == 3);
        let mut model = CpuModel::by_name("max").unwrap();
        change(&mut model, &[("ssse3", false)]).unwrap();
        assert!(!model.has(feature::SSE42) && !model.has(feature::AVX) && !model.has(feature::AVX2));
        let error = change(&mut model, &[("xsave", false), ("sse4_2", true)]).unwrap_err();
        assert_eq!(error.0, "sse4_2");
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
