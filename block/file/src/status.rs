//! Where a file has data and where holes.

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::ops::Range;
use std::os::fd::AsFd;

/// What a file has from some offset on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Run {
    /// Data as far as this.
    Data(Range<u64>),
    /// A hole as far as this.
    Hole(Range<u64>),
}

/// What the file has at `offset`, which is before `end`, its length. A file system that does not say has data.
pub(crate) fn run_at(file: impl AsFd, offset: u64, end: u64) -> Run {
    let data = match seek(&file, SeekFrom::Data(offset)) {
        Ok(data) if data >= offset => data,
        // A hole as far as the file goes.
        Err(Errno::NXIO) => return Run::Hole(offset..end),
        Ok(_) | Err(_) => return Run::Data(offset..end),
    };
    if data > offset {
        return Run::Hole(offset..data.min(end));
    }
    match seek(&file, SeekFrom::Hole(offset)) {
        Ok(hole) if hole > offset => Run::Data(offset..hole.min(end)),
        // A hole that was made this moment, or a file system that has no idea.
        Ok(_) | Err(_) => Run::Data(offset..end),
    }
}
