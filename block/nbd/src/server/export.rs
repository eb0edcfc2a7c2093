//! What a server serves: a node, or a part of one, by a name.

use crate::proto::*;
use crate::server::handshake::OfferedExport;
use block_graph::{DirtyBitmap, Error, NodeRef, Result, WriteFlags, ZeroFlags, status_above};
use io_loop::{IoBuffer, IoVec};
use std::sync::Arc;

/// How a node is exported.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// The name; the empty one is the default export.
    pub name: String,
    /// A description for people.
    pub description: Option<String>,
    /// Clients may write.
    pub writable: bool,
    /// Several connections at once are safe: what one flushes the others see.
    pub multi_conn: bool,
    /// Where the export begins in the node, in bytes.
    pub offset: u64,
    /// Offers [`QEMU_ALLOCATION_DEPTH`].
    pub allocation_depth: bool,
    /// Dirty bitmaps to offer, by name: of the node, of nodes below that it is a filter of, or stored in the image.
    pub bitmaps: Vec<String>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            description: None,
            writable: false,
            multi_conn: true,
            offset: 0,
            allocation_depth: false,
            bitmaps: Vec::new(),
        }
    }
}

/// A metadata context of an export.
#[derive(Debug)]
enum Context {
    Allocation,
    Depth,
    Bitmap(Arc<DirtyBitmap>),
}

/// A node that is exported.
#[derive(Debug)]
pub struct Export {
    node: NodeRef,
    options: ExportOptions,
    contexts: Vec<(String, Context)>,
}

/// How many ranges of a node one request of block status looks at, at most: those that are alike count too.
const MOST_LOOKS: usize = 1 << 16;
/// How many bytes `CMD_CACHE` reads at once.
const CACHE_PIECE: u64 = 1 << 20;

impl Export {
    /// An export of `node`.
    ///
    /// # Errors
    /// If it begins beyond the node's end, a name is too long, or there is no bitmap of a wanted name.
    pub async fn new(node: NodeRef, options: ExportOptions) -> Result<Self> {
        if options.name.len() > MAX_STRING {
            return Err(Error::invalid(format!("export name '{}' too long", options.name)));
        }
        if options.description.as_ref().is_some_and(|text| text.len() > MAX_STRING) {
            return Err(Error::invalid("export description too long"));
        }
        if options.offset > node.len() {
            let (offset, len) = (options.offset, node.len());
            return Err(Error::invalid(format!(
                "Offset {offset} is beyond the end of the image ({len} bytes)"
            )));
        }
        let mut contexts = vec![(BASE_ALLOCATION.to_owned(), Context::Allocation)];
        if options.allocation_depth {
            contexts.push((QEMU_ALLOCATION_DEPTH.to_owned(), Context::Depth));
        }
        for name in &options.bitmaps {
            let full = format!("{QEMU_DIRTY_BITMAP}{name}");
            if full.len() > MAX_STRING {
                return Err(Error::invalid(format!("Bitmap name too long to use as dirty bitmap: {name}")));
            }
            contexts.push((full, Context::Bitmap(find_bitmap(&node, name).await?)));
        }
        Ok(Self { node, options, contexts })
    }

    /// The node.
    pub fn node(&self) -> &NodeRef {
        &self.node
    }

    /// The options.
    pub fn options(&self) -> &ExportOptions {
        &self.options
    }

    /// Whether clients may write.
    pub fn writable(&self) -> bool {
        self.options.writable && !self.node.read_only()
    }

    /// Bytes, now.
    pub fn len(&self) -> u64 {
        self.node.len().saturating_sub(self.options.offset)
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What clients are told.
    pub fn offer(&self) -> OfferedExport {
        let mut flags = TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_CACHE;
        if self.writable() {
            flags |= TransmissionFlags::SEND_FUA
                | TransmissionFlags::SEND_TRIM
                | TransmissionFlags::SEND_WRITE_ZEROES
                | TransmissionFlags::SEND_FAST_ZERO;
        } else {
            flags |= TransmissionFlags::READ_ONLY;
        }
        flags.set(TransmissionFlags::CAN_MULTI_CONN, self.options.multi_conn);
        let limits = self.node.driver().limits();
        let minimum = limits.request_alignment.clamp(1, 1 << 16);
        let maximum = u32::try_from(limits.max_transfer).unwrap_or(u32::MAX);
        let maximum = if maximum == 0 { MAX_PAYLOAD } else { maximum.clamp(minimum.max(4096), MAX_PAYLOAD) };
        OfferedExport {
            name: self.options.name.clone(),
            description: self.options.description.clone(),
            info: ExportInfo { size: self.len(), flags },
            sizes: BlockSizes { minimum, preferred: minimum.max(4096), maximum },
            contexts: self.contexts.iter().map(|(name, _)| name.clone()).collect(),
        }
    }

    pub(super) async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.node.read(self.options.offset + offset, into).await
    }

