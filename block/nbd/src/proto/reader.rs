//! Fields of a message, one after another, with bounds.

use super::constants::MAX_STRING;
use super::error::ProtocolError;

/// Reads big-endian fields of one message. Every method fails with [`ProtocolError::Short`] if the message ends.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    message: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads `bytes`, which errors call `message`.
    pub fn new(bytes: &'a [u8], message: &'static str) -> Self {
        Self { bytes, message }
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], ProtocolError> {
        let (head, rest) =
            self.bytes.split_at_checked(len).ok_or(ProtocolError::Short { message: self.message })?;
        self.bytes = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let (head, rest) =
            self.bytes.split_first_chunk().ok_or(ProtocolError::Short { message: self.message })?;
        self.bytes = rest;
        Ok(*head)
    }

    /// 16 bits.
    pub fn u16(&mut self) -> Result<u16, ProtocolError> {
        self.array().map(u16::from_be_bytes)
    }

    /// 32 bits.
    pub fn u32(&mut self) -> Result<u32, ProtocolError> {
        self.array().map(u32::from_be_bytes)
    }

    /// 64 bits.
    pub fn u64(&mut self) -> Result<u64, ProtocolError> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string of `len` bytes, called `field` in errors.
    pub fn text(&mut self, len: usize, field: &'static str) -> Result<&'a str, ProtocolError> {
        if len > MAX_STRING {
            return Err(ProtocolError::TooLong { field, found: len as u64, limit: MAX_STRING as u64 });
        }
        let bytes = self.bytes(len)?;
        match std::str::from_utf8(bytes) {
            Ok(text) if !bytes.contains(&0) => Ok(text),
            _ => Err(ProtocolError::Text { field }),
        }
    }

    /// A string behind its length of 32 bits.
    pub fn counted_text(&mut self, field: &'static str) -> Result<&'a str, ProtocolError> {
        let len = self.u32()?;
        self.text(usize::try_from(len).unwrap_or(usize::MAX), field)
    }

    /// How many bytes are left.
    pub fn left(&self) -> usize {
        self.bytes.len()
    }

    /// What is left, as a string.
    pub fn rest_text(&mut self, field: &'static str) -> Result<&'a str, ProtocolError> {
        self.text(self.left(), field)
    }

    /// The end of the message, or [`ProtocolError::Extra`].
    pub fn end(self) -> Result<(), ProtocolError> {
        match self.bytes.len() {
            0 => Ok(()),
            extra => Err(ProtocolError::Extra { message: self.message, extra }),
        }
    }
}
