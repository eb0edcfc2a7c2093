//! The system calls that no safe interface offers in the shape they are needed in here.

use crate::buffer::{IoVec, Segment};
use smallvec::SmallVec;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// The most pieces in one system call (`IOV_MAX`).
pub(crate) const MOST_PIECES: usize = 1024;

/// A new event descriptor.
pub(crate) fn event() -> io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(
        0,
        rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK,
    )?)
}

/// Makes an event readable.
pub(crate) fn signal(event: &OwnedFd) {
    // It fails only when it is readable already.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Makes an event unreadable.
pub(crate) fn drain(event: &OwnedFd) {
    // It fails only when it is not readable.
    let _ = rustix::io::read(event, &mut [0; 8][..]);
}

/// An entry for [`poll`].
pub(crate) fn poll_entry(fd: RawFd, events: i16) -> libc::pollfd {
    libc::pollfd { fd, events, revents: 0 }
}

/// Waits until one of `list` is ready or the time is over.
pub(crate) fn poll(list: &mut [libc::pollfd], wait: Option<Duration>) -> io::Result<()> {
    let limit = wait.map(|wait| libc::timespec {
        tv_sec: wait.as_secs().min(1 << 40) as libc::time_t,
        tv_nsec: wait.subsec_nanos().into(),
    });
    let limit = limit.as_ref().map_or(std::ptr::null(), |limit| &raw const *limit);
    // SAFETY: `list` is a valid array of its length, and `limit` null or a valid time.
    let result =
        unsafe { libc::ppoll(list.as_mut_ptr(), list.len() as libc::nfds_t, limit, std::ptr::null()) };
    match check(result as isize) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// What operations return: what the system call did, or the negated error number.
pub(crate) fn as_result(result: io::Result<usize>) -> i32 {
    match result {
        Ok(count) => i32::try_from(count).unwrap_or(i32::MAX),
        Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
    }
}

/// The pieces of memory as system calls want them.
fn list(memory: &IoVec) -> SmallVec<[libc::iovec; 8]> {
    let entry = |s: &Segment| libc::iovec { iov_base: s.start.cast(), iov_len: s.len };
    memory.segments().iter().take(MOST_PIECES).map(entry).collect()
}

/// One call of preadv(2).
pub(crate) fn read_at(file: &OwnedFd, offset: u64, memory: &IoVec) -> io::Result<usize> {
    let (list, offset) = (list(memory), offset_of(offset)?);
    // SAFETY: the list names memory that is kept while it is borrowed and that no reference covers.
    check(unsafe { libc::preadv(file.as_raw_fd(), list.as_ptr(), list.len() as libc::c_int, offset) })
}

/// One call of pwritev(2).
pub(crate) fn write_at(file: &OwnedFd, offset: u64, memory: &IoVec) -> io::Result<usize> {
    let (list, offset) = (list(memory), offset_of(offset)?);
    // SAFETY: as in `read_at`; the memory is only read.
    check(unsafe { libc::pwritev(file.as_raw_fd(), list.as_ptr(), list.len() as libc::c_int, offset) })
}

/// One call of preadv2(2) or pwritev2(2), which with `nowait` fails rather than wait (`EAGAIN`), if the file can do that
/// at all (`EOPNOTSUPP`).
pub(crate) fn transfer_now(
    file: &OwnedFd,
    offset: u64,
    memory: &IoVec,
    write: bool,
    nowait: bool,
) -> io::Result<usize> {
    let (list, offset) = (list(memory), offset_of(offset)?);
    let (fd, start, count) = (file.as_raw_fd(), list.as_ptr(), list.len() as libc::c_int);
    let flags = if nowait { libc::RWF_NOWAIT } else { 0 };
    // SAFETY: as in `read_at`.
    check(unsafe {
        if write {
            libc::pwritev2(fd, start, count, offset, flags)
        } else {
            libc::preadv2(fd, start, count, offset, flags)
        }
    })
}

/// An offset as system calls take it.
pub(crate) fn offset_of(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// One call of recvmsg(2) that does not wait.
pub(crate) fn receive(socket: &OwnedFd, memory: &IoVec) -> io::Result<usize> {
    let mut list = list(memory);
    let mut message = message(&mut list);
    // SAFETY: the message names the list, and that memory as in `read_at`.
    check(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
}

/// One call of sendmsg(2) that does not wait.
pub(crate) fn send(socket: &OwnedFd, memory: &IoVec) -> io::Result<usize> {
    let mut list = list(memory);
    let message = message(&mut list);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: as in `receive`; the memory is only read.
    check(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })
}

fn message(list: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes are a message without address, memory and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_mut_ptr();
    message.msg_iovlen = list.len() as _;
    message
}
