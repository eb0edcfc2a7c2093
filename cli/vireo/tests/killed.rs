//! A process that writes to an image is killed at any moment, over and over: what it had flushed is there afterwards,
//! whatever else is there was written too, and the image's metadata has at most leaked clusters.
//!
//! `VIREO_KILLS` is how often each kind of image is killed (5 unless set).

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

const SECTOR: usize = 512;
const DISK: usize = 16 << 20;
/// What `length` prints, which is asked for after each batch.
const LENGTH: &str = "16 MiB";
/// Requests of a batch are in flight together, each in a part of the disk of its own.
const PARTS: usize = 8;
/// How many batches may be under way without word of their end.
const AHEAD: usize = 2;

/// A generator of numbers that a test repeats by its seed (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize) % below
    }
}

/// The bytes that a sector may hold, as bits: all of a sector's bytes are equal, and below 64.
type Allowed = u64;

/// One request of a batch.
struct Request {
    begin: usize,
    sectors: usize,
    kind: Kind,
}

enum Kind {
    Write(u8),
    Zero,
    Discard,
}

impl Request {
    /// One within part `part` of the disk.
    fn new(random: &mut Random, part: usize) -> Self {
        let sectors_of_part = DISK / SECTOR / PARTS;
        let most = [8, 64, 300][random.next(3)];
        let sectors = 1 + random.next(most);
        let begin = part * sectors_of_part + random.next(sectors_of_part - sectors);
        let kind = match random.next(8) {
            0 => Kind::Zero,
            1 => Kind::Discard,
            _ => Kind::Write(1 + random.next(63) as u8),
        };
        Self { begin, sectors, kind }
    }

    fn command(&self) -> String {
        let (at, len) = (self.begin * SECTOR, self.sectors * SECTOR);
        match self.kind {
            Kind::Write(byte) => format!("aio_write -q -P {byte} {at} {len}\n"),
            Kind::Zero => format!("aio_write -q -z -u {at} {len}\n"),
            Kind::Discard => format!("discard -q {at} {len}\n"),
        }
    }

    /// What a sector may hold once this is done, that might hold `before`.
    fn after(&self, before: Allowed) -> Allowed {
        match self.kind {
            Kind::Write(byte) => 1 << byte,
            Kind::Zero => 1,
            // Less than a cluster stays as it is.
            Kind::Discard => before | 1,
        }
    }
}

/// What is known of a disk.
struct Model {
    /// What each sector may hold by what was flushed.
    flushed: Vec<Allowed>,
    /// What it may hold besides, by batches that were sent and not heard of.
    sent: Vec<Vec<Request>>,
    /// How many batches were flushed.
    batches: usize,
}

impl Model {
    fn new() -> Self {
        Self { flushed: vec![1; DISK / SECTOR], sent: Vec::new(), batches: 0 }
    }

    /// The oldest batch under way was flushed.
    fn acknowledged(&mut self) {
        self.batches += 1;
        for request in self.sent.remove(0) {
            for allowed in &mut self.flushed[request.begin..][..request.sectors] {
                *allowed = request.after(*allowed);
            }
        }
    }

    /// Compares the disk's content with what it may be, and goes on from there.
    fn check(&mut self, content: &[u8], what: &str) {
        let mut allowed = self.flushed.clone();
        for request in self.sent.drain(..).flatten() {
            for allowed in &mut allowed[request.begin..][..request.sectors] {
                *allowed |= request.after(*allowed);
            }
        }
        assert_eq!(content.len(), DISK, "{what}");
        for (index, sector) in content.chunks(SECTOR).enumerate() {
            let byte = sector[0];
            let whole = sector.iter().all(|other| *other == byte);
            assert!(
                whole && byte < 64 && allowed[index] & 1 << byte != 0,
                "{what}: sector {index} holds {byte} (in one piece: {whole}) and may hold {:#x}",
                allowed[index]
            );
            self.flushed[index] = 1 << byte;
        }
    }
}

/// A running `vireo io` that writes.
struct Writer {
    child: Child,
    input: ChildStdin,
    said: Receiver<String>,
}

