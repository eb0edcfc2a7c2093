//! Commands that tell of disks: `query-block` and its like.

use crate::command::Command;
use crate::context::Context;
use crate::error::Result;
use block_filters::{Limit, ThrottleLimits};
use block_graph::{Backend, DetectZeroes, NodeRef, skip_filters};
use jobs::{BitmapStatus, Storage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

pub(super) fn commands() -> Vec<Command> {
    vec![
        Command::new("query-block", query_block),
        Command::new("query-named-block-nodes", query_named_block_nodes),
    ]
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct BlockdevCacheInfo {
    writeback: bool,
    direct: bool,
    no_flush: bool,
}

#[derive(Serialize, JsonSchema)]
struct BlockDirtyInfo {
    name: String,
    count: u64,
    granularity: u64,
    recording: bool,
    busy: bool,
    persistent: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    inconsistent: Option<bool>,
}

impl From<BitmapStatus> for BlockDirtyInfo {
    fn from(status: BitmapStatus) -> Self {
        Self {
            name: status.name,
            count: status.count,
            granularity: status.granularity,
            recording: status.recording,
            busy: status.busy,
            persistent: status.persistent,
            inconsistent: status.inconsistent.then_some(true),
        }
    }
}

/// A node as its user sees it.
#[derive(Serialize, JsonSchema)]
struct BlockDeviceInfo {
    file: String,
    #[serde(rename = "node-name")]
    node_name: String,
    ro: bool,
    drv: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_file: Option<String>,
    backing_file_depth: u64,
    active: bool,
    encrypted: bool,
    detect_zeroes: &'static str,
    write_threshold: u64,
    cache: BlockdevCacheInfo,
    /// QAPI's `ImageInfo`, without what stands in the backing chain's nodes where clients ask for little.
    image: Value,
    #[serde(rename = "dirty-bitmaps", skip_serializing_if = "Vec::is_empty")]
    dirty_bitmaps: Vec<BlockDirtyInfo>,
    /// Limits in bytes and requests a second; 0 is none.
    #[serde(flatten)]
    throttling: Throttling,
}

#[derive(Serialize, JsonSchema, Default)]
struct Throttling {
    bps: u64,
    bps_rd: u64,
    bps_wr: u64,
    iops: u64,
    iops_rd: u64,
    iops_wr: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    bps_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bps_rd_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bps_wr_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iops_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iops_rd_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iops_wr_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iops_size: Option<u64>,
}

impl From<ThrottleLimits> for Throttling {
    fn from(limits: ThrottleLimits) -> Self {
        let [bps, bps_rd, bps_wr, iops, iops_rd, iops_wr] = limits.limits;
        let burst = |limit: Limit| (limit.burst > 0).then_some(limit.burst);
        Self {
            bps: bps.rate,
            bps_rd: bps_rd.rate,
            bps_wr: bps_wr.rate,
            iops: iops.rate,
            iops_rd: iops_rd.rate,
            iops_wr: iops_wr.rate,
            bps_max: burst(bps),
            bps_rd_max: burst(bps_rd),
            bps_wr_max: burst(bps_wr),
            iops_max: burst(iops),
            iops_rd_max: burst(iops_rd),
            iops_wr_max: burst(iops_wr),
            iops_size: (limits.request_bytes > 0).then_some(limits.request_bytes),
        }
    }
}

/// The chain of images below a node, itself first.
fn chain(node: &NodeRef) -> Vec<NodeRef> {
    std::iter::successors(Some(node.clone()), |node| skip_filters(node).backing()).collect()
}

/// QAPI's `ImageInfo` of an image, with those that it stands on as `backing-image`.
fn image_info(images: &[NodeRef], flat: bool) -> Value {
    let mut info = Value::Null;
    for node in images.iter().rev() {
        let mut image = blockdev::info::to_json(&blockdev::info::collect(node));
        if let Some(members) = image.as_object_mut() {
            members.remove("children");
            if !flat && !info.is_null() {
                members.insert("backing-image".into(), info);
            }
        }
        info = image;
    }
    info
}

fn device_info(
    storage: &Storage,
    node: &NodeRef,
    throttling: Option<ThrottleLimits>,
    writeback: bool,
    flat: bool,
) -> block_graph::Result<BlockDeviceInfo> {
    let (flags, images) = (node.flags(), chain(node));
    let shown = if flat { &images[..1] } else { &images[..] };
    let image = skip_filters(node);
    let info = blockdev::info::collect(&image);
    Ok(BlockDeviceInfo {
        file: blockdev::filename::of(node),
        node_name: node.name().into(),
        ro: node.read_only(),
        drv: node.driver().format_name(),
        backing_file: info.full_backing_filename.or(info.image.backing_filename),
        backing_file_depth: images.len() as u64 - 1,
        active: true,
        encrypted: info.image.encrypted,
        detect_zeroes: match flags.detect_zeroes {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        },
        write_threshold: 0,
        cache: BlockdevCacheInfo { writeback, direct: flags.direct, no_flush: flags.no_flush },
        image: image_info(shown, flat),
        dirty_bitmaps: storage.bitmaps(node)?.into_iter().map(Into::into).collect(),
        throttling: throttling.map(Into::into).unwrap_or_default(),
    })
}

/// A disk of the VM.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct BlockInfo {
    device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    qdev: Option<String>,
    #[serde(rename = "type")]
    kind: &'static str,
    removable: bool,
    locked: bool,
    io_status: &'static str,
    inserted: BlockDeviceInfo,
}

async fn query_block(context: &Context, (): ()) -> Result<Vec<BlockInfo>> {
    let io_errors = context.counts.io_errors.lock().clone();
    let throttles = context.throttles.borrow().clone();
    context
        .storage(move |storage| {
            let info = |backend: &Arc<Backend>| {
                let (name, node) = (backend.name(), backend.node());
                let throttling = throttles.get(name).copied();
                let writeback = !backend.flags().write_through;
                Ok(BlockInfo {
                    device: name.into(),
                    qdev: Some(format!("/machine/peripheral/{name}/virtio-backend")),
                    kind: "unknown",
                    removable: false,
                    locked: false,
                    io_status: match io_errors.get(name) {
                        None => "ok",
                        Some(false) => "failed",
                        Some(true) => "nospace",
                    },
                    inserted: device_info(storage, &node, throttling, writeback, false)?,
                })
            };
            storage.backends().iter().map(info).collect()
        })
        .await
}

#[derive(Deserialize, JsonSchema)]
struct QueryNodes {
    flat: Option<bool>,
}

async fn query_named_block_nodes(context: &Context, given: QueryNodes) -> Result<Vec<BlockDeviceInfo>> {
    let flat = given.flat.unwrap_or(false);
    context
        .storage(move |storage| {
            let nodes = storage.nodes();
            let open = nodes.iter().filter(|node| !node.is_closed());
            open.map(|node| device_info(storage, node, None, !node.flags().write_through, flat)).collect()
        })
        .await
}
