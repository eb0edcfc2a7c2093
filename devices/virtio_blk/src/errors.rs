//! What becomes of requests that the host failed.

use block_graph::{Errno, Error};
use parking_lot::Mutex;
use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// What is done about a request that the host failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ErrorPolicy {
    /// The guest is told.
    #[default]
    Report,
    /// The guest is told that it succeeded.
    Ignore,
    /// The VM stands still; when it runs on, the request is tried again.
    Stop,
    /// The same for want of space; otherwise the guest is told.
    Enospc,
}

impl ErrorPolicy {
    /// All of them with their names.
    pub const NAMES: [(&'static str, Self); 4] =
        [("report", Self::Report), ("ignore", Self::Ignore), ("stop", Self::Stop), ("enospc", Self::Enospc)];

    fn action(self, error: &Error) -> ErrorAction {
        match self {
            Self::Report => ErrorAction::Report,
            Self::Ignore => ErrorAction::Ignore,
            Self::Stop => ErrorAction::Stop,
            Self::Enospc if error.errno() == Errno::NO_SPACE => ErrorAction::Stop,
            Self::Enospc => ErrorAction::Report,
        }
    }
}

/// What was done about one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorAction {
    /// The guest was told.
    Report,
    /// The guest was told that it succeeded.
    Ignore,
    /// It is kept until the VM runs on, which is to stand still.
    Stop,
}

/// A request that the host failed.
#[derive(Debug)]
pub struct IoFailure<'a> {
    /// It was a read.
    pub read: bool,
    /// What is done about it.
    pub action: ErrorAction,
    /// Why it failed.
    pub error: &'a Error,
}

type Listener = Box<dyn Fn(&IoFailure<'_>) + Send + Sync>;

/// A request that is kept: its queue, and the head of its chain.
pub(crate) type Kept = (u16, u16);

/// What becomes of a device's requests that the host failed.
#[derive(Default)]
pub(crate) struct Failures {
    reads: ErrorPolicy,
    writes: ErrorPolicy,
    listener: OnceLock<Listener>,
    kept: Mutex<Vec<Kept>>,
    /// The VM has not yet stood still since the last was kept.
    waits: AtomicBool,
}

impl Failures {
    pub(crate) fn new(reads: ErrorPolicy, writes: ErrorPolicy) -> Self {
        Self { reads, writes, ..Self::default() }
    }

    pub(crate) fn listen(&self, listener: Listener) {
        let first = self.listener.set(listener).is_ok();
        debug_assert!(first, "a device has one listener");
    }

    /// Says what is to be done about a failure. Where nobody can stop the VM the guest is told.
    pub(crate) fn decide(&self, read: bool, error: &Error) -> ErrorAction {
        let policy = if read { self.reads } else { self.writes };
        let Some(listener) = self.listener.get() else {
            return if policy == ErrorPolicy::Ignore { ErrorAction::Ignore } else { ErrorAction::Report };
        };
        let action = policy.action(error);
        if action == ErrorAction::Stop {
            self.waits.store(true, Ordering::SeqCst);
        }
        listener(&IoFailure { read, action, error });
        action
    }

    /// Keeps a request.
    pub(crate) fn keep(&self, queue: u16, head: u16) {
        self.kept.lock().push((queue, head));
    }

    /// The VM runs on: what is kept is tried again.
    pub(crate) fn start(&self) {
        self.waits.store(false, Ordering::SeqCst);
    }

    /// Takes the heads of the requests of `queue` that are to be tried again.
    pub(crate) fn take(&self, queue: u16) -> Vec<u16> {
        if self.waits.load(Ordering::SeqCst) {
            return Vec::new();
        }
        let mut kept = self.kept.lock();
        let heads = kept.iter().filter(|(of, _)| *of == queue).map(|(_, head)| *head).collect();
        kept.retain(|(of, _)| *of != queue);
        heads
    }

    /// What is kept now.
    pub(crate) fn kept(&self) -> Vec<Kept> {
        self.kept.lock().clone()
    }

    /// Keeps these.
    pub(crate) fn set_kept(&self, kept: Vec<Kept>) {
        *self.kept.lock() = kept;
    }
}

impl fmt::Debug for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failures").field("kept", &self.kept()).finish_non_exhaustive()
    }
}
