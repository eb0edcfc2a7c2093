//! Nodes on real files: requests of any alignment, with and without the page cache, zeroes, holes, lengths, errors.

use block_file::register;
use block_graph::{
    AllowAll, Errno, Error, NodeRef, OpenContext, OpenFlags, Options, Preallocation, Registry, Secrets,
    Truncate, WriteFlags, ZeroFlags,
};
use io_loop::{IoBuffer, IoVec, block_on};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

fn context() -> OpenContext {
    let mut registry = Registry::new();
    register(&mut registry);
    OpenContext::new(Arc::new(registry), Arc::new(Secrets::default()), Arc::new(AllowAll))
}

async fn open_with(path: &Path, options: &[(&str, &str)], flags: OpenFlags) -> Result<NodeRef, Error> {
    let options: Options = options.iter().map(|(name, value)| (*name, *value)).collect();
    context().open_protocol(path.to_str().unwrap(), options, flags).await
}

async fn open(path: &Path, flags: OpenFlags) -> NodeRef {
    open_with(path, &[], flags).await.unwrap()
}

fn direct() -> OpenFlags {
    OpenFlags { direct: true, ..OpenFlags::WRITE }
}

fn folder_with(bytes: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    fs::write(&path, bytes).unwrap();
    (folder, path)
}

async fn read(node: &NodeRef, offset: u64, len: usize) -> Vec<u8> {
    let mut buffer = IoBuffer::from(&vec![0xee; len][..]);
    node.read(offset, &buffer.io()).await.unwrap();
    buffer.bytes().to_vec()
}

fn memory(bytes: &[u8]) -> IoVec {
    IoBuffer::from(bytes).into_io()
}

/// A small generator of numbers, the same each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Random requests against a vector, with the file re-opened in between; its length is no multiple of a block.
async fn like_a_vector(flags: OpenFlags, options: &[(&str, &str)], seed: u64) {
    const MOST: u64 = 300_000;
    let mut model: Vec<u8> = (0..100_123_u32).map(|index| (index / 7) as u8).collect();
    let (_folder, path) = folder_with(&model);
    let mut node = open_with(&path, options, flags).await.unwrap();
    let mut numbers = Numbers(seed);
    for step in 0..400 {
        let offset = numbers.below(MOST);
        let len = [1, 512, 4096, 70_000][numbers.below(4) as usize] + numbers.below(2) * numbers.below(5000);
        let end = (offset + len) as usize;
        let grown = model.len().max(end);
        match numbers.below(8) {
            0 | 1 => {
                let expected: Vec<u8> =
                    (offset as usize..end).map(|at| model.get(at).copied().unwrap_or(0)).collect();
                assert!(read(&node, offset, len as usize).await == expected, "step {step}");
            }
            2..5 => {
                let byte = step as u8;
                // In two pieces, of which the second begins anywhere.
                let half = (len / 2) as usize;
                let pieces = [memory(&vec![byte; half]), memory(&vec![byte; len as usize - half])];
                node.write(offset, &IoVec::chain(pieces), WriteFlags::empty()).await.unwrap();
                model.resize(grown, 0);
                model[offset as usize..end].fill(byte);
            }
            5 => {
                let flags = [ZeroFlags::empty(), ZeroFlags::MAY_UNMAP][numbers.below(2) as usize];
                node.write_zeroes(offset, len, flags).await.unwrap();
                model.resize(grown, 0);
                model[offset as usize..end].fill(0);
            }
            6 => {
                let end = end.min(model.len());
                let offset = (offset as usize).min(end);
                node.discard(offset as u64, (end - offset) as u64).await.unwrap();
                model[offset..end].fill(0);
            }
            _ => {
                if step % 3 == 0 {
                    let len = numbers.below(MOST);
                    node.truncate(len, Truncate::default()).await.unwrap();
                    model.resize(len as usize, 0);
                }
                node.close().await.unwrap();
                drop(node);
                assert!(fs::read(&path).unwrap() == model, "step {step}");
                node = open_with(&path, options, flags).await.unwrap();
            }
        }
        assert_eq!(node.len(), model.len() as u64, "step {step}");
    }
    node.close().await.unwrap();
    assert!(fs::read(&path).unwrap() == model);
}

#[test]
fn a_file_is_like_a_vector() {
    block_on(async {
        like_a_vector(OpenFlags::WRITE, &[], 1).await;
        like_a_vector(OpenFlags::WRITE, &[("aio", "threads")], 2).await;
    });
}

#[test]
fn a_file_is_like_a_vector_past_the_page_cache() {
    block_on(async {
        like_a_vector(direct(), &[], 3).await;
        like_a_vector(direct(), &[("aio", "native")], 4).await;
    });
}

