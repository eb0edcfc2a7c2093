//! What ranges of images are, seen through filters, files and backing chains.

use block_graph::{BlockStatus, NodeRef, Result, Role, skip_filters};
use std::sync::Arc;

/// What a range of a node is, with what the file below knows of it: a hole of the file is zero. What no backing file
/// reaches is zero too.
///
/// # Errors
///
/// A driver's.
pub async fn of(node: &NodeRef, offset: u64, len: u64) -> Result<BlockStatus> {
    let mut status = node.block_status(offset, len, true).await?;
    if status.at.is_none() && status.allocated && node.driver().edges().is_empty() {
        // What stands on nothing has its bytes where they are.
        status.at = Some((node.clone(), offset));
    }
    if status.recurse
        && let Some((below, at)) = status.at.clone()
        && !Arc::ptr_eq(&below, node)
    {
        let found = Box::pin(of(&below, at, status.len)).await?;
        if node.driver().is_filter() {
            let (len, eof) = (found.len.min(status.len), status.eof);
            if len > 0 {
                status = BlockStatus { len, eof: eof && len == status.len, ..found };
            }
        } else if status.data {
            if found.len == 0 || (found.eof && found.zero) {
                status.zero = true;
            } else {
                status.eof = status.eof && found.len >= status.len;
                status.len = status.len.min(found.len);
                status.zero |= found.zero;
            }
        }
    }
    if !status.allocated && status.len > 0 {
        status.zero |= match below(node) {
            None => true,
            Some(below) => offset >= below.len(),
        };
    }
    Ok(status)
}

/// The node that is seen where this one has nothing.
fn below(node: &NodeRef) -> Option<NodeRef> {
    let filtered =
        || node.driver().is_filter().then(|| node.child(Role::Filtered).or_else(|| node.child(Role::File)));
    node.backing().or_else(|| filtered().flatten())
}

/// What a range is in the chain from `top` down to `base`, which is no part of it: that of the first node that has it.
/// What lies beyond the end of a shorter node is zero. The second result is how deep that node is.
///
/// # Errors
///
/// A driver's.
pub async fn above(
    top: &NodeRef,
    base: Option<&NodeRef>,
    offset: u64,
    len: u64,
) -> Result<(BlockStatus, usize)> {
    let mut node = top.clone();
    let mut status = of(&node, offset, len).await?;
    let mut depth = 0;
    while !status.allocated && status.len > 0 {
        let Some(next) = below(&node) else { break };
        if base.is_some_and(|base| Arc::ptr_eq(base, &next)) {
            break;
        }
        let len = status.len;
        depth += 1;
        status = of(&next, offset, len).await?;
        if status.len == 0 {
            return Ok((BlockStatus::zero(len), depth));
        }
        node = next;
    }
    status.eof = offset + status.len >= top.len();
    Ok((status, depth))
}

/// A part of an image, as `map` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins.
    pub start: u64,
    /// Its bytes.
    pub len: u64,
    /// How deep in the chain it is found.
    pub depth: usize,
    /// A node of the chain has it.
    pub present: bool,
    /// It reads as zero.
    pub zero: bool,
    /// It is stored.
    pub data: bool,
    /// It is stored compressed.
    pub compressed: bool,
    /// Where in a file it is stored.
    pub offset: Option<u64>,
    /// That file.
    pub filename: Option<String>,
}

impl Extent {
    /// Whether `next` goes on where this ends, in all respects.
    fn goes_on(&self, next: &Self) -> bool {
        let kind = |extent: &Self| {
            (
                extent.depth,
                extent.present,
                extent.zero,
                extent.data,
                extent.compressed,
                extent.offset.is_some(),
            )
        };
        kind(self) == kind(next)
            && self.filename == next.filename
            && self.offset.is_none_or(|offset| Some(offset + self.len) == next.offset)
    }
}

/// Lists the extents of `node` from `start` to `end`, as long as they can be, to `each`.
///
/// # Errors
///
/// A driver's, or what `each` returns.
pub async fn extents<E: From<block_graph::Error>>(
    node: &NodeRef,
    start: u64,
    end: u64,
    mut each: impl FnMut(Extent) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let mut current: Option<Extent> = None;
    let mut at = start;
    while at < end {
        let next = extent(node, at, end - at).await?;
        at += next.len;
        match &mut current {
            Some(current) if current.goes_on(&next) => current.len += next.len,
            _ => {
                if let Some(done) = current.replace(next) {
                    each(done)?;
                }
            }
        }
    }
    current.map_or(Ok(()), each)
}

async fn extent(node: &NodeRef, offset: u64, len: u64) -> Result<Extent> {
    let (mut node, mut len, mut depth) = (skip_filters(node), len, 0);
    loop {
        let status = of(&node, offset, len).await?;
        if status.len == 0 {
            // A shorter backing file: the node above said zero already.
            return Ok(Extent { zero: true, ..Extent::nothing(offset, len, depth) });
        }
        len = status.len;
        if status.zero || status.data {
            return Ok(Extent {
                start: offset,
                len,
                depth,
                present: status.allocated,
                zero: status.zero,
                data: status.data,
                compressed: status.compressed,
                offset: status.at.as_ref().map(|(_, at)| *at),
                filename: status.at.as_ref().map(|(file, _)| crate::filename::of(file)),
            });
        }
        match node.backing() {
            Some(backing) => node = skip_filters(&backing),
            None => return Ok(Extent::nothing(offset, len, depth)),
        }
        depth += 1;
    }
}

impl Extent {
    fn nothing(start: u64, len: u64, depth: usize) -> Self {
        Self {
            start,
            len,
            depth,
            present: false,
            zero: false,
            data: false,
            compressed: false,
            offset: None,
            filename: None,
        }
    }
}
