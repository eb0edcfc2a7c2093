//! Replies of the transmission phase.

use super::constants::*;
use super::error::ProtocolError;
use super::reader::Reader;

/// Which headers the two sides have agreed upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderMode {
    /// Compact requests, simple replies.
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended requests and replies.
    Extended,
}

/// What a reply, or a chunk of one, begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A reply without chunks. The payload of a successful read follows.
    Simple {
        /// What went wrong, if anything.
        error: ErrorCode,
        /// The request's.
        cookie: u64,
    },
    /// A chunk of a structured or an extended reply.
    Chunk {
        /// [`REPLY_FLAG_DONE`], and others that mean nothing.
        flags: u16,
        /// What follows.
        kind: ChunkType,
        /// The request's.
        cookie: u64,
        /// The request's offset; only in extended replies.
        offset: Option<u64>,
        /// Bytes of payload that follow. At most [`MAX_PAYLOAD`] and a chunk's fixed part.
        len: u32,
    },
}

/// The longest fixed part of a chunk that comes with a payload: an offset.
const CHUNK_OVERHEAD: u32 = 8;

impl ReplyHeader {
    /// Bytes of a simple reply, and of the part of a structured one that tells which it is.
    pub const SIMPLE_SIZE: usize = 16;
    /// Bytes of a structured chunk's header.
    pub const STRUCTURED_SIZE: usize = 20;
    /// Bytes of an extended chunk's header.
    pub const EXTENDED_SIZE: usize = 32;

    /// How many bytes a header has that begins with `start`, if `mode` allows it.
    pub fn size(start: [u8; 4], mode: HeaderMode) -> Result<usize, ProtocolError> {
        match (u32::from_be_bytes(start), mode) {
            (SIMPLE_REPLY_MAGIC, HeaderMode::Simple | HeaderMode::Structured) => Ok(Self::SIMPLE_SIZE),
            (STRUCTURED_REPLY_MAGIC, HeaderMode::Structured) => Ok(Self::STRUCTURED_SIZE),
            (EXTENDED_REPLY_MAGIC, HeaderMode::Extended) => Ok(Self::EXTENDED_SIZE),
            (found, _) => Err(ProtocolError::Magic { message: "reply", found: found.into() }),
        }
    }

    /// The header that `bytes` are: as many as [`ReplyHeader::size`] says.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(bytes, "reply");
        let header = match reader.u32()? {
            SIMPLE_REPLY_MAGIC => {
                Self::Simple { error: ErrorCode::from_wire(reader.u32()?), cookie: reader.u64()? }
            }
            magic @ (STRUCTURED_REPLY_MAGIC | EXTENDED_REPLY_MAGIC) => {
                let extended = magic == EXTENDED_REPLY_MAGIC;
                let (flags, kind, cookie) =
                    (reader.u16()?, ChunkType::from_wire(reader.u16()?), reader.u64()?);
                let offset = if extended { Some(reader.u64()?) } else { None };
                let len = if extended { reader.u64()? } else { reader.u32()?.into() };
                let limit = MAX_PAYLOAD + CHUNK_OVERHEAD;
                let len = u32::try_from(len).ok().filter(|len| *len <= limit).ok_or({
                    let field = "length of a reply's chunk";
                    ProtocolError::TooLong { field, found: len, limit: limit.into() }
                })?;
                Self::Chunk { flags, kind, cookie, offset, len }
            }
            found => return Err(ProtocolError::Magic { message: "reply", found: found.into() }),
        };
        reader.end()?;
        Ok(header)
    }

    /// Appends the header to `out`. A chunk is an extended one if it has an offset.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Simple { error, cookie } => {
                out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
                out.extend_from_slice(&error.to_wire().to_be_bytes());
                out.extend_from_slice(&cookie.to_be_bytes());
            }
            Self::Chunk { flags, kind, cookie, offset, len } => {
                let magic = if offset.is_some() { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
                out.extend_from_slice(&magic.to_be_bytes());
                out.extend_from_slice(&flags.to_be_bytes());
                out.extend_from_slice(&kind.to_wire().to_be_bytes());
                out.extend_from_slice(&cookie.to_be_bytes());
                match offset {
                    Some(offset) => {
                        out.extend_from_slice(&offset.to_be_bytes());
                        out.extend_from_slice(&u64::from(len).to_be_bytes());
                    }
                    None => out.extend_from_slice(&len.to_be_bytes()),
                }
            }
        }
    }
}

/// The payload of an error chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorChunk {
    /// What went wrong.
    pub error: ErrorCode,
    /// The server's words for people.
    pub message: String,
    /// Where, in bytes from the export's beginning, if the server says so.
    pub offset: Option<u64>,
}

impl ErrorChunk {
    /// The type of chunk that the value needs.
    pub fn kind(&self) -> ChunkType {
        if self.offset.is_some() { ChunkType::ErrorOffset } else { ChunkType::Error }
    }

