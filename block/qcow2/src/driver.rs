//! The driver: an open image as a node of the graph.

use crate::bitmaps::PersistentBitmaps;
use crate::check;
use crate::engine::load::{self, read_first_cluster};
use crate::engine::state::{Backing, FirstCluster, Qcow2};
use crate::format::header::{Autoclear, CryptMethod, Incompatible};
use crate::parameters::Parameters;
use crate::storage::NodeFile;
use arc_swap::ArcSwap;
use block_graph::{
    BitmapInfo, BlockStatus, CheckFix, CheckReport, DirtyBitmap, Driver, Edge, Errno, Error, Image,
    ImageInfo, Limits, Log, NodeRef, OpenFlags, Options, Progress, Result, Secrets, SnapshotInfo, Truncate,
    WriteFlags, ZeroFlags, async_trait,
};
use io_loop::IoVec;
use luks::Volume;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use std::any::Any;
use std::sync::{Arc, OnceLock};

/// An open image.
#[derive(Debug)]
pub struct Qcow2Driver {
    engine: ArcSwap<Qcow2>,
    bitmaps: ArcSwap<PersistentBitmaps>,
    file: Arc<Edge>,
    data_file: Option<Arc<Edge>>,
    backing: Arc<Backing>,
    parameters: Mutex<Parameters>,
    secrets: Arc<Secrets>,
    /// The node's name.
    name: OnceLock<String>,
}

impl Qcow2Driver {
    /// Reads the tables of an image whose first cluster has been read. If it is opened for writing, what must be mended
    /// first is.
    pub(crate) async fn load(
        file: Arc<Edge>,
        data_file: Option<Arc<Edge>>,
        backing: Arc<Backing>,
        parameters: Parameters,
        mut first: FirstCluster,
        secrets: Arc<Secrets>,
    ) -> Result<Self> {
        let flags = parameters.flags;
        if flags.writable && !flags.check && first.header.incompatible.contains(Incompatible::DIRTY) {
            crate::repair::repair(&file.node()).await?;
            first = read_first_cluster(&file.node(), &parameters).await?;
        }
        let engine = load::load(file.clone(), data_file.clone(), backing.clone(), &parameters, first).await?;
        if flags.writable {
            tidy_header(&engine).await?;
        }
        let bitmaps = load_bitmaps(&engine, flags).await?;
        Ok(Self {
            engine: ArcSwap::from_pointee(engine),
            bitmaps: ArcSwap::from_pointee(bitmaps),
            file,
            data_file,
            backing,
            parameters: Mutex::new(parameters),
            secrets,
            name: OnceLock::new(),
        })
    }

    pub(crate) fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    pub(crate) fn engine(&self) -> Arc<Qcow2> {
        self.engine.load_full()
    }

    /// The file that holds the metadata.
    pub fn file(&self) -> NodeRef {
        self.file.node()
    }

    /// Has `change` work on the file itself, with nothing in flight and nothing in memory, and reads the tables anew
    /// afterwards.
    ///
    /// # Errors
    /// Those of `change`, or if the image cannot be read any more.
    pub async fn with_file<T>(&self, change: impl AsyncFnOnce(&NodeFile) -> Result<T>) -> Result<T> {
        let engine = self.engine();
        let _alone = engine.requests.exclusive().await;
        if engine.writable {
            engine.write_everything().await?;
        }
        let result = change(&NodeFile(self.file.node())).await;
        let parameters = self.parameters.lock().clone();
        self.reload(parameters).await?;
        result
    }

    async fn reload(&self, parameters: Parameters) -> Result<()> {
        let first = read_first_cluster(&self.file.node(), &parameters).await?;
        let engine =
            load::load(self.file.clone(), self.data_file.clone(), self.backing.clone(), &parameters, first)
                .await?;
        self.engine.store(Arc::new(engine));
        *self.parameters.lock() = parameters;
        Ok(())
    }
}

/// Reads the persistent bitmaps; a check looks at them in the file itself.
async fn load_bitmaps(engine: &Qcow2, flags: OpenFlags) -> Result<PersistentBitmaps> {
    if flags.check { Ok(PersistentBitmaps::default()) } else { PersistentBitmaps::load(engine).await }
}

/// Clears autoclear bits that are unknown, and drops what is known to be stale.
async fn tidy_header(engine: &Qcow2) -> Result<()> {
    let first = engine.first_cluster.lock().clone();
    let unknown = first.header.autoclear.difference(Autoclear::KNOWN);
    if unknown.is_empty() && !first.extensions.stale_bitmaps {
        return Ok(());
    }
    let result = engine.change_header(|header| header.autoclear &= Autoclear::KNOWN).await;
    result.map_err(|error| error.context("Could not update qcow2 header"))
}

