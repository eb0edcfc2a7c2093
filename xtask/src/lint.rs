//! The rules of the house that no compiler checks.

use crate::Outcome;
use anyhow::{Context, bail};
use cargo_metadata::{DependencyKind, MetadataCommand, Package};
use std::fs;
use std::path::{Path, PathBuf};

/// The layers, top first: a crate may depend on crates of its own layer and of those below it.
const LAYERS: &[&str] =
    &["cli", "web", "mgmt", "vmm", "devices", "block", "net", "user", "cpu", "vm", "support"];

/// Layers whose crates know nothing of how guest code is executed, although `cpu` is below them.
const BLIND_TO_CPU: &[&str] = &["devices", "block", "net"];

/// Folders outside the layers: they may use anything, and nothing may use them.
const OUTSIDE: &[&str] = &["xtask", "tests"];

/// The only crates that may allow unsafe code, each for the reason it states.
const UNSAFE_CRATES: &[&str] = &[
    "accel_dbt",     // owns the processor blocks that vCPU threads and the translator share
    "accel_kvm",     // memory slots, the page shared with the kernel, signals
    "dbt_code",      // executable memory
    "guest_memory",  // guest memory as raw pointers
    "io_loop",       // the ring shared with the kernel, and memory that it reads and writes
    "native_oracle", // runs instructions on the host's processor, for tests
    "virtio_blk",    // guest memory as what the kernel reads and writes
    "x86_core",      // guest memory through the soft TLB's pointers
    "x86_fpu",       // native stubs
    "x86_interp",    // string instructions on host spans
    "x86_translate", // generated code
];

/// The longest a source file may be. Tables and tests that are longer say why in `LONG_FILES`.
const MAX_LINES: usize = 1000;

/// Longer files, with the reason.
const LONG_FILES: &[(&str, &str)] = &[];

/// Checks everything and lists what is wrong.
pub(crate) fn run(root: &Path) -> Outcome {
    let mut complaints = Vec::new();
    layering(root, &mut complaints)?;
    for file in rust_files(root)? {
        check_file(root, &file, &mut complaints)?;
    }
    for layer in LAYERS {
        let folder = root.join(layer);
        if folder.is_dir() && !folder.join("README.md").is_file() {
            complaints.push(format!("{layer}/ has no README.md with its rule"));
        }
    }
    if complaints.is_empty() {
        println!("lint: the rules of the house are kept");
        return Ok(());
    }
    for complaint in &complaints {
        eprintln!("lint: {complaint}");
    }
    bail!("{} breaches of the rules of the house", complaints.len())
}

/// The first folder of a package's path: its layer.
fn layer_of(root: &Path, package: &Package) -> Option<String> {
    let manifest = package.manifest_path.as_std_path();
    let folder = manifest.strip_prefix(root).ok()?.components().next()?;
    Some(folder.as_os_str().to_string_lossy().into_owned())
}

/// What is wrong with a dependency of a crate in layer `from` on one in layer `to`, if anything.
fn breach(from: &str, to: &str) -> Option<&'static str> {
    if OUTSIDE.contains(&from) {
        return None;
    }
    if OUTSIDE.contains(&to) {
        return Some("nothing may depend on it");
    }
    let place = |layer| LAYERS.iter().position(|known| *known == layer);
    match (place(from), place(to)) {
        (None, _) | (_, None) => Some("one of them is in no known layer"),
        (Some(from), Some(to)) if to < from => Some("arrows point down only"),
        _ if BLIND_TO_CPU.contains(&from) && to == "cpu" => Some("it must know nothing of an accelerator"),
        _ => None,
    }
}

fn layering(root: &Path, complaints: &mut Vec<String>) -> Outcome {
    let metadata = MetadataCommand::new()
        .manifest_path(root.join("Cargo.toml"))
        .no_deps()
        .exec()
        .context("cargo metadata")?;
    // README's first command is plain `cargo run`.
    let programs = metadata.workspace_default_packages().into_iter().flat_map(|package| &package.targets);
    let programs: Vec<_> = programs.filter(|target| target.is_bin()).map(|target| &target.name).collect();
    if programs != ["vireo"] {
        complaints
            .push(format!("Cargo.toml: `cargo run` is to run vireo, and would run one of {programs:?}"));
    }
    for package in &metadata.packages {
        let Some(from) = layer_of(root, package) else { continue };
        for dependency in &package.dependencies {
            if dependency.path.is_none() || dependency.kind == DependencyKind::Development {
                continue;
            }
            let Some(target) = metadata.packages.iter().find(|other| *other.name == dependency.name) else {
                continue;
            };
            let Some(to) = layer_of(root, target) else { continue };
            if let Some(why) = breach(&from, &to) {
                complaints.push(format!("{from}/{} uses {to}/{}: {why}", package.name, target.name));
            }
        }
    }
    Ok(())
}

fn rust_files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> = LAYERS.iter().chain(OUTSIDE).map(|layer| root.join(layer)).collect();
    while let Some(folder) = folders.pop() {
        if !folder.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() && !path.ends_with("target") && !path.ends_with("node_modules") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

fn check_file(root: &Path, file: &Path, complaints: &mut Vec<String>) -> Outcome {
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let name = file.strip_prefix(root).unwrap_or(file).to_string_lossy().into_owned();
    let lines = text.lines().count();
    if lines > MAX_LINES && !LONG_FILES.iter().any(|(long, _)| *long == name) {
        complaints.push(format!("{name} has {lines} lines; more than {MAX_LINES} need a reason"));
    }
    let allows_unsafe = text.lines().any(|line| {
        let line = line.trim_start();
        line.starts_with("#![allow(unsafe_code") || line.starts_with("#[allow(unsafe_code")
    });
    let package = name.split('/').nth(1).unwrap_or_default();
    if allows_unsafe && !UNSAFE_CRATES.contains(&package) {
        complaints.push(format!("{name} allows unsafe code, and {package} is not a crate that may"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::breach;

    #[test]
    fn arrows_point_down() {
        assert_eq!(breach("cli", "vmm"), None);
        assert_eq!(breach("vm", "vm"), None);
        assert!(breach("vm", "vmm").is_some());
        assert!(breach("devices", "cpu").is_some());
        assert!(breach("vmm", "xtask").is_some());
        assert!(breach("somewhere", "vm").is_some());
        assert_eq!(breach("tests", "cli"), None);
    }
}
