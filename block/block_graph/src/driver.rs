//! What a driver does.

use crate::{BlockStatus, Edge, Error, Image, Options, Result};
use async_trait::async_trait;
use bitflags::bitflags;
use io_loop::IoVec;
use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

bitflags! {
    /// How a write is to be done.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct WriteFlags: u8 {
        /// The data are on stable storage when the request ends.
        const FUA = 1;
        /// The data are to be stored compressed: whole clusters, or what is left at the end of the node.
        const COMPRESSED = 2;
    }

    /// How a range is to be made zero.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct ZeroFlags: u8 {
        /// It is on stable storage when the request ends.
        const FUA = 1;
        /// The space may be given back.
        const MAY_UNMAP = 2;
        /// Not by writing zeroes: where there is no better way the request fails with `NOT_SUPPORTED`.
        const NO_FALLBACK = 4;
    }
}

/// What requests a driver likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths that are multiples of this cost least, in bytes: a power of two. Others are served.
    pub request_alignment: u32,
    /// Addresses that are multiples of this cost least, in bytes: a power of two.
    pub memory_alignment: u32,
    /// The most bytes of one read or write; 0 if there is no limit. The shell divides longer ones.
    pub max_transfer: u64,
    /// The bytes of a read or write that go best; 0 if there is nothing to say.
    pub optimal_transfer: u64,
    /// What ranges should be aligned to for [`Driver::write_zeroes`] to be cheap; 0 if there is nothing to say.
    pub write_zeroes_alignment: u64,
    /// The most bytes of one [`Driver::write_zeroes`]; 0 if there is no limit. The shell divides longer ones.
    pub max_write_zeroes: u64,
    /// What ranges should be aligned to for [`Driver::discard`] to have an effect; 0 if there is nothing to say.
    pub discard_alignment: u64,
    /// The most bytes of one [`Driver::discard`]; 0 if there is no limit. The shell divides longer ones.
    pub max_discard: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_alignment: 1,
            memory_alignment: 1,
            max_transfer: 0,
            optimal_transfer: 0,
            write_zeroes_alignment: 0,
            max_write_zeroes: 0,
            discard_alignment: 0,
            max_discard: 0,
        }
    }
}

/// How much is allocated beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// A format's tables.
    Metadata,
    /// Space of the file system, not written to.
    Falloc,
    /// All, written as zeroes.
    Full,
}

impl Preallocation {
    /// All of them with the names that options have for them.
    pub const NAMES: [(&'static str, Self); 4] =
        [("off", Self::Off), ("metadata", Self::Metadata), ("falloc", Self::Falloc), ("full", Self::Full)];

    /// The one that `name` names.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, mode)| *mode)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, mode)| *mode == self).map_or("off", |(name, _)| name)
    }
}

/// How a node's length is to change.
#[derive(Debug, Clone, Copy, Default)]
pub struct Truncate {
    /// The length must be exactly this; otherwise it may stay longer (block devices).
    pub exact: bool,
    /// What of the new part is allocated.
    pub preallocation: Preallocation,
    /// The new part must read as zero, even where a backing node is longer.
    pub zero: bool,
}

/// A host file, an image format, a filter or a connection, as a node of the graph.
///
/// All offsets and lengths are in bytes and need no alignment. Requests come through the shell ([`crate::Node`]), which
/// answers those of length 0, fills what is beyond the end of a read with zeroes, refuses writes to read-only nodes and
/// beyond the end of nodes that do not grow, and divides requests by the limits. Any number of requests may be in
/// flight, from several threads. A request whose future is dropped may have happened in part.
#[allow(clippy::len_without_is_empty, reason = "the shell has it")]
#[async_trait(?Send)]
pub trait Driver: Debug + Send + Sync + Any {
    /// The driver's name in options, such as "qcow2".
    fn format_name(&self) -> &'static str;

    /// The length in bytes.
    fn len(&self) -> u64;

    /// Is told once the name of its node, for messages.
    fn named(&self, _node: &str) {}

