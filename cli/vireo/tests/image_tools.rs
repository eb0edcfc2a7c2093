//! The image tools beside the ones that they stand in for: the same command lines print the same and end the same.
//!
//! Needs qemu-img and qemu-io; without them the tests say so and compare nothing.

use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder with the tools under their names, and one for images.
struct Bench {
    folder: tempfile::TempDir,
    ours: bool,
}

impl Bench {
    fn new(ours: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["qemu-img", "qemu-io"] {
            symlink(env!("CARGO_BIN_EXE_vireo"), folder.path().join(name)).unwrap();
        }
        std::fs::create_dir(folder.path().join("images")).unwrap();
        Self { folder, ours }
    }

    fn images(&self) -> PathBuf {
        self.folder.path().join("images")
    }

    /// Runs a command line, whose words have no spaces but in single quotes.
    fn run(&self, line: &str) -> Output {
        let mut words = split(line);
        let name = words.remove(0);
        let program =
            if self.ours { self.folder.path().join(&name) } else { Path::new("/usr/bin").join(&name) };
        Command::new(program).arg0(&name).current_dir(self.images()).args(words).output().unwrap()
    }
}

fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (index, part) in line.split('\'').enumerate() {
        match index % 2 {
            0 => words.extend(part.split_whitespace().map(str::to_owned)),
            _ => words.push(part.to_owned()),
        }
    }
    words
}

/// What was printed, without what differs from run to run.
fn printed(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines = text.lines().map(|line| match line.split_once(" ops; ") {
        Some((before, _)) => format!("{before} ops; X\n"),
        None if line.starts_with("disk size:") || line.contains("\"actual-size\":") => "X\n".to_owned(),
        None if line.trim_start().starts_with("disk size:") => "X\n".to_owned(),
        None => format!("{line}\n"),
    });
    lines.collect()
}

