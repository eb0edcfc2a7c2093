//! Making ranges of a file zero and giving their space back.

use crate::fallocate::{PUNCH, attempt, extend, zero_within};
use crate::host_file::HostFile;
use crate::open::Opened;
use block_graph::{Errno, Error, Result, ZeroFlags};
use rustix::fs::FallocateFlags;
use rustix::io::Errno as Os;
use std::sync::Arc;

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
