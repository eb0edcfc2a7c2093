//! Encrypted disks as nodes: on their own, and beside qemu-img and qemu-io.

use block_graph::{
    AllowAll, Errno, Error, Node, NodeRef, OpenContext, OpenFlags, Options, Registry, Secrets, Truncate,
    WriteFlags, ZeroFlags,
};
use io_loop::{IoBuffer, block_on};
use luks::LuksKind;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

fn context() -> OpenContext {
    let mut registry = Registry::new();
    block_file::register(&mut registry);
    registry.add(LuksKind);
    block_filters::register(&mut registry);
    let mut secrets = Secrets::default();
    for (id, text) in [("s", "a secret"), ("t", "another"), ("wrong", "none of them")] {
        secrets.add(id, text.as_bytes().to_vec());
    }
    OpenContext::new(Arc::new(registry), Arc::new(secrets), Arc::new(AllowAll))
}

fn options(pairs: &[(&str, &str)]) -> Options {
    pairs.iter().map(|(name, value)| (*name, *value)).collect()
}

fn create(path: &Path, pairs: &[(&str, &str)]) -> Result<(), Error> {
    let context = context();
    let kind = context.registry.get("luks").unwrap();
    let mut all = options(&[("key-secret", "s"), ("iter-time", "10"), ("size", "1M")]);
    pairs.iter().for_each(|(name, value)| all.set(*name, *value));
    block_on(kind.create(&context, path.to_str().unwrap(), &mut all))
}

async fn open(path: &Path, pairs: &[(&str, &str)], flags: OpenFlags) -> Result<NodeRef, Error> {
    context().open_filename(path.to_str().unwrap(), options(pairs), flags).await
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.luks");
    (folder, path)
}

async fn read(node: &NodeRef, offset: u64, len: usize) -> Vec<u8> {
    let mut buffer = IoBuffer::from(&vec![0xee; len][..]);
    node.read(offset, &buffer.io()).await.unwrap();
    buffer.bytes().to_vec()
}

async fn write(node: &NodeRef, offset: u64, bytes: &[u8]) {
    node.write(offset, &IoBuffer::from(bytes).into_io(), WriteFlags::empty()).await.unwrap();
}

/// Runs one of QEMU's programs, or says that it is not there.
fn qemu(program: &str, arguments: &[&str]) -> Option<String> {
    // qemu-img wants its command first.
    let (first, rest) = if program == "qemu-img" { arguments.split_at(1) } else { arguments.split_at(0) };
    let secret = ["--object", "secret,id=s,data=a secret"];
    let Ok(output) = Command::new(program).args(first).args(secret).args(rest).output() else {
        eprintln!("SKIPPED: {program} is not installed, so this was not compared with it");
        return None;
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{errors}");
    Some(text)
}

#[test]
fn requests_of_any_alignment_are_like_a_vector() {
    let (_folder, path) = scratch();
    create(&path, &[]).unwrap();
    let mut model = vec![0_u8; 1 << 20];
    let mut state = 7_u64;
    let mut below = |bound: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % bound
    };
    block_on(async {
        let node = open(&path, &[("key-secret", "s")], OpenFlags::WRITE).await.unwrap();
        assert_eq!((node.driver().format_name(), node.len()), ("luks", 1 << 20));
        node.write_zeroes(0, 1 << 20, ZeroFlags::empty()).await.unwrap();
        for step in 0..200_u64 {
            let offset = below(1 << 20) as usize;
            let len = [1, 512, 5000, 600_000][below(4) as usize].min((1 << 20) - offset);
            if below(2) == 0 {
                assert!(read(&node, offset as u64, len).await == model[offset..offset + len], "step {step}");
            } else {
                model[offset..offset + len].fill(step as u8);
                write(&node, offset as u64, &model[offset..offset + len]).await;
            }
        }
        node.close().await.unwrap();
        assert!(read(&node, 0, 1 << 20).await == model);
    });
    let file = fs::read(&path).unwrap();
    assert!(!file.windows(512).any(|window| window == [199; 512]), "there is plain text in the file");
    let raw = path.with_extension("raw");
    let source = format!("driver=luks,key-secret=s,file.filename={}", path.display());
    if qemu("qemu-img", &["convert", "--image-opts", &source, "-O", "raw", raw.to_str().unwrap()]).is_some() {
        assert!(fs::read(&raw).unwrap() == model);
    }
}

