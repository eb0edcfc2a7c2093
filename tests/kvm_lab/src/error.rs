//! Why the lab could not run.

use image_store::StoreError;
use std::path::{Path, PathBuf};

/// Why the lab could not run.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// No command was given.
    #[error("there is no command to run in the lab")]
    NoCommand,
    /// QEMU is not installed.
    #[error("{0} is not installed; on Debian: apt-get install qemu-system-x86")]
    NoQemu(&'static str),
    /// The kernel cannot be had.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file cannot be read or written.
    #[error("{action} {}: {source}", path.display())]
    File {
        /// What was done.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The host's error.
        source: std::io::Error,
    },
    /// A file that is copied in is too large.
    #[error("{} has {bytes} bytes, more than fit into the lab", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// A path within the lab is not absolute.
    #[error("{} is no absolute path in the lab", .0.display())]
    NotAbsolute(PathBuf),
    /// A program's libraries are not there.
    #[error("{} needs libraries that are not there: {missing}", path.display())]
    Libraries {
        /// The program.
        path: PathBuf,
        /// Their names.
        missing: String,
    },
    /// QEMU cannot be started.
    #[error("starting {}: {source}", path.display())]
    Start {
        /// QEMU's program.
        path: PathBuf,
        /// The host's error.
        source: std::io::Error,
    },
    /// The time is over.
    #[error("the lab did not end within {seconds} s; its last lines:\n{tail}")]
    TimeLimit {
        /// The limit.
        seconds: u64,
        /// What the console showed last.
        tail: String,
    },
    /// The lab ended before the command did.
    #[error("the lab ended ({status}) before its command did; its last lines:\n{tail}")]
    Died {
        /// How QEMU ended.
        status: String,
        /// What the console showed last.
        tail: String,
    },
}

impl LabError {
    /// Makes an error of the host's one.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}
