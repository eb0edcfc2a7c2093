//! A file or device of the host as a driver.

use crate::direct;
use crate::host_file::HostFile;
use crate::lock::{self, Claim};
use crate::open::{self, FileOptions};
use crate::status::{Run, run_at};
use crate::truncate::set_length;
use crate::zero;
use block_graph::{
    BlockStatus, Driver, Errno, Error, Limits, OpenFlags, Options, Preallocation, Result, Truncate,
    WriteFlags, ZeroFlags, async_trait,
};
use io_loop::IoVec;
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::Ordering;

#[async_trait(?Send)]
impl Driver for HostFile {
    fn format_name(&self) -> &'static str {
        self.driver
    }

    fn len(&self) -> u64 {
        self.known_len()
    }

    fn limits(&self) -> Limits {
        let alignment = self.opened.read().alignment;
        Limits { request_alignment: alignment, memory_alignment: alignment, ..Limits::default() }
    }

    fn grows(&self) -> bool {
        !self.opened.read().device
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        direct::read(&self.opened(), offset, into).await
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let file = self.opened();
        let through = flags.contains(WriteFlags::FUA) && !file.flags.no_flush;
        direct::write(self, &file, offset, from, through).await?;
        self.len.fetch_max(offset + from.len() as u64, Ordering::AcqRel);
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let file = self.opened();
        zero::write_zeroes(self, &file, offset, len, flags).await?;
        self.len.fetch_max(offset + len, Ordering::AcqRel);
        if flags.contains(ZeroFlags::FUA) && !file.flags.no_flush {
            file.io.sync().await?;
        }
        Ok(())
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        zero::discard(self, &self.opened(), offset, len).await
    }

    async fn flush(&self) -> Result<()> {
        let file = self.opened();
        if file.flags.no_flush {
            return Ok(());
        }
        match file.io.sync().await {
            // Devices that keep nothing have nothing to sync.
            Err(error) if file.device && error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            synced => Ok(synced?),
        }
    }

    async fn block_status(&self, offset: u64, len: u64, precise: bool) -> Result<BlockStatus> {
        let file = self.opened();
        if file.device || !precise {
            return Ok(BlockStatus::data(len));
        }
        {
            let run = self.data_run.lock();
            if run.contains(&offset) {
                return Ok(BlockStatus::data(len.min(run.end - offset)));
            }
        }
        Ok(match run_at(&**file.io.descriptor(), offset, self.known_len().max(offset + len)) {
            Run::Data(run) => {
                let found = BlockStatus::data(len.min(run.end - offset));
                *self.data_run.lock() = run;
                found
            }
            Run::Hole(hole) => BlockStatus::zero(len.min(hole.end - offset)),
        })
    }

    async fn truncate(&self, len: u64, how: Truncate) -> Result<()> {
        let file = self.opened();
        if file.device {
            let known = self.known_len();
            return match how {
                _ if how.preallocation != Preallocation::Off => Err(Error::unsupported(format!(
                    "Preallocation mode '{}' unsupported for this non-regular file",
                    how.preallocation.name()
                ))),
                _ if len != known && how.exact => Err(Error::unsupported("Cannot resize device files")),
                _ if len > known => Err(Error::new(Errno::INVALID, "Cannot grow device files")),
                _ => Ok(()),
            };
        }
        self.forget_run(0..u64::MAX);
        let preallocation = how.preallocation;
        file.io.call(move |fd| Ok(set_length(fd, len, preallocation))).await.map_err(Error::from)??;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    /// Others may have the file from now on, though somebody still holds the node.
    async fn close(&self) -> Result<()> {
        lock::release(self.opened().io.descriptor());
        Ok(())
    }

    async fn reopen(&self, options: &mut Options, flags: OpenFlags) -> Result<()> {
        let mut wanted = self.options.clone();
        if options.has("filename") || options.has("aio") || options.has("locking") {
            options.set_default("filename", wanted.filename.as_str());
            wanted = FileOptions::take(self.driver, options)?;
            if wanted.filename != self.options.filename {
                return Err(Error::unsupported("Cannot change the option 'filename'"));
            }
        }
        let old = self.opened();
        // The locks of the old descriptor would be in the way of the new one's.
        lock::release(old.io.descriptor());
        match open::open(self.driver, self.wants, &wanted, flags).await {
            Ok(opened) => {
                self.len.store(opened.len, Ordering::Release);
                *self.opened.write() = Arc::new(opened);
                Ok(())
            }
            Err(error) => {
                if self.options.locking {
                    lock::claim(old.io.descriptor(), Claim::of(old.flags), &self.options.filename)?;
                }
                Err(error)
            }
        }
    }

    fn allocated_size(&self) -> Option<u64> {
        let stat = rustix::fs::fstat(&**self.opened().io.descriptor()).ok()?;
        Some(stat.st_blocks.unsigned_abs() * 512)
    }

    fn filename(&self) -> Option<String> {
        Some(self.options.filename.clone())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
