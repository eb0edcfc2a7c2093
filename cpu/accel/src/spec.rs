//! What a VM asks of an accelerator.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A CPU model with changes to its features, as in `--cpu max,-avx,+rdrand`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CpuSpec {
    /// The model's name; what names there are depends on the accelerator.
    pub name: String,
    /// Features switched on or off, in order; the last word on a feature counts. Names are in lower case,
    /// as in Linux's `/proc/cpuinfo`.
    pub features: Vec<(String, bool)>,
    /// The rate of the time-stamp counter, if it is not to be the host's.
    pub tsc_hertz: Option<u64>,
}

/// What CPUID says of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CpuidLeaf {
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question; 0 where it does not count.
    pub sub: u32,
    /// EAX, EBX, ECX and EDX of the answer.
    pub registers: [u32; 4],
}

/// No processor's counter is slower.
const LEAST_TSC_HERTZ: u64 = 1_000_000;

impl Default for CpuSpec {
    /// The model `max`: everything that the accelerator can do.
    fn default() -> Self {
        Self { name: "max".into(), features: Vec::new(), tsc_hertz: None }
    }
}

/// Why a text is no [`CpuSpec`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuSpecError {
    /// No name.
    #[error("a CPU model's name is missing in {text:?}; accepted is NAME[,+FEATURE][,-FEATURE]...")]
    NoName {
        /// The text.
        text: String,
    },
    /// A rate of the time-stamp counter that is none.
    #[error("{word:?} is no rate of the time-stamp counter; accepted is tsc-frequency=HERTZ, from 1 MHz on")]
    BadFrequency {
        /// The word.
        word: String,
    },
    /// A feature without a sign or a value.
    #[error(
        "{word:?} is no change of a CPU feature; accepted are +FEATURE, -FEATURE, FEATURE=on, FEATURE=off"
    )]
    BadFeature {
        /// The word.
        word: String,
    },
}

impl FromStr for CpuSpec {
    type Err = CpuSpecError;

    fn from_str(text: &str) -> Result<Self, CpuSpecError> {
        let mut words = text.split(',').map(str::trim);
        let name = words.next().unwrap_or_default();
        if name.is_empty() || name.starts_with(['+', '-']) || name.contains('=') {
            return Err(CpuSpecError::NoName { text: text.into() });
        }
        let mut features = Vec::new();
        let mut tsc_hertz = None;
        for word in words {
            if let Some(rate) = word.strip_prefix("tsc-frequency=") {
                let rate = rate.parse().ok().filter(|rate| *rate >= LEAST_TSC_HERTZ);
                tsc_hertz = Some(rate.ok_or_else(|| CpuSpecError::BadFrequency { word: word.into() })?);
                continue;
            }
            let bad = || CpuSpecError::BadFeature { word: word.into() };
            let (feature, on) = match (word.strip_prefix('+'), word.strip_prefix('-'), word.split_once('=')) {
                (Some(feature), _, _) => (feature, true),
                (_, Some(feature), _) => (feature, false),
                (_, _, Some((feature, "on"))) => (feature, true),
                (_, _, Some((feature, "off"))) => (feature, false),
                _ => return Err(bad()),
            };
            let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            if feature.is_empty() || !feature.chars().all(named) {
                return Err(bad());
            }
            features.push((feature.to_ascii_lowercase(), on));
        }
        Ok(Self { name: name.into(), features, tsc_hertz })
    }
}

impl fmt::Display for CpuSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        for (feature, on) in &self.features {
            write!(f, ",{}{feature}", if *on { '+' } else { '-' })?;
        }
        if let Some(rate) = self.tsc_hertz {
            write!(f, ",tsc-frequency={rate}")?;
        }
        Ok(())
    }
}

/// How an accelerator that has the choice executes instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Tier {
    /// Whatever is best.
    #[default]
    Auto,
    /// One instruction at a time.
    Interpreter,
    /// Translated code.
    Translator,
    /// Translated code, every block checked against the interpreter: slow, for finding the translator's
    /// mistakes.
    Lockstep,
}

impl Tier {
    /// All tiers with their names on a command line.
    pub const NAMES: [(&'static str, Self); 4] = [
        ("auto", Self::Auto),
        ("interpreter", Self::Interpreter),
        ("translator", Self::Translator),
        ("lockstep", Self::Lockstep),
    ];

    /// The tier's name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Interpreter => "interpreter",
            Self::Translator => "translator",
            Self::Lockstep => "lockstep",
        }
    }
}

/// What a VM asks of an accelerator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSpec {
    /// How many vCPUs it will have; their APIC ids are `0..vcpus`.
    pub vcpus: u32,
    /// How many of them CPUID says to be in one socket, where they share the last cache: a power of two, or
    /// all of them.
    pub socket_vcpus: u32,
    /// What they announce.
    pub cpu: CpuSpec,
    /// How they execute, where there is a choice.
    pub tier: Tier,
    /// How long a halted vCPU at most looks for a reason to go on before its thread sleeps: its processor is
    /// busy meanwhile, and the guest wakes sooner. Zero is not at all; without it the accelerator decides.
    pub halt_poll: Option<Duration>,
}

impl VmSpec {
    /// [`VmSpec::socket_vcpus`], of those that there are.
    pub fn vcpus_per_socket(&self) -> u32 {
        self.socket_vcpus.clamp(1, self.vcpus.max(1))
    }
}

impl Default for VmSpec {
    fn default() -> Self {
        Self {
            vcpus: 1,
            socket_vcpus: u32::MAX,
            cpu: CpuSpec::default(),
            tier: Tier::default(),
            halt_poll: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_specs_read_what_they_print() {
        for text in
            ["max", "x86-64-v2,+rdrand,-AES", "qemu64,sse4_2=off", "max,tsc-frequency=2500000000,-aes"]
        {
            let spec: CpuSpec = text.parse().unwrap();
            assert_eq!(spec.to_string().parse::<CpuSpec>().unwrap(), spec);
        }
        let spec: CpuSpec = "max,+a,-b,c=on,d=off".parse().unwrap();
        let expected = [("a", true), ("b", false), ("c", true), ("d", false)];
        assert_eq!(spec.features, expected.map(|(name, on)| (name.to_owned(), on)));
    }

    #[test]
    fn what_is_no_cpu_spec_is_refused() {
        for text in ["", ",", "+aes", "a=on", "max,", "max,aes", "max,+", "max,x=yes", "max,+a b"] {
            assert!(text.parse::<CpuSpec>().is_err(), "{text:?}");
        }
        for rate in ["", "fast", "999999", "-1", "18446744073709551616"] {
            let text = format!("max,tsc-frequency={rate}");
            assert!(matches!(text.parse::<CpuSpec>(), Err(CpuSpecError::BadFrequency { .. })), "{text:?}");
        }
    }
}
