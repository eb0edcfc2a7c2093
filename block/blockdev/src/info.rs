//! What is to be known of images, and as JSON.

use crate::filename::{child_name, of as name_of};
use block_graph::{ImageInfo, NodeRef, Role, SnapshotInfo};
use serde_json::{Map, Value, json};

/// What is to be known of a node and of those below it.
#[derive(Debug)]
pub struct NodeInfo {
    /// Its file name.
    pub filename: String,
    /// Its driver's name.
    pub format: &'static str,
    /// Bytes.
    pub virtual_size: u64,
    /// Bytes that it takes on the host.
    pub actual_size: Option<u64>,
    /// What its format says.
    pub image: ImageInfo,
    /// Whether it says if it is dirty.
    pub has_dirty_flag: bool,
    /// Its internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// What it stands on, but for its backing file, with the names that options have for these.
    pub children: Vec<(String, NodeInfo)>,
    /// The backing file as it is opened: its name is relative to the image's, if that has one.
    pub full_backing_filename: Option<String>,
}

/// What is to be known of `node`.
pub fn collect(node: &NodeRef) -> NodeInfo {
    let driver = node.driver();
    let mut edges = driver.edges();
    edges.retain(|edge| edge.role() != Role::Backing);
    edges.reverse();
    let mut image = driver.image().map(|image| image.info()).unwrap_or_default();
    if driver.is_filter()
        && let Some(edge) = edges.first()
    {
        // A filter has the clusters of what is below it.
        image.cluster_size = edge.node().driver().image().and_then(|image| image.info().cluster_size);
    }
    if edges.is_empty() && image.specific.is_none() && ["file", "host_device"].contains(&driver.format_name())
    {
        image.specific = Some((driver.format_name(), Map::new()));
    }
    let full = |backing: &str| block_graph::full_filename_beside(node, backing).ok();
    NodeInfo {
        filename: name_of(node),
        format: driver.format_name(),
        virtual_size: node.len(),
        actual_size: allocated_size(node),
        has_dirty_flag: !driver.format_name().starts_with("null-"),
        snapshots: driver.image().map(block_graph::Image::snapshots).unwrap_or_default(),
        full_backing_filename: image.backing_filename.as_deref().and_then(full),
        children: edges.iter().map(|edge| (child_name(edge.role()), collect(&edge.node()))).collect(),
        image,
    }
}

/// The bytes that a node takes on the host: its own, or those of the files that it stands on.
pub fn allocated_size(node: &NodeRef) -> Option<u64> {
    let driver = node.driver();
    driver.allocated_size().or_else(|| {
        let files = driver.edges().into_iter().filter(|edge| edge.role() != Role::Backing);
        let sizes: Vec<u64> = files.map(|edge| allocated_size(&edge.node())).collect::<Option<_>>()?;
        (!sizes.is_empty()).then(|| sizes.iter().sum())
    })
}

/// The same as QAPI's `ImageInfo`; `children` are what [`NodeInfo::children`] has.
pub fn to_json(info: &NodeInfo) -> Value {
    let children = info.children.iter().map(|(name, child)| json!({"name": name, "info": to_json(child)}));
    let mut object = Map::new();
    object.insert("children".into(), children.collect());
    object.insert("filename".into(), info.filename.as_str().into());
    object.insert("format".into(), info.format.into());
    object.insert("virtual-size".into(), info.virtual_size.into());
    if info.has_dirty_flag {
        object.insert("dirty-flag".into(), info.image.dirty.into());
    }
    let image = &info.image;
    let optional = [
        ("actual-size", info.actual_size.map(Value::from)),
        ("cluster-size", image.cluster_size.filter(|size| *size > 0).map(Value::from)),
        ("encrypted", image.encrypted.then(|| true.into())),
        ("backing-filename", image.backing_filename.as_deref().map(Value::from)),
        ("full-backing-filename", info.full_backing_filename.as_deref().map(Value::from)),
        ("backing-filename-format", image.backing_format.as_deref().map(Value::from)),
        ("format-specific", image.specific.as_ref().map(|(kind, data)| json!({"type": kind, "data": data}))),
        (
            "snapshots",
            (!info.snapshots.is_empty()).then(|| info.snapshots.iter().map(snapshot_to_json).collect()),
        ),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            object.insert(name.into(), value);
        }
    }
    Value::Object(object)
}

/// An internal snapshot as QAPI's `SnapshotInfo`.
pub fn snapshot_to_json(snapshot: &SnapshotInfo) -> Value {
    let mut object = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_nanoseconds,
        "vm-clock-sec": snapshot.vm_clock_ns / 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock_ns % 1_000_000_000,
    });
    if let (Some(icount), Some(object)) = (snapshot.icount, object.as_object_mut()) {
        object.insert("icount".into(), icount.into());
    }
    object
}
