//! Opening a file or device of the host.

use crate::lock::{self, Claim};
use block_graph::{Errno, Error, OpenFlags, Options, Result};
use io_loop::{Aio, IoBuffer, IoFile};
use rustix::fs::{FileType, Mode, OFlags};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The largest alignment that direct I/O may ask for, in bytes.
const MOST_ALIGNMENT: u32 = 4096;

/// What a driver wants its file to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wants {
    /// A regular file.
    File,
    /// A block or character device.
    Device,
}

/// A file name without the prefix of one of these drivers.
pub(crate) fn strip_prefix(filename: &str) -> &str {
    let prefixes = ["file:", "host_device:", "host_cdrom:"];
    prefixes.iter().find_map(|prefix| filename.strip_prefix(prefix)).unwrap_or(filename)
}

/// A node's options of its own.
#[derive(Debug, Clone)]
pub(crate) struct FileOptions {
    pub(crate) filename: String,
    pub(crate) aio: Aio,
    pub(crate) native: bool,
    pub(crate) locking: bool,
}

impl FileOptions {
    /// Takes what is known out of `options`.
    pub(crate) fn take(driver: &str, options: &mut Options) -> Result<Self> {
        let filename = options.take_text("filename");
        let filename = filename
            .ok_or_else(|| Error::invalid(format!("The '{driver}' block driver requires a file name")))?;
        let unknown = |value: &str| Error::invalid(format!("invalid parameter value: {value}"));
        let aio = options.take_text("aio");
        let (aio, native) = match aio.as_deref() {
            None | Some("io_uring") => (Aio::Ring, false),
            Some("native") => (Aio::Ring, true),
            Some("threads") => (Aio::Threads, false),
            Some(other) => return Err(unknown(other)),
        };
        let locking = match options.take_text("locking").as_deref() {
            None | Some("auto" | "on") => true,
            Some("off") => false,
            Some(other) => return Err(unknown(other)),
        };
        options.take_number("aio-max-batch")?;
        // The page cache is the host's affair: another host's programs need not see it.
        options.take_switch("drop-cache")?;
        Ok(Self { filename, aio, native, locking })
    }
}

/// An open file.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) io: IoFile,
    pub(crate) flags: OpenFlags,
    /// What offsets and lengths are multiples of, in bytes; 1 without direct I/O.
    pub(crate) alignment: u32,
    /// Whether it has a length that cannot be changed.
    pub(crate) device: bool,
    pub(crate) len: u64,
}

impl Drop for Opened {
    fn drop(&mut self) {
        // The kernel may hold the file a moment longer than the last request takes, and with it the locks, which would
        // be in the way of whoever opens it next. Requests that nobody waits for any more keep them.
        if Arc::strong_count(self.io.descriptor()) == 1 {
            lock::release(self.io.descriptor());
        }
    }
}

fn could_not(action: &str, filename: &str, error: rustix::io::Errno) -> Error {
    let errno = Errno::new(error.raw_os_error());
    let message = format!("Could not {action} '{filename}': {errno}");
    // Programs tell people who may not write from people who may not write here by the message alone.
    Error::new(if errno == Errno::READ_ONLY { Errno::ACCESS } else { errno }, message)
}

/// Opens the file by its name; nothing else.
pub(crate) fn open_named(action: &str, filename: &str, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    let opened = rustix::fs::open(filename, flags | OFlags::CLOEXEC, mode);
    opened.map_err(|error| match error {
        rustix::io::Errno::INVAL if flags.contains(OFlags::DIRECT) => {
            let message = format!("Could not {action} '{filename}': filesystem does not support O_DIRECT");
            Error::new(Errno::INVALID, message)
        }
        _ => could_not(action, filename, error),
    })
}

