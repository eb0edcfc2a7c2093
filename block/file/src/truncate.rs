//! Changing a file's length, and allocating what is new.

use block_graph::{Errno, Error, Preallocation, Result};
use rustix::fs::{FallocateFlags, fallocate, fstat, ftruncate};
use rustix::io::Errno as Os;
use std::os::fd::BorrowedFd;

/// How much is written at once where space is written to, in bytes.
const CHUNK: usize = 1 << 20;

fn failed(what: &str, error: Os) -> Error {
    let errno = Errno::new(error.raw_os_error());
    Error::new(errno, format!("{what}: {errno}"))
}

/// Sets a regular file's length. Calls that may wait.
///
/// # Errors
/// The host's. The length is then what it was.
pub(crate) fn set_length(fd: BorrowedFd<'_>, len: u64, preallocation: Preallocation) -> Result<()> {
    let stat = fstat(fd).map_err(|error| failed("Could not stat file", error))?;
    let old = stat.st_size.unsigned_abs();
    if old > len && preallocation != Preallocation::Off {
        return Err(Error::unsupported("Cannot use preallocation for shrinking files"));
    }
    let result = match preallocation {
        Preallocation::Off => ftruncate(fd, len).map_err(|error| failed("Could not resize file", error)),
        Preallocation::Falloc if len == old => Ok(()),
        Preallocation::Falloc => match fallocate(fd, FallocateFlags::empty(), old, len - old) {
            Err(Os::OPNOTSUPP | Os::NOSYS) => write_zeroes(fd, old, len, "Could not preallocate new data"),
            result => result.map_err(|error| failed("Could not preallocate new data", error)),
        },
        Preallocation::Full => {
            // The file system knows from the beginning how much there will be.
            let resized = ftruncate(fd, len).map_err(|error| failed("Could not resize file", error));
            resized
                .and_then(|()| write_zeroes(fd, old, len, "Could not write zeros for preallocation"))
                .and_then(|()| {
                    rustix::fs::fsync(fd).map_err(|error| failed("Could not flush file to disk", error))
                })
        }
        Preallocation::Metadata => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
    };
    if result.is_err() && preallocation != Preallocation::Metadata {
        // The first error is what counts.
        let _ = ftruncate(fd, old);
    }
    result
}

fn write_zeroes(fd: BorrowedFd<'_>, from: u64, to: u64, what: &str) -> Result<()> {
    let zeroes = vec![0; CHUNK.min(usize::try_from(to.saturating_sub(from)).unwrap_or(CHUNK))];
    let mut at = from;
    while at < to {
        let part = &zeroes[..zeroes.len().min((to - at) as usize)];
        let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(fd, part, at));
        match written.map_err(|error| failed(what, error))? {
            0 => return Err(failed(what, Os::NOSPC)),
            written => at += written as u64,
        }
    }
    Ok(())
}
