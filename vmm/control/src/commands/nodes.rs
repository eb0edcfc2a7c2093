//! Commands about nodes: `blockdev-add` and its like.

use super::block_types::{device_or_node, options};
use super::blockdev_options::Blockdev;
use crate::command::Command;
use crate::context::Context;
use crate::error::{QmpError, Result};
use block_filters::{Limit, ThrottleGroup, ThrottleLimits};
use jobs::parameters as p;
use schemars::JsonSchema;
use serde::Deserialize;

pub(super) fn commands() -> Vec<Command> {
    vec![
        Command::new("blockdev-add", blockdev_add),
        Command::new("blockdev-del", blockdev_del),
        Command::new("blockdev-reopen", blockdev_reopen),
        Command::new("block_resize", block_resize),
        Command::new("change-backing-file", change_backing_file),
        Command::new("block_set_io_throttle", block_set_io_throttle),
    ]
}

async fn blockdev_add(context: &Context, node: Blockdev) -> Result<()> {
    if !node.0.contains_key("node-name") {
        return Err(QmpError::generic("'node-name' must be specified for the root node"));
    }
    let options = options(node.0)?;
    context.storage(move |storage| storage.blockdev_add(options)).await
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct NodeName {
    node_name: String,
}

async fn blockdev_del(context: &Context, NodeName { node_name }: NodeName) -> Result<()> {
    context.storage(move |storage| storage.blockdev_del(&node_name)).await
}

#[derive(Deserialize, JsonSchema)]
struct Nodes {
    options: Vec<Blockdev>,
}

async fn blockdev_reopen(context: &Context, nodes: Nodes) -> Result<()> {
    let nodes = nodes.options.into_iter().map(|node| options(node.0)).collect::<Result<Vec<_>>>()?;
    context.storage(move |storage| storage.blockdev_reopen(nodes)).await
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct BlockResize {
    device: Option<String>,
    node_name: Option<String>,
    size: i64,
}

async fn block_resize(context: &Context, resize: BlockResize) -> Result<()> {
    let name = device_or_node(resize.device, resize.node_name)?;
    let size =
        u64::try_from(resize.size).map_err(|_| QmpError::generic("Parameter 'size' expects a >0 size"))?;
    context.storage(move |storage| storage.block_resize(&name, size)).await
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct ChangeBackingFile {
    device: String,
    image_node_name: String,
    backing_file: String,
}

async fn change_backing_file(context: &Context, change: ChangeBackingFile) -> Result<()> {
    let ChangeBackingFile { device, image_node_name, backing_file } = change;
    let change = p::ChangeBackingFile { device, image_node_name, backing_file };
    context.storage(move |storage| storage.change_backing_file(change)).await
}

/// Limits of a drive, in bytes and requests a second; 0 is none. QAPI has underscores here.
#[derive(Deserialize, JsonSchema)]
struct BlockIoThrottle {
    device: Option<String>,
    id: Option<String>,
    bps: i64,
    bps_rd: i64,
    bps_wr: i64,
    iops: i64,
    iops_rd: i64,
    iops_wr: i64,
    bps_max: Option<i64>,
    bps_rd_max: Option<i64>,
    bps_wr_max: Option<i64>,
    iops_max: Option<i64>,
    iops_rd_max: Option<i64>,
    iops_wr_max: Option<i64>,
    bps_max_length: Option<i64>,
    bps_rd_max_length: Option<i64>,
    bps_wr_max_length: Option<i64>,
    iops_max_length: Option<i64>,
    iops_rd_max_length: Option<i64>,
    iops_wr_max_length: Option<i64>,
    iops_size: Option<i64>,
}

impl BlockIoThrottle {
    fn limits(&self) -> Result<ThrottleLimits> {
        let number = |value: i64| {
            let text = "bps/iops/max values must be within [0, 1000000000000000]";
            u64::try_from(value).map_err(|_| QmpError::generic(text))
        };
        let limit = |rate: i64, burst: Option<i64>, seconds: Option<i64>| -> Result<Limit> {
            let (rate, burst) = (number(rate)?, number(burst.unwrap_or(0))?);
            Ok(Limit { rate, burst, burst_seconds: number(seconds.unwrap_or(1))? })
        };
        let limits = ThrottleLimits {
            limits: [
                limit(self.bps, self.bps_max, self.bps_max_length)?,
                limit(self.bps_rd, self.bps_rd_max, self.bps_rd_max_length)?,
                limit(self.bps_wr, self.bps_wr_max, self.bps_wr_max_length)?,
                limit(self.iops, self.iops_max, self.iops_max_length)?,
                limit(self.iops_rd, self.iops_rd_max, self.iops_rd_max_length)?,
                limit(self.iops_wr, self.iops_wr_max, self.iops_wr_max_length)?,
            ],
            request_bytes: number(self.iops_size.unwrap_or(0))?,
        };
        limits.check()?;
        Ok(limits)
    }
}

async fn block_set_io_throttle(context: &Context, throttle: BlockIoThrottle) -> Result<()> {
    let limits = throttle.limits()?;
    let name = throttle.device.or(throttle.id).unwrap_or_default();
    let backend = context.disks()?.backend(&name);
    let missing = || QmpError::new(crate::ErrorClass::DeviceNotFound, format!("Device '{name}' not found"));
    let backend = backend.ok_or_else(missing)?;
    let any = limits.limits.iter().any(|limit| limit.rate > 0);
    backend.set_admission(if any { Some(ThrottleGroup::new(limits)) } else { None });
    context.throttles.borrow_mut().insert(name, limits);
    Ok(())
}
