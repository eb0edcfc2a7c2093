//! Block jobs on disks in use, and everything else that changes a VM's disks while it runs.
//!
//! [`Storage`] has the nodes, their users ([`block_graph::Backend`]) and the jobs of a VM. Its methods are QMP's commands
//! with their parameters as types ([`parameters`]; names and meanings are those of QEMU's QAPI schema), may be called
//! from any thread, and return when the command is done; errors' texts are those that a monitor shows. Jobs go on by
//! themselves on a thread of their own, and tell a listener what happens as [`Event`]s.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # fn open() -> (block_graph::OpenContext, block_graph::NodeRef) { unimplemented!() }
//! let (context, node) = open();
//! let storage = jobs::Storage::new(context, Arc::new(|event| println!("{event:?}")))?;
//! storage.attach(block_graph::Backend::new("virtio0", node))?;
//! let stream = jobs::parameters::BlockStream { device: "virtio0".into(), ..Default::default() };
//! storage.block_stream(stream)?;
//! for job in storage.query_jobs()? {
//!     println!("{}: {} of {}", job.id, job.offset, job.len);
//! }
//! storage.close()?;
//! # Ok::<(), block_graph::Error>(())
//! ```
//!
//! How it works: a user's requests go to the node that his root edge leads to when they begin. A job that has to see
//! them is a watcher of that node ([`block_graph::WriteWatcher`]); the graph is changed with all nodes above the place
//! drained ([`block_graph::Quiesced`]), so that no request is half-way through.

mod backup;
mod bitmaps;
mod blockers;
mod commit;
mod copy;
mod create;
mod event;
mod feed;
mod inner;
mod job;
mod lifecycle;
mod mirror;
mod nodes;
pub mod parameters;
mod snapshot;
mod storage;
mod stream;
mod throttle;
mod transaction;
mod transfer;
mod worker;

pub use bitmaps::BitmapStatus;
pub use block_filters::{Limit, ThrottleLimits};
pub use event::{ErrorAction, Event, IoStatus, JobProgress, JobStatus, JobType};
pub use job::JobInfo;
pub use storage::Storage;
