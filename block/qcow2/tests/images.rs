//! What the driver makes of images, and images of what it does: snapshots with VM state, preallocation, amendments,
//! damage. qemu-img looks at each.

mod host;

use block_graph::{
    Errno, NodeRef, OpenFlags, Options, Preallocation, SnapshotInfo, Truncate, WriteFlags, ZeroFlags,
};
use io_loop::{IoBuffer, block_on};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// What qemu-img says to arguments; fails if it does. `None` if it is not installed.
fn qemu_img(arguments: &[&str]) -> Option<String> {
    let Ok(output) = Command::new("qemu-img").args(arguments).output() else {
        eprintln!("SKIPPED: qemu-img is not installed (package qemu-utils)");
        return None;
    };
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    Some(text)
}

/// A new image in a folder that goes with the test; `None` if qemu-img is not installed.
fn image(options: &str, size: &str) -> Option<(TempDir, PathBuf)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.qcow2");
    let options = if options.is_empty() { "lazy_refcounts=off" } else { options };
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), size])?;
    Some((folder, path))
}

async fn open(path: &Path) -> NodeRef {
    host::open_with(path, Options::new(), OpenFlags::WRITE).await.unwrap()
}

fn check(path: &Path) {
    qemu_img(&["check", "-q", path.to_str().unwrap()]);
}

#[test]
fn vm_state_belongs_to_its_snapshot() {
    let Some((_folder, path)) = image("", "3M") else { return };
    block_on(async {
        let node = open(&path).await;
        host::write(&node, 0, &[1; 100_000], WriteFlags::empty()).await.unwrap();
        let image = node.driver().image().unwrap();
        let state: Vec<u8> = (0..300_000u32).map(|at| (at / 7) as u8).collect();
        image.write_vm_state(5, &IoBuffer::from(&state[..]).into_io()).await.unwrap();
        let info = SnapshotInfo { name: "vm".into(), vm_state_size: 300_005, ..SnapshotInfo::default() };
        image.snapshot_create(info).await.unwrap();
        host::write(&node, 50_000, &[2; 100_000], WriteFlags::empty()).await.unwrap();
        image.snapshot_apply("vm").await.unwrap();
        let mut back = IoBuffer::zeroed(300_100);
        image.read_vm_state(0, &back.io()).await.unwrap();
        assert_eq!(back.bytes()[5..300_005], state);
        assert_eq!(host::read(&node, 0, 100_001).await.unwrap(), [vec![1; 100_000], vec![0]].concat());
        node.close().await.unwrap();
    });
    check(&path);
    let list = qemu_img(&["snapshot", "-l", path.to_str().unwrap()]).unwrap();
    assert!(list.contains("293 KiB"), "{list}");
}

#[test]
fn growing_with_each_preallocation_leaves_zeros() {
    for options in ["", "cluster_size=512", "extended_l2=on", "compat=0.10"] {
        for how in [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
            let Some((_folder, path)) = image(options, "1000k") else { return };
            block_on(async {
                let node = open(&path).await;
                host::write(&node, 900 << 10, &[3; 100 << 10], WriteFlags::empty()).await.unwrap();
                let truncate = Truncate { exact: true, preallocation: how, zero: false };
                node.truncate(5 << 20, truncate).await.unwrap();
                let all = host::read(&node, 0, 5 << 20).await.unwrap();
                assert!(all[900 << 10..1000 << 10].iter().all(|byte| *byte == 3));
                assert!(all[..900 << 10].iter().chain(&all[1000 << 10..]).all(|byte| *byte == 0));
                host::write(&node, 4 << 20, &[4; 70_000], WriteFlags::empty()).await.unwrap();
                node.close().await.unwrap();
            });
            check(&path);
        }
    }
}

#[test]
fn versions_are_changed_in_both_directions() {
    let Some((_folder, path)) = image("", "2M") else { return };
    let name = path.to_str().unwrap();
    block_on(async {
        let node = open(&path).await;
        host::write(&node, 0, &[5; 200_000], WriteFlags::empty()).await.unwrap();
        node.write_zeroes(65536, 65536, ZeroFlags::empty()).await.unwrap();
        let amend = async |name: &str, value: &str| {
            let image = node.driver().image().unwrap();
            image.amend(&mut Options::with(name, value), &|_, _| (), false).await
        };
        amend("compat", "0.10").await.unwrap();
        assert!(qemu_img(&["info", "-U", name]).unwrap().contains("compat: 0.10"));
        let error = amend("lazy_refcounts", "on").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        );
        amend("compat", "1.1").await.unwrap();
        amend("lazy_refcounts", "on").await.unwrap();
        let error = amend("compat", "7").await.unwrap_err();
        assert_eq!(error.to_string(), "Unknown compatibility level 7");
        let expected = [vec![5; 65536], vec![0; 65536], vec![5; 200_000 - 131_072]].concat();
        assert_eq!(host::read(&node, 0, 200_000).await.unwrap(), expected);
        node.close().await.unwrap();
    });
    check(&path);
    assert!(qemu_img(&["info", name]).unwrap().contains("lazy refcounts: true"));
}

/// Changes bytes of a file.
fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    std::fs::File::options().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

