//! The images that are measured, made once by QEMU's tools from the same bytes.

use crate::debian_disk::run;
use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The password of encrypted images, for the command line.
pub(super) const SECRET: &str = "secret,id=key,data=measured";
/// Images that only one program can read need no strong password.
const LUKS_OPTIONS: &str = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
/// How many clusters the fragmented image has, and how large it pretends to be.
const FRAGMENTS: u64 = 8000;
const FRAGMENTED_LEN: u64 = 1 << 40;

/// The folder with the images.
pub(super) struct Stock {
    folder: PathBuf,
    pub(super) size: u64,
}

impl Stock {
    pub(super) fn new(folder: &Path, size: u64) -> Self {
        Self { folder: folder.to_owned(), size }
    }

    /// Where an image is, or is to be.
    pub(super) fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn qemu_img(&self, words: &[&str]) -> Result<()> {
        run(Command::new("qemu-img").current_dir(&self.folder).args(words).stdout(Stdio::null()))
    }

    /// Makes an image anew: an empty qcow2 image, or a raw one.
    pub(super) fn create(&self, name: &str, words: &[&str]) -> Result<()> {
        let path = self.path(name);
        if fs::exists(&path)? {
            fs::remove_file(&path)?;
        }
        let size = self.size.to_string();
        self.qemu_img(&[&["create", "-q"], words, &[name, &size]].concat())
    }

    /// Sees to it that the image `name` is there.
    pub(super) fn need(&mut self, name: &str) -> Result<()> {
        if self.folder.join(name).exists() {
            return Ok(());
        }
        eprintln!("making {name}");
        match name {
            "random.raw" => self.fill(name, false),
            "mixed.raw" => self.fill(name, true),
            "random.qcow2" => self.convert("random.raw", name, &["-O", "qcow2"]),
            "mixed-zlib.qcow2" => self.convert("mixed.raw", name, &["-O", "qcow2", "-c"]),
            "mixed-zstd.qcow2" => {
                self.convert("mixed.raw", name, &["-O", "qcow2", "-c", "-o", "compression_type=zstd"])
            }
            "encrypted.qcow2" => {
                self.convert("random.raw", name, &["--object", SECRET, "-O", "qcow2", "-o", LUKS_OPTIONS])
            }
            "encrypted.raw" => {
                let options = "key-secret=key,iter-time=10";
                self.convert("random.raw", name, &["--object", SECRET, "-O", "luks", "-o", options])
            }
            "fragmented.qcow2" => self.fragment(name),
            _ => Ok(()),
        }
    }

    fn convert(&mut self, from: &str, to: &str, words: &[&str]) -> Result<()> {
        self.need(from)?;
        self.qemu_img(&[&["convert", "-f", "raw"], words, &[from, to]].concat())
    }

    /// Random bytes; `mixed` with text and zeroes, a third of each, in runs of 64 KiB and more.
    fn fill(&self, name: &str, mixed: bool) -> Result<()> {
        let mut file = BufWriter::new(fs::File::create(self.folder.join(name)).context("making an image")?);
        let mut numbers = Numbers(1);
        let words: Vec<String> = (0..3000).map(|_| numbers.word()).collect();
        let mut done = 0;
        while done < self.size {
            let len = ((1 + numbers.next() % 15) << 16).min(self.size - done) as usize;
            let mut bytes = Vec::with_capacity(len + 16);
            match if mixed { numbers.next() % 3 } else { 0 } {
                0 => (0..len.div_ceil(8)).for_each(|_| bytes.extend(numbers.next().to_le_bytes())),
                1 => bytes.resize(len, 0),
                _ => {
                    while bytes.len() < len {
                        bytes.extend(words[(numbers.next() % 3000) as usize].as_bytes());
                    }
                }
            }
            bytes.truncate(len);
            file.write_all(&bytes)?;
            done += len as u64;
        }
        Ok(file.flush()?)
    }

    /// An image with clusters here and there, allocated in no order.
    fn fragment(&self, name: &str) -> Result<()> {
        self.qemu_img(&["create", "-q", "-f", "qcow2", name, &FRAGMENTED_LEN.to_string()])?;
        let mut numbers = Numbers(2);
        let mut commands = String::new();
        for _ in 0..FRAGMENTS {
            writeln!(commands, "write -q {} 4k", (numbers.next() % (FRAGMENTED_LEN >> 16)) << 16)?;
        }
        let mut writer = Command::new("qemu-io");
        writer.current_dir(&self.folder).args(["-t", "unsafe", "-f", "qcow2", name]);
        let mut child = writer.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().context("qemu-io")?;
        child.stdin.take().context("qemu-io reads")?.write_all(commands.as_bytes())?;
        anyhow::ensure!(child.wait()?.success(), "qemu-io could not write {name}");
        Ok(())
    }
}

/// Numbers that look random, the same each time (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn word(&mut self) -> String {
        let len = 3 + self.next() % 7;
        let letters = (0..len).map(|_| char::from(b'a' + (self.next() % 26) as u8));
        letters.chain([' ']).collect()
    }
}
