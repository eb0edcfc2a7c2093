//! Filters over images: copies of what is read, compression of what is written, limits of speed.

use block_filters::{ThrottleGroup, ThrottleGroups, ThrottleKind, ThrottleLimits};
use block_graph::{
    AllowAll, Error, NodeRef, OpenContext, OpenFlags, Options, Registry, Secrets, WriteFlags, ZeroFlags,
};
use io_loop::{IoBuffer, block_on, spawn};
use qcow2::Qcow2Kind;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tempfile::TempDir;

const CLUSTER: usize = 65536;

fn context() -> OpenContext {
    let groups = Arc::new(ThrottleGroups::default());
    let mut limits = Options::with("iops-total", "500");
    let limits = ThrottleLimits::take(&mut limits, "").unwrap();
    groups.add("slow", ThrottleGroup::new(limits));
    let mut registry = Registry::new();
    registry.add(ThrottleKind { groups });
    registry.add(Qcow2Kind);
    block_file::register(&mut registry);
    block_filters::register(&mut registry);
    OpenContext::new(Arc::new(registry), Arc::new(Secrets::default()), Arc::new(AllowAll))
}

/// A folder with a raw image of 16 clusters that are numbered, and an empty overlay on it.
fn chain() -> (TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (base, top) = (folder.path().join("base.raw"), folder.path().join("top.qcow2"));
    let bytes: Vec<u8> =
        (0..16).flat_map(|cluster| vec![if cluster == 5 { 0 } else { cluster + 1 }; CLUSTER]).collect();
    fs::write(&base, bytes).unwrap();
    block_on(make_overlay(&context(), &top, &base, "raw"));
    (folder, base, top)
}

async fn make_overlay(context: &OpenContext, top: &Path, base: &Path, format: &str) {
    let mut options = Options::with("size", "1M");
    options.set("backing_file", base.to_str().unwrap());
    options.set("backing_fmt", format);
    let kind = context.registry.get("qcow2").unwrap();
    kind.create(context, top.to_str().unwrap(), &mut options).await.unwrap();
}

async fn open(context: &OpenContext, driver: &str, format: &str, path: &Path) -> Result<NodeRef, Error> {
    let mut options = Options::with("driver", driver);
    options.set("file.driver", format);
    options.set("file.file.filename", path.to_str().unwrap());
    if driver == "throttle" {
        options.set("throttle-group", "slow");
    }
    context.open(options, OpenFlags::WRITE).await
}

async fn read(node: &NodeRef, offset: usize, len: usize) -> Vec<u8> {
    let mut buffer = IoBuffer::from(&vec![0xee; len][..]);
    node.read(offset as u64, &buffer.io()).await.unwrap();
    buffer.bytes().to_vec()
}

async fn write(node: &NodeRef, offset: usize, bytes: &[u8]) {
    node.write(offset as u64, &IoBuffer::from(bytes).into_io(), WriteFlags::empty()).await.unwrap();
}

/// Which of the image's clusters it has itself.
async fn own_clusters(node: &NodeRef) -> Vec<usize> {
    let mut own = Vec::new();
    for cluster in 0..16 {
        let status = node.block_status((cluster * CLUSTER) as u64, CLUSTER as u64, true).await.unwrap();
        if status.allocated {
            own.push(cluster);
        }
    }
    own
}

#[test]
fn what_is_read_is_copied_in_whole_clusters() {
    let (_folder, base, top) = chain();
    block_on(async {
        let context = context();
        let node = open(&context, "copy-on-read", "qcow2", &top).await.unwrap();
        let image = node.child(block_graph::Role::Filtered).unwrap();
        assert_eq!(own_clusters(&image).await, [0; 0]);
        assert_eq!(read(&node, 2 * CLUSTER - 10, 20).await, [[2; 10], [3; 10]].concat());
        assert_eq!(own_clusters(&image).await, [1, 2]);
        assert_eq!(read(&node, 5 * CLUSTER, 1).await, [0]);
        write(&node, 4 * CLUSTER, &[99; 512]).await;
        assert_eq!(
            read(&node, 4 * CLUSTER - 1, CLUSTER + 2 * CLUSTER).await[..514],
            [&[4], &[99; 512][..], &[5]].concat()
        );
        assert_eq!(own_clusters(&image).await, [1, 2, 3, 4, 5, 6]);
        let status = image.block_status(5 * CLUSTER as u64, 1, true).await.unwrap();
        assert!(status.zero, "zeroes are copied as such");
        // The base is not needed any more for what was read.
        fs::write(&base, vec![0xff; 1 << 20]).unwrap();
        assert_eq!(read(&node, 6 * CLUSTER + 100, 10).await, [7; 10]);
        assert_eq!(read(&node, 7 * CLUSTER, 10).await, [0xff; 10]);
        node.close().await.unwrap();
    });
}

