//! Everything that is written is stored compressed.

use crate::filter::{Filter, FilterDriver, open_below};
use block_graph::{
    Driver, DriverKind, Edge, Error, Limits, OpenContext, OpenFlags, Options, RangeLock, Result, Role,
    WriteFlags, async_trait,
};
use io_loop::{IoBuffer, IoVec};
use std::sync::Arc;

/// The most bytes that are read, changed and written back at once.
const MOST_PART: u64 = 1 << 20;

/// The filter `compress`.
#[derive(Debug)]
struct Compress {
    image: Arc<Edge>,
    /// The length of the image's clusters, which are compressed as a whole, in bytes.
    cluster: u64,
    /// The clusters that are being written.
    writes: RangeLock,
}

#[async_trait(?Send)]
impl Filter for Compress {
    const NAME: &'static str = "compress";

    fn below(&self) -> &Arc<Edge> {
        &self.image
    }

    fn limits(&self) -> Limits {
        let below = self.image.node().driver().limits();
        let cluster = u32::try_from(self.cluster).unwrap_or(below.request_alignment);
        Limits { request_alignment: cluster.max(below.request_alignment), ..below }
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let image = self.image.node();
        let flags = flags | WriteFlags::COMPRESSED;
        let stop = offset + from.len() as u64;
        let start = offset / self.cluster * self.cluster;
        // The last cluster ends with the image.
        let end = stop.checked_next_multiple_of(self.cluster).unwrap_or(u64::MAX).min(image.len().max(stop));
        let _held = self.writes.lock(start..end).await;
        if (start, end) == (offset, stop) {
            return image.write(offset, from, flags).await;
        }
        let part = MOST_PART.max(self.cluster) / self.cluster * self.cluster;
        let mut at = start;
        while at < end {
            let len = part.min(end - at);
            let memory = IoBuffer::scratch(len as usize).into_io();
            if at < offset || at + len > stop {
                image.read(at, &memory).await?;
            }
            let (first, last) = (at.max(offset), (at + len).min(stop));
            let piece = from.slice((first - offset) as usize..(last - offset) as usize);
            memory.copy_from_vec((first - at) as usize, &piece);
            image.write(at, &memory, flags).await?;
            at += len;
        }
        Ok(())
    }
}

/// The driver `compress`.
#[derive(Debug, Clone, Copy, Default)]
pub struct CompressKind;

#[async_trait(?Send)]
impl DriverKind for CompressKind {
    fn name(&self) -> &'static str {
        Compress::NAME
    }

    async fn open(
        &self,
        context: &OpenContext,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn Driver>> {
        let image = open_below(context, options, "file", flags).await?;
        // What has clusters can have compressed ones.
        let cluster = image.driver().image().and_then(|image| image.info().cluster_size);
        let Some(cluster) = cluster else {
            let format = image.driver().format_name();
            let message = format!("Compression is not supported for underlying format: {format}");
            return Err(Error::unsupported(message));
        };
        let (image, writes) = (Edge::new(Role::Filtered, image), RangeLock::new());
        Ok(Box::new(FilterDriver(Compress { image, cluster: cluster.max(1), writes })))
    }
}
