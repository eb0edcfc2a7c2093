//! Dirty bitmaps of nodes: those in memory, and those that images store.

use crate::inner::Inner;
use crate::parameters::{BitmapAdd, BitmapMerge, BitmapName};
use crate::storage::Storage;
use block_graph::{DirtyBitmap, Errno, Error, Granularity, NodeRef, Result};
use std::rc::Rc;
use std::sync::Arc;

/// The longest name, in bytes.
const MOST_NAME: usize = 1023;

/// A bitmap, as `query-block` and `query-named-block-nodes` show it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BitmapStatus {
    /// Its name.
    pub name: String,
    /// Bytes that are dirty.
    pub count: u64,
    /// Bytes of each bit.
    pub granularity: u64,
    /// It records writes.
    pub recording: bool,
    /// A job uses it.
    pub busy: bool,
    /// The image stores it.
    pub persistent: bool,
    /// It was not stored properly, and can only be removed.
    pub inconsistent: bool,
}

fn in_memory(node: &NodeRef, name: &str) -> Option<Arc<DirtyBitmap>> {
    node.bitmaps().into_iter().find(|bitmap| bitmap.name() == Some(name))
}

fn is_stored(node: &NodeRef, name: &str) -> bool {
    node.driver().image().is_some_and(|image| image.bitmaps().iter().any(|bitmap| bitmap.name == name))
}

fn missing(name: &str) -> Error {
    Error::new(Errno::NOT_FOUND, format!("Dirty bitmap '{name}' not found"))
}

/// The content of a bitmap of either kind.
///
/// # Errors
/// There is none of this name, or it is inconsistent.
pub(crate) async fn content(node: &NodeRef, name: &str) -> Result<Arc<DirtyBitmap>> {
    if let Some(bitmap) = in_memory(node, name) {
        return Ok(bitmap);
    }
    match node.driver().image() {
        Some(image) if is_stored(node, name) => image.bitmap(name).await,
        _ => Err(missing(name)),
    }
}

/// Has a bitmap of either kind record writes, or not.
async fn set_enabled(node: &NodeRef, name: &str, enabled: bool) -> Result<()> {
    if let Some(bitmap) = in_memory(node, name) {
        bitmap.set_enabled(enabled);
        return Ok(());
    }
    match node.driver().image() {
        Some(image) if is_stored(node, name) => image.bitmap_set_enabled(name, enabled).await,
        _ => Err(missing(name)),
    }
}

impl Inner {
    fn is_busy(&self, node: &NodeRef, name: &str) -> bool {
        self.busy_bitmaps.borrow().iter().any(|(busy, bitmap)| busy == node.name() && bitmap == name)
    }

    fn check_free(&self, node: &NodeRef, name: &str) -> Result<()> {
        if self.is_busy(node, name) {
            let message =
                format!("Bitmap '{name}' is currently in use by another operation and cannot be used");
            return Err(Error::new(Errno::BUSY, message));
        }
        Ok(())
    }

    /// The content of a bitmap that nobody but the caller is to change.
    pub(crate) async fn free_content(&self, node: &NodeRef, name: &str) -> Result<Arc<DirtyBitmap>> {
        let content = content(node, name).await?;
        self.check_free(node, name)?;
        Ok(content)
    }

    /// A bitmap for a job, which nobody else changes until [`Inner::free_bitmap`].
    pub(crate) async fn take_bitmap(&self, node: &NodeRef, name: &str) -> Result<Arc<DirtyBitmap>> {
        let content = self.free_content(node, name).await?;
        self.busy_bitmaps.borrow_mut().push((node.name().to_owned(), name.to_owned()));
        Ok(content)
    }

    pub(crate) fn free_bitmap(&self, node: &NodeRef, name: &str) {
        self.busy_bitmaps.borrow_mut().retain(|(busy, bitmap)| busy != node.name() || bitmap != name);
    }

