//! Which accelerator a VM runs on.

use accel::{Accelerator, Tier};
use accel_dbt::DbtAccelerator;
use accel_kvm::{Engine, HostReport, KvmAccelerator};
use std::fmt;
use std::str::FromStr;

/// What `--accel` takes when nothing is said.
pub(crate) const DEFAULT: &str = "kvm:dbt";

/// An accelerator that there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The host's KVM.
    Kvm,
    /// The dynamic binary translator.
    Dbt,
}

impl Kind {
    /// All of them, with their names.
    pub(crate) const ALL: &[(&str, Self)] = &[("kvm", Self::Kvm), ("dbt", Self::Dbt)];

    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Dbt => "dbt",
        }
    }
}

/// Accelerators in the order in which they are tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Preference(Vec<Kind>);

impl FromStr for Preference {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut kinds = Vec::new();
        for word in text.split(':') {
            let found = Kind::ALL.iter().find(|(name, _)| *name == word);
            let Some((_, kind)) = found else {
                return Err(format!(
                    "{word:?} is no accelerator; accepted are kvm, dbt, and lists as kvm:dbt"
                ));
            };
            if kinds.contains(kind) {
                return Err(format!("{word:?} is named twice"));
            }
            kinds.push(*kind);
        }
        Ok(Self(kinds))
    }
}

/// Why there is no accelerator to run on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoAccelerator(String);

impl fmt::Display for NoAccelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoAccelerator {}

/// What was chosen.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// The accelerator.
    pub(crate) kind: Kind,
    /// What there is to say of it, in one line.
    pub(crate) note: Option<String>,
}

/// Takes the first of `preference` that can run what people run, on the host that `host` asks for its KVM.
/// KVM asked for by itself is taken when VMs can be made at all. Only the translator `counts` instructions.
///
/// # Errors
/// [`NoAccelerator`] says of each why not.
pub(crate) fn choose(
    preference: &Preference,
    tier: Tier,
    counts: bool,
    host: impl FnOnce() -> HostReport,
) -> Result<Choice, NoAccelerator> {
    let mut reasons: Vec<String> = Vec::new();
    let mut host = Some(host);
    for kind in &preference.0 {
        let alone = preference.0.len() == 1;
        let before = (!reasons.is_empty()).then(|| reasons.join("; "));
        match kind {
            Kind::Dbt if alone => return Ok(Choice { kind: *kind, note: None }),
            Kind::Dbt => {
                let note = match before {
                    Some(before) => format!("accelerator: dbt, the translator ({before})"),
                    None => "accelerator: dbt, the translator, as the first that was asked for".to_owned(),
                };
                return Ok(Choice { kind: *kind, note: Some(note) });
            }
            Kind::Kvm if tier != Tier::Auto => {
                reasons.push("not kvm: --tier is an option of the translator".to_owned());
            }
            Kind::Kvm if counts => {
                reasons.push(
                    "not kvm: --icount, --record and --replay are options of the translator".to_owned(),
                );
            }
            Kind::Kvm => {
                let Some(report) = host.take().map(|host| host()) else { continue };
                let stock = report.runs_stock_kernels();
                match (report.usable(), stock) {
                    (Ok(()), Ok(())) => {
                        let note = (!alone).then(|| format!("accelerator: kvm, {}", engine(&report.engine)));
                        return Ok(Choice { kind: *kind, note });
                    }
                    (Ok(()), Err(why)) if alone => {
                        return Ok(Choice { kind: *kind, note: Some(format!("warning: {why}")) });
                    }
                    (Err(why), _) | (_, Err(why)) => reasons.push(format!("not kvm: {why}")),
                }
            }
        }
    }
    let alone = match preference.0.as_slice() {
        [only] => format!(" {}", only.name()),
        _ => String::new(),
    };
    Err(NoAccelerator(format!("the accelerator{alone} cannot be had; {}", reasons.join("; "))))
}

/// What executes guests' code, in words.
pub(crate) fn engine(engine: &Engine) -> String {
    match engine {
        Engine::VtX => "on Intel VT-x".to_owned(),
        Engine::AmdV => "on AMD-V".to_owned(),
        Engine::Software { module } => format!("in software ({module})"),
    }
}

