//! Locks on a file that tell other processes what a node does with it, and what others may do.
//!
//! A process that has a permission holds a shared lock on one byte, at [`PERMISSIONS`] and the permission's number; one
//! that does not let others have a permission holds one at [`REFUSALS`] and its number. Whether somebody refuses what a
//! node wants, or has what it refuses, is found out by asking who would be in the way of an exclusive lock on the other
//! byte. These are QEMU's places and meanings, so that its programs and ours keep each other out. The locks belong to
//! the open file description (fcntl(2), `F_OFD_SETLK`): they end with it, and not with another descriptor of the file.

use block_graph::{Errno, Error, OpenFlags, Result};
use nix::fcntl::{FcntlArg, fcntl};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Where the bytes of permissions that somebody has begin.
const PERMISSIONS: i64 = 100;
/// Where the bytes of permissions that somebody refuses to others begin.
const REFUSALS: i64 = 200;

/// The permissions by number, with the names that messages have for them.
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];
const CONSISTENT_READ: u8 = 1;
const WRITE: u8 = 2;
const RESIZE: u8 = 8;

/// What a node does with its file, and what others may not: bits by the permissions' numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Claim {
    has: u8,
    refuses: u8,
}

impl Claim {
    /// What a node that is opened with these flags claims.
    pub(crate) fn of(flags: OpenFlags) -> Self {
        let mut claim = Self { has: CONSISTENT_READ, refuses: WRITE | RESIZE };
        if flags.writable {
            claim.has |= WRITE;
        }
        if flags.writable && flags.resize {
            claim.has |= RESIZE;
        }
        if flags.force_share {
            claim.refuses = 0;
        }
        claim
    }

    /// What is claimed while a file is made: others may write to it, which is their affair, but not resize it.
    pub(crate) const CREATE: Self = Self { has: WRITE | RESIZE, refuses: RESIZE };
}

fn byte(kind: libc::c_int, at: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

fn bits(bits: u8) -> impl Iterator<Item = usize> {
    (0..NAMES.len()).filter(move |number| bits & (1 << number) != 0)
}

/// The message for a lock that failed; that somebody else has it needs no error number.
fn failed(what: impl FnOnce() -> String, error: nix::errno::Errno) -> Error {
    let errno = Errno::new(error as i32);
    match error {
        nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES => Error::new(errno, what()),
        _ => Error::new(errno, format!("{}: {errno}", what())),
    }
}

/// Takes the locks of a claim, after which [`check`] says whether it holds.
fn take(file: impl AsFd, claim: Claim) -> Result<()> {
    let bytes = bits(claim.has).map(|number| PERMISSIONS + number as i64);
    for at in bytes.chain(bits(claim.refuses).map(|number| REFUSALS + number as i64)) {
        fcntl(&file, FcntlArg::F_OFD_SETLK(&byte(libc::F_RDLCK, at)))
            .map_err(|error| failed(|| format!("Failed to lock byte {at}"), error))?;
    }
    Ok(())
}

/// Whether another process's claim is in the way of this one.
fn check(file: impl AsFd, claim: Claim) -> Result<()> {
    let wanted = bits(claim.has).map(|number| (REFUSALS, number, ""));
    for (base, number, shared) in
        wanted.chain(bits(claim.refuses).map(|number| (PERMISSIONS, number, "shared ")))
    {
        let what = || format!("Failed to get {shared}\"{}\" lock", NAMES[number]);
        let mut lock = byte(libc::F_WRLCK, base + number as i64);
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).map_err(|error| failed(what, error))?;
        if i32::from(lock.l_type) != libc::F_UNLCK {
            return Err(failed(what, nix::errno::Errno::EAGAIN));
        }
    }
    Ok(())
}

/// Makes a claim; `filename` is for the message.
///
/// # Errors
/// Another process's claim is in the way, or the file cannot be locked. No lock is left then.
pub(crate) fn claim(file: impl AsFd, claim: Claim, filename: &str) -> Result<()> {
    let claimed = take(&file, claim).and_then(|()| {
        let hint = format!("Is another process using the image [{filename}]?");
        check(&file, claim).map_err(|error| error.hint(hint))
    });
    if claimed.is_err() {
        release(&file);
    }
    claimed
}

/// How long a claim that is in the way is waited for: the kernel ends the requests of a process that was killed, and
/// with them its locks, a little after the process itself.
const PATIENCE: Duration = Duration::from_millis(500);

/// As [`claim`], but another's claim may go away yet within half a second.
///
/// # Errors
/// As [`claim`].
pub(crate) async fn claim_patiently(file: impl AsFd, wanted: Claim, filename: &str) -> Result<()> {
    let begin = Instant::now();
    loop {
        match claim(&file, wanted, filename) {
            Err(error) if error.errno() == Errno::AGAIN && begin.elapsed() < PATIENCE => {
                io_loop::sleep(Duration::from_millis(10)).await;
            }
            claimed => return claimed,
        }
    }
}

/// Gives up whatever was claimed.
pub(crate) fn release(file: impl AsFd) {
    for base in [PERMISSIONS, REFUSALS] {
        let all = libc::flock { l_len: NAMES.len() as i64, ..byte(libc::F_UNLCK, base) };
        // What cannot be unlocked is unlocked when the descriptor is closed.
        let _ = fcntl(&file, FcntlArg::F_OFD_SETLK(&all));
    }
}
