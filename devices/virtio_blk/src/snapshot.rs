//! A disk whose image stays as it is: what is written goes to a temporary file, and with that.

use crate::{BlockBackend, RawError, RawFile, SECTOR_SIZE};
use parking_lot::RwLock;
use std::collections::HashMap;
use std::io;
use virtio::GuestSlice;

/// Sectors that a word has bits for.
const PER_WORD: u64 = 64;

/// A disk whose image stays as it is.
#[derive(Debug)]
pub struct Snapshot {
    image: RawFile,
    /// What was written, at the same offsets.
    written: RawFile,
    /// Which sectors were, a bit each, in words by the number of their first sector over 64.
    map: RwLock<HashMap<u64, u64>>,
}

impl Snapshot {
    /// A disk that begins with what is in `image`.
    ///
    /// # Errors
    /// [`RawError::Temporary`].
    pub fn new(image: RawFile) -> Result<Self, RawError> {
        let written = RawFile::temporary(image.size_bytes()).map_err(RawError::Temporary)?;
        Ok(Self { image, written, map: RwLock::default() })
    }

    /// Where `sector` is read from, and how many from it on, `most` at most, are read from there.
    fn run(&self, sector: u64, most: u64) -> (&RawFile, u64) {
        let map = self.map.read();
        let is_written = |sector: u64| {
            map.get(&(sector / PER_WORD)).is_some_and(|word| word >> (sector % PER_WORD) & 1 != 0)
        };
        let first = is_written(sector);
        let len = (1..most).find(|ahead| is_written(sector + ahead) != first).unwrap_or(most);
        (if first { &self.written } else { &self.image }, len)
    }

    fn mark(&self, offset: u64, len: u64) {
        let mut map = self.map.write();
        let (first, end) = (offset / SECTOR_SIZE, (offset + len) / SECTOR_SIZE);
        let mut sector = first;
        while sector < end {
            let bit = sector % PER_WORD;
            let count = (PER_WORD - bit).min(end - sector);
            *map.entry(sector / PER_WORD).or_default() |= u64::MAX >> (PER_WORD - count) << bit;
            sector += count;
        }
    }
}

/// The parts of `buffers` from `skip` bytes on that make `len` bytes.
fn part<'a>(buffers: &[GuestSlice<'a>], mut skip: usize, mut len: usize) -> io::Result<Vec<GuestSlice<'a>>> {
    let mut parts = Vec::new();
    for buffer in buffers {
        let begin = skip.min(buffer.len());
        skip -= begin;
        let count = len.min(buffer.len() - begin);
        if count > 0 {
            parts.push(buffer.subslice(begin, count).map_err(io::Error::other)?);
            len -= count;
        }
    }
    Ok(parts)
}

impl BlockBackend for Snapshot {
    fn size_bytes(&self) -> u64 {
        self.image.size_bytes()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        let all: usize = buffers.iter().map(GuestSlice::len).sum();
        let mut done = 0;
        while done < all {
            let at = offset + done as u64;
            let (from, sectors) = self.run(at / SECTOR_SIZE, (all - done) as u64 / SECTOR_SIZE);
            let len = (all - done).min((sectors * SECTOR_SIZE) as usize);
            from.read_at(at, &part(buffers, done, len)?)?;
            done += len;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        self.written.write_at(offset, buffers)?;
        self.mark(offset, buffers.iter().map(|buffer| buffer.len() as u64).sum());
        Ok(())
    }

    /// There is nothing to keep.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// They stay as they are.
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _may_unmap: bool) -> io::Result<()> {
        self.written.write_zeroes(offset, len, true)?;
        self.mark(offset, len);
        Ok(())
    }
}
