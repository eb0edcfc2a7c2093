//! The KVM lab: runs a program where `/dev/kvm` is real, on hosts that have none.
//!
//! QEMU's TCG, or this project's own translator, emulates an AMD processor with SVM; Debian's stock kernel runs on it
//! and loads `kvm-amd`. The program is copied into the kernel's initramfs with the libraries and files that it needs;
//! what it prints comes out, and its exit status comes back.

mod contents;
mod error;
mod outer;

pub use error::LabError;
pub use outer::Outer;

use image_store::{DebianImageName, NoProgress, Progress, Store};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The environment variable that programs within the lab find set to `1`.
pub const INSIDE_VARIABLE: &str = "VIREO_KVM_LAB";

/// Where the lab has the image store's images.
const IMAGES: &str = "/lab/images";

/// Whether this process runs within the lab.
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE_VARIABLE).is_some_and(|value| value == "1")
}

/// A lab to be booted for one command.
#[derive(Debug, Clone)]
pub struct Lab {
    memory: u32,
    cpus: u32,
    limit: Duration,
    interactive: bool,
    outer: Outer,
    files: Vec<(PathBuf, PathBuf)>,
    images: Vec<DebianImageName>,
    environment: Vec<(String, String)>,
    command: Vec<String>,
}

impl Lab {
    /// A lab with 3 GiB of memory and one processor that runs `command`, a program of the lab and its
    /// arguments, for at most five minutes.
    pub fn new<S: Into<String>>(command: impl IntoIterator<Item = S>) -> Self {
        Self {
            memory: 3072,
            cpus: 1,
            limit: Duration::from_secs(300),
            interactive: false,
            outer: Outer::default(),
            files: Vec::new(),
            images: Vec::new(),
            environment: Vec::new(),
            command: command.into_iter().map(Into::into).collect(),
        }
    }

    /// Gives the lab `mib` MiB of memory; everything that is copied in takes its room there too.
    #[must_use]
    pub fn memory(mut self, mib: u32) -> Self {
        self.memory = mib;
        self
    }

    /// Gives the lab `cpus` processors.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Ends the lab with an error after this time.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Connects the lab's console to this process's standard input, a terminal.
    #[must_use]
    pub fn interactive(mut self, on: bool) -> Self {
        self.interactive = on;
        self
    }

    /// Says what the lab's machine is.
    #[must_use]
    pub fn outer(mut self, outer: Outer) -> Self {
        self.outer = outer;
        self
    }

    /// Copies a file or a folder of the host into the lab; the shared libraries of a program come along.
    #[must_use]
    pub fn file(mut self, host: impl Into<PathBuf>, lab: impl Into<PathBuf>) -> Self {
        self.files.push((host.into(), lab.into()));
        self
    }

    /// Copies an image of the image store into the lab's; fetches it if need be.
    #[must_use]
    pub fn image(mut self, name: DebianImageName) -> Self {
        self.images.push(name);
        self
    }

    /// Sets a variable of the command's environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Boots the lab, runs the command, hands what the console shows to `output` as it comes, and returns the
    /// command's exit status.
    ///
    /// # Errors
    /// [`LabError`] if the machine's program is missing, a file cannot be copied in, the kernel cannot be had, or the lab ends
    /// without a status.
    pub fn run(&self, output: &mut dyn FnMut(&[u8])) -> Result<i32, LabError> {
        self.run_with(output, &NoProgress)
    }

    /// As [`Self::run`], with `progress` told of what is fetched.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_with(&self, output: &mut dyn FnMut(&[u8]), progress: &dyn Progress) -> Result<i32, LabError> {
        if self.command.is_empty() {
            return Err(LabError::NoCommand);
        }
        let program = self.outer.program()?;
        let store = Store::open(Store::default_path()?)?;
        let name = DebianImageName::default();
        let image = store.debian(name, None, progress)?;
        let modules = store.hypervisor_modules(name, None, progress)?;
        let own = contents::archive(self, &store, progress)?;
        let mut initrd = tempfile::Builder::new()
            .prefix("kvm-lab-")
            .tempfile()
            .map_err(LabError::file("making a temporary file in", &std::env::temp_dir()))?;
        let path = initrd.path().to_owned();
        for part in [&image.initrd, &modules] {
            let mut part_file = std::fs::File::open(part).map_err(LabError::file("reading", part))?;
            std::io::copy(&mut part_file, &mut initrd).map_err(LabError::file("writing", &path))?;
        }
        std::io::Write::write_all(&mut initrd, &own).map_err(LabError::file("writing", &path))?;
        drop(own);
        let boot = outer::Boot { kernel: &image.kernel, initrd: &path };
        outer::run(self, &program, &boot, output)
    }

    /// Runs the lab and collects what its console shows.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn output(&self) -> Result<(i32, String), LabError> {
        let mut text = Vec::new();
        let status = self.run(&mut |bytes| text.extend_from_slice(bytes))?;
        Ok((status, String::from_utf8_lossy(&text).into_owned()))
    }
}

/// The file named `program` in the folders of `PATH` and those of system programs.
pub fn find_program(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder: PathBuf| folder.join(program))
        .find(|file: &PathBuf| Path::is_file(file))
}
