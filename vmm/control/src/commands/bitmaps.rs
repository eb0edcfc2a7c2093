//! Commands about dirty bitmaps.

use crate::command::Command;
use crate::context::Context;
use crate::error::Result;
use jobs::parameters as p;
use schemars::JsonSchema;
use serde::Deserialize;

pub(super) fn commands() -> Vec<Command> {
    vec![
        Command::new("block-dirty-bitmap-add", add),
        Command::new("block-dirty-bitmap-remove", remove),
        Command::new("block-dirty-bitmap-clear", clear),
        Command::new("block-dirty-bitmap-enable", enable),
        Command::new("block-dirty-bitmap-disable", disable),
        Command::new("block-dirty-bitmap-merge", merge),
    ]
}

/// A bitmap of a device's node, or of a node.
#[derive(Deserialize, JsonSchema)]
pub(super) struct BitmapName {
    node: String,
    name: String,
}

impl From<BitmapName> for p::BitmapName {
    fn from(BitmapName { node, name }: BitmapName) -> Self {
        Self { node, name }
    }
}

#[derive(Deserialize, JsonSchema)]
pub(super) struct BitmapAdd {
    node: String,
    name: String,
    granularity: Option<u32>,
    persistent: Option<bool>,
    disabled: Option<bool>,
}

impl From<BitmapAdd> for p::BitmapAdd {
    fn from(add: BitmapAdd) -> Self {
        Self {
            node: add.node,
            name: add.name,
            granularity: add.granularity,
            persistent: add.persistent.unwrap_or(false),
            disabled: add.disabled.unwrap_or(false),
        }
    }
}

/// One of the bitmaps that are merged: of the same node, or of another.
#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
enum MergeSource {
    External(BitmapName),
    Local(String),
}

#[derive(Deserialize, JsonSchema)]
pub(super) struct BitmapMerge {
    node: String,
    target: String,
    bitmaps: Vec<MergeSource>,
}

impl From<BitmapMerge> for p::BitmapMerge {
    fn from(BitmapMerge { node, target, bitmaps }: BitmapMerge) -> Self {
        let source = |source| match source {
            MergeSource::External(which) => which.into(),
            MergeSource::Local(name) => p::BitmapName { node: node.clone(), name },
        };
        Self { bitmaps: bitmaps.into_iter().map(source).collect(), node: node.clone(), target }
    }
}

async fn add(context: &Context, add: BitmapAdd) -> Result<()> {
    context.storage(move |storage| storage.bitmap_add(add.into())).await
}

async fn remove(context: &Context, which: BitmapName) -> Result<()> {
    context.storage(move |storage| storage.bitmap_remove(which.into())).await
}

async fn clear(context: &Context, which: BitmapName) -> Result<()> {
    context.storage(move |storage| storage.bitmap_clear(which.into())).await
}

async fn enable(context: &Context, which: BitmapName) -> Result<()> {
    context.storage(move |storage| storage.bitmap_enable(which.into(), true)).await
}

async fn disable(context: &Context, which: BitmapName) -> Result<()> {
    context.storage(move |storage| storage.bitmap_enable(which.into(), false)).await
}

async fn merge(context: &Context, merge: BitmapMerge) -> Result<()> {
    context.storage(move |storage| storage.bitmap_merge(merge.into())).await
}
