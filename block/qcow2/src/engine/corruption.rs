//! What happens when an image turns out to be corrupt while it is in use.

use super::state::Qcow2;
use crate::format::header::Incompatible;
use block_graph::{Errno, Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether corruption has been found.
#[derive(Debug, Default)]
pub(crate) struct Corruption {
    /// The image was marked as corrupt: nothing is read or written any more.
    fatal: AtomicBool,
    /// A message was printed.
    reported: AtomicBool,
}

impl Corruption {
    /// Refuses any use after a fatal corruption.
    pub(crate) fn check(&self) -> Result<()> {
        if self.fatal.load(Ordering::Relaxed) {
            return Err(Error::new(Errno::NO_MEDIUM, "No medium found"));
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Reports that the image is corrupt. If it is open for writing, its corrupt bit is set, and it is out of use.
    pub(crate) async fn corrupt(&self, what: String) -> Error {
        let first = !self.corruption.fatal.swap(self.writable, Ordering::SeqCst);
        if self.writable && first {
            eprintln!(
                "qcow2: Marking image as corrupt: {what}; further corruption events will be suppressed"
            );
            tracing::error!("image marked as corrupt: {what}");
            let result = self.change_header(|header| header.incompatible |= Incompatible::CORRUPT).await;
            if let Err(error) = result {
                tracing::error!("the corrupt bit could not be set: {error}");
            }
        } else if !self.corruption.reported.swap(true, Ordering::SeqCst) && !self.writable {
            eprintln!(
                "qcow2: Image is corrupt: {what}; further non-fatal corruption events will be suppressed"
            );
            tracing::error!("image is corrupt: {what}");
        }
        Error::new(Errno::IO, "Input/output error")
    }
}