#[test]
fn writes_to_parts_of_a_sector_do_not_undo_each_other() {
    let (_folder, path) = scratch();
    create(&path, &[]).unwrap();
    block_on(async {
        let node = open(&path, &[("key-secret", "s")], OpenFlags::WRITE).await.unwrap();
        let writes: Vec<_> = (0..256_u64)
            .map(|index| {
                let node = node.clone();
                io_loop::spawn(async move { write(&node, index * 16, &[index as u8; 16]).await })
            })
            .collect();
        for write in writes {
            write.await;
        }
        let bytes = read(&node, 0, 4096).await;
        assert!(bytes.chunks(16).enumerate().all(|(index, part)| part == [index as u8; 16]));
    });
}

#[test]
fn disks_change_their_length() {
    let (_folder, path) = scratch();
    create(&path, &[("preallocation", "falloc")]).unwrap();
    block_on(async {
        let node = open(&path, &[("key-secret", "s")], OpenFlags::WRITE).await.unwrap();
        assert!(node.driver().allocated_size().unwrap() >= 1 << 20);
        write(&node, (1 << 20) - 4, b"last").await;
        node.truncate(3 << 20, Truncate::default()).await.unwrap();
        assert_eq!(node.len(), 3 << 20);
        write(&node, (3 << 20) - 4, b"more").await;
        assert_eq!(read(&node, (1 << 20) - 4, 4).await, b"last");
        node.truncate(1 << 20, Truncate::default()).await.unwrap();
        assert_eq!(read(&node, (1 << 20) - 4, 4).await, b"last");
    });
}

#[test]
fn what_does_not_open_says_why() {
    let (_folder, path) = scratch();
    create(&path, &[]).unwrap();
    let error =
        |pairs: &[(&str, &str)]| block_on(async { open(&path, pairs, OpenFlags::READ).await.unwrap_err() });
    assert_eq!(error(&[]).to_string(), "Parameter 'key-secret' is required for cipher");
    assert_eq!(error(&[("key-secret", "x")]).to_string(), "No secret with id 'x'");
    let wrong = error(&[("key-secret", "wrong")]);
    assert_eq!(wrong.typed(), Some(&luks::Error::InvalidPassword));
    let other = path.with_extension("other");
    fs::write(&other, [0; 100]).unwrap();
    let short = block_on(open(&other, &[("driver", "luks"), ("key-secret", "s")], OpenFlags::READ));
    assert!(short.unwrap_err().to_string().starts_with("Could not read encryption header"));
    fs::write(&other, [0; 1000]).unwrap();
    let none = block_on(open(&other, &[("driver", "luks"), ("key-secret", "s")], OpenFlags::READ));
    assert_eq!(none.unwrap_err().typed(), Some(&luks::Error::NotLuks));

    let refused = |pairs: &[(&str, &str)]| create(&other, pairs).unwrap_err();
    assert_eq!(
        refused(&[("cipher-alg", "foo")]).to_string(),
        "Parameter 'cipher-alg' does not accept value 'foo'"
    );
    assert_eq!(refused(&[("key-secret", "x")]).to_string(), "No secret with id 'x'");
    assert_eq!(refused(&[("size", "9E")]).errno(), Errno::TOO_LARGE);
    assert!(other.exists(), "nothing was begun");
    let cast5 = [("cipher-alg", "cast5-128")];
    assert_eq!(refused(&cast5).to_string(), "Unsupported cipher mode xts");
    assert!(!other.exists(), "what was begun is gone");
    // More than the file system takes.
    assert_eq!(refused(&[("size", "8000P")]).to_string(), "The requested file size is too large");
}

