//! Nodes that disks are made of.
//!
//! A [`Node`] is a [`Driver`] (a host file, an image format, a filter, a connection to a server) in a shell that all
//! drivers have in common: requests in flight, drain, dirty bitmaps, statistics. Nodes hang together by [`Edge`]s. What
//! images have beyond requests (snapshots, check, amendments) is [`Image`].
//!
//! Nodes are opened by [`OpenContext::open`] from [`Options`], with the [`DriverKind`]s of a [`Registry`]. A file that
//! an image names is opened only if the context's [`OpenRule`] lets it.
//!
//! Requests are futures that stay on the thread whose `io_loop` began them; nodes may be used from several threads.

mod backend;
mod cache_mode;
mod chain;
mod detect_zeroes;
mod dirty_bitmap;
mod driver;
mod edge;
mod error;
mod filename;
mod graph;
mod image;
mod node;
mod open;
mod options;
mod range_lock;
mod size;
mod status;
#[cfg(test)]
mod tests;
mod watcher;

pub use async_trait::async_trait;
pub use backend::{Admission, Backend, Direction};
pub use cache_mode::CacheMode;
pub use chain::{Depth, skip_filters, status_above};
pub use detect_zeroes::DetectZeroes;
pub use dirty_bitmap::{DirtyBitmap, Granularity};
pub use driver::{Driver, Limits, Preallocation, Truncate, WriteFlags, ZeroFlags};
pub use edge::{Edge, Role};
pub use error::{Errno, Error, Result};
pub use filename::{full_filename, full_filename_beside, protocol_prefix};
pub use graph::Quiesced;
pub use image::{
    BitmapInfo, CheckFix, CheckReport, Image, ImageInfo, Log, MeasureReport, Progress, SnapshotInfo,
};
pub use node::{Drained, Entered, MAX_LEN, Node, NodeRef};
pub use open::{
    AllowAll, DriverKind, OpenContext, OpenFlags, OpenRule, OptionKind, OptionSpec, Reference, RefuseAll,
    Registry, Secrets, is_node_name,
};
pub use options::{Options, OptionsError, Value};
pub use range_lock::{RangeGuard, RangeLock};
pub use size::{SizeError, parse_size, size_option};
pub use status::BlockStatus;
pub use watcher::{Change, Next, WriteWatcher};
