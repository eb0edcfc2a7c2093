//! What is read from backing files is stored in the image, so that it is read from there the next time.

use crate::filter::{Filter, FilterDriver, open_below};
use block_graph::{
    Driver, DriverKind, Edge, Errno, Error, NodeRef, OpenContext, OpenFlags, Options, RangeLock, Result,
    Role, WriteFlags, ZeroFlags, async_trait, status_above,
};
use io_loop::{IoBuffer, IoVec};
use std::sync::Arc;

/// The most bytes that are copied at once.
const MOST_COPY: u64 = 1 << 20;

/// The filter `copy-on-read`.
#[derive(Debug)]
struct CopyOnRead {
    image: Arc<Edge>,
    /// The lowest node that is copied from; any if there is none.
    bottom: Option<NodeRef>,
    /// What copies are aligned to, in bytes.
    cluster: u64,
    /// What is written, by users or by copies: a copy must not undo a write.
    writes: RangeLock,
}

impl CopyOnRead {
    /// Whether bytes from `at` on are to be copied, and how many are alike.
    async fn needs_copy(&self, at: u64, len: u64) -> Result<(bool, u64)> {
        let image = self.image.node();
        let (status, _) = status_above(&image, image.backing().as_ref(), at, len, true).await?;
        let alike = status.len.clamp(1, len);
        if status.allocated {
            return Ok((false, alike));
        }
        let (Some(bottom), Some(backing)) = (&self.bottom, image.backing()) else { return Ok((true, alike)) };
        let (status, _) = status_above(&backing, bottom.backing().as_ref(), at, alike, true).await?;
        // What lies below the bottom is not copied.
        Ok((status.allocated, status.len.clamp(1, alike)))
    }

    /// Copies the clusters of a range that is to be copied, and fills `into` with the range from `at` on. Returns how
    /// many bytes that were.
    async fn copy(&self, at: u64, alike: u64, into: &IoVec) -> Result<u64> {
        let image = self.image.node();
        let start = at / self.cluster * self.cluster;
        let most = MOST_COPY.max(self.cluster);
        let end = at.saturating_add(alike).checked_next_multiple_of(self.cluster).unwrap_or(u64::MAX);
        let end = end.min(start + most).min(image.len());
        let _held = self.writes.lock(start..end).await;
        // The node may have got its own while this waited.
        let (needed, alike) = self.needs_copy(at, alike.min(end - at)).await?;
        if !needed {
            image.read(at, &into.slice(0..alike as usize)).await?;
            return Ok(alike);
        }
        let memory = IoBuffer::scratch((end - start) as usize).into_io();
        image.read(start, &memory).await?;
        image.driver().debug_event("cor_write");
        if memory.is_zero(0, memory.len()) {
            image.write_zeroes(start, end - start, ZeroFlags::empty()).await?;
        } else {
            image.write(start, &memory, WriteFlags::empty()).await?;
        }
        let from = (at - start) as usize;
        into.copy_from_vec(0, &memory.slice(from..from + alike as usize));
        Ok(alike)
    }
}

#[async_trait(?Send)]
impl Filter for CopyOnRead {
    const NAME: &'static str = "copy-on-read";

    fn below(&self) -> &Arc<Edge> {
        &self.image
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        let image = self.image.node();
        if image.read_only() {
            return image.read(offset, into).await;
        }
        let len = into.len() as u64;
        let mut done = 0;
        while done < len {
            let (at, rest) = (offset + done, into.slice(done as usize..into.len()));
            let (needed, alike) = self.needs_copy(at, len - done).await?;
            done += if needed {
                self.copy(at, alike, &rest).await?
            } else {
                image.read(at, &rest.slice(0..alike as usize)).await?;
                alike
            };
        }
        Ok(())
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let _held = self.writes.lock(offset..offset.saturating_add(from.len() as u64)).await;
        self.image.node().write(offset, from, flags).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let _held = self.writes.lock(offset..offset.saturating_add(len)).await;
        self.image.node().write_zeroes(offset, len, flags).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let _held = self.writes.lock(offset..offset.saturating_add(len)).await;
        self.image.node().discard(offset, len).await
    }

    fn open_options(&self) -> Options {
        self.bottom.iter().map(|bottom| ("bottom", bottom.name())).collect()
    }
}

/// The driver `copy-on-read`.
#[derive(Debug, Clone, Copy, Default)]
pub struct CopyOnReadKind;

#[async_trait(?Send)]
impl DriverKind for CopyOnReadKind {
    fn name(&self) -> &'static str {
        CopyOnRead::NAME
    }

    async fn open(
        &self,
        context: &OpenContext,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn Driver>> {
        let image = open_below(context, options, "file", flags).await?;
        let bottom = match options.take_text("bottom") {
            None => None,
            Some(name) => {
                let missing = || Error::invalid(format!("Bottom node '{name}' not found"));
                let node = context.node(&name).ok_or_else(missing)?;
                if node.driver().is_filter() {
                    return Err(Error::invalid(format!("Bottom node '{name}' is a filter")));
                }
                Some(node)
            }
        };
        if image.read_only() {
            // There would be nowhere to copy to.
            return Err(Error::new(Errno::NOT_PERMITTED, "Block node is read-only"));
        }
        let cluster = image.driver().image().and_then(|image| image.info().cluster_size);
        // What a format can make zero alone it can store alone: a part of a cluster, where clusters have parts.
        let parts = image.driver().limits().write_zeroes_alignment;
        let cluster = cluster.map(|cluster| if parts > 0 { cluster.min(parts) } else { cluster });
        Ok(Box::new(FilterDriver(CopyOnRead {
            image: Edge::new(Role::Filtered, image),
            bottom,
            cluster: cluster.unwrap_or(1).max(1),
            writes: RangeLock::new(),
        })))
    }
}
