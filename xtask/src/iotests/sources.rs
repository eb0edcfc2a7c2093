//! The tests' source: Debian's source package of the installed qemu-utils, got by apt into the user's cache folder.

use crate::debian_disk::cache;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What of the source package is unpacked: the tests, and the Python modules that they import.
const PARTS: &[&str] = &["tests/qemu-iotests", "python", "scripts"];

/// The unpacked tests.
pub(super) struct Suite {
    /// `tests/qemu-iotests` of QEMU's source.
    pub(super) folder: PathBuf,
    /// The source's version.
    pub(super) version: String,
}

/// The tests that belong to the installed tools, from the cache or fetched.
pub(super) fn get() -> Result<Suite> {
    let package = installed_version()?;
    let upstream = upstream(&package).to_owned();
    let base = cache("vireo-iotests")?;
    let tree = base.join(&upstream);
    let folder = tree.join("tests/qemu-iotests");
    let done = tree.join("complete");
    if !done.is_file() {
        let archive = fetch(&base, &package, &upstream)?;
        unpack(&archive, &tree)?;
        fs::write(&done, "").context("marking the tests as complete")?;
    }
    Ok(Suite { folder, version: upstream })
}

/// The version of the installed package qemu-utils, as dpkg has it.
fn installed_version() -> Result<String> {
    let query = ["-W", "-f=${Version}", "qemu-utils"];
    let output = Command::new("dpkg-query").args(query).output().context("starting dpkg-query")?;
    let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !output.status.success() || version.is_empty() {
        bail!("Debian's qemu-utils is not installed: its version says which tests to take");
    }
    Ok(version)
}

/// The upstream part of a Debian version: without epoch and Debian's revision.
fn upstream(version: &str) -> &str {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    version.rsplit_once('-').map_or(version, |(upstream, _)| upstream)
}

/// Gets the upstream archive by apt, through the host's own sources.
fn fetch(base: &Path, package: &str, upstream: &str) -> Result<PathBuf> {
    eprintln!("getting the source of QEMU {upstream}");
    let apt = base.join("apt");
    for folder in ["parts", "lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(apt.join(folder)).with_context(|| format!("making {}", apt.display()))?;
    }
    source_entries(&apt.join("parts"))?;
    let options: Vec<String> = [
        "Dir::Etc::SourceList=/dev/null".to_owned(),
        format!("Dir::Etc::SourceParts={}", apt.join("parts").display()),
        format!("Dir::State::Lists={}", apt.join("lists").display()),
        format!("Dir::Cache={}", apt.join("cache").display()),
    ]
    .into_iter()
    .flat_map(|option| ["-o".to_owned(), option])
    .collect();
    let log = fs::File::create(base.join("apt.log")).context("making a log")?;
    let run = |arguments: &[&str]| -> Result<()> {
        // What it leaves is looked at below: it fails where the description of a version that has been replaced is
        // gone from the mirror, although the upstream archive is still there.
        let (out, err) = (log.try_clone()?, log.try_clone()?);
        let mut apt_get = Command::new("apt-get");
        apt_get.current_dir(base).args(&options).args(arguments).stdout(out).stderr(err);
        apt_get.status().context("starting apt-get")?;
        Ok(())
    };
    run(&["update"])?;
    run(&["source", "--download-only", &format!("qemu={package}")])?;
    let archive = base.join(format!("qemu_{upstream}.orig.tar.xz"));
    if !archive.is_file() {
        bail!("apt does not have the source of qemu {package}: see {}/apt.log", base.display());
    }
    Ok(archive)
}

/// Writes the host's package sources, with `deb` made `deb-src`, to `parts`.
fn source_entries(parts: &Path) -> Result<()> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let folder = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    files.extend(folder.map(|entry| entry.path()));
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let (Some(name), Some(kind)) = (file.file_name(), file.extension()) else { continue };
        let text: String = match kind.to_str() {
            Some("list") => text
                .lines()
                .filter_map(|line| line.trim().strip_prefix("deb "))
                .map(|rest| format!("deb-src {rest}\n"))
                .collect(),
            Some("sources") => text
                .lines()
                .map(|line| {
                    if line.starts_with("Types:") {
                        "Types: deb-src\n".to_owned()
                    } else {
                        format!("{line}\n")
                    }
                })
                .collect(),
            _ => continue,
        };
        fs::write(parts.join(name), text).with_context(|| format!("writing to {}", parts.display()))?;
    }
    Ok(())
}

/// Unpacks what the tests need of the archive.
fn unpack(archive: &Path, tree: &Path) -> Result<()> {
    if tree.is_dir() {
        fs::remove_dir_all(tree).context("removing incomplete tests")?;
    }
    fs::create_dir_all(tree).with_context(|| format!("making {}", tree.display()))?;
    let mut tar = Command::new("tar");
    tar.arg("xJf").arg(archive).arg("-C").arg(tree).args(["--strip-components=1", "--wildcards"]);
    tar.args(PARTS.iter().map(|part| format!("*/{part}/*")));
    crate::debian_disk::run(&mut tar)
}

#[cfg(test)]
mod tests {
    use super::upstream;

    #[test]
    fn upstream_versions() {
        assert_eq!(upstream("1:10.0.2+ds-2+deb13u1~bpo12+1"), "10.0.2+ds");
        assert_eq!(upstream("7.2"), "7.2");
    }
}
