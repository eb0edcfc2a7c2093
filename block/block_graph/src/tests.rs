use crate::*;
use io_loop::{IoBuffer, IoVec, block_on, sleep, spawn};
use parking_lot::Mutex;
use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

/// A disk in memory that is slow.
#[derive(Debug)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    max_transfer: u64,
    requests: Mutex<Vec<(u64, usize)>>,
}

impl Memory {
    fn node(bytes: Vec<u8>, max_transfer: u64) -> NodeRef {
        let driver = Self { bytes: Mutex::new(bytes), max_transfer, requests: Mutex::default() };
        Node::new("memory", Box::new(driver), OpenFlags::WRITE)
    }
}

#[async_trait(?Send)]
impl Driver for Memory {
    fn format_name(&self) -> &'static str {
        "memory"
    }

    fn len(&self) -> u64 {
        self.bytes.lock().len() as u64
    }

    fn limits(&self) -> Limits {
        Limits { max_transfer: self.max_transfer, ..Limits::default() }
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.requests.lock().push((offset, into.len()));
        into.copy_from(0, &self.bytes.lock()[offset as usize..][..into.len()]);
        Ok(())
    }

    async fn write(&self, offset: u64, from: &IoVec, _: WriteFlags) -> Result<()> {
        self.requests.lock().push((offset, from.len()));
        sleep(Duration::from_millis(20)).await;
        from.copy_to(0, &mut self.bytes.lock()[offset as usize..][..from.len()]);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[test]
fn requests_are_bounded_and_divided() {
    let node = Memory::node(vec![7; 100], 30);
    block_on(async {
        let mut buffer = IoBuffer::from(&[1; 90][..]);
        node.read(50, &buffer.io()).await.unwrap();
        assert_eq!(buffer.bytes(), [vec![7; 50], vec![0; 40]].concat());
        let requests = &node.driver_as::<Memory>().unwrap().requests;
        assert_eq!(std::mem::take(&mut *requests.lock()), [(50, 30), (80, 20)]);

        node.write_zeroes(10, 70, ZeroFlags::empty()).await.unwrap();
        assert_eq!(std::mem::take(&mut *requests.lock()), [(10, 30), (40, 30), (70, 10)]);
        let refused = node.write_zeroes(10, 70, ZeroFlags::NO_FALLBACK).await.unwrap_err();
        assert_eq!(refused.errno(), Errno::NOT_SUPPORTED);
        let beyond = node.write(50, &buffer.io(), WriteFlags::empty()).await.unwrap_err();
        assert_eq!(beyond.errno(), Errno::IO);
        assert!(node.read(u64::MAX - 5, &buffer.io()).await.is_err());
        node.set_flags(OpenFlags::READ);
        let refused = node.write(0, &buffer.io(), WriteFlags::empty()).await.unwrap_err();
        assert_eq!(refused.errno(), Errno::NOT_PERMITTED);
    });
}

#[test]
fn drain_waits_for_what_is_in_flight_and_holds_up_the_rest() {
    let node = Memory::node(vec![0; 100], 0);
    block_on(async {
        let write = |value: u8| {
            let node = node.clone();
            spawn(async move {
                let io = IoBuffer::from(&[value; 10][..]).into_io();
                node.write(0, &io, WriteFlags::empty()).await.unwrap();
            })
        };
        let first = write(1);
        sleep(Duration::from_millis(5)).await;
        let drained = node.drain().await;
        assert_eq!(node.driver_as::<Memory>().unwrap().bytes.lock()[0], 1);
        let second = write(2);
        sleep(Duration::from_millis(40)).await;
        assert_eq!(node.driver_as::<Memory>().unwrap().bytes.lock()[0], 1);
        drop(drained);
        second.await;
        first.await;
        assert_eq!(node.driver_as::<Memory>().unwrap().bytes.lock()[0], 2);
    });
}

#[test]
fn bitmaps_record_writes() {
    let node = Memory::node(vec![0; 10_000], 0);
    let bitmap = Arc::new(DirtyBitmap::new(Some("b"), node.len(), Granularity::from_bytes(512).unwrap()));
    node.add_bitmap(bitmap.clone());
    block_on(async {
        let io = IoBuffer::zeroed(10).into_io();
        node.write(1020, &io, WriteFlags::empty()).await.unwrap();
        node.write_zeroes(9_999, 1, ZeroFlags::empty()).await.unwrap();
    });
    assert_eq!(bitmap.next_dirty(0), Some(512..1536));
    assert_eq!(bitmap.next_dirty(1536), Some(9_728..10_000));
}

#[test]
fn ranges_are_held_one_after_the_other() {
    let lock = RangeLock::new();
    block_on(async {
        let first = lock.lock(0..10).await;
        assert!(lock.try_lock(10..20).is_some() && lock.try_lock(9..20).is_none());
        let waiting = lock.lock(5..6);
        let mut waiting = std::pin::pin!(waiting);
        assert!(io_loop::timeout(Duration::from_millis(5), waiting.as_mut()).await.is_none());
        drop(first);
        waiting.await;
    });
}

#[test]
fn options_come_apart() {
    let json =
        r#"{"driver":"qcow2","file":{"driver":"file","filename":"a"},"list":[{"x":1},true],"backing":null}"#;
    let mut options = Options::from_json(json).unwrap();
    assert_eq!(options.take_text("driver").unwrap(), "qcow2");
    let file = options.take_child("file");
    assert_eq!(
        file.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>(),
        ["driver=file", "filename=a"]
    );
    assert_eq!(options.take_number("list.0.x").unwrap(), Some(1));
    assert_eq!(options.take_switch("list.1").unwrap(), Some(true));
    assert!(matches!(options.take("backing"), Some(Value::Null)));
    assert!(options.is_empty());
    for bad in ["", "[]", "{", "{\"a\":", "1"] {
        assert!(Options::from_json(bad).is_err(), "{bad}");
    }
    let deep = format!("{}1{}", "{\"a\":".repeat(100_000), "}".repeat(100_000));
    assert!(Options::from_json(&deep).is_err());
}

#[test]
fn sizes_are_read_as_people_write_them() {
    let size = |text: &str| Options::with("size", text).take_size("size").ok().flatten();
    assert_eq!(size("64k"), Some(65_536));
    assert_eq!(size("1.5G"), Some(3 << 29));
    assert_eq!(size("0x10"), Some(16));
    assert_eq!(size("7E"), Some(7 << 60));
    for bad in ["", "k", "-1", "1.5", "16E", "1kk", "1 k", "99999999999999999999", "1.k5", ".5G", "é"] {
        assert_eq!(size(bad), None, "{bad}");
    }
}

#[test]
fn json_may_have_single_quotes() {
    let options =
        Options::from_json(r#"{'driver': "raw", 'file': {'filename': 'a"b\'c', 'list': [1, true]}}"#)
            .unwrap();
    let texts: Vec<String> = options.iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(texts, ["driver=raw", "file.filename=a\"b'c", "file.list.0=1", "file.list.1=on"]);
    assert!(Options::from_json("{'a': ").is_err());
}
