//! Nodes that have no format of their own: raw images, and filters that pass requests on to one node or several.
//!
//! [`register`] adds their drivers to a registry: `raw`, `null-co`, `null-aio` and `blkdebug`.
#![forbid(unsafe_code)]

mod blkdebug;
mod filter;
mod null;
mod raw;

pub use blkdebug::{Blkdebug, BlkdebugKind};
pub use null::{NullDisk, NullKind};
pub use raw::{RawImage, RawKind};

use block_graph::Registry;

/// Adds the drivers of this crate to a registry. `raw` takes any file, so that whoever is surer of one comes first.
pub fn register(registry: &mut Registry) {
    registry.add(RawKind);
    registry.add(NullKind::Co);
    registry.add(NullKind::Aio);
    registry.add(BlkdebugKind);
}