#[async_trait(?Send)]
impl Driver for Qcow2Driver {
    fn format_name(&self) -> &'static str {
        "qcow2"
    }

    fn len(&self) -> u64 {
        self.engine.load().disk_size()
    }

    fn named(&self, node: &str) {
        let _ = self.name.set(node.to_owned());
    }

    fn limits(&self) -> Limits {
        let geometry = self.engine.load().geometry;
        Limits {
            request_alignment: if self.engine.load().crypt.is_some() { 512 } else { 1 },
            write_zeroes_alignment: geometry.subcluster_size(),
            discard_alignment: geometry.cluster_size(),
            ..Limits::default()
        }
    }

    fn edges(&self) -> Vec<Arc<Edge>> {
        [Some(self.file.clone()), self.data_file.clone(), self.backing.edge()].into_iter().flatten().collect()
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.engine.load().read(offset, into).await
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        let written = self.engine.load().write(offset, from, flags).await;
        self.bitmaps.load().wrote(offset, from.len() as u64);
        written
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let written = self.engine.load().write_zeroes(offset, len, flags).await;
        self.bitmaps.load().wrote(offset, len);
        written
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let discarded = self.engine.load().discard(offset, len).await;
        self.bitmaps.load().wrote(offset, len);
        discarded
    }

    async fn flush(&self) -> Result<()> {
        let engine = self.engine.load();
        engine.corruption.check()?;
        engine.flush().await
    }

    async fn block_status(&self, offset: u64, len: u64, _precise: bool) -> Result<BlockStatus> {
        self.engine.load().status(offset, len).await
    }

    async fn truncate(&self, len: u64, how: Truncate) -> Result<()> {
        let (engine, bitmaps) = (self.engine(), self.bitmaps.load_full());
        bitmaps.before_resize(&engine).await?;
        engine.truncate(len, how).await?;
        bitmaps.after_resize(engine.disk_size());
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        let engine = self.engine();
        if !engine.writable || engine.corruption.check().is_err() {
            return Ok(());
        }
        let _alone = engine.requests.exclusive().await;
        let stored = self.bitmaps.load_full().close(&engine).await;
        engine.finish().await?;
        stored.map_err(|error| {
            let node = self.name.get().map_or("", String::as_str);
            let lost = format!("Lost persistent bitmaps during inactivation of node '{node}'");
            error.context(lost).with_errno(Errno::INVALID)
        })
    }

    async fn reopen(&self, options: &mut Options, flags: OpenFlags) -> Result<()> {
        let parameters = Parameters::take(options, flags, &self.secrets)?;
        let engine = self.engine();
        let _alone = engine.requests.exclusive().await;
        if engine.writable {
            self.bitmaps.load_full().close(&engine).await?;
            engine.finish().await?;
        }
        self.reload(parameters).await?;
        let flags = self.parameters.lock().flags;
        self.bitmaps.store(Arc::new(load_bitmaps(&self.engine(), flags).await?));
        Ok(())
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }

    fn allocated_size(&self) -> Option<u64> {
        let file = self.file.node().driver().allocated_size()?;
        let data = self.data_file.as_ref().and_then(|edge| edge.node().driver().allocated_size());
        Some(file + data.unwrap_or(0))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[async_trait(?Send)]
impl Image for Qcow2Driver {
    fn info(&self) -> ImageInfo {
        let engine = self.engine();
        let first = engine.first_cluster.lock().clone();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ImageInfo {
            cluster_size: Some(engine.geometry.cluster_size()),
            encrypted: engine.crypt_method != CryptMethod::None,
            compressed: false,
            dirty: first.header.incompatible.contains(Incompatible::DIRTY),
            backing_filename: first.backing_name.as_deref().map(text),
            backing_format: first.extensions.backing_format.as_deref().map(text),
            specific: Some((
                "qcow2",
                specific(&engine, &first, self.bitmaps.load().to_json(engine.writable)),
            )),
        }
    }

    async fn check(&self, fix: CheckFix, say: Log<'_>) -> Result<CheckReport> {
        let fix = match fix {
            CheckFix::Nothing => check::Fix::NONE,
            CheckFix::Leaks => check::Fix::LEAKS,
            CheckFix::All => check::Fix::ALL,
        };
        let report = self.with_file(async |file| {
            check::check(file, fix, say).await.map_err(|failed| Error::from(failed.error))
        });
        let report = report.await?;
        Ok(CheckReport {
            check_errors: report.check_errors,
            corruptions: report.corruptions,
            corruptions_fixed: report.corruptions_fixed,
            leaks: report.leaks,
            leaks_fixed: report.leaks_fixed,
            image_end_offset: Some(report.image_end_offset),
            total_clusters: Some(report.total_clusters),
            allocated_clusters: Some(report.allocated_clusters),
            fragmented_clusters: Some(report.fragmented_clusters),
            compressed_clusters: Some(report.compressed_clusters),
        })
    }

    async fn amend(&self, options: &mut Options, progress: Progress<'_>, force: bool) -> Result<()> {
        self.amend_options(options, progress, force).await
    }

    async fn change_backing(&self, name: Option<&str>, format: Option<&str>) -> Result<()> {
        let engine = self.engine();
        engine.check_writable()?;
        if name.is_some() && engine.data_file_raw() {
            return Err(Error::errno_only(Errno::INVALID));
        }
        if name.is_some_and(|name| name.len() > crate::format::MAX_BACKING_NAME) {
            return Err(Error::errno_only(Errno::INVALID));
        }
        let change = |first: &mut FirstCluster| {
            first.backing_name = name.filter(|name| !name.is_empty()).map(|name| name.as_bytes().to_vec());
            first.extensions.backing_format =
                format.filter(|format| !format.is_empty()).map(|format| format.as_bytes().to_vec());
        };
        engine.change_first_cluster(change).await?;
        self.file.node().flush().await
    }

    fn set_backing_node(&self, node: Option<NodeRef>) -> Result<()> {
        self.backing.set(node);
        Ok(())
    }

    async fn make_empty(&self) -> Result<()> {
        let engine = self.engine();
        engine.check_writable()?;
        let _alone = engine.requests.exclusive().await;
        if engine.can_be_rebuilt_empty() && self.bitmaps.load().infos().is_empty() {
            engine.rebuild_empty().await?;
            let parameters = self.parameters.lock().clone();
            return self.reload(parameters).await;
        }
        let emptied = engine.discard_all().await;
        self.bitmaps.load().wrote(0, self.len());
        emptied
    }

    fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.engine.load().list_snapshots()
    }

    async fn snapshot_create(&self, snapshot: SnapshotInfo) -> Result<()> {
        self.engine().create_snapshot(snapshot).await
    }

    async fn snapshot_apply(&self, id_or_name: &str) -> Result<()> {
        let (engine, bitmaps) = (self.engine(), self.bitmaps.load_full());
        bitmaps.before_resize(&engine).await?;
        engine.apply_snapshot(id_or_name).await?;
        bitmaps.after_resize(engine.disk_size());
        bitmaps.wrote(0, engine.disk_size());
        Ok(())
    }

    async fn snapshot_delete(&self, id_or_name: &str) -> Result<()> {
        self.engine().delete_snapshot(id_or_name).await
    }

    async fn snapshot_load(&self, id: Option<&str>, name: Option<&str>) -> Result<()> {
        self.engine().load_snapshot(id, name).await
    }

    async fn write_vm_state(&self, offset: u64, from: &IoVec) -> Result<()> {
        self.engine().write_vm_state(offset, from).await
    }

    async fn read_vm_state(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.engine().read_vm_state(offset, into).await
    }

    fn bitmaps(&self) -> Vec<BitmapInfo> {
        self.bitmaps.load().infos()
    }

    async fn bitmap_add(&self, name: &str, granularity: Option<u64>, auto: bool) -> Result<()> {
        self.bitmaps.load().add(&self.engine(), name, granularity, auto)
    }

    async fn bitmap_remove(&self, name: &str) -> Result<()> {
        let engine = self.engine();
        let _alone = engine.requests.exclusive().await;
        self.bitmaps.load_full().remove(&engine, name).await
    }

    async fn bitmap(&self, name: &str) -> Result<Arc<DirtyBitmap>> {
        self.bitmaps.load_full().get(&self.engine(), name).await
    }

    async fn bitmap_set_enabled(&self, name: &str, enabled: bool) -> Result<()> {
        self.bitmaps.load_full().set_enabled(&self.engine(), name, enabled).await
    }
}