    /// Appends the payload to `out`; at most [`MAX_STRING`] bytes of the message.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let end = self.message.floor_char_boundary(MAX_STRING);
        out.extend_from_slice(&self.error.to_wire().to_be_bytes());
        out.extend_from_slice(&(end as u16).to_be_bytes());
        out.extend_from_slice(&self.message.as_bytes()[..end]);
        if let Some(offset) = self.offset {
            out.extend_from_slice(&offset.to_be_bytes());
        }
    }
}

/// A chunk's payload, but for the bytes of data chunks, which stay where they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Nothing.
    None,
    /// Zeroes.
    Hole {
        /// Bytes from the export's beginning.
        offset: u64,
        /// Bytes; never 0.
        len: u32,
    },
    /// An error.
    Error(ErrorChunk),
}

impl Chunk {
    /// The most bytes that the payloads have which [`Chunk::decode`] takes.
    pub const MAX_SIZE: u32 = 6 + MAX_STRING as u32 + 8;

    /// The chunk of type `kind` that `payload` is. Chunks of data and of block status are not decoded here.
    pub fn decode(kind: ChunkType, payload: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(payload, "chunk of a reply");
        if kind.is_error() {
            return Self::decode_error(kind, reader).map(Self::Error);
        }
        let chunk = match kind {
            ChunkType::None => Self::None,
            ChunkType::OffsetHole => {
                let (offset, len) = (reader.u64()?, reader.u32()?);
                if len == 0 {
                    return Err(ProtocolError::Value { field: "size of a hole", found: 0 });
                }
                Self::Hole { offset, len }
            }
            other => {
                let found = other.to_wire().into();
                return Err(ProtocolError::Value { field: "type of a chunk", found });
            }
        };
        reader.end()?;
        Ok(chunk)
    }

    /// Errors of types that are unknown have the same beginning, and something behind it.
    fn decode_error(kind: ChunkType, mut reader: Reader<'_>) -> Result<ErrorChunk, ProtocolError> {
        let error = ErrorCode::from_wire(reader.u32()?);
        if error == ErrorCode::Success {
            return Err(ProtocolError::Value { field: "error of a chunk", found: 0 });
        }
        let len = usize::from(reader.u16()?);
        let message = String::from_utf8_lossy(reader.bytes(len)?);
        let message = message.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        let offset = match kind {
            ChunkType::ErrorOffset => Some(reader.u64()?),
            _ => None,
        };
        if matches!(kind, ChunkType::Error | ChunkType::ErrorOffset) {
            reader.end()?;
        }
        Ok(ErrorChunk { error, message, offset })
    }
}

/// What of a read has come. Chunks come in any order, must lie in the read and not over each other, and fill it.
#[derive(Clone, Debug)]
pub struct ReadCoverage {
    offset: u64,
    len: u64,
    /// Ranges that have come, relative to the read's beginning: sorted, apart, never touching.
    ranges: Vec<(u64, u64)>,
}

/// More ranges that do not touch than this are a server's fault: it could make the client search and store much.
const MAX_RANGES: usize = 4096;

impl ReadCoverage {
    /// Nothing has come of a read of `len` bytes at `offset`.
    pub fn new(offset: u64, len: u64) -> Self {
        Self { offset, len, ranges: Vec::new() }
    }

    /// Notes a chunk of `len` bytes at the export's `offset`; its place relative to the read's beginning.
    pub fn add(&mut self, offset: u64, len: u64) -> Result<u64, ProtocolError> {
        let outside = ProtocolError::Coverage { what: "lie outside of it" };
        let start = offset.checked_sub(self.offset).ok_or(outside.clone())?;
        let end = start.checked_add(len).filter(|end| len > 0 && *end <= self.len).ok_or(outside)?;
        let at = self.ranges.partition_point(|range| range.0 < start);
        let before = at.checked_sub(1).map(|before| self.ranges[before]);
        let after = self.ranges.get(at).copied();
        if before.is_some_and(|range| range.1 > start) || after.is_some_and(|range| range.0 < end) {
            return Err(ProtocolError::Coverage { what: "lie over each other" });
        }
        match (before.is_some_and(|range| range.1 == start), after.is_some_and(|range| range.0 == end)) {
            (true, true) => self.ranges[at - 1].1 = self.ranges.remove(at).1,
            (true, false) => self.ranges[at - 1].1 = end,
            (false, true) => self.ranges[at].0 = start,
            (false, false) if self.ranges.len() >= MAX_RANGES => {
                return Err(ProtocolError::Coverage { what: "are too many" });
            }
            (false, false) => self.ranges.insert(at, (start, end)),
        }
        Ok(start)
    }

    /// Fails unless everything has come.
    pub fn finish(&self) -> Result<(), ProtocolError> {
        if self.len == 0 || self.ranges == [(0, self.len)] {
            return Ok(());
        }
        Err(ProtocolError::Coverage { what: "do not fill it" })
    }
}
