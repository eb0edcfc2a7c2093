//! The driver against a plain model in memory, and against qemu-img on what it leaves behind.

mod host;

use block_graph::{NodeRef, OpenFlags, Options, SnapshotInfo, Truncate, WriteFlags, ZeroFlags};
use futures_util::future::join_all;
use io_loop::block_on;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes of the disks.
const SIZE: u64 = 4 << 20;

/// Numbers that look random and are the same each time (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// A range of a disk: of any alignment, or of whole sectors or clusters.
    fn range(&mut self, size: u64) -> (u64, u64) {
        let unit = [1, 512, 4096, 65536][self.below(4) as usize];
        let longest = [4096, 100_000, 700_000][self.below(3) as usize];
        let start = self.below(size) / unit * unit;
        let len = (self.below(longest) / unit * unit).max(unit).min(size - start);
        (start, len)
    }
}

/// qemu-img with arguments, if it is installed.
fn qemu_img(arguments: &[&str]) -> Option<std::process::Output> {
    match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => Some(output),
        Err(_) => {
            eprintln!("SKIPPED: qemu-img is not installed (package qemu-utils)");
            None
        }
    }
}

fn succeed(arguments: &[&str]) {
    let output = qemu_img(arguments).unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&text));
}

/// A disk, and what must be in it.
struct Disk {
    path: PathBuf,
    node: NodeRef,
    model: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    numbers: Numbers,
    /// Clusters of it, in bytes.
    cluster: u64,
    backed: bool,
    version_2: bool,
    data_file: bool,
    encrypted: bool,
    preallocated: bool,
}

/// What is done to a disk.
#[derive(Debug, Clone)]
enum Step {
    Write(u64, Vec<u8>),
    Zero(u64, u64, ZeroFlags),
    Discard(u64, u64),
    Compressed(u64, Vec<u8>),
    Read(u64, u64),
    Flush,
}

impl Step {
    fn touches(&self) -> (u64, u64) {
        match self {
            Self::Write(start, bytes) | Self::Compressed(start, bytes) => (*start, bytes.len() as u64),
            Self::Zero(start, len, _) | Self::Discard(start, len) | Self::Read(start, len) => (*start, *len),
            Self::Flush => (0, 0),
        }
    }

    async fn run(&self, node: &NodeRef) -> block_graph::Result<Vec<u8>> {
        match self {
            Self::Write(start, bytes) => host::write(node, *start, bytes, WriteFlags::empty()).await?,
            Self::Compressed(start, bytes) => {
                host::write(node, *start, bytes, WriteFlags::COMPRESSED).await?
            }
            Self::Zero(start, len, flags) => node.write_zeroes(*start, *len, *flags).await?,
            Self::Discard(start, len) => node.discard(*start, *len).await?,
            Self::Read(start, len) => return host::read(node, *start, *len as usize).await,
            Self::Flush => node.flush().await?,
        }
        Ok(Vec::new())
    }
}

impl Disk {
    fn len(&self) -> u64 {
        self.model.len() as u64
    }