/// What `info` says of the format alone, with QEMU's names, in its order.
fn specific(engine: &Qcow2, first: &FirstCluster, bitmaps: Option<Value>) -> Map<String, Value> {
    let header = &first.header;
    let mut map = Map::new();
    let mut add = |key: &str, value: Value| map.insert(key.into(), value);
    let compression = json!(header.compression.name());
    if header.version < 3 {
        add("compat", json!("0.10"));
        add("compression-type", compression);
        add("refcount-bits", json!(1u32 << header.refcount_order));
    } else {
        use crate::format::header::Compatible;
        add("compat", json!("1.1"));
        add("compression-type", compression);
        add("lazy-refcounts", json!(header.compatible.contains(Compatible::LAZY_REFCOUNTS)));
        if let Some(bitmaps) = bitmaps {
            add("bitmaps", bitmaps);
        }
        add("refcount-bits", json!(1u32 << header.refcount_order));
        if let Some(name) = &first.extensions.data_file {
            add("data-file", json!(String::from_utf8_lossy(name)));
        }
        if header.incompatible.contains(Incompatible::DATA_FILE) {
            add("data-file-raw", json!(header.autoclear.contains(Autoclear::DATA_FILE_RAW)));
        }
    }
    match &engine.crypt {
        Some(crypt) if header.crypt_method == CryptMethod::Luks => {
            let mut encrypt = Map::new();
            for (key, value) in crypt.volume.read().as_ref().map(Volume::info).unwrap_or_default() {
                if key == "cipher-mode" {
                    encrypt.insert("format".into(), json!("luks"));
                }
                encrypt.insert(key, value);
            }
            add("encrypt", Value::Object(encrypt));
        }
        Some(_) => {
            add("encrypt", json!({"format": "aes"}));
        }
        None => {}
    }
    if header.version >= 3 {
        add("corrupt", json!(header.incompatible.contains(Incompatible::CORRUPT)));
        add("extended-l2", json!(header.incompatible.contains(Incompatible::EXTENDED_L2)));
    }
    map
}
