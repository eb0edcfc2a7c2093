//! Chunks of block status.

use super::constants::*;
use super::error::ProtocolError;
use super::reader::Reader;

/// A run of bytes with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; never 0.
    pub len: u64,
    /// The status, as the metadata context defines it.
    pub status: u64,
}

/// Consecutive extents of one metadata context, from the request's offset on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusChunk {
    /// The metadata context's number.
    pub context: u32,
    /// At least one extent, at most [`MAX_EXTENTS`].
    pub extents: Vec<Extent>,
}

impl StatusChunk {
    /// The most bytes of such a chunk.
    pub const MAX_SIZE: u32 = 8 + 16 * MAX_EXTENTS as u32;

    /// The chunk of type `kind` (one of the two of block status) that `payload` is.
    pub fn decode(kind: ChunkType, payload: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(payload, "chunk of block status");
        let wide = match kind {
            ChunkType::BlockStatus => false,
            ChunkType::BlockStatusExt => true,
            other => {
                let found = other.to_wire().into();
                return Err(ProtocolError::Value { field: "type of a chunk of block status", found });
            }
        };
        let context = reader.u32()?;
        let said = if wide { Some(reader.u32()?) } else { None };
        let size = if wide { 16 } else { 8 };
        let count = reader.left() / size;
        if count == 0 || said.is_some_and(|said| said as usize != count) {
            return Err(ProtocolError::Value { field: "number of extents", found: count as u64 });
        }
        if count > MAX_EXTENTS {
            let (found, limit) = (count as u64, MAX_EXTENTS as u64);
            return Err(ProtocolError::TooLong { field: "number of extents", found, limit });
        }
        let mut extents = Vec::with_capacity(count);
        for _ in 0..count {
            let extent = if wide {
                Extent { len: reader.u64()?, status: reader.u64()? }
            } else {
                Extent { len: reader.u32()?.into(), status: reader.u32()?.into() }
            };
            if extent.len == 0 {
                return Err(ProtocolError::Value { field: "length of an extent", found: 0 });
            }
            extents.push(extent);
        }
        reader.end()?;
        Ok(Self { context, extents })
    }

    /// Appends the payload to `out`, in the form of extended replies if `wide`. In the other form, an extent that is
    /// longer than its 32 bits can say is cut to a multiple of 64 KiB, and nothing follows it.
    pub fn encode(&self, wide: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.context.to_be_bytes());
        if wide {
            out.extend_from_slice(&(self.extents.len() as u32).to_be_bytes());
        }
        for extent in &self.extents {
            if wide {
                out.extend_from_slice(&extent.len.to_be_bytes());
                out.extend_from_slice(&extent.status.to_be_bytes());
                continue;
            }
            let len = u32::try_from(extent.len).unwrap_or(0xffff_0000);
            out.extend_from_slice(&len.to_be_bytes());
            out.extend_from_slice(&(extent.status as u32).to_be_bytes());
            if u64::from(len) < extent.len {
                return;
            }
        }
    }
}