    fn step(&mut self) -> Step {
        let size = self.len();
        let (start, len) = self.numbers.range(size);
        match self.numbers.below(12) {
            0..5 => {
                let seed = self.numbers.next().to_le_bytes();
                Step::Write(start, seed.iter().cycle().copied().take(len as usize).collect())
            }
            5 | 6 => {
                let unmap = self.numbers.below(2) == 0;
                Step::Zero(start, len, if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() })
            }
            7 => Step::Discard(start, len),
            8 if !self.data_file && !self.encrypted => {
                let start = start / self.cluster * self.cluster;
                let len = self.cluster.min(size - start);
                let seed = self.numbers.next().to_le_bytes();
                Step::Compressed(start, seed.iter().cycle().copied().take(len as usize).collect())
            }
            9 => Step::Flush,
            _ => Step::Read(start, len),
        }
    }

    /// Does a step in the model.
    fn apply(&mut self, step: &Step, done: &block_graph::Result<Vec<u8>>) {
        match (step, done) {
            (Step::Read(start, len), Ok(bytes)) => {
                let wanted = &self.model[*start as usize..(start + len) as usize];
                assert!(bytes == wanted, "{} bytes at {start:#x} differ", len);
            }
            (Step::Write(start, bytes) | Step::Compressed(start, bytes), Ok(_)) => {
                self.model[*start as usize..][..bytes.len()].copy_from_slice(bytes);
            }
            // What is allocated cannot be overwritten compressed.
            (Step::Compressed(..), Err(error)) => assert_eq!(error.errno(), block_graph::Errno::IO),
            (Step::Zero(start, len, _), Ok(_)) => self.model[*start as usize..][..*len as usize].fill(0),
            (Step::Discard(start, len), Ok(_)) if !(self.version_2 && self.backed) => {
                let end = start + len;
                let last = if end == self.len() { end } else { end / self.cluster * self.cluster };
                let first = start.next_multiple_of(self.cluster);
                if first < last {
                    self.model[first as usize..last as usize].fill(0);
                }
            }
            (Step::Flush | Step::Discard(..), Ok(_)) => (),
            (step, Err(error)) => panic!("{:?}: {error:?}", step.touches()),
        }
    }

    /// Does several steps that do not touch the same bytes at the same time.
    async fn run_together(&mut self, count: usize) {
        let mut steps: Vec<Step> = Vec::new();
        while steps.len() < count {
            let step = self.step();
            let (start, len) = step.touches();
            // Discards and zeros look at whole clusters; those of others are not to be among them.
            let around = |start: u64, len: u64| (start / self.cluster, (start + len).div_ceil(self.cluster));
            let (mine, whole) =
                (around(start, len), matches!(step, Step::Discard(..) | Step::Compressed(..)));
            let clash = steps.iter().any(|other| {
                let (other_start, other_len) = other.touches();
                let theirs = around(other_start, other_len);
                let either = whole || matches!(other, Step::Discard(..) | Step::Compressed(..));
                let bytes = start < other_start + other_len && other_start < start + len;
                bytes || either && mine.0 < theirs.1 && theirs.0 < mine.1
            });
            if !clash {
                steps.push(step);
            } else if self.numbers.below(8) == 0 {
                break;
            }
        }
        let node = self.node.clone();
        let results = join_all(steps.iter().map(|step| step.run(&node))).await;
        for (step, result) in steps.iter().zip(&results) {
            self.apply(step, result);
        }
    }

    async fn compare(&self) {
        let all = host::read(&self.node, 0, self.model.len()).await.unwrap();
        if let Some(at) = (0..all.len()).find(|at| all[*at] != self.model[*at]) {
            panic!("byte {at:#x} is {} and should be {}", all[at], self.model[at]);
        }
    }

    async fn reopen(&mut self) {
        self.node.close().await.unwrap();
        self.check();
        self.compare_map().await;
        self.node = open(&self.path, self.encrypted).await;
        assert_eq!(self.node.len(), self.len());
    }

    /// qemu-img finds nothing wrong, and the same data.
    fn check(&self) {
        let path = self.path.to_str().unwrap();
        let options = format!("driver=qcow2,encrypt.key-secret=key,file.filename={path}");
        let mut arguments = vec!["check", "-q"];
        if self.encrypted {
            arguments.extend(["--image-opts", "--object", SECRET, &options]);
        } else {
            arguments.push(path);
        }
        let Some(output) = qemu_img(&arguments) else { return };
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "qemu-img check: {text}");
        let raw = self.path.with_extension("model");
        std::fs::write(&raw, &self.model).unwrap();
        let raw = raw.to_str().unwrap();
        if self.encrypted {
            let raw = format!("driver=raw,file.filename={raw}");
            succeed(&["compare", "-q", "--image-opts", "--object", SECRET, &options, &raw]);
        } else {
            succeed(&["compare", "-q", "-f", "qcow2", "-F", "raw", path, raw]);
        }
    }

    /// qemu-img says the same of what is stored where.
    async fn compare_map(&self) {
        if self.backed || self.encrypted || self.preallocated {
            return;
        }
        let path = self.path.to_str().unwrap();
        let Some(output) = qemu_img(&["map", "--output=json", path]) else { return };
        let theirs: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
        // It looks for holes of the file within what is stored, too.
        let mut runs: Vec<(u64, u64, [bool; 4], Option<u64>)> = Vec::new();
        for run in theirs {
            let number = |key: &str| run[key].as_u64();
            let [present, data, compressed, zero] =
                ["present", "data", "compressed", "zero"].map(|key| run[key].as_bool().unwrap());
            let (start, len) = (number("start").unwrap(), number("length").unwrap());
            let what = [present, data, compressed, zero && !data];
            match runs.last_mut() {
                Some(last) if last.2 == what && last.3.map(|at| at + last.1) == number("offset") => {
                    last.1 += len
                }
                _ => runs.push((start, len, what, number("offset"))),
            }
        }
        let node = host::open_with(&self.path, Options::new(), OpenFlags::READ).await.unwrap();
        let mut at = 0;
        for run in runs {
            let status = node.block_status(at, self.len() - at, true).await.unwrap();
            let zero = status.zero || !status.allocated;
            let what = [status.allocated, status.data, status.compressed, zero];
            assert_eq!((at, status.len, what, status.at.map(|(_, offset)| offset)), run);
            at += status.len;
        }
        assert_eq!(at, self.len());
        node.close().await.unwrap();
    }

    async fn snapshots(&mut self) {
        if self.data_file {
            return;
        }
        let image = self.node.driver().image().unwrap();
        match self.numbers.below(4) {
            0 | 1 if self.snapshots.len() < 4 => {
                let name = format!("s{}", self.numbers.next());
                let info = SnapshotInfo { name: name.clone(), ..SnapshotInfo::default() };
                image.snapshot_create(info).await.unwrap();
                self.snapshots.push((name, self.model.clone()));
            }
            2 if !self.snapshots.is_empty() => {
                let index = self.numbers.below(self.snapshots.len() as u64) as usize;
                if self.version_2 && self.snapshots[index].1.len() != self.model.len() {
                    return;
                }
                image.snapshot_apply(&self.snapshots[index].0).await.unwrap();
                self.model = self.snapshots[index].1.clone();
            }
            3 if !self.snapshots.is_empty() => {
                let index = self.numbers.below(self.snapshots.len() as u64) as usize;
                let (name, _) = self.snapshots.remove(index);
                image.snapshot_delete(&name).await.unwrap();
            }
            _ => (),
        }
    }

    async fn resize(&mut self) {
        // What is read behind a backing file's end after growing is the backing file's business: only shrink then.
        let size = self.numbers.below(SIZE / 512) * 512 + SIZE / 2;
        if self.version_2 && !self.snapshots.is_empty() || self.backed && size > self.len() {
            return;
        }
        let how = Truncate { exact: true, ..Truncate::default() };
        self.node.truncate(size, how).await.unwrap();
        self.model.resize(size as usize, 0);
    }
}

