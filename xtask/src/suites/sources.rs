//! Getting and building a suite's sources, outside the repository.

use super::Bench;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A suite's public repository.
pub(crate) struct Repository {
    /// The folder of its clone.
    pub(crate) name: &'static str,
    /// Its public home.
    pub(crate) url: &'static str,
}

/// Clones `repository`, unless it is there from an earlier run; returns the clone's folder.
pub(crate) fn clone(bench: &Bench<'_>, repository: &Repository) -> Result<PathBuf> {
    clone_to(bench, repository, "source")
}

/// The same to a folder of that name: for a second build.
pub(crate) fn clone_to(bench: &Bench<'_>, repository: &Repository, name: &str) -> Result<PathBuf> {
    let folder = bench.folder(repository.name);
    let clone = folder.join(name);
    if clone.join(".git").is_dir() {
        return Ok(clone);
    }
    let from = match bench.sources {
        Some(sources) => local(sources, repository.name)?,
        None => repository.url.to_owned(),
    };
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let mut git = Command::new("git");
    git.args(["clone", "--quiet"]);
    if bench.sources.is_none() {
        // A clone of a clone takes no time whole.
        git.args(["--depth", "1"]);
    }
    let done = git.arg(&from).arg(&clone).output().context("the sources need git, which does not start")?;
    if !done.status.success() {
        let why = String::from_utf8_lossy(&done.stderr);
        let why = why.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
        bail!("the sources of {} cannot be had from {from}: {why}", repository.name);
    }
    Ok(clone)
}

/// The clone of that name below `sources`, with or without a work tree.
fn local(sources: &Path, name: &str) -> Result<String> {
    let names = [name.to_owned(), format!("{name}.git")];
    let found = names.iter().map(|name| sources.join(name)).find(|path| path.is_dir());
    let found = found.with_context(|| format!("there is no {name} in {}", sources.display()))?;
    let found = found.canonicalize().with_context(|| format!("looking at {}", found.display()))?;
    Ok(found.to_string_lossy().into_owned())
}

/// Runs a build's command in `folder`; its output goes to a file beside it, which an error names.
pub(crate) fn build(folder: &Path, program: &str, arguments: &[&str]) -> Result<()> {
    let log = folder.with_extension(format!("{}.log", program.trim_start_matches("./")));
    let file = fs::File::create(&log).with_context(|| format!("making {}", log.display()))?;
    let errors = file.try_clone().with_context(|| format!("making {}", log.display()))?;
    let status = Command::new(program)
        .current_dir(folder)
        .args(arguments)
        .stdout(file)
        .stderr(errors)
        .status()
        .with_context(|| format!("building needs {program}, which does not start"))?;
    if !status.success() {
        bail!("{program} {} failed in {}: see {}", arguments.join(" "), folder.display(), log.display());
    }
    Ok(())
}
