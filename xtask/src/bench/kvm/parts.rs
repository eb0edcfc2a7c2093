//! What the guests are made of.

use anyhow::{Context, Result, bail};
use boot::Payload;
use image_store::cpio::Archive;
use image_store::{DebianImageName, NoProgress, Store};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The most that the unpacked kernel may have.
const KERNEL_LIMIT: u64 = 1 << 30;

/// A folder with everything that guests boot.
pub(super) struct Parts {
    pub(super) folder: PathBuf,
}

impl Parts {
    /// A folder that is prepared already.
    pub(super) fn at(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Debian's kernel as it is distributed.
    pub(super) fn bzimage(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// The same unpacked, an ELF file.
    pub(super) fn vmlinux(&self) -> PathBuf {
        self.folder.join("vmlinux")
    }

    /// An initramfs with nothing but an init that says that it runs.
    pub(super) fn initrd(&self) -> PathBuf {
        self.folder.join("initrd")
    }

    /// An initramfs with drivers that reads its disk.
    pub(super) fn disk_initrd(&self) -> PathBuf {
        self.folder.join("disk-initrd")
    }

    /// A guest that does nothing but leave to its monitor.
    pub(super) fn exits(&self) -> PathBuf {
        self.folder.join("exits")
    }

    /// Builds all into `folder`, and our program if `build` says so.
    pub(super) fn prepare(root: &Path, folder: &Path, build: bool) -> Result<Self> {
        let parts = Self::at(folder);
        if build {
            crate::build_vireo(root)?;
        }
        let program = folder.join("init");
        let sources = root.join("xtask/guest");
        command(
            Command::new("gcc")
                .args(["-O2", "-static", "-Wall", "-pthread", "-o"])
                .arg(&program)
                .arg(sources.join("kvm.c")),
        )?;
        command(
            Command::new("gcc")
                .args([
                    "-m32",
                    "-nostdlib",
                    "-static",
                    "-no-pie",
                    "-Wl,--build-id=none,--no-warn-rwx-segments",
                ])
                .arg("-Wl,-N,-e,start,-Ttext=0x100000,--section-start=.note.Xen=0x102000")
                .arg("-o")
                .arg(parts.exits())
                .arg(sources.join("exits.S")),
        )?;
        let program = fs::read(&program).context("reading the guest's program")?;
        let mut archive = Archive::new();
        archive.folder("dev", 0o755);
        archive.character_device("dev/console", 0o600, 5, 1);
        archive.file("init", 0o755, &program);
        fs::write(parts.initrd(), archive.finish())?;

        let store = Store::open(Store::default_path()?)?;
        let image =
            store.debian(DebianImageName::default(), None, &NoProgress).context("getting Debian's kernel")?;
        let kernel = fs::read(&image.kernel).context("reading Debian's kernel")?;
        fs::write(parts.bzimage(), &kernel)?;
        fs::write(parts.vmlinux(), Payload::find(&kernel)?.unpack(KERNEL_LIMIT)?)?;
        let mut initrd = fs::read(&image.initrd).context("reading Debian's initramfs")?;
        let mut archive = Archive::new();
        archive.file("bin/bench", 0o755, &program);
        archive.file("etc/rc.local", 0o755, b"#!/bin/sh\nexec bench disk >/dev/console\n");
        initrd.extend(archive.finish());
        fs::write(parts.disk_initrd(), initrd)?;
        Ok(parts)
    }
}

fn command(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{:?} failed: {status}", command.get_program());
    }
    Ok(())
}
