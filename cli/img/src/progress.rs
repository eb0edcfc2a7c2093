//! The line that tells how far a command is.

use crate::tool::Tool;
use blockdev::convert::Watcher;
use std::cell::Cell;
use std::io::Write;

/// Tells how far a command is, where it is to be told: `    (12.34/100%)`, over itself again and again.
#[derive(Debug)]
pub(crate) struct Shown<'a> {
    tool: &'a Tool,
    shown: bool,
    quiet: bool,
    /// How many percent more are worth a print.
    step: f64,
    printed: Cell<f64>,
}

impl<'a> Shown<'a> {
    /// Nothing done; told in steps of `step` percent if `shown`. Warnings are left out if `quiet`.
    pub(crate) fn new(tool: &'a Tool, shown: bool, step: f64, quiet: bool) -> Self {
        let progress = Self { tool, shown, quiet, step, printed: Cell::new(0.0) };
        progress.set(0.0);
        progress
    }

    /// So many percent are done.
    pub(crate) fn set(&self, percent: f64) {
        let percent = percent.clamp(0.0, 100.0);
        let is_end = percent == 0.0 || percent == 100.0;
        if self.shown && (is_end || (percent - self.printed.get()).abs() > self.step) {
            self.printed.set(percent);
            print!("    ({percent:.2}/100%)\r");
            // A progress line that cannot be written is no reason to stop.
            let _ = std::io::stdout().flush();
        }
    }

    /// All is done.
    pub(crate) fn end(&self) {
        self.set(100.0);
    }
}

impl Watcher for Shown<'_> {
    fn progress(&self, done: u64, total: u64) {
        if self.shown && total > 0 {
            self.set(100.0 * done as f64 / total as f64);
        }
    }

    fn wants_progress(&self) -> bool {
        self.shown
    }

    fn warn(&self, message: String) {
        if !self.quiet {
            self.tool.warn(message);
        }
    }
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if self.shown {
            // The result stands on the same line.
            self.tool.end();
            println!();
        }
    }
}
