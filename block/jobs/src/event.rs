//! What jobs tell the world.

use block_graph::Error;

/// What a job does. The names are those of QAPI's `JobType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JobType {
    /// Writes layers of a backing chain to one below.
    Commit,
    /// Takes what layers below have into a layer.
    Stream,
    /// Keeps a copy that follows what is written.
    Mirror,
    /// Copies what there was at the start.
    Backup,
    /// Makes an image.
    Create,
}

impl JobType {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Stream => "stream",
            Self::Mirror => "mirror",
            Self::Backup => "backup",
            Self::Create => "create",
        }
    }
}

/// What state a job is in. The names and meanings are those of QAPI's `JobStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum JobStatus {
    /// It exists.
    Created,
    /// It works.
    Running,
    /// It works again when it is resumed.
    Paused,
    /// It works, and may be completed.
    Ready,
    /// It is ready again when it is resumed.
    Standby,
    /// It has done its work, and others of its group have not.
    Waiting,
    /// All of its group have done their work; it waits to be finalized.
    Pending,
    /// It is being undone.
    Aborting,
    /// It has ended.
    Concluded,
    /// It is gone.
    Null,
}

impl JobStatus {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether a job may go from this to `next`.
    pub(crate) fn leads_to(self, next: Self) -> bool {
        use JobStatus::{
            Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting,
        };
        matches!(
            (self, next),
            (Created, Running | Aborting | Null)
                | (Running, Paused | Ready | Waiting | Aborting)
                | (Paused, Running)
                | (Ready, Standby | Waiting | Aborting)
                | (Standby, Ready)
                | (Waiting, Pending | Aborting)
                | (Pending, Aborting | Concluded)
                | (Aborting, Concluded)
                | (Concluded, Null)
        )
    }
}

/// What may be asked of a job. The names are those of QAPI's `JobVerb`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Cancel,
    Pause,
    Resume,
    SetSpeed,
    Complete,
    Finalize,
    Dismiss,
    Change,
}

impl Verb {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
            Self::Change => "change",
        }
    }

    /// Whether a job in that state may be asked for it.
    pub(crate) fn fits(self, status: JobStatus) -> bool {
        use JobStatus::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        let works = matches!(status, Created | Running | Paused | Ready | Standby);
        match self {
            Self::Cancel => works || matches!(status, Waiting | Pending),
            Self::Pause | Self::Resume | Self::SetSpeed | Self::Change => works,
            Self::Complete => status == Ready,
            Self::Finalize => status == Pending,
            Self::Dismiss => status == Concluded,
        }
    }
}

/// What became of an error. The names are those of QAPI's `BlockErrorAction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorAction {
    /// It is tried again, or left out.
    Ignore,
    /// The job fails.
    Report,
    /// The job is paused, and tries again when it is resumed.
    Stop,
}

impl ErrorAction {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ignore => "ignore",
            Self::Report => "report",
            Self::Stop => "stop",
        }
    }
}

/// What a job's last errors mean for it. The names are those of QAPI's `BlockDeviceIoStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoStatus {
    /// All is well.
    #[default]
    Ok,
    /// It was stopped by an error.
    Failed,
    /// It was stopped for want of space.
    NoSpace,
}

impl IoStatus {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}

/// How far a job is, as its events say it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobProgress {
    /// What it does.
    pub kind: JobType,
    /// Its id (`device` in QAPI).
    pub id: String,
    /// What is to be done, in bytes.
    pub len: u64,
    /// What is done, in bytes.
    pub offset: u64,
    /// The most bytes that it copies in a second; 0 if there is no limit.
    pub speed: u64,
}

/// What is told to the listener. The names are those of QMP's events.
#[derive(Debug, Clone)]
pub enum Event {
    /// `JOB_STATUS_CHANGE`.
    StatusChange {
        /// The job.
        id: String,
        /// Its new state.
        status: JobStatus,
    },
    /// `BLOCK_JOB_READY`.
    Ready(JobProgress),
    /// `BLOCK_JOB_PENDING`.
    Pending {
        /// What the job does.
        kind: JobType,
        /// The job.
        id: String,
    },
    /// `BLOCK_JOB_COMPLETED`.
    Completed {
        /// How far it came.
        progress: JobProgress,
        /// Why it failed, if it did.
        error: Option<Error>,
    },
    /// `BLOCK_JOB_CANCELLED`.
    Cancelled(JobProgress),
    /// `BLOCK_JOB_ERROR`.
    Error {
        /// The job.
        id: String,
        /// Whether it was writing.
        write: bool,
        /// What is done about it.
        action: ErrorAction,
    },
}
