//! What goes to standard output.

use std::io::Write;

/// Prints a line. Nobody reading is no error of the tool's.
pub(crate) fn line(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints a text as it is.
pub(crate) fn text(text: &str) {
    let _ = write!(std::io::stdout(), "{text}");
}

/// Brings what was printed to where it goes, before something is said elsewhere.
pub(crate) fn flush() {
    let _ = std::io::stdout().flush();
}
