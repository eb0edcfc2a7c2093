//! The signed index of a release (Debian's repository format, "Release" files).

use std::collections::HashMap;

use crate::fetch::{Expected, Mirror};
use crate::signature::split_cleartext;
use crate::{Release, SignatureVerifier, StoreError};

const INRELEASE_LIMIT: u64 = 8 << 20;

/// A release's files, as its signed index lists them.
#[derive(Debug)]
pub(crate) struct ReleaseIndex {
    url: String,
    folder: String,
    files: HashMap<String, Expected>,
    by_hash: bool,
}

impl ReleaseIndex {
    /// Fetches and verifies the index of `release`.
    pub(crate) fn fetch(
        mirror: &Mirror<'_>,
        release: Release,
        verifier: &dyn SignatureVerifier,
    ) -> Result<Self, StoreError> {
        let folder = format!("dists/{}", release.codename());
        let path = format!("{folder}/InRelease");
        let url = mirror.url(&path);
        let bytes = mirror.get(&path, &format!("Fetching the index of {release}"), INRELEASE_LIMIT)?;
        let signature_error = |source| StoreError::Signature { url: url.clone(), source };
        let file = String::from_utf8(bytes)
            .map_err(|_| signature_error(crate::SignatureError::Malformed("it isn't text")))?;
        let (text, signature) = split_cleartext(&file).map_err(signature_error)?;
        verifier.verify(text.as_bytes(), signature.as_bytes()).map_err(signature_error)?;
        Self::parse(&text, url, folder, release)
    }

    pub(crate) fn parse(
        text: &str,
        url: String,
        folder: String,
        release: Release,
    ) -> Result<Self, StoreError> {
        let wrong = |reason: String| StoreError::Release { url: url.clone(), reason };
        let field = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
        };
        let codename = field("Codename").unwrap_or("");
        if codename != release.codename() {
            return Err(wrong(format!("it's the index of {codename:?}, not of {}", release.codename())));
        }
        let mut files = HashMap::new();
        let list = text.lines().skip_while(|line| line.trim_end() != "SHA256:").skip(1);
        for line in list.take_while(|line| line.starts_with(' ')) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [sha256, size, name] = words[..] else {
                return Err(wrong(format!("the line {line:?} isn't a checksum, a size and a name")));
            };
            let digits = sha256.len() == 64 && sha256.bytes().all(|byte| byte.is_ascii_hexdigit());
            let size = size.parse().ok().filter(|_| digits);
            let size = size.ok_or_else(|| wrong(format!("the line {line:?} has no SHA-256 and size")))?;
            files.insert(name.to_owned(), Expected { size, sha256: sha256.to_ascii_lowercase() });
        }
        if files.is_empty() {
            return Err(wrong("it lists no files with SHA-256".to_owned()));
        }
        let by_hash = field("Acquire-By-Hash") == Some("yes");
        Ok(Self { url, folder, files, by_hash })
    }

    /// Fetches the list of the packages in `main`, in the smallest form that's there, and says by its
    /// name's ending how it's compressed.
    pub(crate) fn fetch_packages(&self, mirror: &Mirror<'_>) -> Result<(Vec<u8>, &'static str), StoreError> {
        const LIMIT: u64 = 128 << 20;
        let mut missing = None;
        for ending in [".xz", ".gz", ""] {
            let name = format!("main/binary-amd64/Packages{ending}");
            let Some(expected) = self.files.get(&name) else { continue };
            let plain = format!("{}/{name}", self.folder);
            let hashed = format!("{}/main/binary-amd64/by-hash/SHA256/{}", self.folder, expected.sha256);
            for path in self.by_hash.then_some(hashed).into_iter().chain([plain]) {
                match mirror.get_checked(&path, "Fetching the list of packages", expected, LIMIT) {
                    Err(error @ StoreError::NotThere { .. }) => missing = Some(error),
                    result => return result.map(|bytes| (bytes, ending)),
                }
            }
        }
        Err(missing.unwrap_or_else(|| StoreError::Release {
            url: self.url.clone(),
            reason: "it lists no packages for amd64".to_owned(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ReleaseIndex, StoreError> {
        ReleaseIndex::parse(text, "u".into(), "dists/trixie".into(), Release::Trixie)
    }

    #[test]
    fn files_come_from_the_list_of_sha256() {
        let hash = "A".repeat(64);
        let text = format!(
            "Codename: trixie\nAcquire-By-Hash: yes\nMD5Sum:\n 00 5 x\nSHA256:\n {hash} 17 main/x\nSHA512:\n 1 2 y\n"
        );
        let index = parse(&text).unwrap();
        assert_eq!(index.files.len(), 1);
        assert_eq!(index.files["main/x"], Expected { size: 17, sha256: "a".repeat(64) });
        assert!(index.by_hash);
    }

    #[test]
    fn a_wrong_release_or_list_is_refused() {
        let hash = "a".repeat(64);
        for text in [
            format!("Codename: bookworm\nSHA256:\n {hash} 17 x\n"),
            "Codename: trixie\n".to_owned(),
            format!("Codename: trixie\nSHA256:\n {hash} x x\n"),
            "Codename: trixie\nSHA256:\n 12 17 x\n".to_owned(),
            format!("Codename: trixie\nSHA256:\n {hash} 17\n"),
        ] {
            assert!(matches!(parse(&text), Err(StoreError::Release { .. })), "{text}");
        }
    }
}
