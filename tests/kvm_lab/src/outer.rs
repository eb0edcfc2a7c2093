//! The machine that the lab is: QEMU with SVM in its TCG, or this project's own program with it in the translator.

use crate::contents::INIT;
use crate::{Lab, LabError, find_program};
use std::ffi::OsString;
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

/// What the lab's machine is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Outer {
    /// QEMU, as it is installed.
    #[default]
    Qemu,
    /// The program `vireo` at that path.
    Vireo(PathBuf),
}

impl Outer {
    /// The program.
    pub(crate) fn program(&self) -> Result<PathBuf, LabError> {
        match self {
            Self::Qemu => find_program(QEMU).ok_or(LabError::NoQemu(QEMU)),
            Self::Vireo(path) => Ok(path.clone()),
        }
    }

    /// Its arguments: the console is on standard input and output, the status goes to the file `status`.
    fn arguments(&self, lab: &Lab, boot: &Boot<'_>, status: &Path) -> Vec<OsString> {
        let interactive = if lab.interactive { " kvm_lab.interactive" } else { "" };
        let seconds = lab.limit.as_secs();
        let append =
            format!("console=ttyS0 quiet panic=-1 rdinit={INIT} kvm_lab.limit={seconds}{interactive}");
        let status = status.to_string_lossy();
        let memory = format!("{}M", lab.memory);
        let cpus = lab.cpus.to_string();
        let words: Vec<String> = match self {
            Self::Qemu => {
                // A comma in an option's value is written twice.
                let status = format!("file,id=status,path={}", status.replace(',', ",,"));
                ["-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max,+svm,-la57"]
                    .into_iter()
                    .chain(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
                    .chain(["-m", &memory, "-smp", &cpus])
                    .chain(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
                    .chain(["-chardev", &status, "-serial", "chardev:status", "-append", &append])
                    .map(str::to_owned)
                    .collect()
            }
            Self::Vireo(_) => {
                let status = format!("file={status}");
                ["run", "--accel", "dbt", "--no-reboot", "--memory", &memory, "--smp", &cpus]
                    .into_iter()
                    .chain(["--serial", "stdio", "--serial", &status, "--append", &append])
                    .map(str::to_owned)
                    .collect()
            }
        };
        let dashes = if *self == Self::Qemu { "-" } else { "--" };
        let files = [("kernel", boot.kernel), ("initrd", boot.initrd)];
        let files =
            files.into_iter().flat_map(|(name, path)| [format!("{dashes}{name}").into(), path.into()]);
        words.into_iter().map(OsString::from).chain(files).collect()
    }
}

/// What the machine boots.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Boot<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: &'a Path,
}

/// Kills the machine if the lab is left early.
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
    program: &Path,
    boot: &Boot<'_>,
    output: &mut dyn FnMut(&[u8]),
) -> Result<i32, LabError> {
    let status_file = tempfile::NamedTempFile::with_prefix("kvm-lab-status-")
        .map_err(LabError::file("making a temporary file in", &std::env::temp_dir()))?;
    let mut command = Command::new(program);
    command.args(lab.outer.arguments(lab, boot, status_file.path()));
    command.stdin(if lab.interactive { Stdio::inherit() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::inherit());
    let child = command.spawn().map_err(|source| LabError::Start { path: program.to_owned(), source })?;
    let mut machine = Machine(child);
    let tail = follow(&mut machine.0, lab.limit, output)?;
    let ended = machine.0.wait().map_err(|source| LabError::Start { path: program.to_owned(), source })?;
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