#[test]
fn copies_do_not_undo_writes() {
    let (_folder, _base, top) = chain();
    block_on(async {
        let context = context();
        let node = open(&context, "copy-on-read", "qcow2", &top).await.unwrap();
        let tasks: Vec<_> = (0..64)
            .map(|index| {
                let node = node.clone();
                spawn(async move {
                    let at = index % 16 * CLUSTER + index / 16 * 512;
                    write(&node, at, &[200; 512]).await;
                    read(&node, at + 2048, 512).await;
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        for index in 0..64 {
            assert_eq!(read(&node, index % 16 * CLUSTER + index / 16 * 512, 512).await, [200; 512]);
        }
        node.close().await.unwrap();
    });
}

#[test]
fn copies_stop_at_the_bottom() {
    let (folder, _base, middle) = chain();
    let top = folder.path().join("upper.qcow2");
    block_on(async {
        let context = context();
        let opened = open(&context, "copy-on-read", "qcow2", &middle).await.unwrap();
        write(&opened, 3 * CLUSTER, &[50; CLUSTER]).await;
        opened.close().await.unwrap();
        drop(opened);
        make_overlay(&context, &top, &middle, "qcow2").await;
        let mut options = Options::with("driver", "qcow2");
        options.set("file.filename", top.to_str().unwrap());
        let image = context.open(options, OpenFlags::WRITE).await.unwrap();
        let with_bottom = |bottom: &str| {
            let mut filter = Options::with("driver", "copy-on-read");
            filter.set("file", image.clone());
            filter.set("bottom", bottom);
            filter
        };
        let bottom = image.backing().unwrap();
        let node = context.open(with_bottom(bottom.name()), OpenFlags::WRITE).await.unwrap();
        assert_eq!(read(&node, 4 * CLUSTER - 10, 20).await, [[50; 10], [5; 10]].concat());
        assert_eq!(own_clusters(&image).await, [3], "the other is below the bottom");
        let error = context.open(with_bottom("nobody"), OpenFlags::WRITE).await.unwrap_err();
        assert_eq!(error.to_string(), "Bottom node 'nobody' not found");
    });
}

#[test]
fn what_is_written_is_compressed() {
    let (_folder, base, top) = chain();
    block_on(async {
        let context = context();
        let node = open(&context, "compress", "qcow2", &top).await.unwrap();
        assert_eq!(node.driver().limits().request_alignment as usize, CLUSTER);
        write(&node, CLUSTER / 2, &[77; CLUSTER]).await;
        write(&node, 10 * CLUSTER, &[78; 2 * CLUSTER]).await;
        let expected = [&[1; CLUSTER / 2][..], &[77; CLUSTER], &[2; CLUSTER / 2]].concat();
        assert!(read(&node, 0, 2 * CLUSTER).await == expected);
        assert!(read(&node, 10 * CLUSTER, 2 * CLUSTER).await == [78; 2 * CLUSTER]);
        let image = node.child(block_graph::Role::Filtered).unwrap();
        for cluster in [0, 1, 10, 11] {
            let status = image.block_status((cluster * CLUSTER) as u64, 1, true).await.unwrap();
            assert!(status.compressed, "cluster {cluster}");
        }
        node.close().await.unwrap();
        drop((node, image));
        let error = open(&context, "compress", "raw", &base).await.unwrap_err();
        assert_eq!(error.to_string(), "Compression is not supported for underlying format: raw");
    });
}

#[test]
fn requests_wait_for_their_groups_limits() {
    let (_folder, base, _top) = chain();
    block_on(async {
        let context = context();
        let node = open(&context, "throttle", "raw", &base).await.unwrap();
        let start = Instant::now();
        // 50 go at once, 100 more take a fifth of a second.
        let reads: Vec<_> = (0..150)
            .map(|index| {
                let node = node.clone();
                spawn(async move {
                    if index % 3 == 0 {
                        node.write_zeroes(0, 512, ZeroFlags::empty()).await.unwrap();
                    } else {
                        read(&node, 512, 512).await;
                    }
                })
            })
            .collect();
        for read in reads {
            read.await;
        }
        let took = start.elapsed().as_millis();
        assert!(took >= 190, "{took} ms");
        let mut options = Options::with("driver", "throttle");
        options.set("file.filename", base.to_str().unwrap());
        let error = context.open(options, OpenFlags::WRITE).await.unwrap_err();
        assert_eq!(error.to_string(), "Please specify a throttle group");
    });
}
