//! A disk with somebody who goes on writing to it on another thread, and a model of what it has.

#![allow(dead_code, reason = "each test uses a part of it")]

use block_graph::{AllowAll, Backend, NodeRef, OpenContext, OpenFlags, Options, WriteFlags, ZeroFlags};
use futures_util::future::join_all;
use io_loop::{IoBuffer, block_on, sleep};
use jobs::{Event, JobInfo, JobStatus, Storage};
use parking_lot::Mutex;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a disk.
pub(crate) const LEN: usize = 24 << 20;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Tasks that write; each has every so manyth block of the disk.
const WRITERS: usize = 4;
const BLOCK: usize = 8192;

/// Random numbers (xorshift).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % end
    }
}

/// Who writes, and what the disk has by that.
pub(crate) struct Writer {
    pub(crate) model: Arc<Mutex<Vec<u8>>>,
    stop: Arc<AtomicBool>,
    pause: Arc<AtomicBool>,
    busy: Arc<AtomicU64>,
    pub(crate) count: Arc<AtomicU64>,
    pub(crate) failed: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Writer {
    pub(crate) fn start(backend: &Arc<Backend>, model: Vec<u8>, seed: u64) -> Self {
        let model = Arc::new(Mutex::new(model));
        let (stop, pause): (Arc<AtomicBool>, Arc<AtomicBool>) = Default::default();
        let (busy, count, failed): (Arc<AtomicU64>, Arc<AtomicU64>, Arc<AtomicU64>) = Default::default();
        let writer = Self { model, stop, pause, busy, count, failed, thread: None };
        let (model, stop, pause) = (writer.model.clone(), writer.stop.clone(), writer.pause.clone());
        let (busy, count, failed) = (writer.busy.clone(), writer.count.clone(), writer.failed.clone());
        let backend = backend.clone();
        let thread = std::thread::spawn(move || {
            block_on(async {
                let one = |index: usize| {
                    let (model, stop, pause, backend) = (&model, &stop, &pause, &backend);
                    let (busy, count, failed) = (&busy, &count, &failed);
                    async move {
                        let mut random = Random(seed * 77 + index as u64 + 1);
                        while !stop.load(Ordering::SeqCst) {
                            sleep(Duration::from_micros(200)).await;
                            busy.fetch_add(1, Ordering::SeqCst);
                            if !pause.load(Ordering::SeqCst) {
                                write_once(backend, model, &mut random, index, failed).await;
                                count.fetch_add(1, Ordering::SeqCst);
                            }
                            busy.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                };
                join_all((0..WRITERS).map(one)).await;
            });
        });
        Self { thread: Some(thread), ..writer }
    }

    /// Does something while nobody writes; what the disk had then.
    pub(crate) fn paused<R>(&self, act: impl FnOnce() -> R) -> (R, Vec<u8>) {
        self.pause.store(true, Ordering::SeqCst);
        while self.busy.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        let result = act();
        let model = self.model.lock().clone();
        self.pause.store(false, Ordering::SeqCst);
        (result, model)
    }

    /// Waits until so many more writes have ended.
    pub(crate) fn wait(&self, writes: u64) {
        let end = self.count.load(Ordering::SeqCst) + writes;
        wait_until("writes", || self.count.load(Ordering::SeqCst) >= end);
    }

    /// Ends it. What the disk has.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
        self.model.lock().clone()
    }
}

async fn write_once(
    backend: &Backend,
    model: &Mutex<Vec<u8>>,
    random: &mut Random,
    index: usize,
    failed: &AtomicU64,
) {
    let blocks = LEN / BLOCK / WRITERS;
    let at = (random.below(blocks) * WRITERS + index) * BLOCK + random.below(8) * 512;
    let len = 512 * (1 + random.below(8));
    let value = random.below(256) as u8;
    let bytes = if random.below(8) == 0 { vec![0; len] } else { (0..len).map(|n| value ^ n as u8).collect() };
    let before = model.lock()[at..at + len].to_vec();
    let written = if bytes[0] == 0 && bytes[1] == 0 {
        backend.write_zeroes(at as u64, len as u64, ZeroFlags::MAY_UNMAP).await
    } else {
        backend.write(at as u64, &IoBuffer::from(&bytes[..]).into_io(), WriteFlags::empty()).await
    };
    match written {
        Ok(()) => model.lock()[at..at + len].copy_from_slice(&bytes),
        Err(_) => {
            // It may have happened in part: the model takes what is there, if it is one or the other.
            failed.fetch_add(1, Ordering::SeqCst);
            let mut buffer = IoBuffer::zeroed(len);
            backend.read(at as u64, &buffer.io()).await.unwrap();
            let there = buffer.bytes().to_vec();
            let whole = there.iter().zip(&bytes).zip(&before).all(|((t, b), a)| t == b || t == a);
            assert!(whole, "neither old nor new at {at}");
            model.lock()[at..at + len].copy_from_slice(&there);
        }
    }
    if random.below(50) == 0 {
        backend.flush().await.unwrap();
    }
}

pub(crate) fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !ready() {
        assert!(begin.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) struct Rig {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) storage: Storage,
    pub(crate) events: Arc<Mutex<Vec<Event>>>,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let context = OpenContext::new(Arc::new(blockdev::registry()), Arc::default(), Arc::new(AllowAll));
        let events: Arc<Mutex<Vec<Event>>> = Arc::default();
        let told = events.clone();
        let storage = Storage::new(context, Arc::new(move |event| told.lock().push(event))).unwrap();
        Self { folder, storage, events }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        let path: PathBuf = self.folder.path().join(name);
        path.to_str().unwrap().to_owned()
    }

    /// Makes an image with what `content` has, by `qemu-io`-free means: the format's own driver.
    pub(crate) fn make(
        &self,
        name: &str,
        format: &str,
        backing: Option<(&str, &str)>,
        content: &[(usize, Vec<u8>)],
    ) {
        let context = self.storage.context();
        let path = self.path(name);
        block_on(async {
            let backing_path = backing.map(|(name, _)| self.path(name));
            let new = blockdev::create::NewImage {
                filename: &path,
                format,
                size: Some(LEN as u64),
                backing: backing_path.as_deref(),
                backing_format: backing.map(|(_, format)| format),
                ..Default::default()
            };
            blockdev::create::create(context, &new, |_| {}).await.unwrap();
            let node = context
                .open_filename(&path, Options::with("driver", format), OpenFlags::WRITE)
                .await
                .unwrap();
            for (at, bytes) in content {
                let io = IoBuffer::from(&bytes[..]).into_io();
                node.write(*at as u64, &io, WriteFlags::empty()).await.unwrap();
            }
            node.close().await.unwrap();
        });
    }

    /// A chain `layer0` (raw) to `layer{n-1}` (qcow2), with data in each, and what its top shows.
    pub(crate) fn chain(&self, layers: usize, seed: u64) -> Vec<u8> {
        let mut random = Random(seed + 1);
        let mut model = vec![0; LEN];
        for layer in 0..layers {
            let content: Vec<(usize, Vec<u8>)> = (0..40)
                .map(|n| {
                    let at = random.below(LEN / 4096 - 40) * 4096;
                    let len = 512 * (1 + random.below(300));
                    (at, vec![(layer * 40 + n + 1) as u8; len])
                })
                .collect();
            for (at, bytes) in &content {
                model[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            let name = format!("layer{layer}");
            match layer {
                0 => self.make(&name, "raw", None, &content),
                1 => self.make(&name, "qcow2", Some(("layer0", "raw")), &content),
                _ => self.make(&name, "qcow2", Some((&format!("layer{}", layer - 1), "qcow2")), &content),
            }
        }
        model
    }

    /// Adds the nodes `layer0` and so on of such a chain by name, and a device `disk` on the last.
    pub(crate) fn open_chain(&self, layers: usize) -> Arc<Backend> {
        for layer in 0..layers {
            let mut options = Options::with("driver", if layer == 0 { "raw" } else { "qcow2" });
            options.set("node-name", format!("layer{layer}"));
            options.set("file.driver", "file");
            options.set("file.filename", self.path(&format!("layer{layer}")));
            options.set("read-only", layer + 1 < layers);
            options.set("discard", "unmap");
            if layer > 0 {
                options.set("backing", format!("layer{}", layer - 1));
            }
            self.storage.blockdev_add(options).unwrap();
        }
        self.device(&format!("layer{}", layers - 1))
    }

    pub(crate) fn device(&self, node: &str) -> Arc<Backend> {
        let backend = Backend::new("disk", self.storage.find(node).unwrap());
        self.storage.attach(backend.clone()).unwrap();
        backend
    }

    /// Adds a new image by name, as a target.
    pub(crate) fn add(&self, name: &str, format: &str) {
        let mut options = Options::with("driver", format);
        options.set("node-name", name);
        options.set("file.driver", "file");
        options.set("file.filename", self.path(name));
        options.set("discard", "unmap");
        self.storage.blockdev_add(options).unwrap();
    }

    pub(crate) fn job(&self, id: &str) -> Option<JobInfo> {
        self.storage.query_jobs().unwrap().into_iter().find(|job| job.id == id)
    }

    pub(crate) fn wait_for(&self, id: &str, status: JobStatus) {
        wait_until(&format!("{id} to be {}", status.name()), || {
            self.events.lock().iter().any(
                |event| matches!(event, Event::StatusChange { id: of, status: now } if of == id && *now == status),
            )
        });
    }

    /// Waits until a job has gone. Why it failed, if it did; `Err` if it was cancelled.
    pub(crate) fn end_of(&self, id: &str) -> Result<Option<String>, ()> {
        self.wait_for(id, JobStatus::Null);
        self.outcome(id)
    }

    pub(crate) fn outcome(&self, id: &str) -> Result<Option<String>, ()> {
        let events = self.events.lock();
        let end = events.iter().find_map(|event| match event {
            Event::Completed { progress, error } if progress.id == id => {
                Some(Ok(error.as_ref().map(ToString::to_string)))
            }
            Event::Cancelled(progress) if progress.id == id => Some(Err(())),
            _ => None,
        });
        end.expect("the job told its end")
    }

    pub(crate) fn read(node: &NodeRef) -> Vec<u8> {
        block_on(async {
            let mut buffer = IoBuffer::zeroed(usize::try_from(node.len()).unwrap());
            node.read(0, &buffer.io()).await.unwrap();
            buffer.bytes().to_vec()
        })
    }

    /// Closes all, and sees that an image, which is still there, has `model`, for this code and for `qemu-img`.
    pub(crate) fn check(self, name: &str, format: &str, model: &[u8]) {
        self.storage.close().unwrap();
        self.check_file(name, format, model);
    }

    pub(crate) fn check_file(&self, name: &str, format: &str, model: &[u8]) {
        let context = OpenContext::new(Arc::new(blockdev::registry()), Arc::default(), Arc::new(AllowAll));
        let path = self.path(name);
        let bytes = block_on(async {
            let node =
                context.open_filename(&path, Options::with("driver", format), OpenFlags::READ).await.unwrap();
            let mut buffer = IoBuffer::zeroed(LEN);
            node.read(0, &buffer.io()).await.unwrap();
            node.close().await.unwrap();
            buffer.bytes().to_vec()
        });
        assert_same(&bytes, model, name);
        let expected = self.path("expected");
        std::fs::write(&expected, model).unwrap();
        if format == "qcow2" {
            qemu_img(&["check", "-f", "qcow2", &path]);
        }
        qemu_img(&["compare", "-f", format, "-F", "raw", &path, &expected]);
    }
}

/// Runs `qemu-img`, which must succeed; says so if there is none.
pub(crate) fn qemu_img(arguments: &[&str]) {
    match Command::new("qemu-img").args(arguments).output() {
        Err(_) => eprintln!("SKIPPED: no qemu-img to ask about {arguments:?}"),
        Ok(output) => assert!(output.status.success(), "{arguments:?}: {output:?}"),
    }
}

pub(crate) fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        let wrong = found.iter().zip(expected).filter(|(a, b)| a != b).count();
        let (is, was) = (&found[at..(at + 8).min(found.len())], &expected[at..(at + 8).min(found.len())]);
        panic!("{what}: {wrong} bytes differ, the first at {at}: {is:?} for {was:?}");
    }
}