#[test]
fn writes_within_one_block_past_the_page_cache_do_not_undo_each_other() {
    let (_folder, path) = folder_with(&vec![0; 1 << 16]);
    block_on(async {
        let node = open(&path, direct()).await;
        let writes = (0..1024_u64).map(|index| {
            let node = node.clone();
            io_loop::spawn(async move {
                node.write(index * 64, &memory(&[index as u8; 64]), WriteFlags::empty()).await.unwrap();
            })
        });
        for write in writes.collect::<Vec<_>>() {
            write.await;
        }
        node.close().await.unwrap();
    });
    let bytes = fs::read(&path).unwrap();
    for (index, part) in bytes.chunks(64).enumerate() {
        assert!(part.iter().all(|&byte| byte == index as u8), "part {index}");
    }
}

#[test]
fn requests_beyond_the_end_do_not_cut_each_other_off() {
    const PART: u64 = 4096;
    for flags in [OpenFlags::WRITE, direct()] {
        let (_folder, path) = folder_with(&[]);
        block_on(async {
            let node = open(&path, flags).await;
            let tasks = (0..512_u64).map(|index| {
                let node = node.clone();
                io_loop::spawn(async move {
                    let at = index * PART;
                    match index % 3 {
                        0 => node.write_zeroes(at, PART, ZeroFlags::MAY_UNMAP).await,
                        1 => node.write(at, &memory(&[1; PART as usize]), WriteFlags::empty()).await,
                        _ => node.write(at, &memory(&[2; 1000]), WriteFlags::empty()).await,
                    }
                })
            });
            for task in tasks.collect::<Vec<_>>() {
                task.await.unwrap();
            }
            node.close().await.unwrap();
        });
        let bytes = fs::read(&path).unwrap();
        for (index, part) in bytes.chunks(PART as usize).enumerate() {
            let (byte, len) = [(0, 4096), (1, 4096), (2, 1000)][index % 3];
            let len = len.min(part.len());
            assert!(part[..len].iter().all(|&found| found == byte), "part {index}");
            assert!(part[len..].iter().all(|&found| found == 0), "part {index}");
        }
        assert_eq!(bytes.len() as u64, 512 * PART, "the last is written as a whole");
    }
}

#[test]
fn holes_are_found_and_made() {
    let (_folder, path) = folder_with(&vec![1; 1 << 20]);
    block_on(async {
        let node = open(&path, OpenFlags::WRITE).await;
        let (hole, end) = (256 << 10, 512 << 10);
        let status = node.block_status(0, 1 << 20, true).await.unwrap();
        assert!(status.data && !status.zero && status.allocated && status.len == 1 << 20 && status.eof);
        node.discard(hole, end - hole).await.unwrap();
        let mut found = Vec::new();
        let mut at = 0;
        while at < node.len() {
            let status = node.block_status(at, node.len() - at, true).await.unwrap();
            found.push((at, status.len, status.zero));
            at += status.len;
        }
        assert_eq!(found, [(0, hole, false), (hole, end - hole, true), (end, (1 << 20) - end, false)]);
        let before = node.driver().allocated_size().unwrap();
        assert!(before < 1 << 20, "{before} bytes are allocated");
        // Zeroes take space unless they may be a hole.
        node.write_zeroes(hole, end - hole, ZeroFlags::empty()).await.unwrap();
        assert!(node.driver().allocated_size().unwrap() > before);
        node.write_zeroes(0, 1 << 20, ZeroFlags::MAY_UNMAP).await.unwrap();
        assert!(node.block_status(0, 1 << 20, true).await.unwrap().zero);
        assert_eq!(read(&node, 0, 1 << 20).await, vec![0; 1 << 20]);
    });
}

#[test]
fn lengths_change_and_space_is_allocated() {
    let (_folder, path) = folder_with(&[5; 1000]);
    block_on(async {
        let node = open(&path, OpenFlags::WRITE).await;
        let how = |preallocation| Truncate { preallocation, ..Truncate::default() };
        node.truncate(1 << 20, how(Preallocation::Falloc)).await.unwrap();
        assert!(node.driver().allocated_size().unwrap() >= 1 << 20);
        node.truncate(2 << 20, how(Preallocation::Full)).await.unwrap();
        assert!(node.driver().allocated_size().unwrap() >= 2 << 20);
        let shrinking = node.truncate(5, how(Preallocation::Full)).await.unwrap_err();
        assert_eq!(shrinking.to_string(), "Cannot use preallocation for shrinking files");
        let metadata = node.truncate(3 << 20, how(Preallocation::Metadata)).await.unwrap_err();
        assert_eq!(metadata.to_string(), "Unsupported preallocation mode: metadata");
        assert_eq!(node.len(), 2 << 20);
        node.truncate(500, Truncate::default()).await.unwrap();
        assert_eq!(read(&node, 0, 600).await, [vec![5; 500], vec![0; 100]].concat());
    });
}