/// Opens the accelerator that was chosen.
///
/// # Errors
/// [`NoAccelerator`] if it is gone since it was looked at.
pub(crate) fn open(kind: Kind) -> Result<Box<dyn Accelerator>, NoAccelerator> {
    match kind {
        Kind::Dbt => Ok(Box::new(DbtAccelerator)),
        Kind::Kvm => match KvmAccelerator::open() {
            Ok(kvm) => Ok(Box::new(kvm)),
            Err(why) => Err(NoAccelerator(format!("the accelerator kvm cannot be had; not kvm: {why}"))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel_kvm::KvmUnavailable;

    fn host(engine: Engine, problem: Option<KvmUnavailable>) -> HostReport {
        HostReport {
            device: "/dev/kvm".into(),
            problem,
            engine,
            nested: None,
            api_version: None,
            capabilities: Vec::new(),
            max_vcpus: 0,
            recommended_vcpus: 0,
            max_vcpu_ids: 0,
            memory_slots: 0,
        }
    }

    fn chosen(text: &str, tier: Tier, host: HostReport) -> Result<(Kind, String), String> {
        let choice =
            choose(&text.parse().unwrap(), tier, false, || host).map_err(|error| error.to_string())?;
        Ok((choice.kind, choice.note.unwrap_or_default()))
    }

    #[test]
    fn lists_people_write() {
        assert_eq!("kvm:dbt".parse(), Ok(Preference(vec![Kind::Kvm, Kind::Dbt])));
        assert_eq!("dbt".parse(), Ok(Preference(vec![Kind::Dbt])));
        for text in ["", "tcg", "kvm:", "kvm:kvm", "KVM", "kvm,dbt"] {
            assert!(text.parse::<Preference>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_first_that_works_is_taken_and_the_rest_explained() {
        let good = || host(Engine::AmdV, None);
        let absent = || host(Engine::VtX, Some(KvmUnavailable::NoDevice { path: "/dev/kvm".into() }));
        let software = || host(Engine::Software { module: "kvm_x".into() }, None);
        let (kind, note) = chosen(DEFAULT, Tier::Auto, good()).unwrap();
        assert_eq!((kind, note.as_str()), (Kind::Kvm, "accelerator: kvm, on AMD-V"));
        let (kind, note) = chosen(DEFAULT, Tier::Auto, absent()).unwrap();
        assert!(kind == Kind::Dbt && note.contains("no /dev/kvm"), "{note}");
        let (kind, note) = chosen(DEFAULT, Tier::Auto, software()).unwrap();
        assert!(kind == Kind::Dbt && note.contains("kvm_x"), "{note}");
        let (kind, note) = chosen(DEFAULT, Tier::Interpreter, good()).unwrap();
        assert!(kind == Kind::Dbt && note.contains("--tier"), "{note}");
        let counting = |text: &str| choose(&text.parse().unwrap(), Tier::Auto, true, good);
        let choice = counting(DEFAULT).unwrap();
        assert!(choice.kind == Kind::Dbt && choice.note.unwrap().contains("--icount"));
        assert!(counting("kvm").unwrap_err().to_string().contains("--icount"));
        assert_eq!(chosen("dbt:kvm", Tier::Auto, good()).unwrap().0, Kind::Dbt);
        assert_eq!(chosen("dbt", Tier::Lockstep, good()), Ok((Kind::Dbt, String::new())));
        assert_eq!(chosen("kvm", Tier::Auto, good()), Ok((Kind::Kvm, String::new())));
        // By itself it may run what it can.
        let (kind, note) = chosen("kvm", Tier::Auto, software()).unwrap();
        assert!(kind == Kind::Kvm && note.starts_with("warning: "), "{note}");
        let error = chosen("kvm", Tier::Auto, absent()).unwrap_err();
        assert!(
            error.starts_with("the accelerator kvm cannot be had") && error.contains("no /dev/kvm"),
            "{error}"
        );
        assert!(chosen("kvm", Tier::Lockstep, good()).unwrap_err().contains("--tier"));
    }
}
