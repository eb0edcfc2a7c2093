//! Features that are nothing without others.

use crate::feature::{self, Feature};

/// What there is not without the first.
const DEPENDENT: &[(Feature, &[Feature])] = &[
    (feature::SSE3, &[feature::SSSE3, feature::SSE4A]),
    (feature::SSSE3, &[feature::SSE41]),
    (feature::SSE41, &[feature::SSE42]),
    (feature::SSE42, &[feature::AVX]),
    (
        feature::XSAVE,
        &[
            feature::AVX,
            feature::PKU,
            feature::XSAVEOPT,
            feature::XSAVEC,
            feature::XGETBV1,
            feature::XSAVES,
            feature::XSAVEERPTR,
            feature::OSXSAVE,
        ],
    ),
    (feature::XSAVEC, &[feature::XSAVES]),
    (
        feature::AVX,
        &[
            feature::AVX2,
            feature::FMA,
            feature::F16C,
            feature::VAES,
            feature::VPCLMULQDQ,
            feature::AVX_VNNI,
            feature::AVX512F,
        ],
    ),
    (feature::AES, &[feature::VAES]),
    (feature::PCLMUL, &[feature::VPCLMULQDQ]),
    (feature::AVX2, &[feature::AVX512F, feature::AVX_VNNI]),
    (
        feature::AVX512F,
        &[
            feature::AVX512DQ,
            feature::AVX512IFMA,
            feature::AVX512CD,
            feature::AVX512BW,
            feature::AVX512VL,
            feature::AVX512VNNI,
            feature::AVX512VPOPCNTDQ,
        ],
    ),
    (
        feature::AVX512BW,
        &[feature::AVX512VBMI, feature::AVX512VBMI2, feature::AVX512BITALG, feature::AVX512BF16],
    ),
];

/// The features of a processor (which has those that `has` says) that are to go because they are nothing without others
/// that it lacks.
///
/// # Errors
/// One of `asked`, which must not go, and what it lacks.
pub fn unsupported(
    has: impl Fn(Feature) -> bool,
    asked: &[Feature],
) -> Result<Vec<Feature>, (Feature, Feature)> {
    let mut gone = Vec::new();
    // Those without which others are stand before them, but for a few; twice is enough for all.
    for _ in 0..2 {
        for (needed, dependents) in DEPENDENT {
            if has(*needed) && !gone.contains(needed) {
                continue;
            }
            for dependent in dependents.iter().filter(|dependent| has(**dependent)) {
                if asked.contains(dependent) {
                    return Err((*dependent, *needed));
                }
                if !gone.contains(dependent) {
                    gone.push(*dependent);
                }
            }
        }
    }
    Ok(gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_go_in_one_pass() {
        let all: Vec<Feature> =
            DEPENDENT.iter().flat_map(|(_, dependents)| dependents.iter().copied()).collect();
        let gone = unsupported(|feature| feature != feature::SSE3, &[]).unwrap();
        for feature in [feature::SSE42, feature::AVX, feature::AVX512F, feature::AVX512BF16] {
            assert!(gone.contains(&feature), "{feature:?}");
        }
        assert!(!gone.contains(&feature::XSAVEOPT));
        let none = unsupported(|_| true, &all).unwrap();
        assert!(none.is_empty());
        let error = unsupported(|feature| feature != feature::XSAVE, &[feature::AVX512BW]);
        assert!(error.is_err());
    }
}