#[test]
fn an_image_that_would_overwrite_its_own_tables_is_marked_as_corrupt() {
    let Some((_folder, path)) = image("preallocation=metadata", "1M") else { return };
    // The first L2 entry names the refcount table's cluster.
    let mut bytes = [0; 8];
    let file = std::fs::File::open(&path).unwrap();
    file.read_exact_at(&mut bytes, 0x30000).unwrap();
    let table = u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00;
    patch(&path, table, &0x8000_0000_0001_0000u64.to_be_bytes());
    block_on(async {
        let node = open(&path).await;
        let error = host::write(&node, 0, &[1; 512], WriteFlags::empty()).await.unwrap_err();
        assert_eq!(error.errno(), Errno::IO);
        let error = host::read(&node, 65536, 512).await.unwrap_err();
        assert_eq!(error.errno(), Errno::NO_MEDIUM);
        node.close().await.unwrap_or_default();
        let error = host::open_with(&path, Options::new(), OpenFlags::WRITE).await.unwrap_err();
        assert_eq!(error.to_string(), "qcow2: Image is corrupt; cannot be opened read/write");
        let node = host::open_with(&path, Options::new(), OpenFlags::READ).await.unwrap();
        assert_eq!(host::read(&node, 65536, 512).await.unwrap(), [0; 512]);
    });
}

#[test]
fn an_l2_entry_between_clusters_is_an_error_and_not_a_panic() {
    let Some((_folder, path)) = image("preallocation=metadata", "1M") else { return };
    let mut bytes = [0; 8];
    std::fs::File::open(&path).unwrap().read_exact_at(&mut bytes, 0x30000).unwrap();
    let table = u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00;
    patch(&path, table, &0x8000_0000_0005_0200u64.to_be_bytes());
    block_on(async {
        let node = host::open_with(&path, Options::new(), OpenFlags::READ).await.unwrap();
        assert_eq!(host::read(&node, 0, 512).await.unwrap_err().errno(), Errno::IO);
        // Others are still read.
        assert_eq!(host::read(&node, 65536, 512).await.unwrap(), [0; 512]);
    });
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened() {
    let Some((_folder, path)) = image("lazy_refcounts=on", "1M") else { return };
    block_on(async {
        let node = open(&path).await;
        host::write(&node, 0, &[6; 300_000], WriteFlags::empty()).await.unwrap();
        node.flush().await.unwrap();
        // Nobody closes it: refcounts are behind.
        let crashed = path.with_extension("crashed");
        std::fs::copy(&path, &crashed).unwrap();
        assert!(node.driver().image().unwrap().info().dirty);
        let again = open(&crashed).await;
        assert!(!again.driver().image().unwrap().info().dirty);
        assert_eq!(host::read(&again, 0, 300_000).await.unwrap(), [6; 300_000]);
        again.close().await.unwrap();
        node.close().await.unwrap();
        check(&crashed);
    });
    check(&path);
}

#[test]
fn unknown_features_that_can_be_cleared_are_and_others_refuse_the_image() {
    let Some((_folder, path)) = image("", "1M") else { return };
    patch(&path, 88, &(1u64 << 40).to_be_bytes());
    block_on(async {
        open(&path).await.close().await.unwrap();
        let mut bytes = [0; 8];
        std::fs::File::open(&path).unwrap().read_exact_at(&mut bytes, 88).unwrap();
        assert_eq!(bytes, [0; 8]);
        patch(&path, 72, &(1u64 << 40).to_be_bytes());
        let error = host::open_with(&path, Options::new(), OpenFlags::READ).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 10000000000"
        );
    });
}

#[test]
fn a_small_cache_writes_and_forgets_and_loses_nothing() {
    let Some((_folder, path)) = image("cluster_size=512", "64M") else { return };
    block_on(async {
        let mut options = Options::with("l2-cache-size", "4k");
        options.set("refcount-cache-size", "4k");
        let node = host::open_with(&path, options, OpenFlags::WRITE).await.unwrap();
        for round in 0..400u64 {
            let at = (round * 7919 % 4096) * 16384;
            host::write(&node, at, &[round as u8; 700], WriteFlags::empty()).await.unwrap();
        }
        for round in 0..400u64 {
            let at = (round * 7919 % 4096) * 16384;
            assert_eq!(host::read(&node, at, 700).await.unwrap(), [round as u8; 700]);
        }
        node.close().await.unwrap();
    });
    check(&path);
}

#[test]
fn compressed_writes_share_clusters_and_are_read_back() {
    for options in ["", "compression_type=zstd", "cluster_size=2M"] {
        let Some((_folder, path)) = image(options, "8M") else { return };
        let data: Vec<u8> = (0..8u32 << 20).map(|at| (at >> 9) as u8).collect();
        block_on(async {
            let node = open(&path).await;
            host::write(&node, 0, &data, WriteFlags::COMPRESSED).await.unwrap();
            assert_eq!(host::read(&node, 0, data.len()).await.unwrap(), data);
            node.close().await.unwrap();
        });
        check(&path);
        // Header and tables of 2 MiB clusters are large by themselves.
        let most = if options.contains("2M") { 14 << 20 } else { 3 << 20 };
        assert!(std::fs::metadata(&path).unwrap().len() < most);
        let raw = path.with_extension("raw");
        std::fs::write(&raw, &data).unwrap();
        qemu_img(&["compare", "-q", path.to_str().unwrap(), raw.to_str().unwrap()]);
    }
}
