//! Commands that begin jobs: commit, stream, mirror, backup.

use super::block_types::{
    BitmapSyncMode, BlockdevOnError, MirrorCopyMode, MirrorSyncMode, NewImageMode, OnCbwError,
};
use crate::command::Command;
use crate::context::Context;
use crate::error::{QmpError, Result};
use jobs::parameters as p;
use schemars::JsonSchema;
use serde::Deserialize;

pub(super) fn commands() -> Vec<Command> {
    vec![
        Command::new("block-commit", block_commit),
        Command::new("block-stream", block_stream),
        Command::new("blockdev-mirror", blockdev_mirror),
        Command::new("drive-mirror", drive_mirror),
        Command::new("blockdev-backup", blockdev_backup),
        Command::new("drive-backup", drive_backup),
    ]
}

/// A speed in bytes a second.
fn speed(speed: Option<i64>) -> Result<u64> {
    let wrong = |_| QmpError::generic("Parameter 'speed' expects a non-negative value");
    u64::try_from(speed.unwrap_or(0)).map_err(wrong)
}

/// What every job is told, of the members that its command has for it.
macro_rules! job_options {
    ($given:ident) => {
        p::JobOptions {
            job_id: $given.job_id,
            speed: speed($given.speed)?,
            auto_finalize: $given.auto_finalize.unwrap_or(true),
            auto_dismiss: $given.auto_dismiss.unwrap_or(true),
            filter_node_name: $given.filter_node_name,
        }
    };
}

