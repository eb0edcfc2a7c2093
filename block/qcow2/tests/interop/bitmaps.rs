//! Persistent bitmaps: kept over closing and opening, here and there.

use crate::oracle::{Oracle, run};
use block_graph::{
    AllowAll, Driver, NodeRef, OpenContext, OpenFlags, Options, Registry, Result, Secrets, Truncate,
    WriteFlags, async_trait,
};
use io_loop::{IoBuffer, IoVec, block_on};
use serde_json::Value;
use std::any::Any;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

#[derive(Debug)]
pub(crate) struct HostDisk(pub(crate) File);

#[async_trait(?Send)]
impl Driver for HostDisk {
    fn format_name(&self) -> &'static str {
        "file"
    }

    fn len(&self) -> u64 {
        self.0.metadata().unwrap().len()
    }

    fn grows(&self) -> bool {
        true
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        let mut bytes = vec![0; into.len()];
        self.0.read_exact_at(&mut bytes, offset)?;
        into.copy_from(0, &bytes);
        Ok(())
    }

    async fn write(&self, offset: u64, from: &IoVec, _: WriteFlags) -> Result<()> {
        Ok(self.0.write_all_at(&from.to_vec(), offset)?)
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn truncate(&self, len: u64, _: Truncate) -> Result<()> {
        Ok(self.0.set_len(len)?)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

pub(crate) fn context() -> OpenContext {
    let mut registry = Registry::new();
    registry.add(qcow2::Qcow2Kind);
    OpenContext::new(Arc::new(registry), Arc::new(Secrets::default()), Arc::new(AllowAll))
}

async fn open(path: &Path, flags: OpenFlags) -> NodeRef {
    let context = context();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let file = context.add(None, Box::new(HostDisk(file)), OpenFlags::WRITE).unwrap();
    let mut options = Options::with("driver", "qcow2");
    options.set("file", file);
    context.open(options, flags).await.unwrap()
}

async fn write(node: &NodeRef, offset: u64, len: usize) {
    let bytes = IoBuffer::from(&vec![0x5a; len][..]).into_io();
    node.write(offset, &bytes, WriteFlags::empty()).await.unwrap();
}

/// The bitmaps as qemu-img shows them: name, granularity, flags.
fn shown(path: &Path) -> Vec<(String, u64, Vec<String>)> {
    let mut command = Command::new("qemu-img");
    let output = run(command.args(["info", "-f", "qcow2", "--output=json"]).arg(path));
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    let bitmaps = info.pointer("/format-specific/data/bitmaps").and_then(Value::as_array).cloned();
    let flag = |flag: &Value| flag.as_str().unwrap().to_owned();
    let one = |bitmap: &Value| {
        let flags = bitmap["flags"].as_array().unwrap().iter().map(flag).collect();
        (bitmap["name"].as_str().unwrap().to_owned(), bitmap["granularity"].as_u64().unwrap(), flags)
    };
    bitmaps.unwrap_or_default().iter().map(one).collect()
}

/// The dirty ranges of a bitmap, as the NBD server of the other implementation tells them.
fn their_dirty(path: &Path, bitmap: &str) -> Vec<(u64, u64)> {
    // Another image takes the bitmap up, and ours is read from there: what it stored is what it understood.
    let copy = path.with_extension("copy");
    let mut command = Command::new("qemu-img");
    run(command.args(["create", "-q", "-f", "qcow2"]).arg(&copy).arg("256M"));
    run(Command::new("qemu-img").args(["bitmap", "--add", "-g", "65536"]).arg(&copy).arg("b"));
    let mut command = Command::new("qemu-img");
    command.args(["bitmap", "-F", "qcow2", "-b"]).arg(path).args(["--merge", bitmap]).arg(&copy).arg("b");
    run(&mut command);
    block_on(async {
        let node = open(&copy, OpenFlags::READ).await;
        let dirty = our_dirty(&node, "b").await;
        node.close().await.unwrap();
        dirty
    })
}

async fn our_dirty(node: &NodeRef, bitmap: &str) -> Vec<(u64, u64)> {
    let content = node.driver().image().unwrap().bitmap(bitmap).await.unwrap();
    let (mut at, mut ranges) = (0, Vec::new());
    while let Some(range) = content.next_dirty(at) {
        ranges.push((range.start, range.end));
        at = range.end;
    }
    ranges
}

#[test]
fn bitmaps_are_kept_and_understood() {
    let Some(oracle) = Oracle::find("bitmaps_are_kept_and_understood") else { return };
    for cluster in ["64k", "512", "2M"] {
        let path = oracle.path(&format!("bitmaps-{cluster}"));
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-o", &format!("cluster_size={cluster}")]);
        run(command.arg(&path).arg("256M"));
        run(Command::new("qemu-img").args(["bitmap", "--add", "-g", "512"]).arg(&path).arg("fine"));
        run(Command::new("qemu-img").args(["bitmap", "--add", "--disable"]).arg(&path).arg("still"));
        run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 1M 64k"]).arg(&path));
        block_on(async {
            let node = open(&path, OpenFlags::WRITE).await;
            let image = node.driver().image().unwrap();
            assert_eq!(our_dirty(&node, "fine").await, [(1 << 20, (1 << 20) + 65536)]);
            assert_eq!(our_dirty(&node, "still").await, []);
            image.bitmap_add("ours", Some(65536), true).await.unwrap();
            let exists = image.bitmap_add("ours", None, true).await.unwrap_err();
            assert_eq!(exists.to_string(), "Bitmap already exists: ours");
            write(&node, (200 << 20) + 512, 512).await;
            write(&node, 0, 1).await;
            node.close().await.unwrap();
        });
        let auto = vec!["auto".to_owned()];
        let granularity = |name: &str| shown(&path).iter().find(|(known, ..)| known == name).unwrap().1;
        let flags: Vec<_> = shown(&path).into_iter().map(|(name, _, flags)| (name, flags)).collect();
        let expected = [("fine".into(), auto.clone()), ("still".into(), Vec::new()), ("ours".into(), auto)];
        assert_eq!(flags, expected, "{cluster}");
        assert_eq!((granularity("fine"), granularity("ours")), (512, 65536));
        let checked = oracle.check(&path, None);
        assert_eq!((checked.report.corruptions, checked.report.leaks), (0, 0), "{cluster}: {checked:?}");
        let start = 200 << 20;
        assert_eq!(their_dirty(&path, "ours"), [(0, 65536), (start, start + 65536)], "{cluster}");
        let fine = [(0, 65536), (1 << 20, (1 << 20) + 65536), (start, start + 65536)];
        assert_eq!(their_dirty(&path, "fine"), fine, "{cluster}");
        block_on(async {
            let node = open(&path, OpenFlags::WRITE).await;
            let image = node.driver().image().unwrap();
            let third = [(0, 512), (1 << 20, (1 << 20) + 65536), (start + 512, start + 1024)];
            assert_eq!(our_dirty(&node, "fine").await, third, "{cluster}");
            image.bitmap_remove("still").await.unwrap();
            let gone = image.bitmap_remove("still").await.unwrap_err();
            assert_eq!(gone.to_string(), "Dirty bitmap 'still' not found");
            image.bitmap_set_enabled("ours", false).await.unwrap();
            write(&node, 10 << 20, 4096).await;
            image.bitmap("fine").await.unwrap().merge(&image.bitmap("ours").await.unwrap());
            node.close().await.unwrap();
        });
        assert_eq!(shown(&path).len(), 2);
        assert_eq!(their_dirty(&path, "ours"), [(0, 65536), (start, start + 65536)], "{cluster}");
        let checked = oracle.check(&path, None);
        assert_eq!((checked.report.corruptions, checked.report.leaks), (0, 0), "{cluster}: {checked:?}");
    }
}

#[test]
fn a_bitmap_that_was_not_stored_is_not_trusted() {
    let Some(oracle) = Oracle::find("a_bitmap_that_was_not_stored_is_not_trusted") else { return };
    let path = oracle.image("crashed", "");
    run(Command::new("qemu-img").args(["bitmap", "--add"]).arg(&path).arg("b"));
    let copy = oracle.path("copy");
    block_on(async {
        let node = open(&path, OpenFlags::WRITE).await;
        write(&node, 0, 4096).await;
        node.flush().await.unwrap();
        // As it would be found after a crash now.
        std::fs::copy(&path, &copy).unwrap();
        node.driver().truncate(128 << 20, Truncate::default()).await.unwrap();
        node.close().await.unwrap();
    });
    assert_eq!(shown(&path), [("b".into(), 65536, vec!["auto".into()])]);
    assert_eq!(shown(&copy), [("b".into(), 65536, vec!["in-use".into(), "auto".into()])]);
    assert_eq!(oracle.check(&path, None).report.leaks, 0);
    block_on(async {
        let node = open(&copy, OpenFlags::WRITE).await;
        let image = node.driver().image().unwrap();
        assert!(image.bitmaps()[0].in_use);
        let error = image.bitmap("b").await.unwrap_err();
        assert_eq!(error.to_string(), "Bitmap 'b' is inconsistent and cannot be used");
        assert!(node.driver().truncate(128 << 20, Truncate::default()).await.is_err());
        image.bitmap_remove("b").await.unwrap();
        node.close().await.unwrap();
    });
    assert_eq!(shown(&copy), []);
    let checked = oracle.check(&copy, None);
    assert_eq!((checked.report.corruptions, checked.report.leaks), (0, 0), "{checked:?}");
    let grown = block_on(async {
        let node = open(&path, OpenFlags::READ).await;
        let (len, dirty) = (node.len(), our_dirty(&node, "b").await);
        node.close().await.unwrap();
        (len, dirty)
    });
    assert_eq!(grown, (128 << 20, vec![(0, 65536)]));
}