    pub(crate) async fn bitmap_add(&self, add: &BitmapAdd) -> Result<()> {
        let node = self.find(&add.node)?;
        let name = &add.name;
        if name.is_empty() {
            return Err(Error::invalid("Bitmap name cannot be empty"));
        }
        if name.len() > MOST_NAME {
            return Err(Error::invalid("Bitmap name too long"));
        }
        if in_memory(&node, name).is_some() || is_stored(&node, name) {
            return Err(Error::new(Errno::EXISTS, format!("Bitmap already exists: {name}")));
        }
        let cluster = node.driver().image().and_then(|image| image.info().cluster_size).unwrap_or(65536);
        let bytes = add.granularity.map_or_else(|| cluster.clamp(4096, 65536), u64::from);
        let granularity = Granularity::from_bytes(bytes);
        let granularity =
            granularity.ok_or_else(|| Error::invalid("Granularity must be power of 2 and at least 512"))?;
        if add.persistent {
            let image = node.driver().image();
            let image = image.ok_or_else(|| {
                let format = node.driver().format_name();
                Error::unsupported(format!(
                    "Driver '{format}' of node '{}' does not support persistent bitmaps",
                    node.name()
                ))
            })?;
            return image.bitmap_add(name, Some(bytes), !add.disabled).await;
        }
        let bitmap = DirtyBitmap::new(Some(name), node.len(), granularity);
        bitmap.set_enabled(!add.disabled);
        node.add_bitmap(Arc::new(bitmap));
        Ok(())
    }

    pub(crate) async fn bitmap_remove(&self, which: &BitmapName) -> Result<()> {
        let node = self.find(&which.node)?;
        self.check_free(&node, &which.name)?;
        if let Some(bitmap) = in_memory(&node, &which.name) {
            node.remove_bitmap(&bitmap);
            return Ok(());
        }
        match node.driver().image() {
            Some(image) if is_stored(&node, &which.name) => {
                if node.read_only() {
                    let message = format!("Bitmap '{}' is readonly and cannot be modified", which.name);
                    return Err(Error::new(Errno::NOT_PERMITTED, message));
                }
                image.bitmap_remove(&which.name).await
            }
            _ => Err(missing(&which.name)),
        }
    }

    pub(crate) fn find_changeable(&self, which: &BitmapName) -> Result<NodeRef> {
        let node = self.find(&which.node)?;
        self.check_free(&node, &which.name)?;
        if node.read_only() && in_memory(&node, &which.name).is_none() && is_stored(&node, &which.name) {
            let message = format!("Bitmap '{}' is readonly and cannot be modified", which.name);
            return Err(Error::new(Errno::NOT_PERMITTED, message));
        }
        Ok(node)
    }

    /// Has a bitmap record writes, or not. Returns whether it did before.
    pub(crate) async fn bitmap_enable(&self, which: &BitmapName, enabled: bool) -> Result<bool> {
        let node = self.find_changeable(which)?;
        let before = content(&node, &which.name).await?.enabled();
        set_enabled(&node, &which.name, enabled).await?;
        Ok(before)
    }

    /// Makes a bitmap clean. Returns what was dirty.
    pub(crate) async fn bitmap_clear(&self, which: &BitmapName) -> Result<DirtyBitmap> {
        let node = self.find_changeable(which)?;
        let bitmap = content(&node, &which.name).await?;
        let before = copy_of(&bitmap);
        bitmap.clear();
        Ok(before)
    }

    /// Makes dirty in one bitmap what is dirty in others. Returns what was dirty before.
    pub(crate) async fn bitmap_merge(&self, merge: &BitmapMerge) -> Result<DirtyBitmap> {
        let node =
            self.find_changeable(&BitmapName { node: merge.node.clone(), name: merge.target.clone() })?;
        let target = content(&node, &merge.target).await?;
        // All are there before the first has an effect.
        let mut sources = Vec::new();
        for source in &merge.bitmaps {
            let node = self.find(&source.node)?;
            self.check_free(&node, &source.name)?;
            let bitmap = content(&node, &source.name).await?;
            if bitmap.len() != target.len() {
                return Err(Error::invalid(format!(
                    "Bitmaps are of different sizes (destination size is {} and source size is {}) and can't be merged",
                    target.len(),
                    bitmap.len()
                )));
            }
            sources.push(bitmap);
        }
        let before = copy_of(&target);
        for source in sources.iter().filter(|source| !Arc::ptr_eq(source, &target)) {
            target.merge(source);
        }
        Ok(before)
    }

