//! Reading little-endian fields of an untrusted file, with errors that name the place.

use crate::{BootError, FileKind, KernelFile};
use std::borrow::Cow;

/// A file with the kind that its errors name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub(crate) file: FileKind,
    pub(crate) kernel: &'a KernelFile<'a>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(file: FileKind, kernel: &'a KernelFile<'a>) -> Self {
        Self { file, kernel }
    }

    /// Sees to it that the file has `len` bytes from `offset`.
    pub(crate) fn check(&self, field: &'static str, offset: u64, len: u64) -> Result<(), BootError> {
        let have = self.kernel.len();
        if offset.checked_add(len).is_some_and(|end| end <= have) {
            return Ok(());
        }
        Err(BootError::Truncated { file: self.file, field, offset, need: len, have })
    }

    /// `len` bytes from `offset`.
    pub(crate) fn bytes(
        &self,
        field: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<Cow<'a, [u8]>, BootError> {
        self.check(field, offset, len)?;
        self.kernel.bytes(offset, len).map_err(|error| self.unreadable(field, offset, &error))
    }

    /// Fills `bytes` from `offset`.
    pub(crate) fn read(&self, field: &'static str, offset: u64, bytes: &mut [u8]) -> Result<(), BootError> {
        self.check(field, offset, bytes.len() as u64)?;
        self.kernel.read(offset, bytes).map_err(|error| self.unreadable(field, offset, &error))
    }

    fn unreadable(&self, field: &'static str, offset: u64, error: &std::io::Error) -> BootError {
        BootError::Unreadable { file: self.file, field, offset, error: error.to_string() }
    }

    fn array<const N: usize>(&self, field: &'static str, offset: u64) -> Result<[u8; N], BootError> {
        let mut value = [0; N];
        self.read(field, offset, &mut value)?;
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
