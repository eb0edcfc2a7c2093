//! `fallocate(2)`: zeroes, holes and space, as far as a file system has them.

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno as Os;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a file system was found not to have; it is not asked again.
#[derive(Debug, Default)]
pub(crate) struct Lacks {
    pub(crate) zero_range: AtomicBool,
    pub(crate) punch_hole: AtomicBool,
    pub(crate) allocate: AtomicBool,
}

/// A hole in place of the range.
pub(crate) const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// One call of `fallocate(2)`; what the file system is known to lack is not asked for.
pub(crate) fn attempt(
    fd: BorrowedFd<'_>,
    lack: &AtomicBool,
    mode: FallocateFlags,
    offset: u64,
    len: u64,
) -> Result<(), Os> {
    if lack.load(Ordering::Relaxed) {
        return Err(Os::OPNOTSUPP);
    }
    let result = rustix::io::retry_on_intr(|| fallocate(fd, mode, offset, len));
    if let Err(Os::OPNOTSUPP | Os::NOSYS | Os::NODEV) = result {
        lack.store(true, Ordering::Relaxed);
        return Err(Os::OPNOTSUPP);
    }
    result
}

/// Zeroes a range of the file that is within it. `unmap`: its space may be given back.
pub(crate) fn zero_within(
    fd: BorrowedFd<'_>,
    lacks: &Lacks,
    offset: u64,
    len: u64,
    unmap: bool,
) -> Result<(), Os> {
    if unmap {
        match attempt(fd, &lacks.punch_hole, PUNCH, offset, len) {
            Err(Os::OPNOTSUPP | Os::INVAL | Os::BUSY) => {}
            result => return result,
        }
    }
    match attempt(fd, &lacks.zero_range, FallocateFlags::ZERO_RANGE, offset, len) {
        // Some file systems want ranges in whole blocks.
        Err(Os::OPNOTSUPP | Os::INVAL) => {}
        result => return result,
    }
    if lacks.allocate.load(Ordering::Relaxed) {
        return Err(Os::OPNOTSUPP);
    }
    match attempt(fd, &lacks.punch_hole, PUNCH, offset, len) {
        Ok(()) => attempt(fd, &lacks.allocate, FallocateFlags::empty(), offset, len),
        Err(Os::INVAL) => Err(Os::OPNOTSUPP),
        result => result,
    }
}

/// Makes the file at least so long; its last byte is then zero. Others may make it longer meanwhile, so that no length
/// may be set: it would cut off what they wrote.
pub(crate) fn extend(fd: BorrowedFd<'_>, lacks: &Lacks, end: u64) -> Result<(), Os> {
    let last = end - 1;
    match attempt(fd, &lacks.allocate, FallocateFlags::empty(), last, 1) {
        Err(Os::OPNOTSUPP) => match rustix::io::retry_on_intr(|| rustix::io::pwrite(fd, &[0], last)) {
            // Direct I/O writes whole blocks only.
            Err(Os::INVAL) => Err(Os::OPNOTSUPP),
            written => written.map(drop),
        },
        result => result,
    }
}
