//! Injected errors, states, limits and breakpoints.

use block_filters::Blkdebug;
use block_graph::{
    AllowAll, Errno, Error, NodeRef, OpenContext, OpenFlags, Options, Registry, Secrets, WriteFlags,
    ZeroFlags,
};
use io_loop::{IoBuffer, block_on, spawn, yield_now};
use std::fs;
use std::path::Path;
use std::sync::Arc;

fn context() -> OpenContext {
    let mut registry = Registry::new();
    block_file::register(&mut registry);
    block_filters::register(&mut registry);
    OpenContext::new(Arc::new(registry), Arc::new(Secrets::default()), Arc::new(AllowAll))
}

fn disk() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, vec![1; 1 << 20]).unwrap();
    file
}

async fn open(path: &Path, pairs: &[(&str, &str)]) -> Result<NodeRef, Error> {
    let mut options: Options = pairs.iter().map(|(name, value)| (*name, *value)).collect();
    options.set("driver", "blkdebug");
    options.set("image.filename", path.to_str().unwrap());
    context().open(options, OpenFlags::WRITE).await
}

async fn read(node: &NodeRef, offset: u64) -> Result<(), Errno> {
    node.read(offset, &IoBuffer::zeroed(512).into_io()).await.map_err(|error| error.errno())
}

async fn write(node: &NodeRef, offset: u64) -> Result<(), Errno> {
    let memory = IoBuffer::zeroed(512).into_io();
    node.write(offset, &memory, WriteFlags::empty()).await.map_err(|error| error.errno())
}

#[test]
fn errors_come_after_their_events() {
    let file = disk();
    block_on(async {
        let pairs = [
            ("inject-error.0.event", "l2_update"),
            ("inject-error.0.iotype", "write"),
            ("inject-error.0.errno", "28"),
            ("inject-error.0.once", "on"),
            ("inject-error.0.state", "2"),
            ("inject-error.1.event", "read_aio"),
            ("inject-error.1.sector", "3"),
            ("inject-error.1.immediately", "on"),
            ("set-state.0.event", "l1_update"),
            ("set-state.0.new_state", "2"),
        ];
        let node = open(file.path(), &pairs).await.unwrap();
        let event = |event| node.driver().debug_event(event);
        event("l2_update");
        assert_eq!(write(&node, 0).await, Ok(()), "it is in another state");
        event("l1_update");
        assert_eq!(write(&node, 0).await, Ok(()), "its event has not come");
        event("l2_update");
        assert_eq!(read(&node, 0).await, Ok(()));
        assert_eq!(write(&node, 0).await, Err(Errno::NO_SPACE));
        assert_eq!(write(&node, 0).await, Ok(()), "it came once");
        event("read_aio");
        assert_eq!(read(&node, 1024).await, Ok(()));
        for _ in 0..2 {
            assert_eq!(read(&node, 1536).await, Err(Errno::IO));
        }
    });
}

#[test]
fn rules_come_from_a_file() {
    let (file, config) = (disk(), tempfile::NamedTempFile::new().unwrap());
    let text = "# a comment\n[inject-error]\nevent = \"pwritev\"\nerrno = \"5\"\nsector = \"-1\"\n\n[set-state \"x\"]\n\
                event = \"none\"\nnew_state = \"1\"\n";
    fs::write(&config, text).unwrap();
    let (image, config) = (file.path().to_str().unwrap(), config.path().to_str().unwrap());
    block_on(async {
        let name = format!("blkdebug:{config}:{image}");
        let node = context().open_protocol(&name, Options::new(), OpenFlags::WRITE).await.unwrap();
        assert_eq!(read(&node, 0).await, Ok(()));
        assert_eq!(write(&node, 0).await, Err(Errno::IO));
        assert_eq!(node.filename(), Some(name));
        drop(node);
        let bad = |text: &str| {
            fs::write(config, text).unwrap();
            let name = format!("blkdebug:{config}:{image}");
            async move {
                let opened = context().open_protocol(&name, Options::new(), OpenFlags::WRITE).await;
                opened.unwrap_err().to_string()
            }
        };
        assert_eq!(bad("[inject-error]\n").await, "Missing event name for rule");
        let unknown = bad("[inject-error]\nevent = \"foo\"\n").await;
        assert_eq!(unknown, "invalid parameter value: foo");
        assert!(bad("[foo]\n").await.ends_with(":1: There is no option group 'foo'"));
        assert!(bad("event = \"none\"\n").await.ends_with(":1: no group defined"));
    });
}

#[test]
fn limits_are_shown_and_kept() {
    let file = disk();
    block_on(async {
        let pairs =
            [("align", "4k"), ("opt-write-zero", "64k"), ("opt-discard", "64k"), ("max-transfer", "8k")];
        let node = open(file.path(), &pairs).await.unwrap();
        let limits = node.driver().limits();
        assert_eq!((limits.request_alignment, limits.max_transfer), (4096, 8192));
        node.write_zeroes(100, 200_000, ZeroFlags::MAY_UNMAP).await.unwrap();
        let refused = node.write_zeroes(100, 200_000, ZeroFlags::NO_FALLBACK).await.unwrap_err();
        assert_eq!(refused.errno(), Errno::NOT_SUPPORTED);
        node.discard(300_000, 100_000).await.unwrap();
        drop(node);
        let bytes = fs::read(&file).unwrap();
        let zero: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at] == 0).collect();
        let expected: Vec<usize> = (100..200_100).chain(303_104..397_312).collect();
        assert!(zero == expected);
        let wrong = open(file.path(), &[("align", "100")]).await.unwrap_err();
        assert_eq!(wrong.to_string(), "Cannot meet constraints with align 100");
        let wrong = open(file.path(), &[("align", "4k"), ("max-transfer", "5k")]).await.unwrap_err();
        assert_eq!(wrong.to_string(), "Cannot meet constraints with max-transfer 5120");
    });
}

#[test]
fn breakpoints_keep_requests() {
    let file = disk();
    block_on(async {
        let node = open(file.path(), &[]).await.unwrap();
        let debug = Blkdebug::of(&node).unwrap();
        assert!(!debug.set_breakpoint("foo", "A"));
        assert!(debug.set_breakpoint("write_aio", "A"));
        node.driver().debug_event("write_aio");
        let request = spawn({
            let node = node.clone();
            async move { write(&node, 0).await }
        });
        while !debug.is_suspended("A") {
            yield_now().await;
        }
        assert_eq!(write(&node, 512).await, Ok(()), "others go on");
        assert!(!request.is_finished());
        assert!(debug.resume("A") && !debug.resume("A"));
        assert_eq!(request.await, Ok(()));
        assert!(debug.set_breakpoint("read_aio", "B"));
        assert!(debug.remove_breakpoint("B") && !debug.remove_breakpoint("B"));
    });
}
