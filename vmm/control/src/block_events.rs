//! Events of jobs on disks (QAPI's block-core.json and job.json).

use crate::events::{Event, Hub};
use jobs::{Event as JobEvent, JobProgress};
use schemars::JsonSchema;
use serde::Serialize;

/// A job has another state.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct JobStatusChange {
    id: String,
    status: &'static str,
}

/// What is told of a job that goes on or ends.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Progress {
    #[serde(rename = "type")]
    kind: &'static str,
    device: String,
    len: u64,
    offset: u64,
    speed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Progress {
    fn new(progress: &JobProgress, error: Option<String>) -> Self {
        Self {
            kind: progress.kind.name(),
            device: progress.id.clone(),
            len: progress.len,
            offset: progress.offset,
            speed: progress.speed,
            error,
        }
    }
}

macro_rules! progress_events {
    ($($(#[$doc:meta])* $type:ident $name:literal;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Serialize, JsonSchema)]
            #[serde(transparent)]
            pub(crate) struct $type(Progress);

            impl Event for $type {
                const NAME: &'static str = $name;
            }
        )*
    };
}

progress_events! {
    /// A job may be completed.
    BlockJobReady "BLOCK_JOB_READY";
    /// A job has ended by itself.
    BlockJobCompleted "BLOCK_JOB_COMPLETED";
    /// A job was cancelled.
    BlockJobCancelled "BLOCK_JOB_CANCELLED";
}

/// A job waits to be finalized.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct BlockJobPending {
    #[serde(rename = "type")]
    kind: &'static str,
    id: String,
}

/// A job met an error.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct BlockJobError {
    device: String,
    operation: &'static str,
    action: &'static str,
}

impl Event for JobStatusChange {
    const NAME: &'static str = "JOB_STATUS_CHANGE";
}

impl Event for BlockJobPending {
    const NAME: &'static str = "BLOCK_JOB_PENDING";
}

impl Event for BlockJobError {
    const NAME: &'static str = "BLOCK_JOB_ERROR";
}

/// Tells clients of what a job did.
pub(crate) fn send(hub: &Hub, event: &JobEvent) {
    match event {
        JobEvent::StatusChange { id, status } => {
            hub.send(&JobStatusChange { id: id.clone(), status: status.name() });
        }
        JobEvent::Ready(progress) => hub.send(&BlockJobReady(Progress::new(progress, None))),
        JobEvent::Pending { kind, id } => {
            hub.send(&BlockJobPending { kind: kind.name(), id: id.clone() });
        }
        JobEvent::Completed { progress, error } => {
            let error = error.as_ref().map(ToString::to_string);
            hub.send(&BlockJobCompleted(Progress::new(progress, error)));
        }
        JobEvent::Cancelled(progress) => hub.send(&BlockJobCancelled(Progress::new(progress, None))),
        JobEvent::Error { id, write, action } => {
            let operation = if *write { "write" } else { "read" };
            hub.send(&BlockJobError { device: id.clone(), operation, action: action.name() });
        }
    }
}
