//! Nodes that have no format of their own: raw images, and filters that pass requests on to one node or several.
//!
//! [`register`] adds their drivers to a registry: `raw`, `null-co`, `null-aio`, `blkdebug`, `copy-on-read`, `compress`,
//! `quorum`, and `throttle` (without groups: [`ThrottleKind`]).
#![forbid(unsafe_code)]

mod blkdebug;
mod compress;
mod copy_on_read;
mod filter;
mod null;
mod quorum;
mod raw;
mod throttle;

pub use blkdebug::{Blkdebug, BlkdebugKind};
pub use compress::CompressKind;
pub use copy_on_read::CopyOnReadKind;
pub use null::{NullDisk, NullKind};
pub use quorum::{Quorum, QuorumKind};
pub use raw::{RawImage, RawKind};
pub use throttle::{Direction, Limit, ThrottleGroup, ThrottleGroups, ThrottleKind, ThrottleLimits};

use block_graph::Registry;

/// Adds the drivers of this crate to a registry. `raw` takes any file, so that whoever is surer of one comes first.
pub fn register(registry: &mut Registry) {
    registry.add(RawKind);
    registry.add(NullKind::Co);
    registry.add(NullKind::Aio);
    registry.add(BlkdebugKind);
    registry.add(CopyOnReadKind);
    registry.add(CompressKind);
    registry.add(QuorumKind);
    registry.add(ThrottleKind::default());
}
