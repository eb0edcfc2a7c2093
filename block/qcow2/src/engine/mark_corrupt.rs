//! What happens when an image turns out to be corrupt while it is in use.

use super::state::Qcow2;
use crate::format::header::Incompatible;
use block_graph::{Errno, Error};
use std::sync::atomic::Ordering;

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
