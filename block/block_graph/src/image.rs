//! What image formats have beyond requests.

use crate::{Error, NodeRef, Options, Result};
use async_trait::async_trait;
use io_loop::IoVec;
use serde_json::{Map, Value};

/// Who is told lines of a log, without their ends.
pub type Log<'a> = &'a mut dyn FnMut(&str);

/// Is told how far an operation has come, as (done, all) in units of the operation's own.
pub type Progress<'a> = &'a dyn Fn(u64, u64);

/// What is to be known of an image besides its length.
#[derive(Debug, Clone, Default)]
pub struct ImageInfo {
    /// Bytes of a cluster.
    pub cluster_size: Option<u64>,
    /// The data are encrypted.
    pub encrypted: bool,
    /// Data may be stored compressed.
    pub compressed: bool,
    /// The image was not closed.
    pub dirty: bool,
    /// The backing file as the image names it.
    pub backing_filename: Option<String>,
    /// The backing file's format, if the image says it.
    pub backing_format: Option<String>,
    /// What the format alone has: its name, and fields with the names that the image tools print.
    pub specific: Option<(&'static str, Map<String, Value>)>,
}

/// An internal snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its number, as text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// Seconds since 1970.
    pub date_seconds: u32,
    /// Nanoseconds of the second.
    pub date_nanoseconds: u32,
    /// The VM's clock in nanoseconds.
    pub vm_clock_ns: u64,
    /// Executed instructions, if the VM counts them.
    pub icount: Option<u64>,
    /// The disk's length then, in bytes.
    pub disk_size: u64,
}

/// A persistent dirty bitmap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes of the disk for each bit.
    pub granularity: u64,
    /// It was not stored properly.
    pub in_use: bool,
    /// It records writes.
    pub auto: bool,
    /// Bytes that are dirty, if it is loaded.
    pub count: Option<u64>,
}

/// What a check may mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CheckFix {
    /// Nothing.
    #[default]
    Nothing,
    /// Leaked clusters.
    Leaks,
    /// Whatever can be.
    All,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What it could not look at.
    pub check_errors: u64,
    /// What is wrong.
    pub corruptions: u64,
    /// What was wrong and is not any more.
    pub corruptions_fixed: u64,
    /// Clusters that nobody uses.
    pub leaks: u64,
    /// Leaked clusters that were given back.
    pub leaks_fixed: u64,
    /// Where the image ends in its file, in bytes.
    pub image_end_offset: Option<u64>,
    /// Clusters that the disk has.
    pub total_clusters: Option<u64>,
    /// Clusters that are stored.
    pub allocated_clusters: Option<u64>,
    /// Clusters that do not follow the one before.
    pub fragmented_clusters: Option<u64>,
    /// Clusters that are stored compressed.
    pub compressed_clusters: Option<u64>,
}

/// How large an image would be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MeasureReport {
    /// Bytes for the data that there are.
    pub required: u64,
    /// Bytes if all were allocated.
    pub fully_allocated: u64,
    /// Bytes for bitmaps, if there can be any.
    pub bitmaps: Option<u64>,
}

/// What image formats have beyond requests. What a format has not got fails with `NOT_SUPPORTED`.
#[async_trait(?Send)]
pub trait Image: Send + Sync {
    /// What is to be known of it.
    fn info(&self) -> ImageInfo;

    /// Looks for what is wrong with it, and mends what it may, telling `say` line by line. No other request is in flight.
    ///
    /// # Errors
    /// If it cannot be checked at all; what is wrong with the image stands in the report.
    async fn check(&self, _fix: CheckFix, _say: Log<'_>) -> Result<CheckReport> {
        Err(Error::unsupported("This image format does not support checks"))
    }

    /// Changes options of the format. Options that are taken are removed. `force` allows to lose data or access.
    ///
    /// # Errors
    /// Nothing has changed if the options make no sense.
    async fn amend(&self, _options: &mut Options, _progress: Progress<'_>, _force: bool) -> Result<()> {
        Err(Error::unsupported("Format driver does not support option amendment"))
    }

