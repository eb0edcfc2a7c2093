//! What a workload runs on: our program, the peer, or the host itself.

use super::Options;
use super::guest::Guest;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The longest that one run may take.
const TIME_LIMIT: Duration = Duration::from_secs(300);

/// A thing that runs the guest program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Target {
    Native,
    Tcg,
    Vireo,
}

impl Target {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Tcg => "QEMU TCG",
            Self::Vireo => "vireo",
        }
    }

    /// The command that runs `guest`'s program to its end.
    fn command(self, root: &Path, guest: &Guest, options: &Options) -> Command {
        let append = format!("console=ttyS0 quiet panic=-1 {}", guest.append);
        match self {
            Self::Native => {
                let mut command = Command::new(&guest.program);
                command.args(&options.workloads);
                command
            }
            Self::Tcg => {
                let mut command = Command::new("qemu-system-x86_64");
                command.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-m", "512M", "-nographic"]);
                command.args(["-no-reboot", "-nic", "none", "-cpu", &options.qemu_cpu]);
                command.arg("-smp").arg(options.smp.to_string());
                command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initrd);
                command.arg("-append").arg(append);
                command
            }
            Self::Vireo => {
                let mut command = Command::new(crate::vireo(root));
                command.args(["run", "--accel", "dbt", "-m", "512M", "--no-reboot", "--serial", "stdio"]);
                command.args(options.vireo_args.split_whitespace());
                command.arg("--smp").arg(options.smp.to_string());
                command.arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(&guest.initrd);
                command.arg("--append").arg(append);
                command
            }
        }
    }

    /// Runs `guest`'s program; gives each line of output with the time at which it came.
    pub(super) fn run(self, root: &Path, guest: &Guest, options: &Options) -> Result<Run> {
        let mut command = self.command(root, guest, options);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let start = Instant::now();
        let mut child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
        let lines = read_lines(&mut child, start, TIME_LIMIT, &mut |_| {})?;
        let total = start.elapsed();
        let status = child.wait()?;
        if !lines.iter().any(|(_, line)| line.starts_with("bench-end")) {
            let last: Vec<_> = lines.iter().rev().take(5).rev().map(|(_, line)| line.as_str()).collect();
            bail!(
                "{} ended ({status}) before the guest's program did; its last lines: {last:#?}",
                self.name()
            );
        }
        Ok(Run { lines, total })
    }
}

/// What one run printed.
pub(super) struct Run {
    lines: Vec<(Duration, String)>,
    /// From exec to exit.
    pub(super) total: Duration,
}

impl Run {
    /// What was printed, each line with the time since exec; and the time from exec to exit.
    pub(super) fn new(lines: Vec<(Duration, String)>, total: Duration) -> Self {
        Self { lines, total }
    }

    /// The lines that were printed.
    pub(super) fn lines(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.lines.iter().map(|(_, line)| line.as_str())
    }

    /// When the guest's first program began.
    pub(super) fn init_reached(&self) -> Option<Duration> {
        self.lines.iter().find(|(_, line)| line.contains("bench-init")).map(|(time, _)| *time)
    }

    /// Name and nanoseconds of each workload.
    pub(super) fn workloads(&self) -> impl Iterator<Item = (&str, f64)> {
        self.lines.iter().filter_map(|(_, line)| {
            let mut words = line.strip_prefix("bench ")?.split_whitespace();
            Some((words.next()?, words.next()?.parse().ok()?))
        })
    }
}

/// Everything that `child` prints until it closes its output, with the time since `start`; `told` has each line at
/// once. Kills the child at `limit`.
pub(crate) fn read_lines(
    child: &mut Child,
    start: Instant,
    limit: Duration,
    told: &mut dyn FnMut(&str),
) -> Result<Vec<(Duration, String)>> {
    let output = child.stdout.take().context("the child's output is not piped")?;
    let errors = child.stderr.take().context("the child's errors are not piped")?;
    let (sender, receiver) = mpsc::channel();
    let error_sender = sender.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send((start.elapsed(), line)).is_err() {
                return;
            }
        }
    });
    std::thread::spawn(move || {
        for line in BufReader::new(errors).lines().map_while(Result::ok) {
            let _ = error_sender.send((start.elapsed(), line));
        }
    });
    let mut lines = Vec::new();
    loop {
        match receiver.recv_timeout(limit.saturating_sub(start.elapsed())) {
            Ok(line) => {
                told(&line.1);
                lines.push(line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(lines),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let _ = child.kill();
                bail!("no end after {} s; the last line was {:?}", limit.as_secs(), lines.last());
            }
        }
    }
}