    pub(super) async fn write(&self, offset: u64, from: &IoVec, fua: bool) -> Result<()> {
        let fua = fua || self.node.flags().write_through;
        let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
        self.node.write(self.options.offset + offset, from, flags).await
    }

    pub(super) async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        unmap: bool,
        fast: bool,
        fua: bool,
    ) -> Result<()> {
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::MAY_UNMAP, unmap);
        flags.set(ZeroFlags::NO_FALLBACK, fast);
        flags.set(ZeroFlags::FUA, fua || self.node.flags().write_through);
        self.node.write_zeroes(self.options.offset + offset, len, flags).await
    }

    pub(super) async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.node.discard(self.options.offset + offset, len).await
    }

    pub(super) async fn flush(&self) -> Result<()> {
        self.node.flush().await
    }

    /// Has whatever caches below know the range.
    pub(super) async fn cache(&self, offset: u64, len: u64) -> Result<()> {
        let piece = IoBuffer::scratch(len.min(CACHE_PIECE) as usize).into_io();
        let mut done = 0;
        while done < len {
            let part = (len - done).min(CACHE_PIECE);
            self.read(offset + done, &piece.slice(0..part as usize)).await?;
            done += part;
        }
        Ok(())
    }

    /// At most `most` extents of the context `name` from `offset` on, up to `len` bytes; at least one.
    pub(super) async fn extents(
        &self,
        name: &str,
        offset: u64,
        len: u64,
        most: usize,
    ) -> Result<Vec<Extent>> {
        let context = self.contexts.iter().find(|(known, _)| known == name).map(|(_, context)| context);
        let context = context.ok_or_else(|| Error::invalid(format!("no metadata context '{name}'")))?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut done = 0;
        for _ in 0..MOST_LOOKS {
            if done >= len {
                break;
            }
            let next = self.extent(context, offset + done, len - done).await?;
            done += next.len;
            if let Some(last) = extents.last_mut().filter(|last| last.status == next.status) {
                last.len += next.len;
            } else if extents.len() < most {
                extents.push(next);
            } else {
                break;
            }
        }
        Ok(extents)
    }

    async fn extent(&self, context: &Context, offset: u64, len: u64) -> Result<Extent> {
        let at = self.options.offset + offset;
        if let Context::Bitmap(bitmap) = context {
            // What is beyond a bitmap's end is clean.
            let dirty = bitmap.next_dirty(at).unwrap_or(u64::MAX..u64::MAX);
            let (until, status) = if dirty.start <= at { (dirty.end, STATE_DIRTY) } else { (dirty.start, 0) };
            return Ok(Extent { len: (until - at).min(len), status });
        }
        let (status, depth) = status_above(&self.node, None, at, len, false).await?;
        if status.len == 0 {
            // The node became shorter meanwhile.
            return Ok(Extent { len, status: 0 });
        }
        let bits = match context {
            Context::Depth if status.allocated => depth as u64 + 1,
            Context::Depth | Context::Bitmap(_) => 0,
            Context::Allocation => {
                let hole = if status.data { 0 } else { STATE_HOLE };
                hole | if status.zero { STATE_ZERO } else { 0 }
            }
        };
        Ok(Extent { len: status.len.min(len), status: bits })
    }
}

async fn find_bitmap(node: &NodeRef, name: &str) -> Result<Arc<DirtyBitmap>> {
    let mut node = node.clone();
    loop {
        if let Some(bitmap) = node.bitmaps().into_iter().find(|bitmap| bitmap.name() == Some(name)) {
            return Ok(bitmap);
        }
        if let Some(image) = node.driver().image()
            && image.bitmaps().iter().any(|bitmap| bitmap.name == name)
        {
            return image.bitmap(name).await;
        }
        let role = block_graph::Role::Filtered;
        let below = node
            .child(role)
            .or_else(|| node.driver().is_filter().then(|| node.child(block_graph::Role::File))?);
        node = below.ok_or_else(|| Error::invalid(format!("Bitmap '{name}' is not found")))?;
    }
}
