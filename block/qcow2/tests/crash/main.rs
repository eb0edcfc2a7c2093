//! Losses of power: every prefix of what an image file saw, and reorderings of what was not flushed, leave an image
//! that opens, whose metadata are sound but for leaks, and that has every byte that was flushed.

mod disk;
mod model;

use block_graph::{OpenFlags, Options};
use disk::{Event, Log, open, open_with, replay, stable};
use io_loop::{IoBuffer, block_on};
use model::{Load, Numbers};
use qcow2::check::{Fix, check};
use qcow2::create::{CreateSpec, create};
use qcow2::storage::{MemoryFile, at_once};
use std::process::Command;

/// How much is tried.
struct Effort {
    steps: u32,
    /// One of so many prefixes is looked at.
    every: usize,
    /// Images with unflushed writes that are there or not, for each prefix that is looked at.
    reorderings: u32,
    /// One of so many images is given to qemu-img, too.
    oracle_every: u32,
}

impl Effort {
    /// A little, or as much as CRASH_STEPS says.
    fn get() -> Self {
        match std::env::var("CRASH_STEPS").ok().and_then(|steps| steps.parse().ok()) {
            Some(steps) => Self { steps, every: 1, reorderings: 4, oracle_every: 50 },
            None => Self { steps: 60, every: 7, reorderings: 1, oracle_every: 40 },
        }
    }
}

fn spec(options: &str) -> CreateSpec {
    spec_of_size(options, "2M")
}

fn spec_of_size(options: &str, size: &str) -> CreateSpec {
    let mut taken = Options::new();
    for (name, value) in options.split(',').filter_map(|pair| pair.split_once('=')) {
        taken.set(name, value);
    }
    taken.set("size", size);
    CreateSpec::take(&mut taken).unwrap()
}

/// Looks at an image after a crash when the log was `at` long; returns how many clusters leak.
fn look(load: &Load, at: usize, image: Vec<u8>, lazy: bool, what: &str) -> u64 {
    let mut lines = Vec::new();
    let mut file = MemoryFile::new(image);
    let mut report = at_once(check(&file, Fix::NONE, &mut |line| lines.push(line.to_owned())));
    let is_dirty = |file: &MemoryFile| {
        let mut features = [0; 8];
        at_once(qcow2::storage::Storage::read(file, 72, &mut features)).unwrap();
        features[7] & 1 != 0
    };
    if lazy && is_dirty(&file) {
        // Refcounts are behind then, and a repair is part of opening the image.
        at_once(check(&file, Fix::ALL, &mut |_| ())).unwrap_or_else(|failed| panic!("{what}: {failed}"));
        lines.clear();
        report = at_once(check(&file, Fix::NONE, &mut |line| lines.push(line.to_owned())));
    }
    let report = report.unwrap_or_else(|failed| panic!("{what}: {failed}\n{}", lines.join("\n")));
    if report.corruptions > 0 {
        // Where refcounts were raised for a snapshot that is in no table, and are leaked, flags may already say so, or
        // not yet: both is harmless, and both is right again when the leaks are repaired.
        let sound = lines.iter().all(|line| !line.starts_with("ERROR") || line.contains("OFLAG_COPIED"));
        let errors: Vec<_> = lines.iter().filter(|line| line.starts_with("ERROR")).take(20).collect();
        assert!(sound && report.leaks > 0, "{what}: {report:?} {errors:#?}");
        let repaired = at_once(check(&file, Fix::LEAKS, &mut |_| ())).unwrap();
        assert_eq!(repaired.corruptions, 0, "{what}: {repaired:?}");
    }
    assert_eq!(report.check_errors, 0, "{what}\n{}", lines.join("\n"));
    let image = std::mem::take(&mut file).into_bytes();
    let found = block_on(async {
        let node = open(image, Log::default(), OpenFlags::READ).await;
        let node = node.unwrap_or_else(|error| panic!("{what}: {error}"));
        let mut buffer = IoBuffer::zeroed(node.len() as usize);
        node.read(0, &buffer.io()).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        let found = buffer.bytes().to_vec();
        node.close().await.unwrap();
        found
    });
    if let Some(complaint) = load.complaint(at, &found) {
        panic!("{what}: {complaint}");
    }
    report.leaks
}

