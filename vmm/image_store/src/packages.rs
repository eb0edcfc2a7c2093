//! The list of a release's packages (deb822 stanzas).

use std::cmp::Ordering;
use std::io::{BufRead, Read};

use crate::fetch::Expected;
use crate::version;

/// What's needed of a package's stanza.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) depends: String,
    pub(crate) filename: String,
    size: Option<u64>,
    sha256: String,
}

impl Package {
    /// What its file must be; `None` if the stanza doesn't say.
    pub(crate) fn expected(&self) -> Option<Expected> {
        let well_formed = self.sha256.len() == 64
            && self.filename.starts_with("pool/")
            && !self.filename.split('/').any(|part| part == "..");
        well_formed.then_some(Expected { size: self.size?, sha256: self.sha256.to_ascii_lowercase() })
    }

    /// The name and exact version of the kernel that a metapackage depends on.
    pub(crate) fn kernel_dependency(&self) -> Option<(String, Option<String>)> {
        self.depends.split(',').find_map(|item| {
            let item = item.split('|').next()?.trim();
            let (name, constraint) = item.split_once(' ').unwrap_or((item, ""));
            let version = constraint.trim().strip_prefix("(=").and_then(|rest| rest.strip_suffix(')'));
            name.starts_with("linux-image-")
                .then(|| (name.to_owned(), version.map(|version| version.trim().to_owned())))
        })
    }
}

/// Longer lines aren't in any list; the rest of one is an error.
const LINE_LIMIT: u64 = 1 << 20;
/// More bytes than any list has.
const LIST_LIMIT: u64 = 1 << 30;

/// Reads `list` and returns the packages whose name `wanted` accepts, the newest of each name.
pub(crate) fn read(list: impl BufRead, wanted: impl Fn(&str) -> bool) -> std::io::Result<Vec<Package>> {
    let mut list = list.take(LIST_LIMIT);
    let mut found: Vec<Package> = Vec::new();
    let mut current = Package::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut list).take(LINE_LIMIT).read_until(b'\n', &mut line)?;
        if read as u64 == LINE_LIMIT {
            return Err(std::io::Error::other("a line of the list of packages is too long"));
        }
        if read == 0 || line == b"\n" {
            if !current.name.is_empty() {
                keep_newest(&mut found, std::mem::take(&mut current));
            }
            if read == 0 {
                return Ok(found);
            }
            continue;
        }
        let Ok(text) = std::str::from_utf8(&line) else { continue };
        let Some((key, value)) = text.split_once(':') else { continue };
        let value = value.trim();
        match key {
            "Package" => current.name = if wanted(value) { value.to_owned() } else { String::new() },
            _ if current.name.is_empty() => {}
            "Version" => value.clone_into(&mut current.version),
            "Depends" => value.clone_into(&mut current.depends),
            "Filename" => value.clone_into(&mut current.filename),
            "Size" => current.size = value.parse().ok(),
            "SHA256" => value.clone_into(&mut current.sha256),
            _ => {}
        }
    }
}

fn keep_newest(found: &mut Vec<Package>, package: Package) {
    match found.iter_mut().find(|other| other.name == package.name) {
        Some(other) if version::compare(&package.version, &other.version) == Ordering::Greater => {
            *other = package;
        }
        Some(_) => {}
        None => found.push(package),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn wanted_stanzas_are_read_and_the_newest_kept() {
        let text = "Package: other\nDepends: linux-image-wrong\n\n\
                    Package: linux-image-cloud-amd64\nVersion: 6.1.9-1\nSize: 5\n\n\
                    Package: linux-image-cloud-amd64\nVersion: 6.1.10-1\nDepends: kmod, linux-image-6.1.0-50-cloud-amd64 (= 6.1.10-1)\n\
                    Filename: pool/main/l/x.deb\nSize: 17\nDescription: a\n b: c\nSHA256: ABC\n";
        let found = read(text.as_bytes(), |name| name.starts_with("linux-image-")).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].version.as_str(), found[0].size), ("6.1.10-1", Some(17)));
        assert_eq!(
            found[0].kernel_dependency(),
            Some(("linux-image-6.1.0-50-cloud-amd64".to_owned(), Some("6.1.10-1".to_owned())))
        );
        assert_eq!(found[0].expected(), None);
        let mut good = found[0].clone();
        good.sha256 = "B".repeat(64);
        assert_eq!(good.expected(), Some(Expected { size: 17, sha256: "b".repeat(64) }));
        good.filename = "pool/../../etc/passwd".to_owned();
        assert_eq!(good.expected(), None);
    }

    #[test]
    fn an_endless_line_is_an_error() {
        assert!(read(vec![b'x'; 2 << 20].as_slice(), |_| true).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_text_is_survived(text in "(Package|Size|Depends|x| )?:? ?[a-z0-9()=|, \n:~-]{0,200}") {
            for package in read(text.as_bytes(), |_| true).unwrap() {
                let _ = (package.kernel_dependency(), package.expected());
                prop_assert!(!package.name.is_empty());
            }
        }
    }
}
