//! A kernel's file: bytes in memory, or a file of the host of which only what is needed is read.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// How much of a file's beginning is read at once: the headers of almost every kernel.
const HEAD: u64 = 1 << 16;

/// A kernel to be identified and loaded.
#[derive(Debug, Clone)]
pub struct KernelFile<'a> {
    /// Its beginning, or all of it.
    head: Cow<'a, [u8]>,
    /// Where the rest is.
    rest: Option<&'a File>,
    len: u64,
}

impl<'a> From<&'a [u8]> for KernelFile<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self { head: bytes.into(), rest: None, len: bytes.len() as u64 }
    }
}

impl<'a> From<&'a Vec<u8>> for KernelFile<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        bytes.as_slice().into()
    }
}

impl<'a> KernelFile<'a> {
    /// The first `len` bytes of a regular file, which should not change while they are used.
    ///
    /// # Errors
    /// Those of reading its beginning, also if it has fewer bytes.
    pub fn in_file(file: &'a File, len: u64) -> io::Result<Self> {
        let mut head = vec![0; len.min(HEAD) as usize];
        file.read_exact_at(&mut head, 0)?;
        Ok(Self { head: head.into(), rest: Some(file), len })
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Its beginning: 64 KiB, if it has as many.
    pub(crate) fn head(&self) -> &[u8] {
        &self.head[..self.head.len().min(HEAD as usize)]
    }

    /// Fills `bytes` with what is at `offset`; all of it must be within the length.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        match (self.in_memory(offset, bytes.len() as u64), self.rest) {
            (Some(part), _) => bytes.copy_from_slice(part),
            (None, Some(file)) => file.read_exact_at(bytes, offset)?,
            (None, None) => return Err(OUTSIDE.into()),
        }
        Ok(())
    }

    /// `len` bytes at `offset`, all of them within the length.
    pub(crate) fn bytes(&self, offset: u64, len: u64) -> io::Result<Cow<'_, [u8]>> {
        if let Some(bytes) = self.in_memory(offset, len) {
            return Ok(bytes.into());
        }
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(OUTSIDE.into());
        }
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| OUTSIDE)?];
        self.read(offset, &mut bytes)?;
        Ok(bytes.into())
    }

    /// The same if they are in memory already.
    pub(crate) fn in_memory(&self, offset: u64, len: u64) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        self.head.get(start..end)
    }
}

const OUTSIDE: io::ErrorKind = io::ErrorKind::UnexpectedEof;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_file_reads_like_its_bytes() {
        let content: Vec<u8> = (0..200_000u32).map(|at| (at * 7 / 3) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        let in_memory = KernelFile::from(&content);
        let in_file = KernelFile::in_file(&file, content.len() as u64).unwrap();
        assert_eq!((in_file.len(), in_file.head()), (in_memory.len(), in_memory.head()));
        for (offset, len) in [(0, 10), (65_530, 10), (65_536, 5), (199_999, 1), (200_000, 0)] {
            assert_eq!(in_file.bytes(offset, len).unwrap(), in_memory.bytes(offset, len).unwrap());
        }
        for (offset, len) in [(200_000, 1), (199_990, 11), (u64::MAX, 1), (1, u64::MAX), (0, 1 << 60)] {
            assert!(in_file.bytes(offset, len).is_err() && in_memory.bytes(offset, len).is_err());
        }
        file.set_len(100_000).unwrap();
        assert!(in_file.bytes(150_000, 10).is_err());
        assert!(KernelFile::in_file(&file, 50_000).is_ok());
        file.set_len(10).unwrap();
        assert!(KernelFile::in_file(&file, 50_000).is_err());
    }
}
