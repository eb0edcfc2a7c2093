//! Events of the VM as a whole (QAPI's run-state.json).

use crate::events::{Event, Hub};
use machine::{Ending, Quitter, VmEvent};
use schemars::JsonSchema;
use serde::Serialize;

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

/// Tells clients of what happened to the VM.
pub(crate) fn send(hub: &Hub, event: &VmEvent) {
    match event {
        VmEvent::Stopped => hub.send(&Stop {}),
        VmEvent::Resumed => hub.send(&Resume {}),
        VmEvent::PowerButton => hub.send(&Powerdown {}),
        VmEvent::Suspended => hub.send(&Suspend {}),
        VmEvent::Woken => hub.send(&Wakeup {}),
        VmEvent::Panicked => hub.send(&GuestPanicked { action: PanicAction::Poweroff }),
        VmEvent::CrashLoaded => hub.send(&GuestCrashLoaded { action: PanicAction::Run }),
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
