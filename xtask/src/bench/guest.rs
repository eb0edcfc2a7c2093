//! The guest that is measured: Debian's kernel and one static program as its whole userland.

use super::Options;
use anyhow::{Context, Result, bail};
use image_store::cpio::Archive;
use image_store::{DebianImageName, NoProgress, Store};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Flags that the program is built with. (What needs more asks the processor first.)
const COMPILER_FLAGS: &[&str] = &["-O2", "-static", "-march=x86-64-v2", "-Wall"];
/// The same of 32-bit code: what Debian's i386 is built for, and SSE2 for what asks for it. The kernel's headers are
/// among those of the host.
const COMPILER_FLAGS_32: &[&str] = &[
    "-m32",
    "-O2",
    "-static",
    "-march=i686",
    "-msse2",
    "-Wall",
    "-idirafter",
    "/usr/include/x86_64-linux-gnu",
];

/// A kernel, an initramfs with the program as init, and the program by itself.
pub(super) struct Guest {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) program: PathBuf,
    /// Words for the end of the kernel's command line.
    pub(super) append: String,
    _folder: TempDir,
}

impl Guest {
    /// Builds the program and its initramfs, and gets the kernel and our own program ready. With
    /// `boot_only`, init runs no workload.
    pub(super) fn prepare(root: &Path, options: &Options, boot_only: bool) -> Result<Self> {
        let folder = TempDir::with_prefix("vireo-bench-").context("making a temporary folder")?;
        let program = folder.path().join("bench");
        let sources = root.join("xtask/guest");
        let mut compiler = Command::new("gcc");
        let flags = if options.m32 { COMPILER_FLAGS_32 } else { COMPILER_FLAGS };
        compiler.args(flags).arg("-o").arg(&program);
        for source in ["main.c", "integer.c", "vector.c", "avx.c", "system.c"] {
            compiler.arg(sources.join(source));
        }
        run(compiler.arg("-lm"))?;
        let initrd = folder.path().join("initrd");
        std::fs::write(&initrd, initramfs(&std::fs::read(&program)?, boot_only))?;
        crate::build_vireo(root)?;
        let kernel = match &options.kernel {
            Some(kernel) => kernel.clone(),
            None => debian_kernel()?,
        };
        let append = options.workloads.iter().map(|workload| format!(" {workload}")).collect::<String>();
        let append = if append.is_empty() { append } else { format!("--{append}") };
        Ok(Self { kernel, initrd, program, append, _folder: folder })
    }
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{:?} failed: {status}", command.get_program());
    }
    Ok(())
}

/// An initramfs with `program` as init, and the mark that keeps it from running workloads if `boot_only`.
fn initramfs(program: &[u8], boot_only: bool) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.folder("dev", 0o755);
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.folder("proc", 0o755);
    archive.file("init", 0o755, program);
    if boot_only {
        archive.file("boot-only", 0o644, &[]);
    }
    archive.finish()
}

/// Debian 13's cloud kernel, from the image store.
fn debian_kernel() -> Result<PathBuf> {
    let store = Store::open(Store::default_path()?)?;
    let image =
        store.debian(DebianImageName::default(), None, &NoProgress).context("getting Debian's kernel")?;
    Ok(image.kernel)
}
