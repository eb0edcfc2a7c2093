//! `cargo xtask fuzz`: builds the fuzz targets and runs each for a while.

use crate::Outcome;
use anyhow::{Context, bail};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What must be there: a name, a command that succeeds if it is, and the command that installs it.
const NEEDED: &[(&str, &[&str], &str)] = &[
    (
        "a nightly toolchain",
        &["cargo", "+nightly", "--version"],
        "rustup toolchain install nightly --profile minimal",
    ),
    ("cargo-fuzz", &["cargo", "fuzz", "--version"], "cargo install cargo-fuzz --locked"),
    ("a C++ compiler", &["c++", "--version"], "apt-get install -y g++"),
];

/// Targets that reach unsafe code, which run under the address sanitizer. The others are several times faster
/// without; so is `x86_translate`, whose generated code the sanitizer does not see.
const SANITIZED: &[&str] = &["x86_interp", "x86_system", "virtio_queue", "virtio_blk"];

/// Seconds that one input may take before it is a finding.
const TIMEOUT: u32 = 10;
/// MiB of memory that a target may take before it is a finding.
const MEMORY_LIMIT: u32 = 2048;
/// The longest input that is tried, in bytes.
const MAX_LEN: u32 = 4096;
/// How much of a finding's report is shown.
const REPORT_LINES: usize = 30;

/// Which targets, for how long.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Targets by name, or the beginning of names; all if none is named.
    targets: Vec<String>,
    /// How long each target runs.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Only lists the targets.
    #[arg(long)]
    list: bool,
}

/// One target and how it is built.
struct Target {
    name: String,
    sanitizer: &'static str,
}

/// What came of running a target.
#[derive(Debug, Default, PartialEq, Eq)]
struct Run {
    executions: u64,
    coverage: u64,
    /// The file with the input that was found, if one was.
    finding: Option<PathBuf>,
}

/// Builds and runs what `options` say, and fails if something was found.
pub(crate) fn run(root: &Path, options: &Options) -> Outcome {
    let targets = choose(&fs::read_to_string(root.join("fuzz/Cargo.toml"))?, &options.targets)?;
    if options.list {
        targets.iter().for_each(|target| println!("{}", target.name));
        return Ok(());
    }
    require()?;
    let folder = target_folder(root).join("fuzz");
    for target in &targets {
        build(root, &folder, target)?;
    }
    println!("{:<18} {:>12} {:>9} {:>9}  finding", "target", "executions", "per s", "coverage");
    let mut findings = 0;
    for target in &targets {
        let run = fuzz(&folder, target, options.seconds)?;
        let finding = run.finding.as_ref().map_or("-".into(), |path| path.display().to_string());
        let rate = run.executions / u64::from(options.seconds.max(1));
        println!("{:<18} {:>12} {:>9} {:>9}  {finding}", target.name, run.executions, rate, run.coverage);
        findings += u32::from(run.finding.is_some());
    }
    if findings > 0 {
        bail!("{findings} of {} targets found something", targets.len());
    }
    Ok(())
}

/// The targets of the manifest that begin with one of `wanted`, or all.
fn choose(manifest: &str, wanted: &[String]) -> anyhow::Result<Vec<Target>> {
    let mut lines = manifest.lines();
    let mut names = Vec::new();
    while lines.any(|line| line == "[[bin]]") {
        let name = lines.next().and_then(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
        names.push(name.context("a [[bin]] of fuzz/Cargo.toml does not begin with its name")?);
    }
    if let Some(unknown) = wanted.iter().find(|wanted| !names.iter().any(|name| name.starts_with(*wanted))) {
        bail!("there is no fuzz target {unknown}; there are {}", names.join(", "));
    }
    let is_exact = |name: &str| wanted.iter().any(|wanted| wanted == name);
    let is_wanted = |name: &str| {
        // A name that is all of a target's is not the beginning of another's.
        let begins = |wanted: &String| name.starts_with(wanted) && !names.contains(&wanted.as_str());
        wanted.is_empty() || is_exact(name) || wanted.iter().any(begins)
    };
    let target = |name: &str| {
        let sanitized = SANITIZED.iter().any(|prefix| name.starts_with(prefix));
        Target { name: name.to_owned(), sanitizer: if sanitized { "address" } else { "none" } }
    };
    Ok(names.iter().copied().filter(|name| is_wanted(name)).map(target).collect())
}

/// Says what is missing and how to install it.
fn require() -> Outcome {
    let is_there = |command: &[&str]| {
        let (program, arguments) = command.split_first()?;
        let status =
            Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.ok().filter(|status| status.success())
    };
    let missing: Vec<_> = NEEDED.iter().filter(|(_, command, _)| is_there(command).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(name, _, _)| *name).collect();
    let commands: Vec<_> = missing.iter().map(|(_, _, install)| *install).collect();
    bail!(
        "fuzzing needs {}, which is missing; install with:\n  {}",
        names.join(" and "),
        commands.join(" && ")
    )
}

/// The folder for what is built.
fn target_folder(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |folder| root.join(folder))
}

fn build(root: &Path, folder: &Path, target: &Target) -> Outcome {
    let mut command = Command::new("cargo");
    command.current_dir(root).args(["+nightly", "fuzz", "build", "--fuzz-dir", "fuzz"]);
    // Each sanitizer has a folder of its own: they share nothing that is built.
    command.args(["--sanitizer", target.sanitizer, "--target-dir"]).arg(folder.join(target.sanitizer));
    command.arg(&target.name);
    let status = command.status().context("starting cargo fuzz")?;
    if !status.success() {
        bail!("building the fuzz targets failed: {status}");
    }
    Ok(())
}

