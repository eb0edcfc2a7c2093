//! Files and block devices of the host as nodes: the drivers `file`, `host_device` and `host_cdrom`.
//!
//! A node takes locks on the file that QEMU's programs and ours understand ([`lock`]); reads and writes past the page
//! cache at any offset ([`direct`]); makes ranges zero and gives space back by what the file system has ([`zero`]); and
//! knows where a file has holes ([`status`]).
#![forbid(unsafe_code)]

mod create;
mod direct;
mod driver;
mod fallocate;
mod host_file;
mod kind;
mod lock;
mod open;
mod status;
mod truncate;
mod zero;

pub use host_file::HostFile;
pub use kind::{FileKind, register};
