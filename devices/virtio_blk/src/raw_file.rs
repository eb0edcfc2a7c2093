//! A file or block device of the host as a disk, byte for byte.

use crate::{BlockBackend, file_io};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use virtio::GuestSlice;

/// Why an image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum RawError {
    /// The host does not open it.
    #[error("cannot open the image {}: {source}", .path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// It is neither a regular file nor a block device.
    #[error("the image {} is neither a file nor a block device", .0.display())]
    NotADisk(PathBuf),
    /// There is no room for what would be written to it.
    #[error("there is no temporary file for what is written to the image: {0}")]
    Temporary(io::Error),
    /// Somebody uses it in a way that does not go with what was asked for.
    #[error("the image {} is in use by another process", .0.display())]
    InUse(PathBuf),
}

/// A raw image, locked against other writers.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    size: u64,
    read_only: bool,
}

/// How many zeros are written at once where the host cannot make holes.
const ZEROS: &[u8] = &[0; 1 << 16];

impl RawFile {
    /// Opens the image at `path`. A writer has it for itself; readers share it with readers. The lock is an
    /// advisory one on all of the file, which goes with those that QEMU takes.
    ///
    /// # Errors
    /// [`RawError`].
    pub fn open(path: impl AsRef<Path>, read_only: bool) -> Result<Self, RawError> {
        let path = path.as_ref();
        let failed = |source| RawError::Open { path: path.to_owned(), source };
        let mut file = File::options().read(true).write(!read_only).open(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(RawError::NotADisk(path.to_owned()));
        }
        if !file_io::lock(file.as_fd(), !read_only).map_err(failed)? {
            return Err(RawError::InUse(path.to_owned()));
        }
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self { file, size, read_only })
    }

    /// An empty disk of `size` bytes in a file without a name, which goes with this.
    pub(crate) fn temporary(size: u64) -> io::Result<Self> {
        let file = tempfile::tempfile()?;
        file.set_len(size)?;
        Ok(Self { file, size, read_only: false })
    }

    /// `None` if the host cannot do it to this file.
    fn try_fallocate(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<Option<()>> {
        loop {
            match fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len) {
                Ok(()) => return Ok(Some(())),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl BlockBackend for RawFile {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        file_io::read_at(self.file.as_fd(), offset, buffers)
    }

    fn write_at(&self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        file_io::write_at(self.file.as_fd(), offset, buffers)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.try_fallocate(FallocateFlags::PUNCH_HOLE, offset, len)?
            .ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let how = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        if self.try_fallocate(how, offset, len)?.is_some() {
            return Ok(());
        }
        let mut done = 0;
        while done < len {
            let part = (len - done).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..part as usize], offset + done)?;
            done += part;
        }
        Ok(())
    }
}
