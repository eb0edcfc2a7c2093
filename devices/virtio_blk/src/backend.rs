//! What is behind a block device.

use std::io;
use virtio::GuestSlice;

/// What a block device's sectors are stored in.
///
/// Offsets and lengths are in bytes; the device has checked that they are multiples of 512 and lie within
/// [`BlockBackend::size_bytes`]. All methods may be called from several threads at once and return when the
/// work is done.
pub trait BlockBackend: Send + Sync {
    /// The size in bytes. It may change, in which case the device is to be told.
    fn size_bytes(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Fills `buffers`, one after the other, with what is at `offset`.
    ///
    /// # Errors
    /// The host's; any part of the buffers may then have been written.
    fn read_at(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()>;

    /// Writes what is in `buffers`, one after the other, to `offset`.
    ///
    /// # Errors
    /// The host's; any part may then have been written.
    fn write_at(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()>;

    /// Returns when everything written before is on stable storage.
    ///
    /// # Errors
    /// The host's; what was written since the last successful flush may be lost.
    fn flush(&self) -> io::Result<()>;

    /// The guest no longer needs these bytes. They may read as anything afterwards.
    ///
    /// # Errors
    /// The host's; [`io::ErrorKind::Unsupported`] if there is no way to do so.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes these bytes zero. `may_unmap` allows giving the space back to the host.
    ///
    /// # Errors
    /// The host's.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;
}