/// The password of encrypted images, as qemu-img's option.
const SECRET: &str = "secret,id=key,data=sesame";

async fn open(path: &Path, encrypted: bool) -> NodeRef {
    let options = if encrypted { Options::with("encrypt.key-secret", "key") } else { Options::new() };
    // What is freed is discarded in the file, too.
    let flags = OpenFlags { unmap: true, ..OpenFlags::WRITE };
    host::open_with(path, options, flags).await.unwrap()
}

fn names(folder: &Path, shape: &str) -> (PathBuf, PathBuf) {
    (folder.join(format!("{shape}.qcow2")), folder.join(format!("{shape}-base.qcow2")))
}

/// Runs a random sequence on an image that qemu-img made.
fn run_sequence(shape: &str, options: &str, backed: bool, seed: u64) {
    if qemu_img(&["--version"]).is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (path, base) = names(folder.path(), shape);
    let data_file = options.contains("data_file");
    let options = options.replace("DATA", folder.path().join("data").to_str().unwrap());
    let mut model = vec![0; SIZE as usize];
    let size = SIZE.to_string();
    let options = if options.is_empty() { "lazy_refcounts=off".to_owned() } else { options };
    let encrypted = options.contains("encrypt");
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "--object", SECRET, "-o", &options];
    if backed {
        let raw = folder.path().join("base.raw");
        model = (0..SIZE).map(|at| (at / 1000 % 251) as u8).collect();
        std::fs::write(&raw, &model).unwrap();
        succeed(&["convert", "-O", "qcow2", raw.to_str().unwrap(), base.to_str().unwrap()]);
        arguments.extend(["-b", base.to_str().unwrap(), "-F", "qcow2"]);
    }
    arguments.extend([path.to_str().unwrap(), &size]);
    succeed(&arguments);
    block_on(async {
        let node = open(&path, encrypted).await;
        let cluster = node.driver().image().unwrap().info().cluster_size.unwrap();
        let version_2 = options.contains("compat=0.10");
        let snapshots = Vec::new();
        let numbers = Numbers(seed);
        let preallocated = options.contains("preallocation");
        let mut disk = Disk {
            preallocated,
            path,
            node,
            model,
            snapshots,
            numbers,
            cluster,
            backed,
            version_2,
            data_file,
            encrypted,
        };
        for round in 0..60 {
            let count = disk.numbers.below(8) as usize + 1;
            disk.run_together(count).await;
            match disk.numbers.below(8) {
                0 => disk.reopen().await,
                1 => disk.snapshots().await,
                2 if round % 3 == 0 => disk.resize().await,
                3 => disk.compare().await,
                _ => (),
            }
        }
        disk.compare().await;
        disk.reopen().await;
    });
}

macro_rules! sequences {
    ($($name:ident: $options:literal, $backed:literal;)*) => {$(
        #[test]
        fn $name() {
            for seed in 0..3 {
                run_sequence(stringify!($name), $options, $backed, seed);
            }
        }
    )*};
}

sequences! {
    plain: "", false;
    version_2: "compat=0.10", false;
    small_clusters: "cluster_size=512", false;
    four_k_clusters: "cluster_size=4k,refcount_bits=8", false;
    large_clusters: "cluster_size=2M", false;
    wide_refcounts: "refcount_bits=64,cluster_size=512", false;
    lazy_refcounts: "lazy_refcounts=on", false;
    extended: "extended_l2=on", false;
    extended_backed: "extended_l2=on,cluster_size=16k", true;
    zstd: "compression_type=zstd", false;
    data_file: "data_file=DATA", false;
    data_file_small: "data_file=DATA,cluster_size=4k", true;
    data_file_raw: "data_file=DATA,data_file_raw=on", false;
    preallocated: "preallocation=metadata", false;
    backed: "", true;
    luks: "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1", false;
    luks_extended: "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1,extended_l2=on", true;
    aes: "encrypt.format=aes,encrypt.key-secret=key,cluster_size=4k", true;
    backed_small: "cluster_size=1k", true;
}