fn on_error(policy: Option<BlockdevOnError>) -> p::OnError {
    policy.map(Into::into).unwrap_or_default()
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct BlockCommit {
    job_id: Option<String>,
    device: String,
    base_node: Option<String>,
    base: Option<String>,
    top_node: Option<String>,
    top: Option<String>,
    backing_file: Option<String>,
    speed: Option<i64>,
    on_error: Option<BlockdevOnError>,
    filter_node_name: Option<String>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
}

async fn block_commit(context: &Context, given: BlockCommit) -> Result<()> {
    if context.disks()?.find(&given.device).is_err() {
        let description = format!("Device '{}' not found", given.device);
        return Err(QmpError::new(crate::ErrorClass::DeviceNotFound, description));
    }
    let commit = p::BlockCommit {
        job: job_options!(given),
        device: given.device,
        base_node: given.base_node,
        base: given.base,
        top_node: given.top_node,
        top: given.top,
        backing_file: given.backing_file,
        on_error: on_error(given.on_error),
    };
    context.storage(move |storage| storage.block_commit(commit)).await
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct BlockStream {
    job_id: Option<String>,
    device: String,
    base: Option<String>,
    base_node: Option<String>,
    backing_file: Option<String>,
    bottom: Option<String>,
    speed: Option<i64>,
    on_error: Option<BlockdevOnError>,
    filter_node_name: Option<String>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
}

async fn block_stream(context: &Context, given: BlockStream) -> Result<()> {
    let stream = p::BlockStream {
        job: job_options!(given),
        device: given.device,
        base_node: given.base_node,
        base: given.base,
        bottom: given.bottom,
        backing_file: given.backing_file,
        on_error: on_error(given.on_error),
    };
    context.storage(move |storage| storage.block_stream(stream)).await
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct BlockdevMirror {
    job_id: Option<String>,
    device: String,
    target: String,
    replaces: Option<String>,
    sync: MirrorSyncMode,
    speed: Option<i64>,
    granularity: Option<u32>,
    buf_size: Option<u64>,
    on_source_error: Option<BlockdevOnError>,
    on_target_error: Option<BlockdevOnError>,
    filter_node_name: Option<String>,
    copy_mode: Option<MirrorCopyMode>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    target_is_zero: Option<bool>,
}

async fn blockdev_mirror(context: &Context, given: BlockdevMirror) -> Result<()> {
    let mirror = p::Mirror {
        job: job_options!(given),
        device: given.device,
        replaces: given.replaces,
        sync: given.sync.into(),
        bitmap: None,
        granularity: given.granularity,
        buf_size: given.buf_size,
        on_source_error: on_error(given.on_source_error),
        on_target_error: on_error(given.on_target_error),
        copy_mode: given.copy_mode.map(Into::into).unwrap_or_default(),
        target_is_zero: given.target_is_zero.unwrap_or(false),
    };
    let mirror = p::BlockdevMirror { mirror, target: given.target };
    context.storage(move |storage| storage.blockdev_mirror(mirror)).await
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct DriveMirror {
    job_id: Option<String>,
    device: String,
    target: String,
    format: Option<String>,
    node_name: Option<String>,
    replaces: Option<String>,
    sync: MirrorSyncMode,
    mode: Option<NewImageMode>,
    speed: Option<i64>,
    granularity: Option<u32>,
    buf_size: Option<u64>,
    on_source_error: Option<BlockdevOnError>,
    on_target_error: Option<BlockdevOnError>,
    copy_mode: Option<MirrorCopyMode>,
    filter_node_name: Option<String>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
}

async fn drive_mirror(context: &Context, given: DriveMirror) -> Result<()> {
    let mirror = p::Mirror {
        job: job_options!(given),
        device: given.device,
        replaces: given.replaces,
        sync: given.sync.into(),
        bitmap: None,
        granularity: given.granularity,
        buf_size: given.buf_size,
        on_source_error: on_error(given.on_source_error),
        on_target_error: on_error(given.on_target_error),
        copy_mode: given.copy_mode.map(Into::into).unwrap_or_default(),
        target_is_zero: false,
    };
    let target = p::NewTarget {
        target: given.target,
        format: given.format,
        node_name: given.node_name,
        mode: given.mode.map(Into::into).unwrap_or_default(),
    };
    context.storage(move |storage| storage.drive_mirror(p::DriveMirror { mirror, target })).await
}

/// What `blockdev-backup` and `drive-backup` have in common.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct BackupCommon {
    job_id: Option<String>,
    device: String,
    sync: MirrorSyncMode,
    speed: Option<u64>,
    bitmap: Option<String>,
    bitmap_mode: Option<BitmapSyncMode>,
    compress: Option<bool>,
    on_source_error: Option<BlockdevOnError>,
    on_target_error: Option<BlockdevOnError>,
    on_cbw_error: Option<OnCbwError>,
    auto_finalize: Option<bool>,
    auto_dismiss: Option<bool>,
    filter_node_name: Option<String>,
    x_perf: Option<BackupPerf>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct BackupPerf {
    max_workers: Option<u32>,
    max_chunk: Option<u64>,
}

impl From<BackupCommon> for p::Backup {
    fn from(given: BackupCommon) -> Self {
        let perf = given.x_perf.unwrap_or(BackupPerf { max_workers: None, max_chunk: None });
        Self {
            job: p::JobOptions {
                job_id: given.job_id,
                speed: given.speed.unwrap_or(0),
                auto_finalize: given.auto_finalize.unwrap_or(true),
                auto_dismiss: given.auto_dismiss.unwrap_or(true),
                filter_node_name: given.filter_node_name,
            },
            device: given.device,
            sync: given.sync.into(),
            bitmap: given.bitmap,
            bitmap_mode: given.bitmap_mode.map(Into::into),
            compress: given.compress.unwrap_or(false),
            on_source_error: on_error(given.on_source_error),
            on_target_error: on_error(given.on_target_error),
            on_cbw_error: given.on_cbw_error.map(Into::into).unwrap_or_default(),
            max_workers: perf.max_workers.unwrap_or(0),
            max_chunk: perf.max_chunk.unwrap_or(0),
        }
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlockdevBackup {
    target: String,
    #[serde(flatten)]
    common: BackupCommon,
}

impl From<BlockdevBackup> for p::BlockdevBackup {
    fn from(BlockdevBackup { target, common }: BlockdevBackup) -> Self {
        Self { backup: common.into(), target }
    }
}

async fn blockdev_backup(context: &Context, given: BlockdevBackup) -> Result<()> {
    context.storage(move |storage| storage.blockdev_backup(given.into())).await
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct DriveBackup {
    target: String,
    format: Option<String>,
    mode: Option<NewImageMode>,
    #[serde(flatten)]
    common: BackupCommon,
}

impl From<DriveBackup> for p::DriveBackup {
    fn from(given: DriveBackup) -> Self {
        let target = p::NewTarget {
            target: given.target,
            format: given.format,
            node_name: None,
            mode: given.mode.map(Into::into).unwrap_or_default(),
        };
        Self { backup: given.common.into(), target }
    }
}

async fn drive_backup(context: &Context, given: DriveBackup) -> Result<()> {
    context.storage(move |storage| storage.drive_backup(given.into())).await
}