impl Writer {
    fn start(image: &Path, cache: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vireo"))
            .args(["io", "-f", "qcow2", "-d", "unmap", "-t", cache])
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (send, said) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, input, said }
    }

    /// Writes batches until `end`, and is killed then.
    fn run(mut self, model: &mut Model, random: &mut Random, end: Instant) {
        while Instant::now() < end {
            while model.sent.len() < AHEAD {
                let batch: Vec<_> = (0..PARTS).map(|part| Request::new(random, part)).collect();
                let mut text: String = batch.iter().map(Request::command).collect();
                text.push_str("aio_flush\nflush\nlength\n");
                model.sent.push(batch);
                self.input.write_all(text.as_bytes()).expect("it takes commands until it is killed");
            }
            match self.said.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => Self::heard(&line, model),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => panic!("it ended by itself"),
            }
        }
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // What it had said before counts.
        for line in self.said {
            Self::heard(&line, model);
        }
    }

    fn heard(line: &str, model: &mut Model) {
        assert!(!line.contains("fail") && !line.contains("rror"), "{line}");
        if line.ends_with(LENGTH) {
            model.acknowledged();
        }
    }
}

/// Runs a program; its exit code, which must be one of `codes`, and what it printed.
fn run(program: &str, arguments: &[&str], codes: &[i32]) -> (i32, String) {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let code = output.status.code().unwrap_or(-1);
    assert!(codes.contains(&code), "{program} {arguments:?} ended with {code}: {text}");
    (code, text)
}

fn img(arguments: &[&str], codes: &[i32]) -> (i32, String) {
    run(env!("CARGO_BIN_EXE_vireo"), &[&["img"], arguments].concat(), codes)
}

/// An image may have leaks and no other fault (exit code 3), after it was opened for writing once.
const SOUND: &[i32] = &[0, 3];

/// Kills writers of an image with `options` again and again.
fn kill_writers_of(options: &str, cache: &str, seed: u64) {
    let kills = std::env::var("VIREO_KILLS").map_or(5, |text| text.parse().expect("VIREO_KILLS is a number"));
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let (image, raw) = (path("disk.qcow2"), path("disk.raw"));
    let (image_text, raw_text) = (image.to_str().unwrap(), raw.to_str().unwrap());
    let options = options.replace("FOLDER", folder.path().to_str().unwrap());
    img(&["create", "-q", "-f", "qcow2", "-o", &options, image_text, &DISK.to_string()], &[0]);
    let has_qemu = Command::new("qemu-img").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !has_qemu {
        eprintln!(
            "SKIPPED: qemu-img is not installed (package qemu-utils), so only our own check says what it finds"
        );
    }

    let mut random = Random(seed);
    let mut model = Model::new();
    for kill in 0..kills {
        let what = format!("{options}, seed {seed}, kill {kill}");
        let end = Instant::now() + Duration::from_millis(50 + random.next(400) as u64);
        Writer::start(&image, cache).run(&mut model, &mut random, end);
        // Opening for writing repairs what a dirty image has to have repaired.
        run(env!("CARGO_BIN_EXE_vireo"), &["io", "-f", "qcow2", "-c", "quit", image_text], &[0]);
        let (_, said) = img(&["check", "-f", "qcow2", image_text], SOUND);
        if has_qemu {
            run("qemu-img", &["check", "-f", "qcow2", image_text], SOUND);
        }
        img(&["convert", "-f", "qcow2", "-O", "raw", image_text, raw_text], &[0]);
        model.check(&std::fs::read(&raw).unwrap(), &format!("{what} ({said})"));
        // Clusters that a snapshot shares are copied by the next writes. With a data file there are none.
        match kill % 4 {
            _ if options.contains("data_file") => {}
            1 => drop(img(&["snapshot", "-c", "kept", image_text], &[0])),
            3 => drop(img(&["snapshot", "-d", "kept", image_text], &[0])),
            _ => {}
        }
        if kill % 3 == 2 {
            img(&["check", "-q", "-r", "leaks", "-f", "qcow2", image_text], &[0]);
        }
    }
    assert!(kills < 5 || model.batches > kills, "it hardly wrote: {} batches", model.batches);
    eprintln!("{options}: {kills} kills, {} batches of {PARTS} requests flushed before", model.batches);
}

#[test]
fn small_clusters() {
    kill_writers_of("cluster_size=4k", "writeback", 1);
}

#[test]
fn lazy_refcounts() {
    kill_writers_of("lazy_refcounts=on", "writeback", 2);
}

#[test]
fn subclusters_and_direct_requests() {
    kill_writers_of("cluster_size=16k,extended_l2=on", "none", 3);
}

#[test]
fn data_in_another_file() {
    kill_writers_of("cluster_size=8k,data_file=FOLDER/data.raw", "writeback", 4);
}
