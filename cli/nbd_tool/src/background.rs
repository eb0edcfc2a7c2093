//! `--fork`: the server runs in a process of its own, and this one ends when it does so.
//!
//! The process is started anew with the same words, and a mark in its environment. Its standard error is a pipe that
//! this one reads: when the server runs it takes its own standard error back, which it was given as standard input, and
//! the pipe ends.

use crate::Failure;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

/// The mark.
const BEHIND: &str = "VIREO_NBD_BEHIND";

/// Whether this is the process in the background.
pub(crate) fn is_behind() -> bool {
    std::env::var_os(BEHIND).is_some()
}

/// Starts the process in the background, and waits until the server runs or has said why not.
pub(crate) fn start(words: Vec<String>) -> Result<ExitCode, Failure> {
    let failed = |error: std::io::Error| Failure::from(format!("Failed to fork: {error}"));
    let program = std::env::current_exe().map_err(failed)?;
    let own = std::io::stderr().as_fd().try_clone_to_owned().map_err(failed)?;
    let mut command = Command::new(program);
    // Called by its own name, the program is the tool; otherwise the tool is a command of it.
    let called = std::env::args_os().next().unwrap_or_default();
    let is_tool = std::path::Path::new(&called).file_name().is_some_and(|name| name == "qemu-nbd");
    command.arg0(called).env(BEHIND, "1");
    if !is_tool {
        command.arg("nbd");
    }
    let mut child = command
        .args(words)
        .stdin(Stdio::from(own))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut said = false;
    let mut piece = [0; 1024];
    if let Some(mut pipe) = child.stderr.take() {
        loop {
            match pipe.read(&mut piece) {
                Ok(0) => break,
                Ok(got) => {
                    said = true;
                    std::io::stderr().write_all(&piece[..got]).map_err(failed)?;
                }
                Err(error) => return Err(format!("Cannot read from daemon: {error}").into()),
            }
        }
    }
    // It says nothing if all is well. It may end badly without a word, too.
    let ended = child.try_wait().ok().flatten().is_some_and(|status| !status.success());
    Ok(if said || ended { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The server runs: who waits for that is told, and messages go where they should.
pub(crate) fn detach() -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::from(format!("Failed to daemonize: {error}"));
    // It fails only for the leader of a group, which a started process is not.
    let _ = rustix::process::setsid();
    rustix::stdio::dup2_stderr(rustix::stdio::stdin()).map_err(|errno| failed(errno.into()))?;
    let nothing = File::open("/dev/null").map_err(failed)?;
    rustix::stdio::dup2_stdin(&nothing).map_err(|errno| failed(errno.into()))
}
