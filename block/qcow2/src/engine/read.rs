//! Reading.

use super::clusters::Run;
use super::parts::Parts;
use super::state::Qcow2;
use crate::format::entry::SubclusterKind;
use block_graph::Result;
use io_loop::IoVec;

impl Qcow2 {
    /// Reads guest data into `into`; the range is within the disk, or within the VM state behind it.
    pub(crate) async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.corruption.check()?;
        let _request = self.requests.enter().await;
        self.read_guest(offset, into).await
    }

    /// [`Qcow2::read`] for those that are within a request, or alone.
    pub(crate) async fn read_guest(&self, offset: u64, into: &IoVec) -> Result<()> {
        let len = into.len() as u64;
        let first = match self.map_in_memory(offset, len) {
            Some(run) => run,
            None => self.map(offset, len).await?,
        };
        if first.len == len {
            return self.read_run(first, offset, into.clone()).await;
        }
        let mut parts = Parts::new();
        let result = self
            .read_parts(&mut parts, offset, into, |run, guest, into| self.read_run(run, guest, into))
            .await;
        parts.end(result).await
    }

    /// Reads guest data behind the disk's end, where the backing file has no say.
    pub(crate) async fn read_own(&self, offset: u64, into: &IoVec) -> Result<()> {
        let (len, mut done) = (into.len() as u64, 0);
        while done < len {
            let run = self.map(offset + done, len - done).await?;
            let part = into.slice(done as usize..(done + run.len) as usize);
            match run.kind {
                SubclusterKind::UnallocatedPlain | SubclusterKind::UnallocatedAllocated => {
                    part.zero(0, part.len())
                }
                _ => self.read_run(run, offset + done, part).await?,
            }
            done += run.len;
        }
        Ok(())
    }

    async fn read_parts<F: Future<Output = Result<()>>>(
        &self,
        parts: &mut Parts<F>,
        offset: u64,
        into: &IoVec,
        begin: impl Fn(Run, u64, IoVec) -> F,
    ) -> Result<()> {
        let (len, mut done) = (into.len() as u64, 0);
        while done < len {
            let run = parts.beside(self.map(offset + done, len - done)).await?;
            let range = done as usize..(done + run.len) as usize;
            parts.begin(begin(run, offset + done, into.slice(range))).await;
            done += run.len;
        }
        Ok(())
    }

    async fn read_run(&self, run: Run, guest: u64, into: IoVec) -> Result<()> {
        match run.kind {
            SubclusterKind::Normal => self.read_host(run.host, guest, &into).await,
            SubclusterKind::ZeroPlain | SubclusterKind::ZeroAllocated => {
                into.zero(0, into.len());
                Ok(())
            }
            SubclusterKind::UnallocatedPlain | SubclusterKind::UnallocatedAllocated => {
                self.read_backing(guest, &into).await
            }
            SubclusterKind::Compressed => self.read_compressed(run.entry, guest, &into).await,
            // `map` reports it.
            SubclusterKind::Invalid => Err(self.corrupt("Invalid cluster entry found".into()).await),
        }
    }

    /// Reads what the backing file has, and zeros where it has nothing.
    pub(crate) async fn read_backing(&self, guest: u64, into: &IoVec) -> Result<()> {
        let len = into.len();
        let Some(backing) = self.backing_node().filter(|_| guest < self.disk_size()) else {
            into.zero(0, len);
            return Ok(());
        };
        let there = backing.len().saturating_sub(guest).min(len as u64) as usize;
        into.zero(there, len - there);
        if there == 0 {
            return Ok(());
        }
        self.event("read_backing_aio");
        backing.read(guest, &into.slice(0..there)).await
    }
}