#[test]
fn passwords_change_and_info_says_so() {
    let (_folder, path) = scratch();
    create(&path, &[]).unwrap();
    block_on(async {
        let node = open(&path, &[("key-secret", "s")], OpenFlags::WRITE).await.unwrap();
        write(&node, 1000, b"text").await;
        let amend = async |node: &Arc<Node>, pairs: &[(&str, &str)]| {
            let mut options = options(pairs);
            let amended = node.driver().image().unwrap().amend(&mut options, &|_, _| (), false).await;
            assert!(amended.is_err() || options.is_empty());
            amended
        };
        amend(&node, &[("state", "active"), ("new-secret", "t"), ("iter-time", "10")]).await.unwrap();
        let info = node.driver().image().unwrap().info();
        let (name, map) = info.specific.unwrap();
        assert!(info.encrypted && name == "luks");
        assert_eq!(map["slots"][1]["active"], true);
        assert_eq!(map["payload-offset"], 2_068_480);
        amend(&node, &[("state", "inactive"), ("old-secret", "s")]).await.unwrap();
        let last = amend(&node, &[("state", "inactive"), ("keyslot", "1")]).await.unwrap_err();
        assert_eq!(last.typed(), Some(&luks::Error::LastSlot(1)));
        assert_eq!(amend(&node, &[]).await.unwrap_err().to_string(), "Parameter 'state' is missing");
        let retrieved = amend(&node, &[("state", "active"), ("new-secret", "s"), ("iter-time", "10")]).await;
        assert_eq!(retrieved.unwrap_err().hints(), ["Failed to retrieve the master key"]);
        node.close().await.unwrap();
        drop(node);
        assert!(open(&path, &[("key-secret", "s")], OpenFlags::READ).await.is_err());
        let node = open(&path, &[("key-secret", "t")], OpenFlags::READ).await.unwrap();
        assert_eq!(read(&node, 1000, 4).await, b"text");
        drop(node);
        let look = open(&path, &[], OpenFlags { no_io: true, ..OpenFlags::READ }).await.unwrap();
        assert!(look.read(0, &IoBuffer::zeroed(1).into_io()).await.is_err());
    });
}

#[test]
fn a_header_may_be_elsewhere() {
    let (_folder, path) = scratch();
    create(&path, &[("detached-header", "on")]).unwrap();
    let data = path.with_extension("data");
    fs::write(&data, vec![0; 1 << 20]).unwrap();
    block_on(async {
        let header = path.to_str().unwrap();
        let pairs =
            [("driver", "luks"), ("key-secret", "s"), ("header.driver", "file"), ("header.filename", header)];
        let node = open(&data, &pairs, OpenFlags::WRITE).await.unwrap();
        assert_eq!(node.len(), 1 << 20);
        write(&node, 0, &[0x5a; 65536]).await;
        node.close().await.unwrap();
    });
    assert!(!fs::read(&data).unwrap().starts_with(&[0x5a; 16]));
    let image = format!(
        "driver=luks,key-secret=s,file.driver=file,file.filename={},header.driver=file,header.filename={}",
        data.display(),
        path.display()
    );
    if let Some(text) = qemu("qemu-io", &["--image-opts", &image, "-c", "read -P 0x5a 0 64k"]) {
        assert!(text.contains("read 65536/65536") && !text.contains("failed"), "{text}");
    }
}

#[test]
fn sizes_are_measured_as_they_come_out() {
    let (_folder, path) = scratch();
    create(&path, &[("cipher-alg", "serpent-192")]).unwrap();
    let context = context();
    let kind = context.registry.get("luks").unwrap();
    let pairs =
        [("size", "1M"), ("cipher-alg", "serpent-192"), ("key-secret", "s"), ("preallocation", "full")];
    let measured = block_on(kind.measure(&mut options(&pairs), None)).unwrap();
    assert_eq!(measured.required, fs::metadata(&path).unwrap().len());
    assert_eq!(measured.required, measured.fully_allocated);
}
