//! The file, or the lack of one, that guest memory is made of.

use crate::options::{MemoryOptions, MemorySource};
use crate::{MemoryError, PAGE_SIZE, host};
use rustix::fs::{MemfdFlags, fstatfs, fstatvfs, memfd_create};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// `f_type` of hugetlbfs and tmpfs (statfs(2)).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// What all regions of guest memory are mapped from.
#[derive(Debug, Clone)]
pub(crate) struct Backing {
    /// The file, with the regions one after the other; none for anonymous memory.
    pub(crate) file: Option<Arc<File>>,
    /// Whether what is written goes to the file.
    pub(crate) shared: bool,
    /// The size of the pages that the host takes it from.
    pub(crate) page_size: u64,
    /// Whether it consists of reserved huge pages.
    pub(crate) huge: bool,
    /// The file on a disk that it is in, if it is in one.
    pub(crate) on_disk: Option<PathBuf>,
}

impl Backing {
    /// A backing for `bytes` of memory.
    pub(crate) fn new(options: &MemoryOptions, bytes: u64) -> Result<Self, MemoryError> {
        let plain =
            Self { file: None, shared: options.shared, page_size: PAGE_SIZE, huge: false, on_disk: None };
        match &options.source {
            MemorySource::Anonymous => {
                host::check_total(bytes)?;
                let file = if options.shared { Some(memfd(None, bytes)?) } else { None };
                Ok(Self { file, ..plain })
            }
            MemorySource::HugePages(size) => {
                host::check_huge_page_size(*size)?;
                let file = if options.shared { Some(memfd(Some(*size), bytes)?) } else { None };
                Ok(Self { file, page_size: *size, huge: true, ..plain })
            }
            MemorySource::File(path) => {
                let file = open(path, options.shared, bytes)?;
                let failed = |errno: Errno| file_error(path, errno.into());
                let system = fstatfs(&file).map_err(failed)?;
                let kind = system.f_type as i64;
                let huge = kind == HUGETLBFS_MAGIC;
                let page_size = if huge { system.f_bsize as u64 } else { PAGE_SIZE };
                if kind == TMPFS_MAGIC {
                    host::check_total(bytes)?;
                }
                let on_disk = (!huge && kind != TMPFS_MAGIC).then(|| path.clone());
                Ok(Self { file: Some(Arc::new(file)), page_size, huge, on_disk, ..plain })
            }
        }
    }

    /// Grows the file to `bytes`. Called once sizes are known to fit its pages.
    pub(crate) fn grow(&self, options: &MemoryOptions, bytes: u64) -> Result<(), MemoryError> {
        let (MemorySource::File(path), Some(file)) = (&options.source, &self.file) else { return Ok(()) };
        let failed = |source| file_error(path, source);
        let status = file.metadata().map_err(failed)?;
        if status.len() >= bytes {
            return Ok(());
        }
        if !self.shared || status.len() > 0 {
            return Err(MemoryError::FileTooSmall { path: path.clone(), len: status.len(), needed: bytes });
        }
        // A file system that is full would end the program in the middle of the guest's work.
        let system = fstatvfs(&**file).map_err(|errno| failed(errno.into()))?;
        let available = system.f_bavail.saturating_mul(system.f_frsize);
        let needed = bytes.saturating_sub(status.blocks().saturating_mul(512));
        // A hugetlbfs or tmpfs without a limit says that it has no blocks at all.
        if system.f_blocks > 0 && needed > available {
            if self.huge {
                return Err(host::too_few_huge_pages(self.page_size, bytes));
            }
            return Err(MemoryError::NoSpace { path: path.clone(), needed, available });
        }
        file.set_len(bytes).map_err(failed)
    }
}

fn file_error(path: &Path, source: io::Error) -> MemoryError {
    MemoryError::File { path: path.to_owned(), source }
}

/// A memfd of `bytes`, of huge pages of the size given.
fn memfd(huge: Option<u64>, bytes: u64) -> Result<Arc<File>, MemoryError> {
    let mut flags = MemfdFlags::CLOEXEC;
    if let Some(size) = huge {
        // The logarithm of the size stands in the upper bits (memfd_create(2)).
        flags |= MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(size.trailing_zeros() << 26);
    }
    let no_memory = |source| MemoryError::NoMemory { bytes, source };
    let fd = memfd_create("guest-memory", flags).map_err(|errno| no_memory(errno.into()))?;
    let file = File::from(fd);
    if let Some(size) = huge
        && !bytes.is_multiple_of(size)
    {
        return Err(MemoryError::Unaligned { what: "guest memory", bytes, page: size });
    }
    file.set_len(bytes).map_err(no_memory)?;
    Ok(Arc::new(file))
}

/// Opens a file for guest memory, or makes one.
fn open(path: &Path, shared: bool, bytes: u64) -> Result<File, MemoryError> {
    let failed = |source| file_error(path, source);
    match path.metadata() {
        Ok(status) if status.is_dir() => {
            if !shared {
                return Err(failed(io::Error::other(
                    "a folder is good for shared memory only; add shared=on, or name a file",
                )));
            }
            return tempfile::tempfile_in(path).map_err(failed);
        }
        Ok(status) if !status.is_file() => {
            return Err(failed(io::Error::other("it is neither a file nor a folder")));
        }
        Ok(status) if !shared && status.len() < bytes => {
            return Err(MemoryError::FileTooSmall {
                path: path.to_owned(),
                len: status.len(),
                needed: bytes,
            });
        }
        _ => {}
    }
    OpenOptions::new().read(true).write(shared).create(shared).truncate(false).open(path).map_err(failed)
}
