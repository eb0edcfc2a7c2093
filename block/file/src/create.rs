//! Making files.

use crate::lock::{self, Claim};
use crate::open::{open_named, strip_prefix};
use crate::truncate::set_length;
use block_graph::{Error, OptionKind, OptionSpec, Options, Preallocation, Result};
use io_loop::{Aio, IoFile};
use rustix::fs::{IFlags, Mode, OFlags};
use std::os::fd::AsFd;

/// What a file's length is a multiple of, in bytes.
const SECTOR: u64 = 512;

/// The options of a new file.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "extent_size_hint",
        kind: OptionKind::Size,
        help: "Extent size hint for the image file, 0 to disable",
        default: None,
        amendable: false,
    },
    OptionSpec {
        name: "nocow",
        kind: OptionKind::Switch,
        help: "Turn off copy-on-write (valid only on btrfs)",
        default: None,
        amendable: false,
    },
    OptionSpec {
        name: "preallocation",
        kind: OptionKind::Text,
        help: "Preallocation mode (allowed values: off, falloc, full)",
        default: None,
        amendable: false,
    },
    OptionSpec {
        name: "size",
        kind: OptionKind::Size,
        help: "Virtual disk size",
        default: None,
        amendable: false,
    },
];

/// Makes a file, or empties the one that is there.
///
/// # Errors
/// The host's, what is wrong with the options, or that another process uses the file.
pub(crate) async fn create(filename: &str, options: &mut Options) -> Result<()> {
    let filename = strip_prefix(filename);
    let size = options.take_size("size")?.unwrap_or(0);
    let size = size.checked_next_multiple_of(SECTOR).filter(|size| *size <= i64::MAX as u64);
    let size = size.ok_or_else(|| Error::invalid("Image size is too large"))?;
    let no_copy_on_write = options.take_switch("nocow")?.unwrap_or(false);
    let preallocation = options.take_text("preallocation").unwrap_or_else(|| "off".into());
    let preallocation = Preallocation::from_name(&preallocation)
        .ok_or_else(|| Error::invalid(format!("invalid parameter value: {preallocation}")))?;
    // A hint that file systems with allocation groups may follow or not; this one leaves them to their own devices.
    if options.take_size("extent_size_hint")?.is_some_and(|hint| hint > u64::from(u32::MAX)) {
        return Err(Error::invalid("Extent size hint is too large"));
    }
    let file = open_named("create", filename, OFlags::RDWR | OFlags::CREATE, Mode::from_raw_mode(0o644))?;
    lock::claim(&file, Claim::CREATE, filename)?;
    let file = IoFile::new(file, Aio::Threads);
    let made = file.call(move |fd| {
        let made = set_length(fd, 0, Preallocation::Off).and_then(|()| {
            if no_copy_on_write {
                // Only some file systems have it, and without it the file is as good.
                let flags = rustix::fs::ioctl_getflags(fd).unwrap_or(IFlags::empty());
                let _ = rustix::fs::ioctl_setflags(fd, flags | IFlags::NOCOW);
            }
            set_length(fd, size, preallocation)
        });
        lock::release(fd.as_fd());
        Ok(made)
    });
    made.await.map_err(Error::from)?
}
