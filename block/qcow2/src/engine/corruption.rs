//! Whether an image turned out to be corrupt while it is in use.

use block_graph::{Errno, Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether corruption has been found.
#[derive(Debug, Default)]
pub(crate) struct Corruption {
    /// The image was marked as corrupt: nothing is read or written any more.
    pub(crate) fatal: AtomicBool,
    /// A message was printed.
    pub(crate) reported: AtomicBool,
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
