//! One thing of the host and what there is to say of it.

use serde::Serialize;
use std::fmt;

/// How good it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    /// As it should be.
    Pass,
    /// For information only.
    Note,
    /// Something works less well, or not at all, that many do without.
    Warn,
    /// Something that VMs need is missing.
    Fail,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pass => "PASS",
            Self::Note => "NOTE",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        })
    }
}

/// One thing of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// What it belongs to.
    pub(crate) area: &'static str,
    /// What was looked at.
    pub(crate) name: &'static str,
    /// How good it is.
    pub(crate) status: Status,
    /// What was found.
    pub(crate) found: String,
    /// What to do about it.
    pub(crate) advice: Option<String>,
}

/// The checks of one area, being collected.
pub(crate) struct Area<'a> {
    pub(crate) name: &'static str,
    pub(crate) checks: &'a mut Vec<Check>,
}

impl Area<'_> {
    pub(crate) fn pass(&mut self, name: &'static str, found: impl Into<String>) {
        self.add(name, Status::Pass, found.into(), None);
    }

    pub(crate) fn note(&mut self, name: &'static str, found: impl Into<String>) {
        self.add(name, Status::Note, found.into(), None);
    }

    pub(crate) fn warn(&mut self, name: &'static str, found: impl Into<String>, advice: &str) {
        self.add(name, Status::Warn, found.into(), Some(advice.to_owned()));
    }

    pub(crate) fn fail(&mut self, name: &'static str, found: impl Into<String>, advice: &str) {
        self.add(name, Status::Fail, found.into(), Some(advice.to_owned()));
    }

    fn add(&mut self, name: &'static str, status: Status, found: String, advice: Option<String>) {
        self.checks.push(Check { area: self.name, name, status, found, advice });
    }
}
