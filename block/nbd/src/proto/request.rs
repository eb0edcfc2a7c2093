//! Requests of the transmission phase.

use super::constants::*;
use super::error::ProtocolError;
use super::option::expect_magic;
use super::reader::Reader;
use super::reply::HeaderMode;

/// A request without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How.
    pub flags: CommandFlags,
    /// What.
    pub command: Command,
    /// What the reply will be called by.
    pub cookie: u64,
    /// Bytes from the export's beginning.
    pub offset: u64,
    /// Bytes: of the payload if [`Request::payload`] says so, of the export otherwise.
    pub len: u64,
}

impl Request {
    /// Bytes of a compact request on the wire.
    pub const COMPACT_SIZE: usize = 28;
    /// Bytes of an extended request on the wire.
    pub const EXTENDED_SIZE: usize = 32;

    /// Bytes of a request's header in `mode`.
    pub const fn size(mode: HeaderMode) -> usize {
        match mode {
            HeaderMode::Extended => Self::EXTENDED_SIZE,
            HeaderMode::Simple | HeaderMode::Structured => Self::COMPACT_SIZE,
        }
    }

    /// The request that `bytes` are: [`Request::size`] of them, or this fails.
    pub fn decode(bytes: &[u8], mode: HeaderMode) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(bytes, "request");
        let extended = mode == HeaderMode::Extended;
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        expect_magic(reader.u32()?.into(), magic.into(), "request")?;
        let flags = CommandFlags::from_bits_retain(reader.u16()?);
        let command = Command::from_wire(reader.u16()?);
        let (cookie, offset) = (reader.u64()?, reader.u64()?);
        let len = if extended { reader.u64()? } else { reader.u32()?.into() };
        reader.end()?;
        Ok(Self { flags, command, cookie, offset, len })
    }

    /// Appends the request's header to `out`. The length of a compact one must be below 2^32.
    pub fn encode(&self, mode: HeaderMode, out: &mut Vec<u8>) {
        let extended = mode == HeaderMode::Extended;
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&self.flags.bits().to_be_bytes());
        out.extend_from_slice(&self.command.to_wire().to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        if extended {
            out.extend_from_slice(&self.len.to_be_bytes());
        } else {
            out.extend_from_slice(&u32::try_from(self.len).unwrap_or(u32::MAX).to_be_bytes());
        }
    }

    /// Bytes of payload that follow the header: of writes, and of extended requests that say so. More than
    /// [`MAX_PAYLOAD`] are an error, after which the stream cannot be followed.
    pub fn payload(&self, mode: HeaderMode) -> Result<u32, ProtocolError> {
        // QEMU's client does not set the flag in extended writes, and sends the payload all the same.
        let says_so = mode == HeaderMode::Extended && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        let has_one = says_so || self.command == Command::Write;
        if !has_one {
            return Ok(0);
        }
        match u32::try_from(self.len) {
            Ok(len) if len <= MAX_PAYLOAD => Ok(len),
            _ => {
                let field = "length of a request's payload";
                Err(ProtocolError::TooLong { field, found: self.len, limit: MAX_PAYLOAD.into() })
            }
        }
    }
}