/// The program of a target: where cargo put it depends on the host's name for itself.
fn program(folder: &Path, target: &Target) -> anyhow::Result<PathBuf> {
    let built = folder.join(target.sanitizer);
    let entries = fs::read_dir(&built).with_context(|| format!("reading {}", built.display()))?;
    let candidates = entries.flatten().map(|entry| entry.path().join("release").join(&target.name));
    candidates
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("{} was not built", target.name))
}

fn fuzz(folder: &Path, target: &Target, seconds: u32) -> anyhow::Result<Run> {
    let corpus = folder.join("corpus").join(&target.name);
    let artifacts = folder.join("artifacts").join(&target.name);
    for folder in [&corpus, &artifacts] {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let mut child = Command::new(program(folder, target)?)
        // Else glibc takes ever larger blocks from its heap, between what the fuzzer keeps of each input: the heap would
        // grow by as much with every input that is kept.
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={TIMEOUT}"))
        .arg(format!("-rss_limit_mb={MEMORY_LIMIT}"))
        .arg(format!("-max_len={MAX_LEN}"))
        // Inputs may grow at once: sequences of accesses are interesting from a few dozen bytes on.
        .args(["-len_control=1", "-use_value_profile=1", "-print_final_stats=1"])
        .arg(&corpus)
        // What was found before is tried first.
        .arg(&artifacts)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {}", target.name))?;
    let output = BufReader::new(child.stderr.take().context("a pipe from the fuzzer")?);
    let mut lines: Vec<String> = Vec::new();
    let mut run = Run::default();
    for line in output.split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        if !line.starts_with('#') {
            lines.push(line.clone());
        }
        run.note(&line);
    }
    let status = child.wait()?;
    if !status.success() || run.finding.is_some() {
        eprintln!("{}: {status}", target.name);
        let interesting = lines.iter().skip_while(|line| !begins_report(line)).take(REPORT_LINES);
        interesting.for_each(|line| eprintln!("  {line}"));
        if let Some(finding) = &run.finding {
            eprintln!("  again: {} {}", program(folder, target)?.display(), finding.display());
        }
        // A fuzzer that dies without an input to show for it has failed as well.
        run.finding.get_or_insert(artifacts);
    }
    Ok(run)
}

/// Whether `line` is the first of what a finding says of itself.
fn begins_report(line: &str) -> bool {
    line.contains("panicked at") || line.contains("ERROR: ") || line.contains("runtime error")
}

impl Run {
    /// Takes from a line of the fuzzer's output what it tells.
    fn note(&mut self, line: &str) {
        let number = |text: &str| text.split_whitespace().next()?.parse().ok();
        if let Some(rest) = line.strip_prefix('#') {
            self.executions = rest.split_whitespace().next().and_then(number).unwrap_or(self.executions);
            let coverage = line.split_once(" cov: ").and_then(|(_, rest)| number(rest));
            self.coverage = coverage.unwrap_or(self.coverage);
        } else if let Some(rest) = line.strip_prefix("stat::number_of_executed_units:") {
            self.executions = number(rest).unwrap_or(self.executions);
        } else if let Some((_, path)) = line.split_once("Test unit written to ") {
            // A slow input is noted too, and is no finding.
            if !path.contains("/slow-unit-") {
                self.finding = Some(path.trim().into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_chosen_by_name_or_beginning() {
        let manifest =
            "[[bin]]\nname = \"boot_elf\"\n\n[[bin]]\nname = \"boot_any\"\n[[bin]]\nname = \"virtio_blk\"\n";
        let chosen = |wanted: &[&str]| {
            let wanted: Vec<_> = wanted.iter().map(|name| name.to_string()).collect();
            let targets = choose(manifest, &wanted)?;
            anyhow::Ok(
                targets.iter().map(|target| (target.name.clone(), target.sanitizer)).collect::<Vec<_>>(),
            )
        };
        assert_eq!(chosen(&[]).unwrap().len(), 3);
        assert_eq!(chosen(&["boot"]).unwrap().len(), 2);
        assert_eq!(chosen(&["virtio_blk"]).unwrap(), [("virtio_blk".to_owned(), "address")]);
        assert!(chosen(&["nothing"]).unwrap_err().to_string().contains("boot_any"));
    }

    #[test]
    fn the_fuzzer_s_output_is_understood() {
        let mut run = Run::default();
        run.note("INFO: Seed: 1");
        run.note("#2\tINITED cov: 17 ft: 18 corp: 1/1b exec/s: 0 rss: 30Mb");
        run.note("#4096\tpulse  cov: 123 ft: 300 corp: 9/40b lim: 43 exec/s: 2048 rss: 31Mb");
        assert_eq!(run, Run { executions: 4096, coverage: 123, finding: None });
        run.note("stat::number_of_executed_units: 5000");
        run.note("artifact_prefix='/a/'; Test unit written to /a/slow-unit-12");
        assert_eq!(run, Run { executions: 5000, coverage: 123, finding: None });
        run.note("artifact_prefix='/a/'; Test unit written to /a/crash-34");
        assert_eq!(run.finding, Some("/a/crash-34".into()));
    }
}
