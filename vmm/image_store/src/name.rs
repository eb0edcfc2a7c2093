//! The names of images.

use std::fmt;
use std::str::FromStr;

use crate::StoreError;

/// A release of Debian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Release {
    /// Debian 12, bookworm.
    Bookworm,
    /// Debian 13, trixie.
    #[default]
    Trixie,
}

impl Release {
    /// Its number.
    pub fn number(self) -> u32 {
        match self {
            Self::Bookworm => 12,
            Self::Trixie => 13,
        }
    }

    /// Its name in the archive.
    pub fn codename(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Debian {} ({})", self.number(), self.codename())
    }
}

/// Which of Debian's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Flavour {
    /// The small one for virtual machines.
    #[default]
    Cloud,
    /// The one for any PC.
    Generic,
}

impl Flavour {
    /// Its word in an image's name.
    pub fn word(self) -> &'static str {
        match self {
            Self::Cloud => "cloud",
            Self::Generic => "generic",
        }
    }

    /// The package that depends on the newest kernel of this flavour.
    pub(crate) fn metapackage(self) -> &'static str {
        match self {
            Self::Cloud => "linux-image-cloud-amd64",
            Self::Generic => "linux-image-amd64",
        }
    }
}

/// The name of a Debian image: `debian[:RELEASE[:FLAVOUR]]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct DebianImageName {
    /// The release.
    pub release: Release,
    /// The kernel.
    pub flavour: Flavour,
}

impl DebianImageName {
    /// Whether `name` is meant as the name of a Debian image, rightly spelt or not.
    pub fn is_meant_by(name: &str) -> bool {
        name.split(':').next() == Some("debian")
    }

    /// The image's folder in the store.
    pub(crate) fn folder(self) -> String {
        format!("debian-{}-{}", self.release.number(), self.flavour.word())
    }
}

impl fmt::Display for DebianImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "debian:{}", self.release.number())?;
        if self.flavour != Flavour::default() {
            write!(f, ":{}", self.flavour.word())?;
        }
        Ok(())
    }
}

impl FromStr for DebianImageName {
    type Err = StoreError;

    fn from_str(name: &str) -> Result<Self, StoreError> {
        let unknown = || StoreError::UnknownImage { name: name.to_owned() };
        let mut words = name.split(':');
        if words.next() != Some("debian") {
            return Err(unknown());
        }
        let release = match words.next() {
            None => Release::default(),
            Some("12" | "bookworm") => Release::Bookworm,
            Some("13" | "trixie") => Release::Trixie,
            Some(_) => return Err(unknown()),
        };
        let flavour = match words.next() {
            None => Flavour::default(),
            Some("cloud") => Flavour::Cloud,
            Some("generic") => Flavour::Generic,
            Some(_) => return Err(unknown()),
        };
        if words.next().is_some() { Err(unknown()) } else { Ok(Self { release, flavour }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood_and_said_again() {
        for (name, said) in [
            ("debian", "debian:13"),
            ("debian:12", "debian:12"),
            ("debian:trixie:cloud", "debian:13"),
            ("debian:13:generic", "debian:13:generic"),
        ] {
            assert_eq!(name.parse::<DebianImageName>().unwrap().to_string(), said);
        }
        for name in ["", "debian:", "debian:11", "debian:13:rt", "debian:13:cloud:x", "ubuntu", "debian-13"] {
            let error = name.parse::<DebianImageName>().unwrap_err().to_string();
            assert!(error.contains(&format!("{name:?}")) && error.contains("debian:12"), "{error}");
        }
        assert!(DebianImageName::is_meant_by("debian:11"));
        assert!(!DebianImageName::is_meant_by("debian.qcow2"));
    }
}