/// Opens a file, takes its locks, and finds out what there is to know of it.
///
/// # Errors
/// The host's; it is not what the driver wants; or another process is in the way.
pub(crate) async fn open(
    driver: &str,
    wants: Wants,
    options: &FileOptions,
    flags: OpenFlags,
) -> Result<Opened> {
    let filename = &options.filename;
    // A pipe would wait for its other end; of what else it is not, opening it may say more.
    let kind = rustix::fs::stat(filename.as_str()).map_err(|error| could_not("open", filename, error))?;
    let kind = FileType::from_raw_mode(kind.st_mode);
    if [FileType::Fifo, FileType::Socket].contains(&kind) {
        check_type(driver, wants, filename, kind)?;
    }
    let mut how = if flags.writable { OFlags::RDWR } else { OFlags::RDONLY };
    if flags.direct {
        how |= OFlags::DIRECT;
    } else if options.native {
        let message = "aio=native was specified, but it requires cache.direct=on, which was not specified.";
        return Err(Error::invalid(message));
    }
    if driver == "host_cdrom" {
        how |= OFlags::NONBLOCK;
    }
    let file = open_named("open", filename, how, Mode::empty())?;
    let stat = rustix::fs::fstat(&file).map_err(|error| could_not("stat", filename, error))?;
    let device = check_type(driver, wants, filename, FileType::from_raw_mode(stat.st_mode))?;
    if flags.writable && FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
        check_writable(stat.st_rdev)?;
    }
    if options.locking {
        lock::claim_patiently(&file, Claim::of(flags), filename).await?;
    }
    let len = length(&file, device).map_err(|error| could_not("get the length of", filename, error))?;
    let io = IoFile::new(file, options.aio);
    let alignment = if flags.direct { probe_alignment(&io).await? } else { 1 };
    Ok(Opened { io, flags, alignment, device, len })
}

/// Whether it is a device; an error if it is not what the driver wants.
fn check_type(driver: &str, wants: Wants, filename: &str, file_type: FileType) -> Result<bool> {
    let device = matches!(file_type, FileType::BlockDevice | FileType::CharacterDevice);
    let wanted = match wants {
        Wants::File if file_type != FileType::RegularFile => "a regular file",
        Wants::Device if !device => "either a character or block device",
        _ => return Ok(device),
    };
    Err(Error::invalid(format!("'{driver}' driver requires '{filename}' to be {wanted}")))
}

/// A block device that is read-only can be opened for writing, and refuses the writes.
fn check_writable(device: u64) -> Result<()> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let read_only = std::fs::read(format!("/sys/dev/block/{major}:{minor}/ro"));
    if read_only.is_ok_and(|text| text.starts_with(b"1")) {
        let message = format!("The device is not writable: {}", Errno::ACCESS);
        return Err(Error::new(Errno::ACCESS, message));
    }
    Ok(())
}

/// The length in bytes.
pub(crate) fn length(file: &OwnedFd, device: bool) -> rustix::io::Result<u64> {
    if device {
        // Devices that have no length cannot be sought in, and are empty.
        return Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::End(0)).unwrap_or(0));
    }
    Ok(rustix::fs::fstat(file)?.st_size.unsigned_abs())
}

/// What offsets, lengths and addresses of direct I/O must be multiples of: a device says it, a file is tried.
async fn probe_alignment(io: &IoFile) -> Result<u32> {
    if let Ok(sector) = rustix::fs::ioctl_blksszget(io.descriptor())
        && sector.is_power_of_two()
        && sector <= MOST_ALIGNMENT
    {
        return Ok(sector);
    }
    let mut buffer = IoBuffer::zeroed(MOST_ALIGNMENT as usize);
    for alignment in [1, 512, 1024, 2048, 4096] {
        let read = io.read_at(0, &buffer.io_range(0..alignment as usize)).await;
        match read {
            // The file system does without, or has nothing to read: what suits all is right.
            Ok(_) if alignment == 1 => return Ok(MOST_ALIGNMENT),
            Ok(_) => return Ok(alignment),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(Error::from(error)),
        }
    }
    Err(Error::invalid("Could not find working O_DIRECT alignment").hint("Try cache.direct=off"))
}
