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
    assert_eq!(size(".5G"), Some(1 << 29));
    assert_eq!(size("0x10"), Some(16));
    assert_eq!(size("7E"), Some(7 << 60));
    for bad in ["", "k", "-1", "1.5", "16E", "1kk", "1 k", "99999999999999999999", "1.k5", "é"] {
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

/// Lets everything through to the node below.
#[derive(Debug)]
struct Through(Arc<Edge>);

#[async_trait(?Send)]
impl Driver for Through {
    fn format_name(&self) -> &'static str {
        "through"
    }

    fn len(&self) -> u64 {
        self.0.node().len()
    }

    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.0.clone()]
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        self.0.node().read(offset, into).await
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        // Two parts: between them nothing below may be exchanged.
        let half = from.len() / 2;
        self.0.node().write(offset, &from.slice(0..half), flags).await?;
        sleep(Duration::from_millis(1)).await;
        self.0.node().write(offset + half as u64, &from.slice(half..from.len()), flags).await
    }

    async fn flush(&self) -> Result<()> {
        self.0.node().flush().await
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn memory_in(context: &OpenContext, name: &str, len: usize) -> NodeRef {
    let driver = Memory { bytes: Mutex::new(vec![0; len]), max_transfer: 0, requests: Mutex::default() };
    context.add(Some(name.into()), Box::new(driver), OpenFlags::WRITE).unwrap()
}

fn context() -> OpenContext {
    OpenContext::new(Arc::new(Registry::new()), Arc::default(), Arc::new(RefuseAll))
}

#[test]
fn nodes_are_exchanged_between_requests_of_another_thread() {
    let context = context();
    let nodes: Vec<NodeRef> = ["a", "b"].iter().map(|name| memory_in(&context, name, 100)).collect();
    let filter = Through(Edge::new(Role::Filtered, nodes[0].clone()));
    let filter = context.add(None, Box::new(filter), OpenFlags::WRITE).unwrap();
    let backend = Backend::new("disk", filter.clone());
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (other, told) = (backend.clone(), stop.clone());
    let writer = std::thread::spawn(move || {
        block_on(async {
            let mut count = 0_u8;
            while !told.load(std::sync::atomic::Ordering::SeqCst) {
                count = count.wrapping_add(1);
                let io = IoBuffer::from(&[count; 10][..]).into_io();
                other.write(0, &io, WriteFlags::empty()).await.unwrap();
            }
        });
    });
    block_on(async {
        for round in 0..6 {
            sleep(Duration::from_millis(30)).await;
            let (old, new) = (&nodes[round % 2], &nodes[(round + 1) % 2]);
            let quiesced = context.quiesce(std::slice::from_ref(old)).await;
            assert!(quiesced.holds(&filter) && quiesced.holds(old) && !quiesced.holds(new));
            // A request is in one node as a whole.
            let bytes = old.driver_as::<Memory>().unwrap().bytes.lock()[..10].to_vec();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{bytes:?}");
            assert!(round == 0 || bytes[0] != 0);
            let moved = context.replace_node(&quiesced, old, new, |_| false).unwrap();
            assert_eq!((moved.len(), moved[0].role()), (1, Role::Filtered));
            assert!(context.replace_node(&quiesced, new, old, |_| false).is_err());
        }
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
    });
    writer.join().unwrap();
    // The same at the root: the filter is put above a node for all its users, and not for itself.
    let (a, root) = (nodes[0].clone(), Backend::new("other", nodes[0].clone()));
    block_on(async {
        let quiesced = context.quiesce(std::slice::from_ref(&a)).await;
        assert_eq!(context.replace_node(&quiesced, &a, &filter, |_| false).unwrap().len(), 1);
        drop(quiesced);
        assert!(Arc::ptr_eq(&root.node(), &filter));
        assert!(Arc::ptr_eq(&filter.driver().edges()[0].node(), &a));
        let users = context.users(&a);
        assert_eq!(users.len(), 1);
        assert!(Arc::ptr_eq(users[0].0.as_ref().unwrap(), &filter));
        assert!(
            context.users(&filter).iter().all(|(owner, edge)| owner.is_none() && edge.role() == Role::Root)
        );
        assert!(OpenContext::stands_on(&filter, &a) && !OpenContext::stands_on(&a, &filter));
    });
}

/// Keeps what is overwritten.
struct Before {
    of: NodeRef,
    seen: Mutex<Vec<(u64, u8)>>,
}

#[async_trait(?Send)]
impl WriteWatcher for Before {
    async fn around(&self, change: Change<'_>, next: Next<'_>) -> Result<()> {
        let mut buffer = IoBuffer::zeroed(1);
        self.of.read_within(change.range().0, &buffer.io()).await?;
        self.seen.lock().push((change.range().0, buffer.bytes()[0]));
        next.run(change).await
    }
}

#[test]
fn watchers_see_what_is_overwritten() {
    let node = Memory::node(vec![7; 100], 0);
    let before = Arc::new(Before { of: node.clone(), seen: Mutex::default() });
    let watcher: Arc<dyn WriteWatcher> = before.clone();
    block_on(async {
        let io = IoBuffer::from(&[1; 10][..]).into_io();
        let write = spawn({
            let (node, io) = (node.clone(), io.clone());
            async move { node.write(50, &io, WriteFlags::empty()).await }
        });
        sleep(Duration::from_millis(5)).await;
        let drained = node.drain().await;
        node.add_watcher(watcher.clone());
        drop(drained);
        write.await.unwrap();
        let write = node.write(50, &io, WriteFlags::empty());
        // Who watches is served while somebody waits for the request to end.
        futures_util::future::join(write, async { drop(node.drain().await) }).await.0.unwrap();
        node.write_zeroes(0, 5, ZeroFlags::empty()).await.unwrap();
        node.store_within(Change::Data { offset: 20, from: &io, flags: WriteFlags::empty() }).await.unwrap();
        node.remove_watcher(&watcher);
        node.write(60, &io, WriteFlags::empty()).await.unwrap();
    });
    assert_eq!(*before.seen.lock(), [(50, 1), (0, 7)]);
}
