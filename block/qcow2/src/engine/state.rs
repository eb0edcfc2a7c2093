//! The state of an open image.

use super::allocator::Allocator;
use super::cache::SliceCache;
use super::corruption::Corruption;
use super::crypt::Crypt;
use super::decompressed::Decompressed;
use super::frees::Frees;
use super::metadata_map::MetadataMap;
use super::requests::{Claims, Requests};
use crate::format::header::{CryptMethod, Incompatible};
use crate::format::snapshot::Snapshot;
use crate::format::{Extensions, Geometry, Header};
use crate::parameters::DiscardRules;
use arc_swap::ArcSwapOption;
use block_graph::{Edge, Errno, Error, NodeRef, Result, Role};
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// What an image's first cluster says.
#[derive(Clone, Debug)]
pub(crate) struct FirstCluster {
    pub(crate) header: Header,
    pub(crate) extensions: Extensions,
    pub(crate) backing_name: Option<Vec<u8>>,
}

/// The active L1 table, which is in memory as a whole.
#[derive(Debug, Default)]
pub(crate) struct L1Table {
    pub(crate) offset: u64,
    pub(crate) entries: Vec<u64>,
    /// Entries that are not in the file yet.
    pub(crate) dirty: BTreeSet<usize>,
}

/// The edge to the backing file, which may come and go.
#[derive(Debug, Default)]
pub(crate) struct Backing(ArcSwapOption<Edge>);

impl Backing {
    /// The edge, if there is a backing file.
    pub(crate) fn edge(&self) -> Option<Arc<Edge>> {
        self.0.load_full()
    }

    /// The backing file's node.
    pub(crate) fn node(&self) -> Option<NodeRef> {
        self.0.load().as_ref().map(|edge| edge.node())
    }

    /// Takes another backing file, or none.
    pub(crate) fn set(&self, node: Option<NodeRef>) {
        self.0.store(node.map(|node| Edge::new(Role::Backing, node)));
    }
}

/// An open image.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    pub(crate) geometry: Geometry,
    pub(crate) crypt_method: CryptMethod,
    pub(crate) writable: bool,
    /// See [`Qcow2::version_2`].
    pub(crate) is_version_2: AtomicBool,
    /// What encrypted data need.
    pub(crate) crypt: Option<Crypt>,
    /// Whether clusters behind the file's end read as zeros when they are part of it.
    pub(crate) fresh_is_zero: bool,
    /// The image file.
    pub(crate) file: Arc<Edge>,
    /// The external data file.
    pub(crate) data_file: Option<Arc<Edge>>,
    /// The backing file.
    pub(crate) backing: Arc<Backing>,
    pub(crate) first_cluster: Mutex<FirstCluster>,
    /// Held while the header is rewritten.
    pub(crate) header_writing: futures_util::lock::Mutex<()>,
    /// The virtual disk's size in bytes.
    pub(crate) size: AtomicU64,
    pub(crate) l1: RwLock<L1Table>,
    pub(crate) l2: SliceCache,
    pub(crate) blocks: SliceCache,
    pub(crate) allocator: futures_util::lock::Mutex<Allocator>,
    pub(crate) frees: Mutex<Frees>,
    /// Held while tables are written.
    pub(crate) writing: futures_util::lock::Mutex<()>,
    pub(crate) requests: Requests,
    pub(crate) claims: Claims,
    pub(crate) metadata: RwLock<MetadataMap>,
    pub(crate) snapshots: Mutex<Vec<Snapshot>>,
    pub(crate) decompressed: Decompressed,
    pub(crate) corruption: Corruption,
    pub(crate) discards: DiscardRules,
    /// Whether writes are checked against overlaps with metadata.
    pub(crate) overlap_check: bool,
    /// See [`Qcow2::is_preallocated`].
    pub(crate) preallocated: OnceLock<bool>,
    /// Refcounts may be written late, with the dirty bit set.
    pub(crate) lazy_refcounts: AtomicBool,
}

impl Qcow2 {
    /// The file that has guest data.
    pub(crate) fn data(&self) -> NodeRef {
        self.data_file.as_ref().unwrap_or(&self.file).node()
    }

    /// The backing file's node.
    pub(crate) fn backing_node(&self) -> Option<NodeRef> {
        self.backing.node()
    }

    /// Says which point the work has come to, for filters that inject errors there.
    pub(crate) fn event(&self, event: &'static str) {
        self.file.node().driver().debug_event(event);
    }

    /// The virtual disk's size in bytes.
    pub(crate) fn disk_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Whether the image is of version 2, which cannot say that clusters are zero.
    pub(crate) fn version_2(&self) -> bool {
        self.is_version_2.load(Ordering::Relaxed)
    }

    /// Whether the external data file must be a raw image by itself.
    pub(crate) fn data_file_raw(&self) -> bool {
        use crate::format::header::Autoclear;
        self.geometry.data_file
            && self.first_cluster.lock().header.autoclear.contains(Autoclear::DATA_FILE_RAW)
    }

    /// Whether the dirty bit is set.
    pub(crate) fn is_dirty(&self) -> bool {
        self.first_cluster.lock().header.incompatible.contains(Incompatible::DIRTY)
    }

    /// Refuses writing to images that were opened for reading only.
    pub(crate) fn check_writable(&self) -> Result<()> {
        self.corruption.check()?;
        if self.writable { Ok(()) } else { Err(Error::new(Errno::ACCESS, "Image is read-only")) }
    }
}
