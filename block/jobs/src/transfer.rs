//! What brings ranges of a node to where they are to be.

use block_graph::{Error, NodeRef, async_trait};
use std::ops::Range;

/// On which side a copy failed.
#[derive(Debug, Clone)]
pub(crate) enum CopyError {
    Read(Error),
    Write(Error),
}

impl CopyError {
    pub(crate) fn is_write(&self) -> bool {
        matches!(self, Self::Write(_))
    }

    pub(crate) fn error(&self) -> &Error {
        match self {
            Self::Read(error) | Self::Write(error) => error,
        }
    }
}

/// Brings a range to where it is to be.
#[async_trait(?Send)]
pub(crate) trait Transfer: Send + Sync {
    /// The node that the range is of.
    fn source(&self) -> &NodeRef;

    /// Brings over a range of whole units, or up to the source's end. The caller has entered the source, and nobody else
    /// brings over or changes any of it.
    async fn transfer(&self, range: Range<u64>) -> Result<(), CopyError>;
}
