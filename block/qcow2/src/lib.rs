//! The qcow2 image format, versions 2 and 3.
//!
//! [`format`] is the codec of everything that stands in an image file, without any I/O: bytes in, typed values out, and
//! back. Section names in this crate's documentation are those of QEMU's `docs/interop/qcow2.txt`, the format's
//! specification.

mod amend;
mod bitmaps;
pub mod check;
pub mod create;
mod driver;
mod engine;
pub mod format;
pub mod measure;
mod open;
mod parameters;
mod repair;
pub mod storage;

pub use driver::Qcow2Driver;
pub use open::Qcow2Kind;
