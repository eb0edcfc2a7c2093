//! What is done with backing chains: writing an image's data to one below it, and moving an image to another one.

use crate::convert::{ConvertError, Settings, Watcher, convert};
use crate::status;
use block_graph::{
    Errno, Error, NodeRef, OpenFlags, Options, Result, Role, Truncate, WriteFlags, ZeroFlags, skip_filters,
};
use futures_util::future::try_join;
use io_loop::IoBuffer;

/// The most bytes that are read at once.
const CHUNK: u64 = 2 << 20;

/// The node below `top` in its chain that `name` names: as the image above it does, or with a path that is relative to
/// that image, as backing files' are.
pub fn find_backing(top: &NodeRef, name: &str) -> Option<NodeRef> {
    let canonical = |name: &str| std::fs::canonicalize(name).ok();
    let mut node = skip_filters(top);
    while let Some(backing) = node.backing() {
        let named = node.driver().image().and_then(|image| image.info().backing_filename);
        let filename = backing.filename();
        let is_protocol = block_graph::protocol_prefix(name).is_some();
        let found = if is_protocol {
            [&named, &filename].iter().any(|known| known.as_deref() == Some(name))
        } else {
            let image = crate::filename::of(&node);
            let wanted = block_graph::full_filename(&image, name).ok().and_then(|name| canonical(&name));
            wanted.is_some() && filename.as_deref().and_then(canonical) == wanted
        };
        if found {
            return Some(backing);
        }
        node = skip_filters(&backing);
    }
    None
}

/// Has a node, and the files below it, take writes, or no more.
///
/// # Errors
///
/// The node cannot be changed, or the host does not allow it.
pub async fn set_writable(node: &NodeRef, writable: bool) -> Result<()> {
    if node.read_only() != writable {
        return Ok(());
    }
    let flags = OpenFlags { writable, resize: writable, unmap: true, ..node.flags() };
    let change_node = async {
        node.driver().reopen(&mut Options::new(), flags).await?;
        node.set_flags(flags);
        Ok(())
    };
    let change_files = async {
        for edge in node.driver().edges() {
            if edge.role() != Role::Backing {
                Box::pin(set_writable(&edge.node(), writable)).await?;
            }
        }
        Ok(())
    };
    // A format writes to its file until it is read-only, and as soon as it is not.
    if writable {
        change_files.await?;
        change_node.await
    } else {
        change_node.await?;
        change_files.await
    }
}

/// Writes what the nodes from `top` down to above `base` have into `base`.
///
/// # Errors
///
/// `base` cannot be written, or a node cannot be read. `base` may then have parts of it.
pub async fn commit(top: &NodeRef, base: &NodeRef, rate: Option<u64>, watcher: &dyn Watcher) -> Result<()> {
    set_writable(base, true).await?;
    if base.len() < top.len() {
        base.truncate(top.len(), Truncate::default()).await?;
    }
    let settings = Settings {
        target_has_backing: true,
        base: Some(base.clone()),
        scan: false,
        rate,
        ..Settings::default()
    };
    let copied = convert(std::slice::from_ref(top), base, &settings, watcher, false).await;
    copied.map_err(|error| match error {
        ConvertError::Status(_, error) | ConvertError::Read(_, error) | ConvertError::Write(_, error) => {
            Error::new(error.errno(), format!("Block job failed: {}", error.errno()))
        }
        ConvertError::ClusterSize => Error::invalid(error.to_string()),
    })?;
    base.flush().await
}

/// How an image is moved to another backing file.
#[derive(Debug)]
pub struct Rebase<'a> {
    /// The image.
    pub image: &'a NodeRef,
    /// Its backing node, if it has one.
    pub old: Option<NodeRef>,
    /// The new one, if there is to be one.
    pub new: Option<NodeRef>,
    /// Whether the new one stands in the chain of the old one.
    pub shortens: bool,
    /// What is copied is compressed.
    pub compressed: bool,
    /// What writes are aligned to: a cluster, or a part of one, in bytes.
    pub alignment: u64,
}