/// Has qemu-img look at an image; `false` if there is no qemu-img.
fn oracle_looks(image: &[u8], lazy: bool, what: &str) -> bool {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), image).unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["check", "-f", "qcow2"]);
    command.args(["-r", if lazy { "all" } else { "leaks" }]);
    let Ok(output) = command.arg(file.path()).output() else { return false };
    let sound = output.status.code() == Some(0);
    let text = [output.stdout, output.stderr].concat();
    assert!(sound, "{what}: qemu-img check: {}", String::from_utf8_lossy(&text));
    true
}

fn crash(options: &str, seed: u64) {
    let effort = Effort::get();
    let lazy = options.contains("lazy_refcounts=on");
    let base = MemoryFile::default();
    at_once(create(&base, None, &spec(options), None)).unwrap();
    let base = base.into_bytes();
    let log = Log::default();
    let load = block_on(async {
        let node = open(base.clone(), log.clone(), OpenFlags::WRITE).await.unwrap();
        let mut load = Load::new(node, log.clone(), seed);
        for _ in 0..effort.steps {
            load.step().await;
        }
        load.flush().await;
        load.node.close().await.unwrap();
        load
    });
    let events = log.events();
    let mut numbers = Numbers(seed ^ 0x55);
    let (mut images, mut by_oracle, mut leaks) = (0u32, 0u32, 0);
    let mut one = |end: usize, image: Vec<u8>, what: String| {
        images += 1;
        if images.is_multiple_of(effort.oracle_every) && oracle_looks(&image, lazy, &what) {
            by_oracle += 1;
        }
        leaks += look(&load, end, image, lazy, &what);
    };
    for end in (0..=events.len()).filter(|end| end % effort.every == 0 || *end == events.len()) {
        let prefix = &events[..end];
        one(end, replay(&base, prefix, |_, _| true), format!("{options}: all {end} of {}", events.len()));
        let kept = stable(&events, end);
        if kept.len() == prefix.iter().filter(|event| !matches!(event, Event::Flush)).count() {
            continue;
        }
        for turn in 0..effort.reorderings {
            // Whole writes, or sectors of them, are there or not.
            let torn = numbers.below(4) == 0;
            let key = numbers.next();
            let keep = |number: usize, sector: usize| {
                let lot = if torn { number as u64 * 4096 + sector as u64 } else { number as u64 };
                kept.contains(&number) || Numbers(key ^ lot.wrapping_mul(0x1234_5678_9abc_def1)).below(2) == 0
            };
            let what = format!("{options}: {end} of {}, turn {turn}, torn {torn}", events.len());
            one(end, replay(&base, prefix, keep), what);
        }
    }
    eprintln!(
        "{options}: {} events, {images} images ({by_oracle} by qemu-img, too), {leaks} leaked clusters",
        events.len()
    );
}

#[test]
fn default_images_survive() {
    crash("", 1);
}

#[test]
fn small_clusters_survive() {
    crash("cluster_size=512", 2);
}

#[test]
fn large_clusters_survive() {
    crash("cluster_size=256k,refcount_bits=64", 3);
}

#[test]
fn subclusters_survive() {
    crash("extended_l2=on,cluster_size=16k", 4);
}

#[test]
fn lazy_refcounts_survive() {
    crash("lazy_refcounts=on,cluster_size=4k", 5);
}

#[test]
fn narrow_refcounts_survive() {
    crash("refcount_bits=8,cluster_size=1k,compression_type=zstd", 6);
}

#[test]
fn version_2_survives() {
    crash("compat=0.10,cluster_size=2k", 7);
}

/// Every writing of tables costs a flush or two: with the memory that is the default, a small disk's wait until somebody
/// asks for one.
#[test]
fn scattered_writes_do_not_flush() {
    let base = MemoryFile::default();
    at_once(create(&base, None, &spec_of_size("", "512M"), None)).unwrap();
    let log = Log::default();
    block_on(async {
        let node = open_with(base.into_bytes(), log.clone(), OpenFlags::WRITE, &[]).await.unwrap();
        for number in 0..600_u64 {
            let data = IoBuffer::from(&[number as u8; 512][..]).into_io();
            node.write((number * 5_077 % 8192) << 16, &data, Default::default()).await.unwrap();
        }
        let flushes = log.events().iter().filter(|event| matches!(event, Event::Flush)).count();
        assert_eq!(flushes, 0);
        node.close().await.unwrap();
    });
}
