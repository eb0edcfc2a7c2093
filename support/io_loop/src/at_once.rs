//! Requests that a loop carries out itself, since they only copy between memory and the page cache: a system call is
//! then all they cost. A ring has threads of the kernel make writes that not every file system can make without waiting,
//! which costs several times as much.

use crate::buffer::IoVec;
use crate::unix;
use rustix::fs::OFlags;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The most bytes of such a request: copying more takes longer than asking others to do it.
const MOST: usize = 64 << 10;
/// What took longer than this has waited.
const SLOW: Duration = Duration::from_millis(1);
/// For how long nothing more is done at once after something had to wait.
const REST: Duration = Duration::from_millis(100);

/// File systems that are memory ("statfs(2)").
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
/// File systems whose writes only go to the page cache of this host: ext4, XFS, Btrfs, F2FS, Bcachefs.
const LOCAL: [u64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0xca45_1a4e];

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// How requests of one direction go.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Not at once.
    Never,
    /// At once if the kernel can do it without waiting.
    NoWait,
    /// At once; the kernel cannot say whether it would wait.
    Plain,
}

impl Way {
    fn of(value: u8) -> Self {
        match value {
            1 => Self::NoWait,
            2 => Self::Plain,
            _ => Self::Never,
        }
    }
}

/// Which requests on a file are carried out at once.
#[derive(Debug)]
pub(crate) struct AtOnce {
    read: AtomicU8,
    write: AtomicU8,
    /// What takes the place of [`Way::NoWait`] for writes where the file system does not know it.
    else_write: Way,
    /// Until then nothing is, in milliseconds since the first file was opened.
    rest_until: AtomicU64,
}

impl AtOnce {
    /// What `file` is good for.
    pub(crate) fn of(file: &OwnedFd) -> Self {
        let regular = rustix::fs::fstat(file).is_ok_and(|stat| {
            rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile
        });
        let kind = rustix::fs::fstatfs(file).map_or(0, |stat| stat.f_type as u64);
        let cached = rustix::fs::fcntl_getfl(file)
            .is_ok_and(|flags| !flags.intersects(OFlags::DIRECT | OFlags::DSYNC));
        let (read, write, else_write) = match regular {
            // Direct or not is one there.
            true if IN_MEMORY.contains(&kind) => (Way::Plain, Way::Plain, Way::Plain),
            true if cached && LOCAL.contains(&kind) => (Way::NoWait, Way::NoWait, Way::Plain),
            true if cached => (Way::NoWait, Way::NoWait, Way::Never),
            _ => (Way::Never, Way::Never, Way::Never),
        };
        Self {
            read: AtomicU8::new(read as u8),
            write: AtomicU8::new(write as u8),
            else_write,
            rest_until: AtomicU64::new(0),
        }
    }

    /// Whether a request of this direction and length may be tried.
    pub(crate) fn is_worth_it(&self, len: usize, write: bool) -> bool {
        let way = if write { &self.write } else { &self.read };
        len <= MOST
            && way.load(Ordering::Relaxed) != Way::Never as u8
            && match self.rest_until.load(Ordering::Relaxed) {
                0 => true,
                until => until <= START.elapsed().as_millis() as u64,
            }
    }

    /// Carries out a request; `None` says that it must go another way.
    pub(crate) fn transfer(
        &self,
        file: &OwnedFd,
        offset: u64,
        memory: &IoVec,
        write: bool,
    ) -> Option<io::Result<usize>> {
        let ways = if write { &self.write } else { &self.read };
        match Way::of(ways.load(Ordering::Relaxed)) {
            Way::Never => None,
            Way::NoWait => match unix::transfer_now(file, offset, memory, write, true) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => None,
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                    let instead = if write { self.else_write } else { Way::Never };
                    ways.store(instead as u8, Ordering::Relaxed);
                    None
                }
                result => Some(result),
            },
            Way::Plain => {
                let begin = Instant::now();
                let result = unix::transfer_now(file, offset, memory, write, false);
                if begin.elapsed() > SLOW {
                    let until = START.elapsed() + REST;
                    self.rest_until.store(until.as_millis() as u64, Ordering::Relaxed);
                }
                Some(result)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::IoBuffer;

    #[test]
    fn what_goes_at_once_is_what_was_asked_for() {
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        let way = AtOnce::of(&file);
        let data = IoBuffer::from(&[7; 5000][..]).into_io();
        assert!(!way.is_worth_it(MOST + 1, true));
        // The first may only find out that the file system cannot say whether it would wait.
        let written = (0..2).find_map(|_| way.transfer(&file, 100, &data, true));
        if let Some(written) = written {
            assert_eq!(written.unwrap(), 5000);
            let back = IoBuffer::zeroed(6000).into_io();
            if let Some(read) = way.transfer(&file, 0, &back, false) {
                assert_eq!(read.unwrap(), 5100);
                assert!(back.is_zero(0, 100) && back.is_zero(5100, 900));
                assert_eq!(back.slice(100..5100).to_vec(), data.to_vec());
            }
        }
    }

    #[test]
    fn pipes_and_direct_files_are_left_to_others() {
        let (read, _write) = io::pipe().unwrap();
        assert!(!AtOnce::of(&read.into()).is_worth_it(1, false));
    }
}
