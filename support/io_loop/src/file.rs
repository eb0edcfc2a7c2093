//! Reading and writing files at offsets.

use crate::at_once::AtOnce;
use crate::buffer::IoVec;
use crate::completion::Keep;
use crate::local_loop::current;
use crate::unix::{self, MOST_PIECES};
use io_uring::{opcode, squeue, types};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// The most bytes that one system call is asked to move: what Linux does at most, in whole pages.
const MOST_BYTES: usize = 0x7fff_f000;

/// What carries out operations on a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Aio {
    /// The io_uring of the thread's loop, or threads if it has none.
    #[default]
    Ring,
    /// Threads that make system calls.
    Threads,
}

/// A file or block device of the host that is read and written at offsets.
#[derive(Debug, Clone)]
pub struct IoFile {
    file: Arc<OwnedFd>,
    aio: Aio,
    at_once: Arc<AtOnce>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write { through: bool },
}

impl IoFile {
    /// A file for I/O by way of `aio`.
    pub fn new(file: OwnedFd, aio: Aio) -> Self {
        let at_once = Arc::new(AtOnce::of(&file));
        Self { file: Arc::new(file), aio, at_once }
    }

    /// The descriptor, which stays open as long as the file or an operation on it.
    pub fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    /// Reads from `offset` until `into` is full or the file ends; returns how many bytes were read.
    ///
    /// # Errors
    /// The host's; any part of `into` may have been written.
    pub async fn read_at(&self, offset: u64, into: &IoVec) -> io::Result<usize> {
        self.transfer(offset, into, Direction::Read).await
    }

    /// Writes all of `from` to `offset`. With `through`, it is on stable storage when this returns.
    ///
    /// # Errors
    /// The host's; any part may have been written.
    pub async fn write_at(&self, offset: u64, from: &IoVec, through: bool) -> io::Result<()> {
        let done = self.transfer(offset, from, Direction::Write { through }).await?;
        if done == from.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOSPC)) }
    }

    async fn transfer(&self, offset: u64, memory: &IoVec, direction: Direction) -> io::Result<usize> {
        let mut done = 0;
        while done < memory.len() {
            let at = offset.checked_add(done as u64).ok_or(io::ErrorKind::InvalidInput)?;
            let moved = if done == 0 {
                self.once(at, memory, direction).await
            } else {
                self.once(at, &memory.slice(done..memory.len()), direction).await
            };
            match moved {
                Ok(0) => break,
                Ok(moved) => done += moved,
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                // Direct I/O has read to the end of a file that does not end with a block: no more can be read there.
                Err(error)
                    if done > 0
                        && direction == Direction::Read
                        && error.raw_os_error() == Some(libc::EINVAL) =>
                {
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// One system call's worth.
    async fn once(&self, offset: u64, memory: &IoVec, direction: Direction) -> io::Result<usize> {
        unix::offset_of(offset)?;
        let write = match direction {
            Direction::Read => Some(false),
            Direction::Write { through: false } => Some(true),
            Direction::Write { through: true } => None,
        };
        let write =
            write.filter(|write| self.aio == Aio::Ring && self.at_once.is_worth_it(memory.len(), *write));
        if let Some(write) = write {
            while !current().take_at_once() {
                crate::local_loop::yield_now().await;
            }
            if let Some(result) = self.at_once.transfer(&self.file, offset, memory, write) {
                return result;
            }
        }
        let here = current();
        let ring = here.ring().filter(|_| self.aio == Aio::Ring);
        let operation = if let Some(ring) = ring {
            let (keep, entry) = self.entry(offset, memory, direction, &here.operations);
            // SAFETY: the entry names memory of `memory`, and the list of its pieces; both are in `keep`.
            unsafe { here.submit(ring, keep, entry) }?
        } else {
            let (file, memory) = (self.file.clone(), memory.clone());
            here.on_thread(move || {
                unix::as_result(match direction {
                    Direction::Read => unix::read_at(&file, offset, &memory),
                    Direction::Write { through } => unix::write_at(&file, offset, &memory).and_then(|done| {
                        if through {
                            rustix::fs::fdatasync(&*file)?;
                        }
                        Ok(done)
                    }),
                })
            })
        };
        operation.await.map(|done| done as usize)
    }

    fn entry(
        &self,
        offset: u64,
        memory: &IoVec,
        direction: Direction,
        operations: &crate::completion::Operations,
    ) -> (Keep, squeue::Entry) {
        let fd = types::Fd(self.file.as_raw_fd());
        let flags = if direction == (Direction::Write { through: true }) { libc::RWF_DSYNC } else { 0 };
        let mut keep = Keep { file: Some(self.file.clone()), memory: memory.clone(), list: Vec::new() };
        let entry = if let [segment] = memory.segments() {
            let len = segment.len.min(MOST_BYTES) as u32;
            match direction {
                Direction::Read => opcode::Read::new(fd, segment.start, len).offset(offset).build(),
                Direction::Write { .. } => {
                    opcode::Write::new(fd, segment.start, len).offset(offset).rw_flags(flags).build()
                }
            }
        } else {
            keep.list = operations.list_of(memory);
            let (list, count) = (keep.list.as_ptr(), keep.list.len().min(MOST_PIECES) as u32);
            match direction {
                Direction::Read => opcode::Readv::new(fd, list, count).offset(offset).build(),
                Direction::Write { .. } => {
                    opcode::Writev::new(fd, list, count).offset(offset).rw_flags(flags).build()
                }
            }
        };
        (keep, entry)
    }

    /// Returns when all data written before are on stable storage, and the size; not times.
    ///
    /// # Errors
    /// The host's.
    pub async fn sync(&self) -> io::Result<()> {
        let here = current();
        let operation = match here.ring().filter(|_| self.aio == Aio::Ring) {
            Some(ring) => {
                let fd = types::Fd(self.file.as_raw_fd());
                let entry = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
                let keep = Keep { file: Some(self.file.clone()), ..Keep::default() };
                // SAFETY: the entry points at nothing.
                unsafe { here.submit(ring, keep, entry) }?
            }
            None => {
                let file = self.file.clone();
                here.on_thread(move || {
                    unix::as_result(rustix::fs::fdatasync(&*file).map(|()| 0).map_err(Into::into))
                })
            }
        };
        operation.await.map(drop)
    }

    /// Makes a system call on the file that may wait, on a thread.
    ///
    /// # Errors
    /// What `call` returns.
    pub async fn call<R: Send + 'static>(
        &self,
        call: impl FnOnce(BorrowedFd<'_>) -> io::Result<R> + Send + 'static,
    ) -> io::Result<R> {
        let file = self.file.clone();
        crate::pool::blocking(move || call(file.as_fd())).await
    }
}
