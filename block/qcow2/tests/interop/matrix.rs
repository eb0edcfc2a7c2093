//! Combinations of the format's parameters, in both directions: written here and read by qemu-img, and written by
//! qemu-img and read here. A sample of them: `cargo xtask interop` does all, with the tools.

use crate::bitmaps::{HostDisk, context};
use crate::oracle::{HostFile, Oracle, run};
use block_graph::{OpenFlags, Options, WriteFlags, ZeroFlags};
use io_loop::{IoBuffer, block_on};
use qcow2::create::{CreateSpec, create};
use qcow2::storage::at_once;
use std::fs::File;
use std::path::Path;
use std::process::Command;

/// Bytes of the disks.
const SIZE: usize = 6 << 20;

/// Options of images that go together.
fn combinations() -> Vec<String> {
    let mut all = Vec::new();
    for cluster in ["512", "1k", "4k", "16k", "64k", "256k", "2M"] {
        all.push(format!("compat=0.10,cluster_size={cluster}"));
        for bits in [1, 2, 4, 8, 16, 32, 64] {
            for compression in ["zlib", "zstd"] {
                let extended: &[&str] =
                    if cluster.len() < 3 || cluster == "512" { &["off"] } else { &["off", "on"] };
                let extended = if cluster == "2M" { &["off", "on"] } else { extended };
                for extended in extended {
                    all.push(format!(
                        "cluster_size={cluster},refcount_bits={bits},compression_type={compression},extended_l2={extended}"
                    ));
                }
            }
        }
    }
    // A prime step meets every value of every parameter.
    all.into_iter().step_by(13).collect()
}

/// What the disk is to hold: data, zeros, and data again over both.
fn content(seed: usize) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    for (start, len) in [(0, 100_000), (1 << 20, 70_000), (3_000_000, 1_000_000), (SIZE - 5000, 5000)] {
        for (index, byte) in bytes[start..start + len].iter_mut().enumerate() {
            *byte = ((index / 512) * 31 + index % 7 + seed) as u8;
        }
    }
    bytes
}

/// Writes `content` to an image, compressed or not, with detours.
async fn fill(path: &Path, content: &[u8], compressed: bool) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let context = context();
    let file = context.add(None, Box::new(HostDisk(file)), OpenFlags::WRITE).unwrap();
    let mut options = Options::with("driver", "qcow2");
    options.set("file", file);
    let node = context.open(options, OpenFlags::WRITE).await.unwrap();
    let cluster = node.driver().image().unwrap().info().cluster_size.unwrap() as usize;
    let step = if compressed { cluster } else { 150_000 };
    for start in (0..SIZE).step_by(step) {
        let piece = &content[start..SIZE.min(start + step)];
        if piece.iter().all(|byte| *byte == 0) {
            if !compressed && start.is_multiple_of(4) {
                let zeros = node.write_zeroes(start as u64, piece.len() as u64, ZeroFlags::MAY_UNMAP);
                zeros.await.unwrap();
            }
            continue;
        }
        let flags = if compressed { WriteFlags::COMPRESSED } else { WriteFlags::empty() };
        node.write(start as u64, &IoBuffer::from(piece).into_io(), flags).await.unwrap();
    }
    node.close().await.unwrap();
}

async fn read(path: &Path) -> Vec<u8> {
    let context = context();
    let file = context.add(None, Box::new(HostDisk(File::open(path).unwrap())), OpenFlags::READ).unwrap();
    let mut options = Options::with("driver", "qcow2");
    options.set("file", file);
    let node = context.open(options, OpenFlags::READ).await.unwrap();
    let mut buffer = IoBuffer::zeroed(node.len() as usize);
    node.read(0, &buffer.io()).await.unwrap();
    let bytes = buffer.bytes().to_vec();
    node.close().await.unwrap();
    bytes
}

fn check_one(oracle: &Oracle, number: usize, options: &str) {
    let content = content(number);
    let (raw, image) = (oracle.path("raw"), oracle.path("image"));
    for compressed in [false, true] {
        // From here to there.
        let _ = std::fs::remove_file(&image);
        let mut taken = Options::new();
        options
            .split(',')
            .filter_map(|pair| pair.split_once('='))
            .for_each(|(name, value)| taken.set(name, value));
        taken.set("size", SIZE.to_string());
        at_once(create(&HostFile::open(&image), None, &CreateSpec::take(&mut taken).unwrap(), None)).unwrap();
        block_on(fill(&image, &content, compressed));
        let checked = oracle.check(&image, None);
        let found = (checked.failed, checked.report.corruptions, checked.report.leaks);
        assert_eq!(found, (false, 0, 0), "{options}: {checked:?}");
        let mut command = Command::new("qemu-img");
        run(command.args(["convert", "-f", "qcow2", "-O", "raw"]).arg(&image).arg(&raw));
        assert!(std::fs::read(&raw).unwrap() == content, "{options}, compressed {compressed}: written here");
        // And from there to here.
        std::fs::write(&raw, &content).unwrap();
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "raw", "-O", "qcow2", "-o", options]);
        if compressed {
            command.arg("-c");
        }
        run(command.arg(&raw).arg(&image));
        assert!(block_on(read(&image)) == content, "{options}, compressed {compressed}: written there");
        let mut lines = Vec::new();
        let report =
            at_once(qcow2::check::check(&HostFile::open(&image), qcow2::check::Fix::NONE, &mut |line| {
                lines.push(line.to_owned())
            }));
        assert_eq!(report.unwrap(), oracle.check(&image, None).report, "{options}: {lines:?}");
    }
    println!("{options:<90} both ways, plain and compressed: alike");
}

#[test]
fn every_shape_goes_both_ways() {
    let Some(oracle) = Oracle::find("every_shape_goes_both_ways") else { return };
    let all = combinations();
    for (number, options) in all.iter().enumerate() {
        check_one(&oracle, number, options);
    }
    println!("{} combinations", all.len());
}
