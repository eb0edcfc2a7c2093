//! Reading little-endian fields of an untrusted file, with errors that name the place.

use crate::{BootError, FileKind};

/// A file's bytes with the kind that its errors name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub(crate) file: FileKind,
    pub(crate) data: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(file: FileKind, data: &'a [u8]) -> Self {
        Self { file, data }
    }

    /// `len` bytes from `offset`.
    pub(crate) fn bytes(&self, field: &'static str, offset: u64, len: u64) -> Result<&'a [u8], BootError> {
        usize::try_from(offset)
            .ok()
            .zip(offset.checked_add(len).and_then(|end| usize::try_from(end).ok()))
            .and_then(|(start, end)| self.data.get(start..end))
            .ok_or(BootError::Truncated {
                file: self.file,
                field,
                offset,
                need: len,
                have: self.data.len() as u64,
            })
    }

    fn array<const N: usize>(&self, field: &'static str, offset: u64) -> Result<[u8; N], BootError> {
        let mut value = [0; N];
        value.copy_from_slice(self.bytes(field, offset, N as u64)?);
        Ok(value)
    }

    pub(crate) fn u8(&self, field: &'static str, offset: u64) -> Result<u8, BootError> {
        self.array::<1>(field, offset).map(|[byte]| byte)
    }

    pub(crate) fn u16(&self, field: &'static str, offset: u64) -> Result<u16, BootError> {
        self.array(field, offset).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&self, field: &'static str, offset: u64) -> Result<u32, BootError> {
        self.array(field, offset).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&self, field: &'static str, offset: u64) -> Result<u64, BootError> {
        self.array(field, offset).map(u64::from_le_bytes)
    }

    pub(crate) fn bad(
        &self,
        field: &'static str,
        offset: u64,
        value: u64,
        expected: &'static str,
    ) -> BootError {
        BootError::BadField { file: self.file, field, offset, value, expected }
    }
}
