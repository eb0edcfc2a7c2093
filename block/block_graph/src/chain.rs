//! Chains of nodes, each read where the one above has nothing.

use crate::{BlockStatus, NodeRef, Result, Role};
use std::sync::Arc;

/// How far down a chain something was found: 0 is the top.
pub type Depth = usize;

/// The node that a filter lets through, and so on down to one that is no filter.
pub fn skip_filters(node: &NodeRef) -> NodeRef {
    let mut node = node.clone();
    while node.driver().is_filter()
        && let Some(below) = node.child(Role::Filtered).or_else(|| node.child(Role::File))
    {
        node = below;
    }
    node
}

/// What a range of a chain from `top` down is, and how deep it was found. The chain ends above `base`, or at its end:
/// what nobody there has is then unallocated, and zero if there is no `base`.
///
/// # Errors
/// A driver's.
pub async fn status_above(
    top: &NodeRef,
    base: Option<&NodeRef>,
    offset: u64,
    len: u64,
    precise: bool,
) -> Result<(BlockStatus, Depth)> {
    let (mut status, depth) = search(top, base, offset, len, precise).await?;
    status.eof = offset.saturating_add(status.len) >= top.len();
    Ok((status, depth))
}

async fn search(
    top: &NodeRef,
    base: Option<&NodeRef>,
    offset: u64,
    mut len: u64,
    precise: bool,
) -> Result<(BlockStatus, Depth)> {
    let (mut node, mut depth) = (top.clone(), 0);
    loop {
        let status = node.block_status(offset, len, precise).await?;
        if status.len == 0 && depth > 0 {
            // The node ends before: what the ones above have not is zero from here on.
            return Ok((BlockStatus { zero: true, ..BlockStatus::unallocated(len) }, depth));
        }
        if status.len == 0 || status.allocated {
            return Ok((status, depth));
        }
        len = status.len;
        let filtered = || node.driver().is_filter().then(|| node.child(Role::Filtered)).flatten();
        let Some(below) = node.backing().or_else(filtered) else {
            return Ok((BlockStatus { zero: true, ..BlockStatus::unallocated(len) }, depth));
        };
        depth += 1;
        if base.is_some_and(|base| Arc::ptr_eq(base, &below)) {
            return Ok((BlockStatus::unallocated(len), depth));
        }
        node = below;
    }
}
