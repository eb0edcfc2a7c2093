//! The words that name a character device.

use std::path::PathBuf;
use std::str::FromStr;

/// What a serial port or console is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChardevSpec {
    /// The terminal that the program runs in, with its escape keys.
    Stdio,
    /// A new pseudo-terminal, whose name is printed.
    Pty,
    /// Output goes to a file, which is emptied first; there is no input.
    File(PathBuf),
    /// A Unix socket: listened on, one client at a time, or connected to.
    Unix {
        /// Where it is.
        path: PathBuf,
        /// Whether to listen instead of connecting.
        server: bool,
        /// Whether a listener waits for its first client before the VM starts.
        wait: bool,
    },
    /// Output is lost and there is no input.
    Null,
}

/// Why a text names no character device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChardevSpecError {
    /// The kind is not known.
    #[error(
        "{0:?} is no character device; accepted are stdio, pty, file=PATH, unix=PATH[,server=on|off][,wait=on|off], null, none"
    )]
    Unknown(String),
    /// A path is missing.
    #[error("{0:?} names no path; accepted is {0}=PATH")]
    NoPath(String),
    /// An option of a socket is not known.
    #[error("{0:?} is no option of a Unix socket; accepted are server=on|off and wait=on|off")]
    BadOption(String),
}

impl FromStr for ChardevSpec {
    type Err = ChardevSpecError;

    fn from_str(text: &str) -> Result<Self, ChardevSpecError> {
        match text {
            "stdio" | "mon:stdio" => return Ok(Self::Stdio),
            "pty" => return Ok(Self::Pty),
            "null" | "none" => return Ok(Self::Null),
            "file" | "unix" => return Err(ChardevSpecError::NoPath(text.into())),
            _ => {}
        }
        let unknown = || ChardevSpecError::Unknown(text.into());
        let at = text.find([':', '=']).ok_or_else(unknown)?;
        let (kind, rest) = (&text[..at], &text[at + 1..]);
        if matches!(kind, "file" | "unix") && (rest.is_empty() || rest.starts_with(',')) {
            return Err(ChardevSpecError::NoPath(kind.into()));
        }
        match kind {
            "file" => Ok(Self::File(rest.into())),
            "unix" => parse_unix(rest),
            _ => Err(unknown()),
        }
    }
}

fn parse_unix(text: &str) -> Result<ChardevSpec, ChardevSpecError> {
    let mut words = text.split(',');
    let path = words.next().unwrap_or_default().into();
    // As a name on the command line has always been taken: listen, and do not hold the VM up.
    let (mut server, mut wait) = (true, false);
    for word in words {
        match word {
            "server" | "server=on" => server = true,
            "server=off" => server = false,
            "wait" | "wait=on" => wait = true,
            "nowait" | "wait=off" => wait = false,
            _ => return Err(ChardevSpecError::BadOption(word.into())),
        }
    }
    Ok(ChardevSpec::Unix { path, server, wait })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_writing_are_read() {
        let unix = |server, wait| ChardevSpec::Unix { path: "/a/b".into(), server, wait };
        for (text, spec) in [
            ("stdio", ChardevSpec::Stdio),
            ("pty", ChardevSpec::Pty),
            ("none", ChardevSpec::Null),
            ("file=/x,y", ChardevSpec::File("/x,y".into())),
            ("file:/x", ChardevSpec::File("/x".into())),
            ("unix=/a/b", unix(true, false)),
            ("unix:/a/b,server=on,wait=on", unix(true, true)),
            ("unix:/a/b,server=off", unix(false, false)),
        ] {
            assert_eq!(text.parse(), Ok(spec), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "tcp", "tcp:1", "file", "file=", "unix=", "unix=,server=on", "unix=/a,x=y"] {
            assert!(text.parse::<ChardevSpec>().is_err(), "{text}");
        }
    }
}
