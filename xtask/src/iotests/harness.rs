//! One run of QEMU's test harness with a set of tools.

use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Words of tests that start a whole emulator, an NBD server or a daemon.
const NEEDS_MORE: &[&str] = &[
    "_launch_qemu",
    "$QEMU ",
    "$QEMU\"",
    "run_qemu",
    "iotests.VM",
    "QMPTestCase",
    "common.qemu",
    "QEMU_NBD",
    "qemu_nbd",
    "nbd_server",
    "QSD",
    "StorageDaemon",
    "common.nbd",
    "QEMU_PROG",
    "hmp_qemu_io",
    "_send_qemu_cmd",
    "device_info",
];

/// How a test ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The output was the expected one.
    Passed,
    /// It does not run for this format, or lacks something of the host.
    Skipped,
    /// It was not; what differed.
    Failed(String),
    /// The harness said nothing of it.
    Absent,
}

impl Verdict {
    /// A word for a table.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Passed => "pass",
            Self::Skipped => "skip",
            Self::Failed(_) => "FAIL",
            Self::Absent => "-",
        }
    }
}

/// The programs that tests call, by the variable that names each.
pub(super) type Tools = Vec<(&'static str, PathBuf)>;

/// Where the harness is, and what it tests.
pub(super) struct Harness {
    folder: PathBuf,
    format: String,
    jobs: u32,
    scratch: tempfile::TempDir,
}

impl Harness {
    /// The harness in `folder`, for images of `format`.
    pub(super) fn new(folder: PathBuf, format: &str, jobs: u32) -> Result<Self> {
        // Some tests refuse to run where the folder's name has a dot.
        let scratch = tempfile::Builder::new().prefix("vireo_iotests_").tempdir();
        let scratch = scratch.context("making a scratch folder")?;
        Ok(Self { folder, format: format.to_owned(), jobs, scratch })
    }

    /// A folder that is gone afterwards.
    pub(super) fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    fn check(&self, tools: &Tools) -> Result<Command> {
        let mut check = Command::new("python3");
        check.current_dir(&self.folder).arg("check").arg(format!("-{}", self.format)).stdin(Stdio::null());
        for (variable, program) in tools {
            check.env(variable, program);
        }
        for (variable, name) in [("TEST_DIR", "images"), ("SOCK_DIR", "sockets")] {
            let folder = self.scratch.path().join(name);
            fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
            check.env(variable, folder);
        }
        Ok(check)
    }

    /// The names of the tests in the group `quick` that call the image tools alone. (Those that do not know the
    /// format are skipped by themselves.)
    pub(super) fn quick_with_image_tools(&self) -> Result<Vec<String>> {
        let mut check = self.check(&real_tools()?)?;
        let output = check.args(["-n", "-g", "quick"]).output().context("starting the harness")?;
        if !output.status.success() {
            bail!("the harness failed: {}", String::from_utf8_lossy(&output.stderr));
        }
        let names = String::from_utf8_lossy(&output.stdout);
        let alone = |name: &&str| {
            let text = [self.folder.join(name), self.folder.join("tests").join(name)]
                .iter()
                .find_map(|path| fs::read_to_string(path).ok())
                .unwrap_or_default();
            !NEEDS_MORE.iter().any(|word| text.contains(word))
        };
        Ok(names.split_whitespace().filter(alone).map(str::to_owned).collect())
    }

    /// Runs `tests` with `tools`.
    pub(super) fn run(&self, tools: &Tools, tests: &[String]) -> Result<BTreeMap<String, Verdict>> {
        let mut check = self.check(tools)?;
        let output = check
            .args(["-tap", "-j", &self.jobs.to_string()])
            .args(tests)
            .output()
            .context("starting the harness, which needs python3")?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !text.starts_with("TAP") {
            bail!("the harness failed: {}{text}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(verdicts(&text, &String::from_utf8_lossy(&output.stderr)))
    }
}

/// Reads the harness's report (`ok FORMAT NAME`, `ok FORMAT NAME # SKIP` or `not ok FORMAT NAME`) and the differences
/// between outputs that it printed as errors.
fn verdicts(report: &str, differences: &str) -> BTreeMap<String, Verdict> {
    let mut verdicts = BTreeMap::new();
    for line in report.lines() {
        let (passed, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
            (Some(rest), _) => (true, rest),
            (_, Some(rest)) => (false, rest),
            _ => continue,
        };
        let Some(name) = rest.split_whitespace().nth(1) else { continue };
        let verdict = match passed {
            true if rest.contains("# SKIP") => Verdict::Skipped,
            true => Verdict::Passed,
            false => Verdict::Failed(difference(differences, name)),
        };
        verdicts.insert(name.to_owned(), verdict);
    }
    verdicts
}

/// The unified diff of the test of that name.
fn difference(differences: &str, name: &str) -> String {
    let is_header = |line: &&str| line.starts_with("--- ");
    let is_ours = |line: &&str| is_header(line) && line.contains(&format!("/{name}.out"));
    let mut lines = differences.lines().skip_while(|line| !is_ours(line));
    let mut text = String::new();
    for line in lines
        .by_ref()
        .take(1)
        .collect::<Vec<_>>()
        .into_iter()
        .chain(lines.take_while(|line| !is_header(line)))
    {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// The installed tools.
pub(super) fn real_tools() -> Result<Tools> {
    let found = |name: &str| on_path(name).with_context(|| format!("{name} is not installed"));
    let mut tools = vec![
        ("QEMU_IMG_PROG", found("qemu-img")?),
        ("QEMU_IO_PROG", found("qemu-io")?),
        ("QEMU_NBD_PROG", found("qemu-nbd")?),
    ];
    tools.extend(others(&std::env::temp_dir())?);
    Ok(tools)
}

/// Our program under the tools' names, in `folder`.
pub(super) fn our_tools(vireo: &Path, folder: &Path) -> Result<Tools> {
    let links = folder.join("tools");
    fs::create_dir_all(&links).with_context(|| format!("making {}", links.display()))?;
    let mut tools = Vec::new();
    for (variable, name) in
        [("QEMU_IMG_PROG", "qemu-img"), ("QEMU_IO_PROG", "qemu-io"), ("QEMU_NBD_PROG", "qemu-nbd")]
    {
        let link = links.join(name);
        symlink(vireo, &link).with_context(|| format!("linking {}", link.display()))?;
        tools.push((variable, link));
    }
    tools.extend(others(&links)?);
    Ok(tools)
}

/// The emulator and the storage daemon, which the harness wants to be there: the installed ones, or stubs that say
/// what it asks for at its start.
fn others(folder: &Path) -> Result<Tools> {
    let mut tools = Vec::new();
    for (variable, name) in [("QEMU_PROG", "qemu-system-x86_64"), ("QSD_PROG", "qemu-storage-daemon")] {
        let works = |path: &PathBuf| {
            let status =
                Command::new(path).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            status.is_ok_and(|status| status.success())
        };
        let program = match on_path(name).filter(works) {
            Some(program) => program,
            None => stub(&folder.join(name))?,
        };
        tools.push((variable, program));
    }
    Ok(tools)
}

/// A script that answers what the harness asks an emulator.
fn stub(path: &Path) -> Result<PathBuf> {
    const SCRIPT: &str = "#!/bin/sh\ncase \"$*\" in\n*-machine*help*) echo 'pc (default)' ;;\n\
        *--version*) echo 'stub version 0' ;;\n*help*) ;;\n*) exit 1 ;;\nesac\n";
    fs::write(path, SCRIPT).with_context(|| format!("writing {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).context("making a stub executable")?;
    Ok(path.to_owned())
}

/// A program of that name on the search path.
fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::{Verdict, verdicts};

    #[test]
    fn a_report_is_read() {
        let report = "TAP version 13\n1..3\n# running qcow2 001\nok qcow2 001\n# running qcow2 002\n\
            not ok qcow2 002\n# running qcow2 003\nok qcow2 003 # SKIP\n";
        let errors = "--- /x/001.out\n+++ /y\n-c\n--- /x/002.out\n+++ /y\n-a\n+b\n--- /x/004.out\n";
        let verdicts = verdicts(report, errors);
        assert_eq!(verdicts["001"], Verdict::Passed);
        assert_eq!(verdicts["002"], Verdict::Failed("--- /x/002.out\n+++ /y\n-a\n+b\n".into()));
        assert_eq!(verdicts["003"], Verdict::Skipped);
    }
}