/// Runs command lines with both, and compares what they print, and how they end.
fn compare(lines: &[&str]) {
    let have =
        |tool: &str| Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success());
    if !have("qemu-img") || !have("qemu-io") {
        eprintln!("SKIPPED: qemu-img and qemu-io are not installed, so nothing is compared");
        return;
    }
    let (ours, theirs) = (Bench::new(true), Bench::new(false));
    let mut differences = Vec::new();
    for line in lines {
        let (our, their) = (ours.run(line), theirs.run(line));
        let said = |output: &Output| {
            let (out, err) = (printed(&output.stdout), printed(&output.stderr));
            format!("{out}{err}[{:?}]", output.status.code())
        };
        if said(&our) != said(&their) {
            differences.push(format!("$ {line}\n--- theirs\n{}\n--- ours\n{}\n", said(&their), said(&our)));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn raw_images() {
    compare(&[
        "qemu-img create -f raw a.raw 1M",
        "qemu-img create -f raw",
        "qemu-img create a.raw 1x",
        "qemu-img create a.raw 1M 2M",
        "qemu-img create -o size=1M -f raw a.raw 1M",
        "qemu-img create -o foo=bar -f raw a.raw 1M",
        "qemu-img create -o size=z -f raw a.raw",
        "qemu-img create -f nosuch a.raw 1M",
        "qemu-img create -b a.raw -f raw b.raw 1M",
        "qemu-img create -f raw a.raw",
        "qemu-img create -o , -f raw a.raw 1M",
        "qemu-img create -f",
        "qemu-img create --nosuch",
        "qemu-img nosuch",
        "qemu-img",
        "qemu-io -f raw -c 'write -P 1 64k 64k' -c 'write -P 2 512k 4k' a.raw",
        "qemu-io -f raw -c 'read -P 1 64k 64k' -c 'read -P 3 64k 64k' -c 'read -v 1023k 32' a.raw",
        "qemu-io -f raw -c 'read 0 2M' -c 'read 1x 1' -c 'read 0' -c nosuch -c length a.raw",
        "qemu-io -f raw -c 'aio_write -P 5 0 4k' -c aio_flush -c 'write -z 0 1k' -c 'write -q 0 1' a.raw",
        "qemu-io -f raw -c 'write -u 0 1' -c 'write -z -P 1 0 1' -c 'write -P 500 0 1' a.raw",
        "qemu-io -f raw -c 'discard 128k 64k' -c 'truncate 2M' -c length -c flush a.raw",
        "qemu-io -f raw -c 'readv 0 1k 2k' -c 'writev -P 7 0 512 512' -c 'read -b 0 512' a.raw",
        "qemu-io -c 'read 0 1' -c 'open nosuch' -c 'open -o driver=raw a.raw' -c 'read 0 512' -c close -c length",
        "qemu-io -r -f raw -c 'write 0 1k' a.raw",
        "qemu-io -r -f raw -c 'read 0 1k' nosuch.raw",
        "qemu-img info -f raw a.raw",
        "qemu-img info --output=json a.raw",
        "qemu-img info --output=json --backing-chain -f raw a.raw",
        "qemu-img info --output=xml a.raw",
        "qemu-img info nosuch.raw",
        "qemu-img info a.raw b.raw",
        "qemu-img info -f nosuch a.raw",
        "qemu-img info --image-opts driver=raw,file.driver=file,file.filename=a.raw",
        "qemu-img info --image-opts driver=raw,file.filename=a.raw,nosuch=1",
        "qemu-img map -f raw --output=json a.raw",
        "qemu-img map -f raw a.raw",
        "qemu-img map -f raw --output=json -s 64k -l 128k a.raw",
        "qemu-img convert -f raw -O raw a.raw c.raw",
        "qemu-img compare -f raw -F raw a.raw c.raw",
        "qemu-img compare -p a.raw c.raw",
        "qemu-img compare -s -f raw -F raw a.raw c.raw",
        "qemu-img resize -f raw c.raw +1M",
        "qemu-img compare -f raw -F raw a.raw c.raw",
        "qemu-img compare -s -f raw -F raw a.raw c.raw",
        "qemu-img resize -f raw c.raw 1M",
        "qemu-img resize -f raw --shrink c.raw 1M",
        "qemu-img resize -f raw c.raw -- -5M",
        "qemu-img resize c.raw",
        "qemu-io -f raw -c 'write -P 9 70k 1k' c.raw",
        "qemu-img compare -f raw -F raw a.raw c.raw",
        "qemu-img compare -q -f raw -F raw a.raw c.raw",
        "qemu-img compare a.raw nosuch.raw",
        "qemu-img convert -S 0 -f raw -O raw a.raw c.raw a.raw d.raw",
        "qemu-img map -f raw --output=json d.raw",
        "qemu-img convert -S 1k -m 99 a.raw c.raw",
        "qemu-img convert -S 1 a.raw c.raw",
        "qemu-img convert -c -f raw -O raw a.raw c.raw",
        "qemu-img convert a.raw",
        "qemu-img convert -n -f raw -O raw d.raw c.raw",
        "qemu-img convert -n -o size=1 a.raw c.raw",
        "qemu-img convert -t nosuch a.raw c.raw",
        "qemu-img dd -f raw -O raw bs=64k count=2 skip=1 if=a.raw of=e.raw",
        "qemu-img dd -f raw -O raw bs=64k skip=100 if=a.raw of=e.raw",
        "qemu-img dd bs=0 if=a.raw of=e.raw",
        "qemu-img dd nosuch=1 if=a.raw of=e.raw",
        "qemu-img dd if=a.raw",
        "qemu-img check -f raw a.raw",
        "qemu-img check -r some a.raw",
        "qemu-img measure -f raw -O raw a.raw",
        "qemu-img measure --output=json --size 1G",
        "qemu-img measure",
        "qemu-img snapshot -l a.raw",
        "qemu-img snapshot -c x a.raw",
        "qemu-img commit -f raw a.raw",
        "qemu-img rebase -f raw -u -b x -F raw a.raw",
        "qemu-img rebase a.raw",
        "qemu-img amend -f raw -o size=1 a.raw",
        "qemu-img bitmap a.raw b",
        "qemu-img bench --pattern=300 a.raw",
        "qemu-img bench --flush-interval=1 -f raw a.raw",
    ]);
}
