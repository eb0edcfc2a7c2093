//! Commands that have a disk's states kept, and transactions of these.

use super::bitmaps::{BitmapAdd, BitmapMerge, BitmapName};
use super::block_types::NewImageMode;
use super::copies::{BlockdevBackup, DriveBackup};
use crate::command::Command;
use crate::context::Context;
use crate::error::{QmpError, Result};
use jobs::parameters as p;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

pub(super) fn commands() -> Vec<Command> {
    vec![
        Command::new("blockdev-snapshot", blockdev_snapshot),
        Command::new("blockdev-snapshot-sync", blockdev_snapshot_sync),
        Command::new("blockdev-snapshot-internal-sync", blockdev_snapshot_internal_sync),
        Command::new("blockdev-snapshot-delete-internal-sync", blockdev_snapshot_delete_internal_sync),
        Command::new("transaction", transaction),
    ]
}

#[derive(Deserialize, JsonSchema)]
struct BlockdevSnapshot {
    node: String,
    overlay: String,
}

impl From<BlockdevSnapshot> for p::Snapshot {
    fn from(BlockdevSnapshot { node, overlay }: BlockdevSnapshot) -> Self {
        Self { node, overlay }
    }
}

async fn blockdev_snapshot(context: &Context, snapshot: BlockdevSnapshot) -> Result<()> {
    context.storage(move |storage| storage.blockdev_snapshot(snapshot.into())).await
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct BlockdevSnapshotSync {
    device: Option<String>,
    node_name: Option<String>,
    snapshot_file: String,
    snapshot_node_name: Option<String>,
    format: Option<String>,
    mode: Option<NewImageMode>,
}

impl TryFrom<BlockdevSnapshotSync> for p::SnapshotSync {
    type Error = QmpError;

    fn try_from(snapshot: BlockdevSnapshotSync) -> Result<Self> {
        Ok(Self {
            device: super::block_types::device_or_node(snapshot.device, snapshot.node_name)?,
            snapshot_file: snapshot.snapshot_file,
            snapshot_node_name: snapshot.snapshot_node_name,
            format: snapshot.format,
            mode: snapshot.mode.map(Into::into).unwrap_or_default(),
        })
    }
}

async fn blockdev_snapshot_sync(context: &Context, snapshot: BlockdevSnapshotSync) -> Result<()> {
    let snapshot = snapshot.try_into()?;
    context.storage(move |storage| storage.blockdev_snapshot_sync(snapshot)).await
}

#[derive(Deserialize, JsonSchema)]
struct BlockdevSnapshotInternal {
    device: String,
    name: String,
}

impl From<BlockdevSnapshotInternal> for p::SnapshotInternal {
    fn from(BlockdevSnapshotInternal { device, name }: BlockdevSnapshotInternal) -> Self {
        Self { device, name }
    }
}

async fn blockdev_snapshot_internal_sync(
    context: &Context,
    snapshot: BlockdevSnapshotInternal,
) -> Result<()> {
    context.storage(move |storage| storage.blockdev_snapshot_internal(snapshot.into())).await
}

#[derive(Deserialize, JsonSchema)]
struct DeleteInternal {
    device: String,
    id: Option<String>,
    name: Option<String>,
}

async fn blockdev_snapshot_delete_internal_sync(context: &Context, given: DeleteInternal) -> Result<Value> {
    let DeleteInternal { device, id, name } = given;
    let deleted = context
        .storage(move |storage| {
            storage.blockdev_snapshot_delete_internal(&device, id.as_deref(), name.as_deref())
        })
        .await?;
    Ok(blockdev::info::snapshot_to_json(&deleted))
}

#[derive(Deserialize, JsonSchema)]
struct Abort {}

/// An action of a transaction.
#[derive(Deserialize, JsonSchema)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
enum TransactionAction {
    Abort(Abort),
    BlockDirtyBitmapAdd(BitmapAdd),
    BlockDirtyBitmapRemove(BitmapName),
    BlockDirtyBitmapClear(BitmapName),
    BlockDirtyBitmapEnable(BitmapName),
    BlockDirtyBitmapDisable(BitmapName),
    BlockDirtyBitmapMerge(BitmapMerge),
    BlockdevBackup(BlockdevBackup),
    DriveBackup(DriveBackup),
    BlockdevSnapshot(BlockdevSnapshot),
    BlockdevSnapshotSync(BlockdevSnapshotSync),
    BlockdevSnapshotInternalSync(BlockdevSnapshotInternal),
}

impl TryFrom<TransactionAction> for p::Action {
    type Error = QmpError;

    fn try_from(action: TransactionAction) -> Result<Self> {
        Ok(match action {
            TransactionAction::Abort(Abort {}) => Self::Abort,
            TransactionAction::BlockDirtyBitmapAdd(given) => Self::BitmapAdd(given.into()),
            TransactionAction::BlockDirtyBitmapRemove(given) => Self::BitmapRemove(given.into()),
            TransactionAction::BlockDirtyBitmapClear(given) => Self::BitmapClear(given.into()),
            TransactionAction::BlockDirtyBitmapEnable(given) => Self::BitmapEnable(given.into()),
            TransactionAction::BlockDirtyBitmapDisable(given) => Self::BitmapDisable(given.into()),
            TransactionAction::BlockDirtyBitmapMerge(given) => Self::BitmapMerge(given.into()),
            TransactionAction::BlockdevBackup(given) => Self::BlockdevBackup(given.into()),
            TransactionAction::DriveBackup(given) => Self::DriveBackup(given.into()),
            TransactionAction::BlockdevSnapshot(given) => Self::Snapshot(given.into()),
            TransactionAction::BlockdevSnapshotSync(given) => Self::SnapshotSync(given.try_into()?),
            TransactionAction::BlockdevSnapshotInternalSync(given) => Self::SnapshotInternal(given.into()),
        })
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum ActionCompletionMode {
    Individual,
    Grouped,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct TransactionProperties {
    completion_mode: Option<ActionCompletionMode>,
}

#[derive(Deserialize, JsonSchema)]
struct Transaction {
    actions: Vec<TransactionAction>,
    properties: Option<TransactionProperties>,
}

async fn transaction(context: &Context, transaction: Transaction) -> Result<()> {
    let mode = match transaction.properties.and_then(|properties| properties.completion_mode) {
        Some(ActionCompletionMode::Grouped) => p::CompletionMode::Grouped,
        Some(ActionCompletionMode::Individual) | None => p::CompletionMode::Individual,
    };
    let actions = transaction.actions.into_iter().map(TryInto::try_into).collect::<Result<Vec<_>>>()?;
    context.storage(move |storage| storage.transaction(actions, mode)).await
}