#[test]
fn a_node_is_opened_again_to_be_written() {
    let (_folder, path) = folder_with(&[7; 512]);
    block_on(async {
        let node = open(&path, OpenFlags::READ).await;
        let refused = node.write(0, &memory(&[1]), WriteFlags::empty()).await.unwrap_err();
        assert_eq!(refused.errno(), Errno::NOT_PERMITTED);
        let reader = open(&path, OpenFlags::READ).await;
        let refused = node.driver().reopen(&mut Options::new(), OpenFlags::WRITE).await.unwrap_err();
        assert_eq!(refused.to_string(), "Failed to get \"write\" lock");
        assert_eq!(read(&node, 0, 2).await, [7, 7], "it is as it was");
        drop(reader);
        node.driver().reopen(&mut Options::new(), OpenFlags::WRITE).await.unwrap();
        node.set_flags(OpenFlags::WRITE);
        node.write(0, &memory(&[1]), WriteFlags::FUA).await.unwrap();
        assert_eq!(read(&node, 0, 2).await, [1, 7]);
    });
}

#[test]
fn files_are_made_with_options() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new.raw");
    let name = path.to_str().unwrap();
    let create = |options: &[(&str, &str)]| {
        let mut options: Options = options.iter().map(|(name, value)| (*name, *value)).collect();
        block_on(async { context().create_protocol(name, &mut options).await })
    };
    create(&[("size", "1000"), ("nocow", "on"), ("extent_size_hint", "64k")]).unwrap();
    assert_eq!(fs::read(&path).unwrap(), vec![0; 1024]);
    fs::write(&path, vec![9; 5000]).unwrap();
    create(&[("size", "1M"), ("preallocation", "full")]).unwrap();
    assert_eq!(fs::read(&path).unwrap(), vec![0; 1 << 20], "what was there is gone");
    let error = |options: &[(&str, &str)]| create(options).unwrap_err().to_string();
    assert_eq!(error(&[("preallocation", "bla")]), "invalid parameter value: bla");
    let metadata = error(&[("size", "1k"), ("preallocation", "metadata")]);
    assert_eq!(metadata, "Unsupported preallocation mode: metadata");
    assert_eq!(error(&[("extent_size_hint", "8G")]), "Extent size hint is too large");
    let nowhere = block_on(async {
        context().create_protocol("/nonexistent/x", &mut Options::new()).await.unwrap_err().to_string()
    });
    assert_eq!(nowhere, "Could not create '/nonexistent/x': No such file or directory");
}

#[test]
fn what_cannot_be_opened_is_named() {
    let (folder, path) = folder_with(&[0; 512]);
    let error = |path: &Path, options: &[(&str, &str)], flags| {
        block_on(async { open_with(path, options, flags).await.unwrap_err() })
    };
    let missing = folder.path().join("missing");
    let message = format!("Could not open '{}': No such file or directory", missing.display());
    let found = error(&missing, &[], OpenFlags::READ);
    assert_eq!((found.errno(), found.to_string()), (Errno::NOT_FOUND, message));
    let message = format!("'file' driver requires '{}' to be a regular file", folder.path().display());
    assert_eq!(error(folder.path(), &[], OpenFlags::READ).to_string(), message);
    let native = error(&path, &[("aio", "native")], OpenFlags::READ).to_string();
    assert!(native.starts_with("aio=native was specified, but it requires cache.direct=on"), "{native}");
    assert_eq!(error(&path, &[("aio", "x")], OpenFlags::READ).to_string(), "invalid parameter value: x");
    let device = error(&path, &[("driver", "host_device")], OpenFlags::READ).to_string();
    let name = path.display();
    assert_eq!(
        device,
        format!("'host_device' driver requires '{name}' to be either a character or block device")
    );
    // A pipe without another end keeps nobody waiting.
    let pipe = folder.path().join("pipe");
    let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, kind, mode, 0).unwrap();
    assert!(error(&pipe, &[], OpenFlags::READ).to_string().contains("to be a regular file"));
    let full = block_on(async {
        let node = open(Path::new("/dev/full"), OpenFlags::WRITE).await;
        node.driver().write(0, &memory(&[0; 4096]), WriteFlags::empty()).await.unwrap_err()
    });
    assert_eq!(full.errno(), Errno::NO_SPACE);
}