    /// Has a bitmap be what it was; nothing was written since.
    pub(crate) async fn bitmap_restore(&self, which: &BitmapName, before: &DirtyBitmap) {
        let Ok(node) = self.find(&which.node) else { return };
        if let Ok(bitmap) = content(&node, &which.name).await {
            bitmap.clear();
            bitmap.merge(before);
        }
    }

    pub(crate) fn bitmap_statuses(&self, node: &NodeRef) -> Vec<BitmapStatus> {
        let memory = node.bitmaps().into_iter().filter_map(|bitmap| {
            let name = bitmap.name()?.to_owned();
            Some(BitmapStatus {
                busy: self.is_busy(node, &name),
                name,
                count: bitmap.dirty_bytes(),
                granularity: bitmap.granularity().bytes(),
                recording: bitmap.enabled(),
                persistent: false,
                inconsistent: false,
            })
        });
        let stored = node.driver().image().map(|image| image.bitmaps()).unwrap_or_default();
        let stored = stored.into_iter().map(|info| BitmapStatus {
            busy: self.is_busy(node, &info.name),
            count: info.count.unwrap_or(0),
            granularity: info.granularity,
            recording: info.auto && !info.in_use && !node.read_only(),
            persistent: true,
            inconsistent: info.in_use,
            name: info.name,
        });
        memory.chain(stored).collect()
    }
}

/// A copy of what is dirty.
pub(crate) fn copy_of(bitmap: &DirtyBitmap) -> DirtyBitmap {
    let copy = DirtyBitmap::new(None, bitmap.len(), bitmap.granularity());
    copy.merge(bitmap);
    copy
}

impl Storage {
    fn bitmap_call<R: Send + 'static>(
        &self,
        change: impl AsyncFnOnce(&Rc<Inner>) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        self.call(move |inner| Box::pin(async move { change(&inner).await }))
    }

    /// The bitmaps of a node that have names.
    ///
    /// # Errors
    /// The disks have been closed.
    pub fn bitmaps(&self, node: &NodeRef) -> Result<Vec<BitmapStatus>> {
        let node = node.clone();
        self.bitmap_call(async move |inner| Ok(inner.bitmap_statuses(&node)))
    }

    /// A copy of what is dirty in a bitmap (`x-debug-block-dirty-bitmap-sha256` is made of its bits).
    ///
    /// # Errors
    /// There is no such node or bitmap.
    pub fn bitmap_content(&self, which: BitmapName) -> Result<DirtyBitmap> {
        self.bitmap_call(async move |inner| {
            let node = inner.find(&which.node)?;
            Ok(copy_of(&*content(&node, &which.name).await?))
        })
    }

    /// `block-dirty-bitmap-add`.
    ///
    /// # Errors
    /// There is no such node, there is one of this name, or it cannot be stored.
    pub fn bitmap_add(&self, add: BitmapAdd) -> Result<()> {
        self.bitmap_call(async move |inner| inner.bitmap_add(&add).await)
    }

    /// `block-dirty-bitmap-remove`.
    ///
    /// # Errors
    /// There is no such node or bitmap, or a job uses it.
    pub fn bitmap_remove(&self, which: BitmapName) -> Result<()> {
        self.bitmap_call(async move |inner| inner.bitmap_remove(&which).await)
    }

    /// `block-dirty-bitmap-clear`.
    ///
    /// # Errors
    /// There is no such node or bitmap, or a job uses it.
    pub fn bitmap_clear(&self, which: BitmapName) -> Result<()> {
        self.bitmap_call(async move |inner| inner.bitmap_clear(&which).await.map(drop))
    }

    /// `block-dirty-bitmap-enable` and `-disable`.
    ///
    /// # Errors
    /// There is no such node or bitmap, or a job uses it.
    pub fn bitmap_enable(&self, which: BitmapName, enabled: bool) -> Result<()> {
        self.bitmap_call(async move |inner| inner.bitmap_enable(&which, enabled).await.map(drop))
    }

    /// `block-dirty-bitmap-merge`.
    ///
    /// # Errors
    /// There is no such node or bitmap, a job uses it, or they are of disks of different lengths.
    pub fn bitmap_merge(&self, merge: BitmapMerge) -> Result<()> {
        self.bitmap_call(async move |inner| inner.bitmap_merge(&merge).await.map(drop))
    }
}
