//! Events of the VM as a whole (QAPI's run-state.json).

use crate::events::{Event, Hub};
use machine::{Ending, ErrorAction, IoErrorReport, Quitter, VmEvent};
use schemars::JsonSchema;
use serde::Serialize;
use std::time::Duration;

/// Why a VM ends or is reset: QAPI's `ShutdownCause`.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ShutdownCause {
    None,
    HostError,
    HostQmpQuit,
    HostQmpSystemReset,
    HostSignal,
    HostUi,
    GuestShutdown,
    GuestReset,
    GuestPanic,
}

/// The VM ends.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Shutdown {
    guest: bool,
    reason: ShutdownCause,
}

/// The VM was reset.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Reset {
    guest: bool,
    reason: ShutdownCause,
}

/// The guest's kernel panicked.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct GuestPanicked {
    action: PanicAction,
}

/// The guest's kernel panicked, and goes on in a crash kernel.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct GuestCrashLoaded {
    action: PanicAction,
}

/// What is done about a panic.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PanicAction {
    Poweroff,
    Run,
}

macro_rules! plain_events {
    ($($(#[$doc:meta])* $type:ident $name:literal;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Serialize, JsonSchema)]
            pub(crate) struct $type {}

            impl Event for $type {
                const NAME: &'static str = $name;
            }
        )*
    };
}

plain_events! {
    /// The VM stands still.
    Stop "STOP";
    /// It runs again.
    Resume "RESUME";
    /// The power button was pressed.
    Powerdown "POWERDOWN";
    /// The guest sleeps in S3.
    Suspend "SUSPEND";
    /// It woke.
    Wakeup "WAKEUP";
}

impl Event for Shutdown {
    const NAME: &'static str = "SHUTDOWN";
}

impl Event for Reset {
    const NAME: &'static str = "RESET";
}

impl Event for GuestPanicked {
    const NAME: &'static str = "GUEST_PANICKED";
}

impl Event for GuestCrashLoaded {
    const NAME: &'static str = "GUEST_CRASHLOADED";
}

/// A disk's request failed.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct BlockIoError {
    qom_path: String,
    device: String,
    node_name: String,
    operation: Operation,
    action: Action,
    nospace: bool,
    reason: String,
    /// How often the VM was started: one that stops it is told each time.
    #[serde(skip)]
    started: u64,
}

#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Operation {
    Read,
    Write,
}

#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Action {
    Ignore,
    Report,
    Stop,
}

impl Event for BlockIoError {
    const NAME: &'static str = "BLOCK_IO_ERROR";
    /// A guest makes as many as it likes.
    const EVERY: Option<Duration> = Some(Duration::from_secs(1));

    fn subject(&self) -> String {
        match self.action {
            Action::Stop => format!("{} stop {}", self.device, self.started),
            action => format!("{} {action:?}", self.device),
        }
    }
}

impl BlockIoError {
    fn new(report: &IoErrorReport, started: u64) -> Self {
        Self {
            qom_path: format!("/machine/peripheral/{}/virtio-backend", report.drive),
            device: report.drive.clone(),
            node_name: report.node.clone(),
            operation: if report.read { Operation::Read } else { Operation::Write },
            action: match report.action {
                ErrorAction::Ignore => Action::Ignore,
                ErrorAction::Report => Action::Report,
                ErrorAction::Stop => Action::Stop,
            },
            nospace: report.no_space,
            reason: report.reason.clone(),
            started,
        }
    }
}

/// Tells clients of what happened to the VM, which was started so often.
pub(crate) fn send(hub: &Hub, event: &VmEvent, started: u64) {
    match event {
        VmEvent::Stopped => hub.send(&Stop {}),
        VmEvent::Resumed => hub.send(&Resume {}),
        VmEvent::PowerButton => hub.send(&Powerdown {}),
        VmEvent::Suspended => hub.send(&Suspend {}),
        VmEvent::Woken => hub.send(&Wakeup {}),
        VmEvent::Panicked => hub.send(&GuestPanicked { action: PanicAction::Poweroff }),
        VmEvent::CrashLoaded => hub.send(&GuestCrashLoaded { action: PanicAction::Run }),
        VmEvent::IoError(report) => hub.send(&BlockIoError::new(report, started)),
        VmEvent::Reset { guest } => {
            let reason = if *guest { ShutdownCause::GuestReset } else { ShutdownCause::HostQmpSystemReset };
            hub.send(&Reset { guest: *guest, reason });
        }
    }
}

/// Tells clients of the VM's end.
pub(crate) fn send_end(hub: &Hub, ending: &Ending) {
    let (guest, reason) = match ending {
        Ending::PowerOff | Ending::DebugExit(_) => (true, ShutdownCause::GuestShutdown),
        Ending::Reset | Ending::TripleFault { .. } => (true, ShutdownCause::GuestReset),
        Ending::Panicked => (true, ShutdownCause::GuestPanic),
        Ending::Quit(Quitter::Control) => (false, ShutdownCause::HostQmpQuit),
        Ending::Quit(Quitter::Signal) => (false, ShutdownCause::HostSignal),
        Ending::Quit(Quitter::Terminal) => (false, ShutdownCause::HostUi),
        Ending::Quit(Quitter::Debugger) => (false, ShutdownCause::None),
        Ending::InternalError(_) | Ending::RecordingFailed(_) | Ending::Diverged(_) => {
            (false, ShutdownCause::HostError)
        }
        Ending::Replayed { .. } => (false, ShutdownCause::None),
    };
    hub.send(&Shutdown { guest, reason });
}
