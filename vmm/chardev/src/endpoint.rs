//! An opened character device.

use crate::escape::EscapeKeys;
use crate::socket;
use crate::terminal::{RawTerminal, TerminalOutput};
use crate::{ChardevSpec, ESCAPE_HELP};
use rustix::fs::OFlags;
use rustix::pty::OpenptFlags;
use rustix::termios::OptionalActions;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What comes from the host's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InputEvent {
    /// Characters for the guest.
    Bytes(Vec<u8>),
    /// A break condition.
    Break,
    /// The person wants the program to end.
    Quit,
    /// The person wants to know the keys.
    Help,
    /// The person wants time stamps, or no longer.
    ToggleTimestamps,
}

/// Why a character device could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open {what}: {source}")]
pub struct ChardevError {
    what: String,
    source: io::Error,
}

impl ChardevError {
    pub(crate) fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { what: what.into(), source: source.into() }
    }
}

/// Both directions of an opened character device.
pub struct Endpoint {
    /// Where the guest's characters go.
    pub output: Box<dyn Write + Send>,
    pub(crate) input: Option<Box<dyn Read + Send>>,
    /// For the terminal: keys with a meaning of their own, and the switch for time stamps.
    pub(crate) terminal: Option<(EscapeKeys, Arc<AtomicBool>)>,
    /// The terminal's settings, restored with the endpoint.
    pub(crate) raw: Option<RawTerminal>,
    /// For a pseudo-terminal: the name of its other end.
    pub name: Option<PathBuf>,
}

impl Endpoint {
    /// Opens what `spec` names.
    ///
    /// # Errors
    /// [`ChardevError`] naming the device, if the host refuses.
    pub fn open(spec: &ChardevSpec) -> Result<Self, ChardevError> {
        let plain = |output: Box<dyn Write + Send>, input: Option<Box<dyn Read + Send>>| Self {
            output,
            input,
            terminal: None,
            raw: None,
            name: None,
        };
        match spec {
            ChardevSpec::Null => Ok(plain(Box::new(io::sink()), None)),
            ChardevSpec::File(path) => {
                let file =
                    File::create(path).map_err(|e| ChardevError::new(path.display().to_string(), e))?;
                Ok(plain(Box::new(file), None))
            }
            ChardevSpec::Stdio => {
                let raw = RawTerminal::enter().map_err(|e| ChardevError::new("the terminal", e))?;
                let output = TerminalOutput::new();
                let terminal = Some((EscapeKeys::default(), output.timestamps.clone()));
                let input: Box<dyn Read + Send> = Box::new(io::stdin());
                Ok(Self { terminal, raw: Some(raw), ..plain(Box::new(output), Some(input)) })
            }
            ChardevSpec::Pty => Self::open_pty().map_err(|e| ChardevError::new("a pseudo-terminal", e)),
            ChardevSpec::Unix { path, server, wait } => {
                let what = || format!("the socket {}", path.display());
                if *server {
                    let (output, input) =
                        socket::listen(path, *wait).map_err(|e| ChardevError::new(what(), e))?;
                    return Ok(plain(Box::new(output), Some(Box::new(input))));
                }
                let stream = UnixStream::connect(path).map_err(|e| ChardevError::new(what(), e))?;
                let input = stream.try_clone().map_err(|e| ChardevError::new(what(), e))?;
                Ok(plain(Box::new(stream), Some(Box::new(input))))
            }
        }
    }

    fn open_pty() -> io::Result<Self> {
        let fd = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        rustix::pty::grantpt(&fd)?;
        rustix::pty::unlockpt(&fd)?;
        let name = rustix::pty::ptsname(&fd, Vec::new())?;
        let name = PathBuf::from(name.to_string_lossy().into_owned());
        // Held open, so that reads do not fail while nobody else has it open; raw, as a wire is.
        let other = rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY, rustix::fs::Mode::empty())?;
        let mut settings = rustix::termios::tcgetattr(&other)?;
        settings.make_raw();
        rustix::termios::tcsetattr(&other, OptionalActions::Now, &settings)?;
        let file = File::from(fd);
        let input = PtyInput { file: file.try_clone()?, _other: other };
        let (output, input) = (Box::new(file), Some(Box::new(input) as Box<dyn Read + Send>));
        Ok(Self { output, input, terminal: None, raw: None, name: Some(name) })
    }
}

struct PtyInput {
    file: File,
    _other: OwnedFd,
}

impl Read for PtyInput {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

/// Reads events from an endpoint's input until it ends, and hands each to `event`.
pub(crate) fn read_events(
    mut input: Box<dyn Read + Send>,
    mut terminal: Option<(EscapeKeys, Arc<AtomicBool>)>,
    event: &mut dyn FnMut(InputEvent),
) {
    let mut buffer = [0; 4096];
    loop {
        let count = match input.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let Some((keys, timestamps)) = &mut terminal else {
            event(InputEvent::Bytes(buffer[..count].to_vec()));
            continue;
        };
        for found in keys.split(&buffer[..count]) {
            match found {
                InputEvent::Help => eprint!("\n{ESCAPE_HELP}"),
                InputEvent::ToggleTimestamps => {
                    timestamps.fetch_xor(true, Ordering::Relaxed);
                }
                other => event(other),
            }
        }
    }
}
