//! The qcow2 image format, versions 2 and 3.
//!
//! [`format`] is the codec of everything that stands in an image file, without any I/O: bytes in, typed values out, and
//! back. Section names in this crate's documentation are those of QEMU's `docs/interop/qcow2.txt`, the format's
//! specification.

pub mod check;
pub mod create;
pub mod format;
pub mod measure;
pub mod storage;
