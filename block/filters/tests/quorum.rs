//! Several nodes of which enough must agree.

use block_graph::{
    AllowAll, Error, NodeRef, OpenContext, OpenFlags, Options, Registry, Secrets, WriteFlags, ZeroFlags,
};
use io_loop::{IoBuffer, block_on};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use tempfile::TempDir;

const LEN: usize = 65536;

fn context() -> OpenContext {
    let mut registry = Registry::new();
    block_file::register(&mut registry);
    block_filters::register(&mut registry);
    OpenContext::new(Arc::new(registry), Arc::new(Secrets::default()), Arc::new(AllowAll))
}

/// A folder with files of these bytes.
fn files(bytes: &[u8]) -> (TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..bytes.len()).map(|index| folder.path().join(index.to_string())).collect();
    for (path, byte) in paths.iter().zip(bytes) {
        fs::write(path, vec![*byte; LEN]).unwrap();
    }
    (folder, paths)
}

/// A quorum of the files; a child whose number is in `broken` fails whatever it is asked.
async fn open(paths: &[PathBuf], pairs: &[(&str, &str)], broken: &[usize]) -> Result<NodeRef, Error> {
    let mut options: Options = pairs.iter().map(|(name, value)| (*name, *value)).collect();
    options.set("driver", "quorum");
    for (index, path) in paths.iter().enumerate() {
        let path = path.to_str().unwrap();
        let mut child = Options::with("driver", "raw");
        if broken.contains(&index) {
            child.set("file.driver", "blkdebug");
            child.set("file.inject-error.0.event", "none");
            child.set("file.image.filename", path);
        } else {
            child.set("file.filename", path);
        }
        options.set_child(&format!("children.{index}"), child);
    }
    context().open(options, OpenFlags::WRITE).await
}

async fn read(node: &NodeRef) -> Result<u8, String> {
    let mut buffer = IoBuffer::zeroed(512);
    node.read(1024, &buffer.io()).await.map_err(|error| error.to_string())?;
    Ok(buffer.bytes()[7])
}

async fn write(node: &NodeRef, byte: u8) -> Result<(), String> {
    let memory = IoBuffer::from(&[byte; 512][..]).into_io();
    node.write(1024, &memory, WriteFlags::empty()).await.map_err(|error| error.to_string())
}

#[test]
fn what_enough_say_is_read() {
    block_on(async {
        let (_folder, paths) = files(&[1, 2, 1]);
        let node = open(&paths, &[("vote-threshold", "2")], &[]).await.unwrap();
        assert_eq!(read(&node).await, Ok(1));
        assert_eq!(fs::read(&paths[1]).unwrap()[1024], 2, "it is not corrected unasked");
        drop(node);
        let node = open(&paths, &[("vote-threshold", "2"), ("rewrite-corrupted", "on")], &[]).await.unwrap();
        assert_eq!(read(&node).await, Ok(1));
        assert_eq!(fs::read(&paths[1]).unwrap()[1023..1026], [2, 1, 1]);
        drop(node);
        let node = open(&paths, &[("vote-threshold", "3")], &[0]).await.unwrap();
        assert_eq!(read(&node).await, Err("Input/output error".into()));
        drop(node);
        let (_folder, paths) = files(&[1, 2, 3]);
        let node = open(&paths, &[("vote-threshold", "2")], &[]).await.unwrap();
        assert_eq!(read(&node).await, Err("The children of the quorum do not agree".into()));
        drop(node);
        let node = open(&paths, &[("vote-threshold", "2"), ("read-pattern", "fifo")], &[0]).await.unwrap();
        assert_eq!(read(&node).await, Ok(2));
    });
}

#[test]
fn writes_go_to_all() {
    block_on(async {
        let (_folder, paths) = files(&[1, 1, 1]);
        let node = open(&paths, &[("vote-threshold", "2")], &[2]).await.unwrap();
        assert_eq!(write(&node, 9).await, Ok(()));
        assert_eq!(read(&node).await, Ok(9));
        node.write_zeroes(0, 512, ZeroFlags::empty()).await.unwrap();
        node.flush().await.unwrap();
        assert!(node.block_status(0, 4096, true).await.unwrap().data);
        drop(node);
        let bytes = |index: usize| fs::read(&paths[index]).unwrap();
        assert!(bytes(0) == bytes(1) && bytes(0)[0] == 0 && bytes(0)[1024] == 9);
        assert_eq!(bytes(2), vec![1; LEN], "it failed");
        let node = open(&paths, &[("vote-threshold", "2")], &[1, 2]).await.unwrap();
        assert_eq!(write(&node, 9).await, Err("Input/output error".into()));
    });
}

#[test]
fn quorums_that_cannot_be_are_refused() {
    let (folder, mut paths) = files(&[1, 2]);
    let refused = |paths: &[PathBuf], pairs: &[(&str, &str)]| {
        block_on(async { open(paths, pairs, &[]).await.unwrap_err().to_string() })
    };
    assert_eq!(refused(&paths, &[("vote-threshold", "3")]), "threshold may not exceed children count");
    assert_eq!(refused(&paths, &[]), "Parameter 'vote-threshold' expects a value >= 1");
    let verify = refused(&paths, &[("vote-threshold", "1"), ("blkverify", "on")]);
    assert!(verify.starts_with("blkverify=on can only be set"), "{verify}");
    assert_eq!(refused(&[], &[]), "Number of provided children must be 1 or more");
    paths.push(folder.path().join("short"));
    fs::write(&paths[2], [1; 512]).unwrap();
    let lengths = refused(&paths, &[("vote-threshold", "2")]);
    assert!(lengths.starts_with("Children of a quorum must be equally long"), "{lengths}");
}
