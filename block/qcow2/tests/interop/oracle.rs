//! The installed qemu-img and qemu-io, and images that they write.

use async_trait::async_trait;
use qcow2::check::Report;
use qcow2::storage::Storage;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Shapes of images: a name, and qemu-img's options.
pub(crate) const SHAPES: &[(&str, &str)] = &[
    ("plain", ""),
    ("v2", "compat=0.10"),
    ("small-clusters", "cluster_size=512"),
    ("large-clusters", "cluster_size=2M"),
    ("refcount-1", "refcount_bits=1"),
    ("refcount-64", "refcount_bits=64,cluster_size=4k"),
    ("extended", "extended_l2=on"),
    ("zstd", "compression_type=zstd"),
    ("metadata", "preallocation=metadata"),
];

/// What qemu-img check said.
#[derive(Debug)]
pub(crate) struct Theirs {
    pub(crate) failed: bool,
    pub(crate) report: Report,
    pub(crate) lines: Vec<String>,
}

/// The tools, and a folder for images.
pub(crate) struct Oracle {
    folder: tempfile::TempDir,
}

impl Oracle {
    /// The tools, if they are installed; says what is skipped if not.
    pub(crate) fn find(test: &str) -> Option<Self> {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("SKIPPED: {test} needs qemu-img and qemu-io (package qemu-utils)");
            return None;
        }
        Some(Self { folder: tempfile::tempdir().unwrap() })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new image of 64 MiB.
    pub(crate) fn image(&self, name: &str, options: &str) -> PathBuf {
        let path = self.path(&format!("{name}.qcow2"));
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]);
        if !options.is_empty() {
            command.args(["-o", options]);
        }
        run(command.arg(&path).arg("64M"));
        path
    }

    /// Fills an image with data, snapshots, zeros and compressed clusters.
    pub(crate) fn populate(&self, path: &Path) {
        let io = |commands: &[&str]| {
            let mut command = Command::new("qemu-io");
            for one in commands {
                command.args(["-c", one]);
            }
            run(command.args(["-f", "qcow2"]).arg(path));
        };
        io(&["write -P 1 0 1M", "write -P 2 5M 300k", "write -z 8M 1M", "write -c -P 3 10M 512k"]);
        run(Command::new("qemu-img").args(["snapshot", "-c", "one"]).arg(path));
        io(&["write -P 4 64k 128k", "write -P 5 40M 64k", "discard 5M 64k", "write -zu 0 64k"]);
        run(Command::new("qemu-img").args(["snapshot", "-c", "two"]).arg(path));
        io(&["write -P 6 512k 64k"]);
        run(Command::new("qemu-img").args(["bitmap", "--add", "-f", "qcow2"]).arg(path).arg("bitmap"));
        io(&["write -P 7 6M 64k"]);
    }

    /// qemu-img check.
    pub(crate) fn check(&self, path: &Path, repair: Option<&str>) -> Theirs {
        let mut command = Command::new("qemu-img");
        command.args(["check", "-f", "qcow2", "--output=json"]);
        if let Some(repair) = repair {
            command.args(["-r", repair]);
        }
        let output = command.arg(path).output().unwrap();
        let lines = String::from_utf8_lossy(&output.stderr).lines().map(str::to_owned).collect();
        let Ok(json) = serde_json::from_slice::<serde_json::Value>(&output.stdout) else {
            return Theirs { failed: true, report: Report::default(), lines };
        };
        let field = |name: &str| json[name].as_u64().unwrap_or(0);
        let report = Report {
            check_errors: field("check-errors"),
            corruptions: field("corruptions"),
            leaks: field("leaks"),
            corruptions_fixed: field("corruptions-fixed"),
            leaks_fixed: field("leaks-fixed"),
            image_end_offset: field("image-end-offset"),
            total_clusters: field("total-clusters"),
            allocated_clusters: field("allocated-clusters"),
            fragmented_clusters: field("fragmented-clusters"),
            compressed_clusters: field("compressed-clusters"),
        };
        Theirs { failed: false, report, lines }
    }
}

/// Runs a command that must succeed.
pub(crate) fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// A file of the host, read and written at once.
pub(crate) struct HostFile(File);

impl HostFile {
    /// Opens a file for reading and writing.
    pub(crate) fn open(path: &Path) -> Self {
        Self(File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap())
    }
}

#[async_trait(?Send)]
impl Storage for HostFile {
    fn len(&self) -> u64 {
        self.0.metadata().unwrap().len()
    }

    async fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            match self.0.read_at(&mut into[done..], offset + done as u64)? {
                0 => break,
                read => done += read,
            }
        }
        into[done..].fill(0);
        Ok(())
    }

    async fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.0.write_all_at(from, offset)
    }

    async fn write_zeroes(&self, offset: u64, len: u64, allocate: bool) -> io::Result<()> {
        if allocate {
            let zeros = vec![0; 1 << 20];
            for start in (0..len).step_by(zeros.len()) {
                self.0.write_all_at(&zeros[..(len - start).min(1 << 20) as usize], offset + start)?;
            }
            return Ok(());
        }
        self.0.set_len(self.len().max(offset + len))
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    async fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(&self.0, rustix::fs::FallocateFlags::empty(), offset, len)?)
    }

    async fn flush(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}
