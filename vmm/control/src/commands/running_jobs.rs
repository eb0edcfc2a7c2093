//! Commands about jobs that were begun.

use crate::command::Command;
use crate::context::Context;
use crate::error::{ErrorClass, QmpError, Result};
use jobs::{JobInfo, JobStatus, Storage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(super) fn commands() -> Vec<Command> {
    vec![
        Command::new("query-jobs", query_jobs),
        Command::new("query-block-jobs", query_block_jobs),
        Command::new("job-pause", async |context: &Context, JobId { id }: JobId| {
            ask(context, id, false, |storage, id| storage.job_pause(id)).await
        }),
        Command::new("job-resume", async |context: &Context, JobId { id }: JobId| {
            ask(context, id, false, |storage, id| storage.job_resume(id)).await
        }),
        Command::new("job-cancel", async |context: &Context, JobId { id }: JobId| {
            ask(context, id, false, |storage, id| storage.job_cancel(id, true)).await
        }),
        Command::new("job-complete", async |context: &Context, JobId { id }: JobId| {
            ask(context, id, false, |storage, id| storage.job_complete(id)).await
        }),
        Command::new("job-finalize", async |context: &Context, JobId { id }: JobId| {
            ask(context, id, false, |storage, id| storage.job_finalize(id)).await
        }),
        Command::new("job-dismiss", async |context: &Context, JobId { id }: JobId| {
            ask(context, id, false, |storage, id| storage.job_dismiss(id)).await
        }),
        Command::new("block-job-pause", async |context: &Context, Device { device }: Device| {
            ask(context, device, true, |storage, id| storage.job_pause(id)).await
        }),
        Command::new("block-job-resume", async |context: &Context, Device { device }: Device| {
            ask(context, device, true, |storage, id| storage.job_resume(id)).await
        }),
        Command::new("block-job-cancel", async |context: &Context, given: Cancel| {
            let force = given.force.unwrap_or(false);
            ask(context, given.device, true, move |storage, id| storage.job_cancel(id, force)).await
        }),
        Command::new("block-job-complete", async |context: &Context, Device { device }: Device| {
            ask(context, device, true, |storage, id| storage.job_complete(id)).await
        }),
        Command::new("block-job-finalize", async |context: &Context, JobId { id }: JobId| {
            ask(context, id, false, |storage, id| storage.job_finalize(id)).await
        }),
        Command::new("block-job-dismiss", async |context: &Context, JobId { id }: JobId| {
            ask(context, id, false, |storage, id| storage.job_dismiss(id)).await
        }),
        Command::new("block-job-set-speed", set_speed),
        Command::new("block-job-change", change),
    ]
}

#[derive(Deserialize, JsonSchema)]
struct JobId {
    id: String,
}

#[derive(Deserialize, JsonSchema)]
struct Device {
    device: String,
}

#[derive(Deserialize, JsonSchema)]
struct Cancel {
    device: String,
    force: Option<bool>,
}

#[derive(Deserialize, JsonSchema)]
struct SetSpeed {
    device: String,
    speed: i64,
}

/// Asks a job for something. Block jobs have an error class of their own for those that are not there.
async fn ask(
    context: &Context,
    id: String,
    block: bool,
    ask: impl FnOnce(&Storage, &str) -> block_graph::Result<()> + Send + 'static,
) -> Result<()> {
    let name = id.clone();
    let known =
        context.storage(move |storage| Ok(storage.query_jobs()?.iter().any(|job| job.id == name))).await?;
    if !known {
        return Err(if block {
            QmpError::new(ErrorClass::DeviceNotActive, format!("Block job '{id}' not found"))
        } else {
            QmpError::generic("Job not found")
        });
    }
    context.storage(move |storage| ask(storage, &id)).await
}

async fn set_speed(context: &Context, given: SetSpeed) -> Result<()> {
    let wrong = |_| QmpError::generic("Parameter 'speed' expects a non-negative value");
    let speed = u64::try_from(given.speed).map_err(wrong)?;
    ask(context, given.device, true, move |storage, id| storage.job_set_speed(id, speed)).await
}

/// What of a job can be changed, by its type.
#[derive(Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
enum JobChange {
    Mirror(MirrorChange),
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct MirrorChange {
    copy_mode: ChangedCopyMode,
}

/// A mirror that has every write reach the copy before it ends does not become another.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum ChangedCopyMode {
    Background,
    WriteBlocking,
}

#[derive(Deserialize, JsonSchema)]
struct BlockJobChange {
    id: String,
    #[serde(flatten)]
    change: JobChange,
}

async fn change(context: &Context, given: BlockJobChange) -> Result<()> {
    let JobChange::Mirror(MirrorChange { copy_mode }) = given.change;
    match copy_mode {
        ChangedCopyMode::WriteBlocking => {
            ask(context, given.id, false, |storage, id| storage.job_write_blocking(id)).await
        }
        ChangedCopyMode::Background => {
            Err(QmpError::generic("Change to copy mode 'background' is not implemented"))
        }
    }
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Job {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    status: &'static str,
    current_progress: u64,
    total_progress: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

async fn query_jobs(context: &Context, (): ()) -> Result<Vec<Job>> {
    let jobs = context.storage(|storage| storage.query_jobs()).await?;
    let info = |job: JobInfo| Job {
        kind: job.kind.name(),
        status: job.status.name(),
        current_progress: job.offset,
        total_progress: job.len,
        error: job.error.map(|error| error.to_string()),
        id: job.id,
    };
    Ok(jobs.into_iter().map(info).collect())
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct BlockJobInfo {
    #[serde(rename = "type")]
    kind: &'static str,
    device: String,
    len: u64,
    offset: u64,
    busy: bool,
    paused: bool,
    speed: u64,
    io_status: &'static str,
    ready: bool,
    status: &'static str,
    auto_finalize: bool,
    auto_dismiss: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(flatten)]
    of_kind: Option<Value>,
}

async fn query_block_jobs(context: &Context, (): ()) -> Result<Vec<BlockJobInfo>> {
    let jobs = context.storage(|storage| storage.query_jobs()).await?;
    let info = |job: JobInfo| BlockJobInfo {
        kind: job.kind.name(),
        len: job.len,
        offset: job.offset,
        busy: job.busy,
        paused: job.paused,
        speed: job.speed,
        io_status: job.io_status.name(),
        ready: job.ready,
        status: job.status.name(),
        auto_finalize: job.auto_finalize,
        auto_dismiss: job.auto_dismiss,
        error: job.error.map(|error| error.to_string()),
        of_kind: job.actively_synced.map(|synced| json!({ "actively-synced": synced })),
        device: job.id,
    };
    Ok(jobs.into_iter().filter(|job| job.status != JobStatus::Null).map(info).collect())
}