    /// What requests it likes.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Whether writes past the end make it longer.
    fn grows(&self) -> bool {
        false
    }

    /// Whether it can be written, as it was opened: some find that they must not.
    fn writable(&self) -> bool {
        true
    }

    /// Whether reads see another node's bytes as they are, and nothing of its own: `raw` without an offset, filters.
    /// The edge that leads there has the role `Filtered`, or `File` for `raw`.
    fn is_filter(&self) -> bool {
        false
    }

    /// The edges to the nodes that it stands on.
    fn edges(&self) -> Vec<Arc<Edge>> {
        Vec::new()
    }

    /// Fills `into` with what is at `offset`.
    ///
    /// # Errors
    /// Any part of `into` may have been written.
    async fn read(&self, offset: u64, into: &IoVec) -> Result<()>;

    /// Writes `from` to `offset`.
    ///
    /// # Errors
    /// Any part may have been written.
    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()>;

    /// Makes a range zero. A driver that has no way of its own returns `NOT_SUPPORTED`, upon which the shell writes
    /// zeroes unless the flags forbid it.
    ///
    /// # Errors
    /// Any part may be zero.
    async fn write_zeroes(&self, _offset: u64, _len: u64, _flags: ZeroFlags) -> Result<()> {
        Err(Error::errno_only(crate::Errno::NOT_SUPPORTED))
    }

    /// The bytes are no longer needed. They may read as anything. What a driver cannot discard stays as it is.
    ///
    /// # Errors
    /// Any part may be gone.
    async fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::errno_only(crate::Errno::NOT_SUPPORTED))
    }

    /// Returns when everything that was written by requests that had ended is on stable storage.
    ///
    /// # Errors
    /// What was written since the last successful flush may be lost.
    async fn flush(&self) -> Result<()>;

    /// What a range is; see [`BlockStatus`]. With `precise` unset, "data" is a right answer for what takes long to find
    /// out.
    ///
    /// # Errors
    /// The host's, or the format's.
    async fn block_status(&self, offset: u64, len: u64, _precise: bool) -> Result<BlockStatus> {
        let _ = offset;
        Ok(BlockStatus::data(len))
    }

    /// Changes the length.
    ///
    /// # Errors
    /// `NOT_SUPPORTED` if it cannot be changed. The length is then as before.
    async fn truncate(&self, _len: u64, _how: Truncate) -> Result<()> {
        Err(Error::unsupported("Image format driver does not support resize"))
    }

    /// Writes what must be written before the node goes: called once, after the last request.
    ///
    /// # Errors
    /// What was written since the last flush may be lost.
    async fn close(&self) -> Result<()> {
        Ok(())
    }

    /// Takes up changed options: whether it may be written, cache modes. Options that it has not got are an error.
    ///
    /// # Errors
    /// `NOT_SUPPORTED` for what cannot be changed; nothing has changed then.
    async fn reopen(&self, _options: &mut Options, _flags: crate::OpenFlags) -> Result<()> {
        Err(Error::unsupported(format!(
            "Block format '{}' used by node does not support reopening files",
            self.format_name()
        )))
    }

    /// What image formats have beyond requests.
    fn image(&self) -> Option<&dyn Image> {
        None
    }

    /// The bytes that it takes on the host, if that can be known.
    fn allocated_size(&self) -> Option<u64> {
        None
    }

    /// A file name that opens it again by itself, if there is one: of protocols, their own; of formats, their file's.
    fn filename(&self) -> Option<String> {
        self.edges().iter().find(|edge| edge.role() == crate::Role::File)?.node().filename()
    }

    /// The options that open it again, as far as they are more than the file name says: for `json:` names.
    fn open_options(&self) -> Options {
        Options::default()
    }

    /// Says that an image format is at a point of its work that has a name: filters that inject errors listen.
    fn debug_event(&self, _event: &'static str) {}

    /// The driver as its own type.
    fn as_any(&self) -> &dyn Any;
}
