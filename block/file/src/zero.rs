//! Making ranges zero and giving their space back, by what the file system has for it.

use crate::driver::HostFile;
use crate::open::Opened;
use block_graph::{Errno, Error, Result, ZeroFlags};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno as Os;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a file system was found not to have; it is not asked again.
#[derive(Debug, Default)]
pub(crate) struct Lacks {
    zero_range: AtomicBool,
    punch_hole: AtomicBool,
    allocate: AtomicBool,
}

/// A hole in place of the range.
const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

fn attempt(
    fd: BorrowedFd<'_>,
    lack: &AtomicBool,
    mode: FallocateFlags,
    offset: u64,
    len: u64,
) -> std::result::Result<(), Os> {
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
fn zero_within(
    fd: BorrowedFd<'_>,
    lacks: &Lacks,
    offset: u64,
    len: u64,
    unmap: bool,
) -> std::result::Result<(), Os> {
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
fn extend(fd: BorrowedFd<'_>, lacks: &Lacks, end: u64) -> std::result::Result<(), Os> {
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

/// Makes a range zero, which may be beyond the file's end. Requests may be of any alignment.
pub(crate) async fn write_zeroes(
    driver: &HostFile,
    file: &Arc<Opened>,
    offset: u64,
    len: u64,
    flags: ZeroFlags,
) -> Result<()> {
    let end = offset.checked_add(len).ok_or_else(|| Error::errno_only(Errno::TOO_LARGE))?;
    let _held = driver.hold(file, offset, end).await;
    let known = driver.known_len();
    let (lacks, device) = (driver.lacks.clone(), file.device);
    let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
    driver.forget_run(offset..end);
    let zeroed = file.io.call(move |fd| {
        let within = end.min(known).saturating_sub(offset);
        if end > known && !device {
            if unmap {
                // What a file has beyond its end is a hole.
                extend(fd, &lacks, end)?;
            } else {
                let beyond = offset.max(known);
                match attempt(fd, &lacks.zero_range, FallocateFlags::ZERO_RANGE, beyond, end - beyond) {
                    Err(Os::OPNOTSUPP | Os::INVAL) => {
                        attempt(fd, &lacks.allocate, FallocateFlags::empty(), beyond, end - beyond)?;
                    }
                    result => result?,
                }
            }
        }
        if within > 0 {
            zero_within(fd, &lacks, offset, within, unmap)?;
        }
        Ok(())
    });
    match zeroed.await.map_err(Error::from) {
        Err(error) if error.errno() == Errno::NOT_SUPPORTED => Err(Error::errno_only(Errno::NOT_SUPPORTED)),
        result => result,
    }
}

/// Gives a range's space back; it then reads as zero.
pub(crate) async fn discard(driver: &HostFile, file: &Arc<Opened>, offset: u64, len: u64) -> Result<()> {
    let end = offset.saturating_add(len).min(driver.known_len());
    if offset >= end {
        return Ok(());
    }
    let _held = driver.hold(file, offset, end).await;
    let lacks = driver.lacks.clone();
    driver.forget_run(offset..end);
    let result =
        file.io.call(move |fd| Ok(attempt(fd, &lacks.punch_hole, PUNCH, offset, end - offset)?)).await;
    match result.map_err(Error::from) {
        Err(error) if [Errno::NOT_SUPPORTED, Errno::INVALID, Errno::BUSY].contains(&error.errno()) => {
            Err(Error::errno_only(Errno::NOT_SUPPORTED))
        }
        result => result,
    }
}
