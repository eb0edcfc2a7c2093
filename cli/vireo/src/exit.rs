//! What the program's exit codes mean.

use machine::Ending;
use std::process::ExitCode;

/// Something was wrong on the host's side; standard error says what. (A wrong command line exits with 2.)
pub(crate) const ERROR: u8 = 1;
/// The guest's kernel panicked.
pub(crate) const PANICKED: u8 = 4;
/// A vCPU shut down by a triple fault, with `--no-reboot`.
pub(crate) const TRIPLE_FAULT: u8 = 6;
/// No accelerator of those asked for can be had.
pub(crate) const NO_ACCELERATOR: u8 = 10;
/// The accelerator failed.
pub(crate) const INTERNAL_ERROR: u8 = 8;

/// A replay is not what was recorded.
pub(crate) const DIVERGED: u8 = 12;

/// For `--help`.
pub(crate) const HELP: &str = "\
Exit codes:
  0    the guest powered off, or reset with --no-reboot, or Ctrl-A X was typed,
       or gdb killed it, or a replay came to its end
  1    an error on the host's side, which standard error names
  2    a wrong command line
  4    the guest's kernel panicked (reported through pvpanic)
  6    triple fault, with --no-reboot
  8    the accelerator failed
  12   a replay is not what was recorded; standard error says where
  10   none of the accelerators asked for can be had; standard error says why
  odd  the guest wrote N to the debug-exit port: 2 * N + 1
  128+S  signal S ended the program";

/// The exit code for the end of a VM.
pub(crate) fn code(ending: &Ending) -> u8 {
    match ending {
        Ending::PowerOff | Ending::Reset | Ending::Quit(_) | Ending::Replayed { .. } => 0,
        Ending::Panicked => PANICKED,
        Ending::TripleFault { .. } => TRIPLE_FAULT,
        Ending::DebugExit(code) => *code,
        Ending::InternalError(_) => INTERNAL_ERROR,
        Ending::Diverged(_) => DIVERGED,
        Ending::RecordingFailed(_) => ERROR,
    }
}

/// The same, with a line for those that need one.
pub(crate) fn of(ending: &Ending) -> ExitCode {
    match ending {
        Ending::PowerOff | Ending::Reset | Ending::Quit(_) | Ending::DebugExit(_) => {}
        Ending::Panicked => eprintln!("vireo: the guest's kernel panicked"),
        Ending::TripleFault { vcpu } => eprintln!("vireo: vCPU {vcpu} shut down by a triple fault"),
        Ending::InternalError(error) => eprintln!("vireo: the accelerator failed: {error}"),
        Ending::Replayed { cut: false } => eprintln!("vireo: the replay has come to the recording's end"),
        Ending::Replayed { cut: true } => {
            eprintln!("vireo: the replay has come to where the recording was cut off");
        }
        Ending::Diverged(what) => eprintln!("vireo: {what}"),
        Ending::RecordingFailed(error) => eprintln!("vireo: {error}"),
    }
    ExitCode::from(code(ending))
}
