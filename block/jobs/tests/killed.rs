//! The process is killed while jobs work on a disk that is written to: what was flushed is there.

mod rig;

use block_graph::{AllowAll, CheckFix, OpenContext, OpenFlags, Options, WriteFlags};
use io_loop::{IoBuffer, block_on};
use jobs::JobStatus;
use jobs::parameters::{
    Backup, BlockCommit, BlockStream, CopyMode, DriveBackup, DriveMirror, JobOptions, Mirror, NewTarget,
    SnapshotSync, SyncMode,
};
use rig::{LEN, Random, Rig, wait_until};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const FOLDER: &str = "JOBS_KILLED_FOLDER";
const SEED: &str = "JOBS_KILLED_SEED";
const BLOCK: usize = 4096;
/// Blocks that are written to: few, so that each is written again and again.
const BLOCKS: usize = 700;
const STRIDE: usize = LEN / BLOCKS / BLOCK * BLOCK;

/// What a block has that was written as the `number`th.
fn content(block: usize, number: u64) -> Vec<u8> {
    let mut bytes = vec![(number % 251) as u8; BLOCK];
    bytes[..8].copy_from_slice(&(block as u64).to_le_bytes());
    bytes[8..16].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn say(log: &mut File, line: &str) {
    log.write_all(format!("{line}\n").as_bytes()).unwrap();
}

fn log_in(folder: &Path, name: &str) -> File {
    OpenOptions::new().create(true).append(true).open(folder.join(name)).unwrap()
}

/// Writes, and says what it is about to write and what it has flushed.
fn write_on(backend: &block_graph::Backend, folder: &Path, seed: u64) {
    let mut log = log_in(folder, "writes");
    let mut random = Random(seed + 5);
    let mut number = 0;
    block_on(async {
        loop {
            for _ in 0..1 + random.below(30) {
                number += 1;
                let block = random.below(BLOCKS);
                say(&mut log, &format!("W {number} {block}"));
                let io = IoBuffer::from(&content(block, number)[..]).into_io();
                backend.write((block * STRIDE) as u64, &io, WriteFlags::empty()).await.unwrap();
            }
            backend.flush().await.unwrap();
            say(&mut log, &format!("F {number}"));
        }
    });
}

/// What the process that is killed does.
fn be_the_child(folder: &Path) {
    let folder = folder.to_owned();
    let seed: u64 = std::env::var(SEED).unwrap().parse().unwrap();
    let rig = Rig::new();
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let mut options = Options::with("driver", "qcow2");
    options.set("discard", "unmap");
    let node =
        block_on(rig.storage.context().open_filename(&path("base"), options, OpenFlags::WRITE)).unwrap();
    let backend = block_graph::Backend::new("disk", node);
    rig.storage.attach(backend.clone()).unwrap();
    let (writes_to, of_writer) = (backend.clone(), folder.clone());
    std::thread::spawn(move || write_on(&writes_to, &of_writer, seed));
    let mut roots = log_in(&folder, "roots");
    say(&mut roots, &format!("is {}", path("base")));
    let mut random = Random(seed + 9);
    for number in 0.. {
        let id = format!("job{number}");
        let job = JobOptions { job_id: Some(id.clone()), ..JobOptions::default() };
        let has_backing = backend.node().backing().is_some();
        match random.below(5) {
            0 | 1 => {
                let name = path(&format!("over{number}"));
                say(&mut roots, &format!("becomes {name}"));
                let snapshot = SnapshotSync {
                    device: "disk".into(),
                    snapshot_file: name.clone(),
                    ..SnapshotSync::default()
                };
                rig.storage.blockdev_snapshot_sync(snapshot).unwrap();
                say(&mut roots, &format!("is {name}"));
            }
            2 if has_backing => {
                let stream = BlockStream { job, device: "disk".into(), ..BlockStream::default() };
                rig.storage.block_stream(stream).unwrap();
                assert_eq!(rig.end_of(&id), Ok(None));
            }
            3 if has_backing => {
                rig.storage
                    .block_commit(BlockCommit { job, device: "disk".into(), ..BlockCommit::default() })
                    .unwrap();
                rig.wait_for(&id, JobStatus::Ready);
                let mut base = backend.node();
                while let Some(below) = base.backing() {
                    base = below;
                }
                let name = base.filename().unwrap();
                say(&mut roots, &format!("becomes {name}"));
                drop(base);
                rig.storage.job_complete(&id).unwrap();
                assert_eq!(rig.end_of(&id), Ok(None));
                say(&mut roots, &format!("is {name}"));
            }
            4 => {
                let name = path(&format!("copy{number}"));
                let target = NewTarget { target: name.clone(), ..NewTarget::default() };
                let copy_mode =
                    if random.below(2) == 0 { CopyMode::Background } else { CopyMode::WriteBlocking };
                let mirror = Mirror { job, device: "disk".into(), copy_mode, ..Mirror::default() };
                rig.storage.drive_mirror(DriveMirror { mirror, target }).unwrap();
                rig.wait_for(&id, JobStatus::Ready);
                say(&mut roots, &format!("becomes {name}"));
                rig.storage.job_complete(&id).unwrap();
                assert_eq!(rig.end_of(&id), Ok(None));
                say(&mut roots, &format!("is {name}"));
            }
            _ => {
                let target = NewTarget { target: path(&format!("backup{number}")), ..NewTarget::default() };
                let backup = Backup { job, device: "disk".into(), sync: SyncMode::Full, ..Backup::default() };
                rig.storage.drive_backup(DriveBackup { backup, target }).unwrap();
                assert_eq!(rig.end_of(&id), Ok(None));
            }
        }
        say(&mut roots, "done");
    }
}

/// Whether an image is sound and has all that was flushed.
fn has_all(image: &str, flushed: &HashMap<usize, u64>, last: &HashMap<usize, u64>) -> Result<(), String> {
    let context = OpenContext::new(Arc::new(blockdev::registry()), Arc::default(), Arc::new(AllowAll));
    block_on(async {
        let options = Options::with("driver", "qcow2");
        let node = context.open_filename(image, options, OpenFlags::READ).await.map_err(|e| e.to_string())?;
        let report = node
            .driver()
            .image()
            .unwrap()
            .check(CheckFix::Nothing, &mut |_| {})
            .await
            .map_err(|e| e.to_string())?;
        if report.corruptions > 0 || report.check_errors > 0 {
            return Err(format!("{report:?}"));
        }
        for block in 0..BLOCKS {
            let mut buffer = IoBuffer::zeroed(BLOCK);
            node.read((block * STRIDE) as u64, &buffer.io()).await.map_err(|e| e.to_string())?;
            let bytes = buffer.bytes();
            let number = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
            let (least, most) =
                (flushed.get(&block).copied().unwrap_or(0), last.get(&block).copied().unwrap_or(0));
            if number < least || number > most {
                return Err(format!(
                    "block {block} has {number}, and {least} was flushed and {most} the last"
                ));
            }
            if number > 0 && bytes != content(block, number) {
                return Err(format!("block {block} is torn"));
            }
        }
        node.close().await.map_err(|e| e.to_string())
    })
}

fn survives(seed: u64) -> usize {
    let rig = Rig::new();
    rig.make("base", "qcow2", None, &[]);
    let folder = rig.folder.path();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "what_was_flushed_survives", "--nocapture"])
        .env(FOLDER, folder)
        .env(SEED, seed.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let text = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
    wait_until("the child to write", || text("writes").contains('F'));
    std::thread::sleep(Duration::from_millis(Random(seed * 31 + 7).below(900) as u64));
    assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
    child.kill().unwrap();
    child.wait().unwrap();

    let (mut last, mut flushed, mut order) = (HashMap::new(), HashMap::new(), Vec::new());
    let writes = text("writes");
    let complete = writes.rfind('\n').map_or("", |end| &writes[..end]);
    for line in complete.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let number: u64 = words[1].parse().unwrap();
        if words[0] == "W" {
            let block: usize = words[2].parse().unwrap();
            last.insert(block, number);
            order.push((number, block));
        } else {
            flushed.extend(order.iter().filter(|(n, _)| *n <= number).map(|(n, block)| (*block, *n)));
            order.clear();
        }
    }
    let roots = text("roots");
    let (mut root, mut next, mut jobs) = (None, None, 0);
    for line in roots.lines() {
        match line.split_once(' ') {
            Some(("is", name)) => (root, next) = (Some(name.to_owned()), None),
            Some(("becomes", name)) => next = Some(name.to_owned()),
            _ => jobs += 1,
        }
    }
    // Between the two it may be either.
    let results: Vec<(String, Result<(), String>)> =
        next.into_iter().chain(root).map(|image| (image.clone(), has_all(&image, &flushed, &last))).collect();
    assert!(results.iter().any(|(_, result)| result.is_ok()), "seed {seed}, after {jobs} jobs: {results:?}");
    jobs
}

#[test]
fn what_was_flushed_survives() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        // This is the process that the test has started.
        return be_the_child(Path::new(&folder));
    }
    let rounds: u64 =
        std::env::var("JOBS_KILLED_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let jobs: usize = (0..rounds).map(survives).sum();
    println!("killed {rounds} times, after {jobs} jobs");
}
