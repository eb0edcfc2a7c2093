//! The terminal that the program runs in.

use parking_lot::Mutex;
use rustix::termios::{self, OptionalActions, Termios};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// The settings to go back to, while the terminal is raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Standard input in raw mode, if it is a terminal; dropping this restores it.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Switches standard input to raw mode. Does nothing if it is no terminal. Output processing stays on,
    /// so that our own messages keep their line ends.
    ///
    /// # Errors
    /// The host's, if the terminal refuses.
    pub fn enter() -> io::Result<Self> {
        let input = rustix::stdio::stdin();
        if termios::isatty(input) {
            let settings = termios::tcgetattr(input)?;
            let mut raw = settings.clone();
            raw.make_raw();
            raw.output_modes = settings.output_modes;
            termios::tcsetattr(input, OptionalActions::Now, &raw)?;
            SAVED.lock().get_or_insert(settings);
        }
        Ok(Self(()))
    }

    /// Restores the terminal if it is raw: for ways out of the program that drop nothing.
    pub fn restore() {
        if let Some(settings) = SAVED.lock().take() {
            let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &settings);
        }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        Self::restore();
    }
}

/// Standard output, with a time stamp before each line when that is switched on.
pub(crate) struct TerminalOutput {
    pub(crate) timestamps: Arc<AtomicBool>,
    start: Instant,
    at_line_start: bool,
}

impl TerminalOutput {
    pub(crate) fn new() -> Self {
        Self { timestamps: Arc::new(AtomicBool::new(false)), start: Instant::now(), at_line_start: true }
    }
}

impl Write for TerminalOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = io::stdout().lock();
        if !self.timestamps.load(Ordering::Relaxed) {
            self.at_line_start = bytes.last() == Some(&b'\n');
            output.write_all(bytes)?;
            return Ok(bytes.len());
        }
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.at_line_start {
                write!(output, "[{:12.6}] ", self.start.elapsed().as_secs_f64())?;
            }
            output.write_all(line)?;
            self.at_line_start = line.ends_with(b"\n");
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}
