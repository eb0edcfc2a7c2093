//! What an open file or device of the host is, apart from what can be asked of it.

use crate::fallocate::Lacks;
use crate::open::{self, FileOptions, Opened, Wants};
use block_graph::{OpenFlags, Options, RangeGuard, RangeLock, Result};
use parking_lot::{Mutex, RwLock};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A file or block device of the host.
#[derive(Debug)]
pub struct HostFile {
    pub(crate) driver: &'static str,
    pub(crate) wants: Wants,
    pub(crate) options: FileOptions,
    pub(crate) opened: RwLock<Arc<Opened>>,
    /// The length as far as this node knows; nobody else may change it.
    pub(crate) len: AtomicU64,
    /// What the file system does not have.
    pub(crate) lacks: Arc<Lacks>,
    /// With direct I/O: the blocks that are being written.
    pub(crate) writes: RangeLock,
    /// Data, no holes: what was found last.
    pub(crate) data_run: Mutex<Range<u64>>,
}

impl HostFile {
    /// Opens the file that `options` name, and takes its locks. `driver` is the name it is opened by.
    pub(crate) async fn open(
        driver: &'static str,
        wants: Wants,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Self> {
        let options = FileOptions::take(driver, options)?;
        let opened = open::open(driver, wants, &options, flags).await?;
        Ok(Self {
            driver,
            wants,
            options,
            len: AtomicU64::new(opened.len),
            opened: RwLock::new(Arc::new(opened)),
            lacks: Arc::default(),
            writes: RangeLock::new(),
            data_run: Mutex::new(0..0),
        })
    }

    /// The open file, which a reopening exchanges.
    pub(crate) fn opened(&self) -> Arc<Opened> {
        self.opened.read().clone()
    }

    /// The length as far as this node knows, in bytes.
    pub(crate) fn known_len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// With direct I/O: waits until nobody writes to the range's blocks, and keeps others from it.
    pub(crate) async fn hold(&self, file: &Opened, start: u64, end: u64) -> Option<RangeGuard<'_>> {
        if file.alignment == 1 {
            return None;
        }
        let alignment = u64::from(file.alignment);
        let start = start - start % alignment;
        Some(self.writes.lock(start..end.checked_next_multiple_of(alignment).unwrap_or(u64::MAX)).await)
    }

    /// Takes a range out of what is known to be data.
    pub(crate) fn forget_run(&self, range: Range<u64>) {
        let mut run = self.data_run.lock();
        if run.start < range.end && range.start < run.end {
            *run = 0..0;
        }
    }
}