    /// Records another backing file, or none. It is not opened.
    ///
    /// # Errors
    /// If there is no room for the name, or the format has no backing files.
    async fn change_backing(&self, _name: Option<&str>, _format: Option<&str>) -> Result<()> {
        Err(Error::unsupported("This image format has no backing files"))
    }

    /// Has reads of what the image does not hold go to `node` from now on, or be zero. Nothing is in flight.
    ///
    /// # Errors
    /// If the format has no backing files.
    fn set_backing_node(&self, _node: Option<NodeRef>) -> Result<()> {
        Err(Error::unsupported("This image format has no backing files"))
    }

    /// Forgets all that the image holds, so that the backing file is seen.
    ///
    /// # Errors
    /// Any part may be gone.
    async fn make_empty(&self) -> Result<()> {
        Err(Error::unsupported("This image format cannot be emptied"))
    }

    /// The internal snapshots.
    fn snapshots(&self) -> Vec<SnapshotInfo> {
        Vec::new()
    }

    /// Makes a snapshot of what the disk is now. An empty id becomes a free number.
    ///
    /// # Errors
    /// The disk is as before.
    async fn snapshot_create(&self, _snapshot: SnapshotInfo) -> Result<()> {
        Err(Error::unsupported("This image format has no snapshots"))
    }

    /// Makes the disk what it was at a snapshot, named by id or name.
    ///
    /// # Errors
    /// The disk is as before.
    async fn snapshot_apply(&self, _id_or_name: &str) -> Result<()> {
        Err(Error::unsupported("This image format has no snapshots"))
    }

    /// Removes a snapshot, named by id or name.
    ///
    /// # Errors
    /// The snapshot is as before, or gone with its space leaked.
    async fn snapshot_delete(&self, _id_or_name: &str) -> Result<()> {
        Err(Error::unsupported("This image format has no snapshots"))
    }

    /// Shows a snapshot's disk in a node that is open read-only.
    ///
    /// # Errors
    /// If there is none with this id and name (where given), or the node may be written.
    async fn snapshot_load(&self, _id: Option<&str>, _name: Option<&str>) -> Result<()> {
        Err(Error::unsupported("This image format has no snapshots"))
    }

    /// Writes VM state, which belongs to the next snapshot.
    ///
    /// # Errors
    /// Any part may have been written.
    async fn write_vm_state(&self, _offset: u64, _from: &IoVec) -> Result<()> {
        Err(Error::unsupported("This image format has no VM state"))
    }

    /// Reads the VM state of the snapshot that was made or applied last.
    ///
    /// # Errors
    /// The host's or the format's.
    async fn read_vm_state(&self, _offset: u64, _into: &IoVec) -> Result<()> {
        Err(Error::unsupported("This image format has no VM state"))
    }

    /// The persistent dirty bitmaps.
    fn bitmaps(&self) -> Vec<BitmapInfo> {
        Vec::new()
    }

    /// Adds a persistent bitmap with nothing dirty.
    ///
    /// # Errors
    /// If there is one of this name, or no room, or the granularity is none.
    async fn bitmap_add(&self, _name: &str, _granularity: Option<u64>, _auto: bool) -> Result<()> {
        Err(Error::unsupported("This image format has no bitmaps"))
    }

    /// Removes a persistent bitmap.
    ///
    /// # Errors
    /// If there is none of this name.
    async fn bitmap_remove(&self, _name: &str) -> Result<()> {
        Err(Error::unsupported("This image format has no bitmaps"))
    }

    /// The contents of a persistent bitmap: what is dirty, by its granularity. Changes to it are stored when the node
    /// is closed.
    ///
    /// # Errors
    /// If there is none of this name, or it was not stored properly.
    async fn bitmap(&self, _name: &str) -> Result<std::sync::Arc<crate::DirtyBitmap>> {
        Err(Error::unsupported("This image format has no bitmaps"))
    }

    /// Whether a persistent bitmap records writes from now on.
    ///
    /// # Errors
    /// If there is none of this name.
    async fn bitmap_set_enabled(&self, _name: &str, _enabled: bool) -> Result<()> {
        Err(Error::unsupported("This image format has no bitmaps"))
    }
}
