//! A test's process, which may hang.

use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How often a process is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// With this exit code.
    Code(i32),
    /// By a signal.
    Signal,
    /// It was ended, since `done` found what it waited for.
    Done,
    /// It was ended, since it took too long.
    Timeout,
}

/// Runs `command` with its output in the file `output`, for at most `limit` or until `done` says so. (`done` is
/// asked now and then.)
pub(crate) fn run(
    command: &mut Command,
    output: &Path,
    limit: Duration,
    mut done: impl FnMut() -> bool,
) -> Result<End> {
    let making = || format!("making {}", output.display());
    let file = fs::File::create(output).with_context(making)?;
    let errors = file.try_clone().with_context(making)?;
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(errors)
        .spawn()
        .with_context(|| format!("{program} does not start"))?;
    let begin = Instant::now();
    let end = loop {
        if let Some(status) = child.try_wait().context("waiting for a test")? {
            return Ok(status.code().map_or(End::Signal, End::Code));
        }
        if done() {
            break End::Done;
        }
        if begin.elapsed() >= limit {
            break End::Timeout;
        }
        std::thread::sleep(LOOK);
    };
    child.kill().and_then(|()| child.wait()).context("ending a test")?;
    Ok(end)
}
