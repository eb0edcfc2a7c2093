//! The system calls that no safe interface offers: positioned vectored I/O straight on guest memory, which
//! must not become Rust slices since the guest changes it at any time, and open-file-description locks.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use virtio::GuestSlice;
use vm_memory::bitmap::Bitmap;

/// The most buffers in one system call (`IOV_MAX`).
const MAX_BUFFERS: usize = 1024;

/// Fills `buffers` from `offset` of `file`.
pub(crate) fn read_at(file: BorrowedFd<'_>, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
    let result = transfer(offset, buffers, io::ErrorKind::UnexpectedEof, |list, offset| {
        // SAFETY: the descriptor is open while it is borrowed; `list` is a valid array of its length, whose
        // entries point at guest memory that stays mapped while `transfer` holds their guards.
        unsafe { libc::preadv(file.as_raw_fd(), list.as_ptr(), list.len() as libc::c_int, offset) }
    });
    // Even an error may have come after part of the data.
    for buffer in buffers {
        buffer.bitmap().mark_dirty(0, buffer.len());
    }
    result
}

/// Writes `buffers` to `offset` of `file`.
pub(crate) fn write_at(file: BorrowedFd<'_>, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
    transfer(offset, buffers, io::ErrorKind::WriteZero, |list, offset| {
        // SAFETY: as in `read_at`; the buffers are only read.
        unsafe { libc::pwritev(file.as_raw_fd(), list.as_ptr(), list.len() as libc::c_int, offset) }
    })
}

/// Calls `call` until all of `buffers` are done; `nothing` is the error if it does none.
fn transfer(
    offset: u64,
    buffers: &[GuestSlice<'_>],
    nothing: io::ErrorKind,
    mut call: impl FnMut(&[libc::iovec], libc::off_t) -> isize,
) -> io::Result<()> {
    let guards: Vec<_> = buffers.iter().map(GuestSlice::ptr_guard_mut).collect();
    let mut list: Vec<_> = guards
        .iter()
        .filter(|guard| guard.len() > 0)
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    let mut rest = &mut list[..];
    let mut offset =
        libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    while !rest.is_empty() {
        let now = rest.len().min(MAX_BUFFERS);
        let done = match usize::try_from(call(&rest[..now], offset)) {
            Ok(0) => return Err(nothing.into()),
            Ok(done) => done,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
        };
        offset = offset
            .checked_add(done as libc::off_t)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        rest = advance(rest, done);
    }
    Ok(())
}

/// What is left of `list` after its first `done` bytes.
fn advance(mut list: &mut [libc::iovec], mut done: usize) -> &mut [libc::iovec] {
    while let Some(first) = list.first_mut() {
        if done < first.iov_len {
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
            first.iov_len -= done;
            break;
        }
        done -= first.iov_len;
        list = &mut list[1..];
    }
    list
}

/// Locks all of `file`, exclusively or shared, until its open file description goes. Says whether that
/// worked, or else somebody holds a lock that does not go with this one.
pub(crate) fn lock(file: BorrowedFd<'_>, exclusive: bool) -> io::Result<bool> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let request = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open while it is borrowed, and `request` is what this command reads.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}
