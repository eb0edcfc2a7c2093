//! What stands in an image file, as typed values: no I/O.
//!
//! All numbers in the file are big endian. What is parsed is untrusted: every length and offset that a parser returns
//! has been checked against the bounds that the format and this implementation have, and the memory it takes is bounded
//! by the length of the bytes that it was given.

pub mod bitmap;
mod bytes;
pub mod entry;
mod error;
pub mod extensions;
pub mod feature_name;
mod geometry;
pub mod header;
pub mod refcount;
pub mod snapshot;

pub use error::{Qcow2Error, Table};
pub use extensions::Extensions;
pub use geometry::Geometry;
pub use header::Header;

/// The largest table of level 1, in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// The largest refcount table, in bytes.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The most internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// The largest snapshot table, in bytes.
pub const MAX_SNAPSHOT_TABLE_BYTES: u64 = 1024 * MAX_SNAPSHOTS as u64;
/// The most extra data of one snapshot, in bytes.
pub const MAX_SNAPSHOT_EXTRA_DATA: u32 = 1024;
/// The most persistent bitmaps.
pub const MAX_BITMAPS: u32 = 65535;
/// The largest bitmap directory, in bytes.
pub const MAX_BITMAP_DIRECTORY_BYTES: u64 = MAX_BITMAPS as u64 * 1024;
/// The longest backing file name, in bytes.
pub const MAX_BACKING_NAME: usize = 1023;
/// The fewest bits of a cluster's size: 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// The most bits of a cluster's size: 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Subclusters in a cluster of an image with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;