/// Copies into an image what it sees in its old backing file and would not see in the new one. Its backing file is not
/// changed.
///
/// # Errors
///
/// A message for people: what could not be read or written.
pub async fn rebase(rebase: &Rebase<'_>, mut progress: impl FnMut(u64, u64)) -> Result<()> {
    let image = skip_filters(rebase.image);
    let size = image.len();
    let metadata = |error: Error| {
        Error::new(error.errno(), format!("error while reading image metadata: {}", error.errno()))
    };
    let mut offset = 0;
    while offset < size {
        let mut len = CHUNK.min(size - offset);
        let found = image.block_status(offset, len, true).await.map_err(metadata)?;
        len = found.len.clamp(1, len);
        let mut skip = found.allocated;
        if !skip
            && rebase.shortens
            && let Some(old) = &rebase.old
        {
            let (found, _) = status::above(old, rebase.new.as_ref(), offset, len).await.map_err(metadata)?;
            if found.len > 0 {
                len = found.len.min(len);
                skip = !found.allocated;
            }
        }
        if !skip {
            let start = offset - offset % rebase.alignment;
            let end = (offset + len).next_multiple_of(rebase.alignment).min(size);
            (offset, len) = (start, end - start);
            copy_differences(rebase, offset, len).await?;
        }
        offset += len;
        progress(offset, size);
    }
    Ok(())
}

/// Copies what differs in a range that the image does not have.
async fn copy_differences(rebase: &Rebase<'_>, offset: u64, len: u64) -> Result<()> {
    let size = usize::try_from(len).unwrap_or(usize::MAX);
    let (mut old, mut new) = (IoBuffer::zeroed(size), IoBuffer::zeroed(size));
    let failed = |what: &'static str| {
        move |error: Error| Error::new(error.errno(), format!("error while reading from {what} backing file"))
    };
    let read_old = async {
        let io = old.io();
        match &rebase.old {
            Some(node) => node.read(offset, &io).await.map_err(failed("old")),
            None => Ok(()),
        }
    };
    let read_new = async {
        let io = new.io();
        match &rebase.new {
            Some(node) => node.read(offset, &io).await.map_err(failed("new")),
            None => Ok(()),
        }
    };
    try_join(read_old, read_new).await?;
    let old_end = rebase.old.as_ref().map_or(0, |old| old.len());
    let unit = usize::try_from(rebase.alignment.max(512)).unwrap_or(512);
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let pieces = old.bytes().chunks(unit).zip(new.bytes().chunks(unit));
    for (index, (before, after)) in pieces.enumerate() {
        let at = index * unit;
        match runs.last_mut() {
            _ if before == after => {}
            // What lies beyond the old file is written as zeroes, not as data.
            Some((start, run)) if *start + *run == at && offset + (at as u64) < old_end => {
                *run += before.len()
            }
            _ => runs.push((at, before.len())),
        }
    }
    let io = old.io();
    for (at, run) in runs {
        let position = offset + at as u64;
        let written = if position >= old_end {
            rebase.image.write_zeroes(position, run as u64, ZeroFlags::empty()).await
        } else {
            let mut flags = WriteFlags::empty();
            flags.set(WriteFlags::COMPRESSED, rebase.compressed);
            flags.set(WriteFlags::FUA, rebase.image.flags().write_through);
            rebase.image.write(position, &io.slice(at..at + run), flags).await
        };
        written.map_err(|error| {
            Error::new(error.errno(), format!("Error while writing to COW image: {}", error.errno()))
        })?;
    }
    Ok(())
}

/// Records another backing file in an image, or none.
///
/// # Errors
///
/// A message for people.
pub async fn change_backing(image: &NodeRef, name: Option<&str>, format: Option<&str>) -> Result<()> {
    let image = skip_filters(image);
    let shown = name.unwrap_or("(null)");
    let because = |errno: Errno, why: String| {
        Error::new(errno, format!("Could not change the backing file to '{shown}': {why}"))
    };
    if name.is_some_and(|name| !name.is_empty()) && format.is_none() {
        return Err(because(Errno::INVALID, "backing format must be specified".to_owned()));
    }
    let changed = match image.driver().image() {
        Some(formatted) => formatted.change_backing(name.filter(|name| !name.is_empty()), format).await,
        None => Err(Error::errno_only(Errno::NOT_SUPPORTED)),
    };
    changed.map_err(|error| match error.errno() {
        errno @ Errno::NO_SPACE => because(errno, "No space left in the file header".to_owned()),
        errno => because(errno, errno.to_string()),
    })
}
