//! What can go wrong with the store and what it fetches.

use std::io;
use std::path::PathBuf;

/// Why an image isn't to be had.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No place for the store is known.
    #[error(
        "where to keep images is unknown: none of VIREO_IMAGES, XDG_DATA_HOME and HOME names an absolute path"
    )]
    NoHome,
    /// The text isn't the name of an image.
    #[error(
        "there's no image {name:?}: accepted are debian, debian:12, debian:13 and, for the kernel with all drivers, debian:12:generic and debian:13:generic"
    )]
    UnknownImage {
        /// What was asked for.
        name: String,
    },
    /// A file or folder of the store couldn't be used.
    #[error("{action} {}: {source}", path.display())]
    File {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The host's package sources name no Debian mirror.
    #[error("this host's package sources (in {}) name no Debian mirror; name one with --mirror URL", folder.display())]
    NoMirror {
        /// Where was looked.
        folder: PathBuf,
    },
    /// Not an address that can be fetched from.
    #[error("the mirror {url:?} isn't an http or https address")]
    BadMirror {
        /// The address.
        url: String,
    },
    /// A transfer failed.
    #[error("fetching {url}: {reason}")]
    Fetch {
        /// The address.
        url: String,
        /// What happened.
        reason: String,
    },
    /// The mirror doesn't have the file.
    #[error("{url} isn't there (status {status})")]
    NotThere {
        /// The address.
        url: String,
        /// The answer's status.
        status: u16,
    },
    /// A file isn't what the index says.
    #[error("{url} is damaged: {what} is {found}, the index says {expected}")]
    Damaged {
        /// The address.
        url: String,
        /// The property that differs.
        what: &'static str,
        /// What was received.
        found: String,
        /// What was promised.
        expected: String,
    },
    /// More bytes than such a file can have.
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// The file.
        what: String,
        /// The limit.
        limit: u64,
    },
    /// The signature of the release file couldn't be checked or is wrong.
    #[error("the signature of {url}: {source}")]
    Signature {
        /// The signed file.
        url: String,
        /// What's wrong.
        source: SignatureError,
    },
    /// The release file is signed but for something else, or lacks a part.
    #[error("{url}: {reason}")]
    Release {
        /// The file.
        url: String,
        /// What's wrong.
        reason: String,
    },
    /// A package isn't in the release.
    #[error("{release} has no package {package}")]
    NoPackage {
        /// The release.
        release: String,
        /// The package.
        package: String,
    },
    /// A package's contents aren't as they should be.
    #[error("package {package}: {reason}")]
    Package {
        /// The package.
        package: String,
        /// What's wrong.
        reason: String,
    },
}

/// Why a signature isn't accepted.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// There's nothing to check it with.
    #[error("can't be checked: neither gpgv nor sqv is installed (Debian packages gpgv, sqv)")]
    NoVerifier,
    /// The keys of Debian's archive aren't there.
    #[error(
        "can't be checked: no Debian archive keyring at {tried} (Debian package debian-archive-keyring; VIREO_DEBIAN_KEYRING names another place)"
    )]
    NoKeyring {
        /// Where was looked.
        tried: String,
    },
    /// The program that checks couldn't be run.
    #[error("can't be checked: running {program}: {source}")]
    Verifier {
        /// The program.
        program: String,
        /// Why not.
        source: io::Error,
    },
    /// The file isn't a cleartext-signed one.
    #[error("isn't well-formed: {0}")]
    Malformed(&'static str),
    /// No key of the keyring made it, or the text was changed.
    #[error("is not valid: {0}")]
    Bad(String),
}
