//! What a VM is doing, and who is told when that changes.

use parking_lot::Mutex;
use std::fmt;
use std::sync::{Arc, OnceLock};
use virtio_blk::ErrorAction;

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RunState {
    /// It was not started yet.
    #[default]
    Prelaunch,
    /// It runs.
    Running,
    /// It would run, but the guest sleeps in S3.
    Suspended,
    /// Somebody had it stand still.
    Paused,
    /// It stands still because a disk's request failed, and goes on when told to, with that request tried again.
    IoError,
    /// A debugger has it stand still.
    Debug,
    /// It has ended.
    Shutdown,
}

impl RunState {
    /// Whether time goes on in the VM.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Running | Self::Suspended)
    }
}

/// Something that happened to a VM as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEvent {
    /// It stands still.
    Stopped,
    /// It runs again.
    Resumed,
    /// It was reset: by its guest, or by somebody on the host.
    Reset {
        /// By its guest.
        guest: bool,
    },
    /// Its power button was pressed.
    PowerButton,
    /// The guest went to sleep in S3.
    Suspended,
    /// It woke.
    Woken,
    /// The guest's kernel panicked; the VM ends.
    Panicked,
    /// The guest's kernel panicked, and goes on in a crash kernel.
    CrashLoaded,
    /// The host failed a request to a disk.
    IoError(IoErrorReport),
}

/// A disk's request that the host failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoErrorReport {
    /// The drive.
    pub drive: String,
    /// The node that it stands on.
    pub node: String,
    /// It was a read.
    pub read: bool,
    /// What is done about it.
    pub action: ErrorAction,
    /// The host has no space left.
    pub no_space: bool,
    /// Why it failed.
    pub reason: String,
}

/// Hears of events, on the thread on which they happen; must not wait.
pub type VmListener = Arc<dyn Fn(VmEvent) + Send + Sync>;

/// A VM's state, as other threads see it.
#[derive(Default)]
pub(crate) struct RunStatus {
    state: Mutex<RunState>,
    listener: OnceLock<VmListener>,
}

impl RunStatus {
    pub(crate) fn state(&self) -> RunState {
        *self.state.lock()
    }

    /// Takes up a state, and says so if the VM stands still by it, or no longer.
    pub(crate) fn set(&self, state: RunState) {
        let old = std::mem::replace(&mut *self.state.lock(), state);
        match (old.is_live(), state.is_live()) {
            (true, false) if state != RunState::Shutdown => self.tell(VmEvent::Stopped),
            (false, true) => self.tell(VmEvent::Resumed),
            _ => {}
        }
    }

    pub(crate) fn tell(&self, event: VmEvent) {
        if let Some(listener) = self.listener.get() {
            listener(event);
        }
    }

    /// Sets who hears of events; the first call counts.
    pub(crate) fn listen(&self, listener: VmListener) {
        let first = self.listener.set(listener).is_ok();
        debug_assert!(first, "a VM has one listener");
    }
}

impl fmt::Debug for RunStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunStatus").field("state", &self.state()).finish_non_exhaustive()
    }
}
