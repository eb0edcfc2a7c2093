//! Locks: between two nodes, and between a node and qemu-io.

use block_file::register;
use block_graph::{AllowAll, Error, NodeRef, OpenContext, OpenFlags, Options, Registry, Secrets};
use io_loop::block_on;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

const SHARED: OpenFlags = OpenFlags { force_share: true, ..OpenFlags::READ };

fn context() -> OpenContext {
    let mut registry = Registry::new();
    register(&mut registry);
    OpenContext::new(Arc::new(registry), Arc::new(Secrets::default()), Arc::new(AllowAll))
}

async fn open(path: &Path, options: Options, flags: OpenFlags) -> Result<NodeRef, Error> {
    context().open_protocol(path.to_str().unwrap(), options, flags).await
}

/// Whether it opens; else the message, which has a hint with it.
async fn outcome(path: &Path, flags: OpenFlags) -> Result<(), String> {
    let opened = open(path, Options::new(), flags).await;
    opened.map(drop).map_err(|error| {
        assert_eq!(error.hints(), [format!("Is another process using the image [{}]?", path.display())]);
        error.to_string()
    })
}

fn no_write() -> Result<(), String> {
    Err("Failed to get \"write\" lock".into())
}

fn no_shared_write() -> Result<(), String> {
    Err("Failed to get shared \"write\" lock".into())
}

#[test]
fn one_node_writes_or_several_read() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path();
    block_on(async {
        let reader = open(path, Options::new(), OpenFlags::READ).await.unwrap();
        assert_eq!(outcome(path, OpenFlags::READ).await, Ok(()));
        assert_eq!(outcome(path, OpenFlags::WRITE).await, no_write());
        drop(reader);
        let writer = open(path, Options::new(), OpenFlags::WRITE).await.unwrap();
        assert_eq!(outcome(path, OpenFlags::READ).await, no_shared_write());
        assert_eq!(outcome(path, OpenFlags::WRITE).await, no_write());
        assert_eq!(outcome(path, SHARED).await, Ok(()));
        assert!(open(path, Options::with("locking", "off"), OpenFlags::WRITE).await.is_ok());
        let created = context().create_protocol(path.to_str().unwrap(), &mut Options::new()).await;
        assert_eq!(created.map_err(|error| error.to_string()), no_write());
        drop(writer);
        assert_eq!(outcome(path, OpenFlags::WRITE).await, Ok(()));
    });
}

/// Runs qemu-io, or says that it is not there.
fn qemu_io(arguments: &[&str]) -> Option<Output> {
    let output = Command::new("qemu-io").args(arguments).output();
    if output.is_err() {
        eprintln!("SKIPPED: qemu-io is not installed, so the locks were not compared with QEMU's");
    }
    output.ok()
}

#[test]
fn qemu_io_and_a_node_keep_each_other_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let name = path.to_str().unwrap();
    if qemu_io(&["--version"]).is_none() {
        return;
    }
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", name, "1M"]).status().unwrap();
    assert!(made.success());
    let says = |arguments: &[&str]| {
        let output = qemu_io(&[arguments, &["-c", "quit", name]].concat()).unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    block_on(async {
        let node = open(&path, Options::new(), OpenFlags::WRITE).await.unwrap();
        let (writes, reads) = (says(&[]), says(&["-r"]));
        assert!(writes.contains("Failed to get \"write\" lock"), "{writes}");
        assert!(reads.contains("Failed to get shared \"write\" lock"), "{reads}");
        assert_eq!(says(&["-r", "-U"]), "");
        drop(node);
        let node = open(&path, Options::new(), OpenFlags::READ).await.unwrap();
        assert_eq!(says(&["-r"]), "", "several may read");
        assert_ne!(says(&[]), "");
        drop(node);
        assert_eq!(says(&[]), "");

        for (arguments, reads) in [(&["-r"][..], Ok(())), (&[], no_shared_write())] {
            let mut peer = Command::new("qemu-io")
                .args(arguments)
                .arg(name)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut input = peer.stdin.take().unwrap();
            let mut output = BufReader::new(peer.stdout.take().unwrap());
            // It answers once it has the file.
            input.write_all(b"length\n").unwrap();
            let mut line = String::new();
            while !line.contains("1 MiB") {
                line.clear();
                assert!(output.read_line(&mut line).unwrap() > 0, "qemu-io did not open the file");
            }
            assert_eq!(outcome(&path, OpenFlags::READ).await, reads, "{arguments:?}");
            assert_eq!(outcome(&path, OpenFlags::WRITE).await, no_write(), "{arguments:?}");
            assert_eq!(outcome(&path, SHARED).await, Ok(()), "{arguments:?}");
            drop(input);
            assert!(peer.wait().unwrap().success());
        }
    });
}
