//! Which Debian mirror the host is configured with: apt's one-line and deb822 sources (sources.list(5)).

use std::fs;
use std::path::Path;

use crate::{Release, StoreError};

/// Suites that a Debian mirror has. Another distribution's mirror has none of these.
const DEBIAN_SUITES: &[&str] =
    &["bullseye", "bookworm", "trixie", "forky", "oldstable", "stable", "testing", "unstable", "sid"];

/// One address with the suites that are fetched from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    uri: String,
    suites: Vec<String>,
}

/// The address of a mirror that the host fetches a Debian release from: one that serves `release`, or else
/// any other one, since every mirror has all of them. `root` is the host's root folder.
///
/// # Errors
/// The sources name none.
pub fn host_mirror(root: &Path, release: Release) -> Result<String, StoreError> {
    let apt = root.join("etc/apt");
    let sources = read_sources(&apt);
    let usable = |wanted: &dyn Fn(&str) -> bool| {
        sources
            .iter()
            .filter(|source| source.suites.iter().any(|suite| wanted(suite)))
            .find_map(|source| web_address(root, &source.uri))
    };
    usable(&|suite| suite == release.codename())
        .or_else(|| usable(&|suite| DEBIAN_SUITES.contains(&suite)))
        .ok_or(StoreError::NoMirror { folder: apt })
}

/// All sources of binary packages, in apt's order.
fn read_sources(apt: &Path) -> Vec<Source> {
    let mut sources = fs::read_to_string(apt.join("sources.list")).map_or(Vec::new(), |text| one_line(&text));
    let mut files: Vec<_> = fs::read_dir(apt.join("sources.list.d"))
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    files.sort();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(one_line(&text)),
            Some("sources") => sources.extend(deb822(&text)),
            _ => {}
        }
    }
    sources
}

/// `deb [options] uri suite component…`
pub(crate) fn one_line(text: &str) -> Vec<Source> {
    text.lines()
        .filter_map(|line| {
            let line = line.split('#').next()?.trim().strip_prefix("deb")?;
            let mut rest = line.strip_prefix([' ', '\t'])?.trim_start();
            if let Some(options) = rest.strip_prefix('[') {
                rest = options.split_once(']')?.1;
            }
            let mut words = rest.split_whitespace();
            let uri = words.next()?.to_owned();
            Some(Source { uri, suites: vec![words.next()?.to_owned()] })
        })
        .collect()
}

/// Stanzas of fields, where a line that starts with a space continues the one before.
pub(crate) fn deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let field = |name: &str| {
            let is_it = |line: &&str| {
                line.split_once(':').is_some_and(|(key, _)| key.trim_end().eq_ignore_ascii_case(name))
            };
            let at = stanza.iter().position(is_it)?;
            let first = stanza[at].split_once(':')?.1;
            let more = stanza[at + 1..].iter().take_while(|line| line.starts_with([' ', '\t']));
            Some(
                std::iter::once(first)
                    .chain(more.copied())
                    .flat_map(str::split_whitespace)
                    .map(str::to_owned)
                    .collect::<Vec<String>>(),
            )
        };
        let off = field("Enabled").is_some_and(|value| value.first().is_some_and(|word| word == "no"));
        let binary = field("Types").is_some_and(|types| types.iter().any(|kind| kind == "deb"));
        if off || !binary {
            continue;
        }
        let suites = field("Suites").unwrap_or_default();
        for uri in field("URIs").unwrap_or_default() {
            sources.push(Source { uri, suites: suites.clone() });
        }
    }
    sources
}

/// The http or https address behind a source's URI. `mirror+file:` names a list of them, as Debian's cloud
/// images have it.
fn web_address(root: &Path, uri: &str) -> Option<String> {
    let is_web = |address: &str| address.starts_with("http://") || address.starts_with("https://");
    if is_web(uri) {
        return Some(uri.trim_end_matches('/').to_owned());
    }
    let path = uri.strip_prefix("mirror+file:")?.trim_start_matches('/');
    let list = fs::read_to_string(root.join(path)).ok()?;
    list.lines()
        .filter_map(|line| line.split_whitespace().next())
        .find(|word| is_web(word))
        .map(|word| word.trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc/apt/sources.list.d")).unwrap();
        fs::create_dir_all(root.path().join("etc/apt/mirrors")).unwrap();
        for (path, text) in files {
            fs::write(root.path().join("etc/apt").join(path), text).unwrap();
        }
        root
    }

    #[test]
    fn both_formats_are_read() {
        let one_line = host(&[(
            "sources.list",
            "# deb http://commented.example/debian trixie main\n\
             deb cdrom:[Debian]/ trixie main\n\
             deb-src http://source.example/debian trixie main\n\
             deb http://security.example/debian-security bookworm-security main\n\
             deb [arch=amd64 signed-by=/x] https://mirror.example/debian/ bookworm main # here\n",
        )]);
        let found = host_mirror(one_line.path(), Release::Bookworm).unwrap();
        assert_eq!(found, "https://mirror.example/debian");
        // Another release from the same mirror.
        assert_eq!(host_mirror(one_line.path(), Release::Trixie).unwrap(), found);

        let stanzas = host(&[(
            "sources.list.d/debian.sources",
            "Types: deb\nURIs: http://off.example/debian\nSuites: trixie\nEnabled: no\n\n\
             Types: deb deb-src\n# comment\nURIs:\n http://first.example/debian\n http://second.example/debian\n\
             Suites: bookworm bookworm-updates\nComponents: main\n\n\
             Types: deb\nURIs: http://exact.example/debian\nSuites: trixie\n",
        )]);
        assert_eq!(host_mirror(stanzas.path(), Release::Bookworm).unwrap(), "http://first.example/debian");
        assert_eq!(host_mirror(stanzas.path(), Release::Trixie).unwrap(), "http://exact.example/debian");
    }

    #[test]
    fn a_list_of_mirrors_is_followed() {
        let root = host(&[
            (
                "sources.list.d/debian.sources",
                "Types: deb\nURIs: mirror+file:///etc/apt/mirrors/debian.list\nSuites: trixie\n",
            ),
            ("mirrors/debian.list", "https://listed.example/debian\tpriority:1\n"),
        ]);
        assert_eq!(host_mirror(root.path(), Release::Trixie).unwrap(), "https://listed.example/debian");
    }

    #[test]
    fn another_distribution_has_no_debian_mirror() {
        let root = host(&[("sources.list", "deb http://archive.example/ubuntu noble main\n")]);
        let error = host_mirror(root.path(), Release::Trixie).unwrap_err().to_string();
        assert!(error.contains("--mirror"), "{error}");
        assert!(host_mirror(Path::new("/nonexistent"), Release::Trixie).is_err());
    }
}
