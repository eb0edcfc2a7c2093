//! Why VMs end.

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset itself, and was not to reboot.
    Reset,
    /// The guest's kernel panicked.
    Panicked,
    /// A vCPU shut down, and the guest was not to reboot.
    TripleFault {
        /// Which vCPU.
        vcpu: u32,
    },
    /// The guest wrote to the debug-exit device.
    DebugExit(u8),
    /// A person or another program ended it.
    Quit(Quitter),
    /// The accelerator failed.
    InternalError(String),
    /// A replay has come to its recording's end, and all was as recorded.
    Replayed {
        /// The recording was cut off.
        cut: bool,
    },
    /// A replay is not what was recorded: where, and what differs.
    Diverged(String),
    /// The recording could not be written.
    RecordingFailed(String),
}

/// Who ends a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quitter {
    /// A person at the terminal.
    Terminal,
    /// A signal to the process.
    Signal,
    /// A client of the control socket.
    Control,
    /// A debugger.
    Debugger,
}
