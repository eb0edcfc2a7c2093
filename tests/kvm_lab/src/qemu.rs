//! QEMU as the lab's machine.

use crate::contents::INIT;
use crate::{Lab, LabError, find_program};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
/// How much of the console's end an error quotes, in lines.
const TAIL: usize = 30;
/// What the lab may take beyond its limit, to boot and to notice by itself that its time is over.
const GRACE: Duration = Duration::from_secs(30);

pub(crate) fn find() -> Result<PathBuf, LabError> {
    find_program(QEMU).ok_or(LabError::NoQemu(QEMU))
}

/// Kills QEMU if the lab is left early.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the machine to its end.
pub(crate) fn run(
    lab: &Lab,
    qemu: &Path,
    kernel: &Path,
    initrd: &Path,
    output: &mut dyn FnMut(&[u8]),
) -> Result<i32, LabError> {
    let status_file = tempfile::NamedTempFile::with_prefix("kvm-lab-status-")
        .map_err(LabError::file("making a temporary file in", &std::env::temp_dir()))?;
    let mut command = Command::new(qemu);
    command.args(["-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max,+svm,-la57"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.arg("-m").arg(format!("{}M", lab.memory)).arg("-smp").arg(lab.cpus.to_string());
    command.args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]);
    // A comma in an option's value is written twice.
    let status_path = status_file.path().to_string_lossy().replace(',', ",,");
    command.arg("-chardev").arg(format!("file,id=status,path={status_path}"));
    command.args(["-serial", "chardev:status"]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    let interactive = if lab.interactive { " kvm_lab.interactive" } else { "" };
    command.arg("-append").arg(format!(
        "console=ttyS0 quiet panic=-1 rdinit={INIT} kvm_lab.limit={}{interactive}",
        lab.limit.as_secs()
    ));
    command.stdin(if lab.interactive { Stdio::inherit() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::inherit());
    let child = command.spawn().map_err(|source| LabError::Start { path: qemu.to_owned(), source })?;
    let mut machine = Machine(child);
    let tail = follow(&mut machine.0, lab.limit, output)?;
    let ended = machine.0.wait().map_err(|source| LabError::Start { path: qemu.to_owned(), source })?;
    let report =
        std::fs::read_to_string(status_file.path()).map_err(LabError::file("reading", status_file.path()))?;
    if report.trim() == "timeout" {
        return Err(LabError::TimeLimit { seconds: lab.limit.as_secs(), tail: last_lines(&tail) });
    }
    let status = report.trim().strip_prefix("exit ").and_then(|number| number.parse().ok());
    status.ok_or_else(|| LabError::Died { status: ended.to_string(), tail: last_lines(&tail) })
}

/// Hands on what the machine prints until its end; returns the end of it.
fn follow(child: &mut Child, limit: Duration, output: &mut dyn FnMut(&[u8])) -> Result<Vec<u8>, LabError> {
    let Some(mut console) = child.stdout.take() else { return Ok(Vec::new()) };
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = console.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    let end = Instant::now() + limit + GRACE;
    let mut tail = Vec::new();
    loop {
        match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(bytes) => {
                output(&bytes);
                tail.extend_from_slice(&bytes);
                if tail.len() > 1 << 16 {
                    tail.drain(..tail.len() - (1 << 14));
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(tail),
            Err(RecvTimeoutError::Timeout) => {
                return Err(LabError::TimeLimit { seconds: limit.as_secs(), tail: last_lines(&tail) });
            }
        }
    }
}

fn last_lines(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}
