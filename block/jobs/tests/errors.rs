//! What becomes of errors, of actions of which one fails, and of nodes that are in use.

mod rig;

use block_graph::{Errno, Options, Value, WriteFlags};
use io_loop::{IoBuffer, block_on};
use jobs::parameters::{
    Action, Backup, BitmapAdd, BitmapMerge, BitmapName, BlockdevBackup, BlockdevCreate, BlockdevMirror,
    CompletionMode, JobOptions, Mirror, OnCbwError, OnError, Snapshot, SnapshotInternal, SnapshotSync,
    SyncMode,
};
use jobs::{ErrorAction, Event, JobStatus, Limit, ThrottleLimits};
use rig::{LEN, Rig, Writer};

/// Adds a target whose file fails when it is written to.
fn add_failing(rig: &Rig, name: &str, errno: i64, once: bool) {
    let mut options = Options::with("driver", "qcow2");
    options.set("node-name", name);
    options.set("file.driver", "blkdebug");
    options.set("file.image.driver", "file");
    options.set("file.image.filename", rig.path(name));
    options.set("file.inject-error.0.event", "write_aio");
    options.set("file.inject-error.0.errno", errno);
    options.set("file.inject-error.0.once", once);
    rig.storage.blockdev_add(options).unwrap();
}

fn mirror(on_target_error: OnError) -> BlockdevMirror {
    let job = JobOptions { job_id: Some("job".into()), ..JobOptions::default() };
    let mirror = Mirror { job, device: "disk".into(), on_target_error, ..Mirror::default() };
    BlockdevMirror { mirror, target: "copy".into() }
}

fn errors(rig: &Rig) -> Vec<(bool, ErrorAction)> {
    let error = |event: &Event| match event {
        Event::Error { write, action, .. } => Some((*write, *action)),
        _ => None,
    };
    rig.events.lock().iter().filter_map(error).collect()
}

#[test]
fn a_mirror_stops_and_goes_on() {
    for (policy, errno, action) in [
        (OnError::Stop, 5, ErrorAction::Stop),
        (OnError::Enospc, 28, ErrorAction::Stop),
        (OnError::Ignore, 5, ErrorAction::Ignore),
        (OnError::Enospc, 5, ErrorAction::Report),
        (OnError::Report, 28, ErrorAction::Report),
    ] {
        let rig = Rig::new();
        let model = rig.chain(2, 31);
        let backend = rig.open_chain(2);
        rig.make("copy", "qcow2", None, &[]);
        add_failing(&rig, "copy", errno, true);
        let writer = Writer::start(&backend, model, 31);
        rig.storage.blockdev_mirror(mirror(policy)).unwrap();
        if action == ErrorAction::Report {
            let text = Errno::new(errno as i32).to_string();
            assert_eq!(rig.end_of("job"), Ok(Some(text)));
            assert_eq!(backend.node().name(), "layer1");
            let model = writer.finish();
            rig.storage.blockdev_del("copy").unwrap();
            rig.check("layer1", "qcow2", &model);
            continue;
        }
        if action == ErrorAction::Stop {
            rig.wait_for("job", JobStatus::Paused);
            let status = rig.job("job").unwrap().io_status;
            assert_eq!(status.name(), if errno == 28 { "nospace" } else { "failed" });
            rig.storage.job_resume("job").unwrap();
        }
        rig.wait_for("job", JobStatus::Ready);
        rig.storage.job_complete("job").unwrap();
        assert_eq!(rig.end_of("job"), Ok(None));
        assert_eq!(errors(&rig)[0], (true, action));
        writer.wait(30);
        let model = writer.finish();
        rig.check("copy", "qcow2", &model);
    }
}

/// What is overwritten cannot be saved: the guest's write fails, or the backup does.
#[test]
fn a_write_fails_or_the_backup_does() {
    for on_cbw_error in [OnCbwError::BreakGuestWrite, OnCbwError::BreakSnapshot] {
        let rig = Rig::new();
        let model = rig.chain(2, 32);
        let backend = rig.open_chain(2);
        rig.make("copy", "qcow2", Some(("layer1", "qcow2")).filter(|_| false), &[]);
        add_failing(&rig, "copy", 28, false);
        let job = JobOptions { job_id: Some("job".into()), ..JobOptions::default() };
        let backup =
            Backup { job, device: "disk".into(), sync: SyncMode::None, on_cbw_error, ..Backup::default() };
        rig.storage.blockdev_backup(BlockdevBackup { backup, target: "copy".into() }).unwrap();
        let writer = Writer::start(&backend, model, 32);
        writer.wait(30);
        if on_cbw_error == OnCbwError::BreakSnapshot {
            assert_eq!(rig.end_of("job"), Ok(Some("No space left on device".into())));
            assert_eq!(writer.failed.load(std::sync::atomic::Ordering::SeqCst), 0);
        } else {
            assert!(writer.failed.load(std::sync::atomic::Ordering::SeqCst) > 0);
            rig.storage.job_cancel("job", true).unwrap();
            assert_eq!(rig.end_of("job"), Err(()));
        }
        writer.wait(30);
        let model = writer.finish();
        rig.check("layer1", "qcow2", &model);
    }
}

/// An action fails: none of the others has happened.
#[test]
fn a_transaction_that_fails_changes_nothing() {
    let rig = Rig::new();
    let model = rig.chain(2, 33);
    let backend = rig.open_chain(2);
    rig.make("copy", "qcow2", None, &[]);
    rig.add("copy", "qcow2");
    let bitmap = |name: &str| BitmapName { node: "disk".into(), name: name.into() };
    let add = |name: &str, persistent| BitmapAdd {
        node: "disk".into(),
        name: name.into(),
        persistent,
        ..BitmapAdd::default()
    };
    rig.storage.bitmap_add(add("a", true)).unwrap();
    rig.storage.bitmap_add(add("b", false)).unwrap();
    let write = |at: u64| {
        let io = IoBuffer::from(&[7; 4096][..]).into_io();
        block_on(backend.write(at, &io, WriteFlags::empty())).unwrap();
    };
    write(0);
    rig.storage.bitmap_enable(bitmap("b"), false).unwrap();
    write(1 << 20);
    let before = rig.storage.bitmaps(&backend.node()).unwrap();
    assert_eq!(
        before.iter().map(|b| (b.name.as_str(), b.count)).collect::<Vec<_>>(),
        [("b", 65536), ("a", 131_072)]
    );
    let job = JobOptions { job_id: Some("job".into()), ..JobOptions::default() };
    let backup = Backup { job, device: "disk".into(), ..Backup::default() };
    let actions = vec![
        Action::BitmapClear(bitmap("a")),
        Action::BitmapEnable(bitmap("b")),
        Action::BitmapAdd(add("c", false)),
        Action::BitmapMerge(BitmapMerge {
            node: "disk".into(),
            target: "c".into(),
            bitmaps: vec![bitmap("b")],
        }),
        Action::BitmapRemove(bitmap("b")),
        Action::BlockdevBackup(BlockdevBackup { backup, target: "copy".into() }),
        Action::SnapshotInternal(SnapshotInternal { device: "disk".into(), name: "moment".into() }),
    ];
    let over = SnapshotSync {
        device: "layer1".into(),
        snapshot_file: rig.path("over"),
        snapshot_node_name: Some("over".into()),
        ..SnapshotSync::default()
    };
    // What a job has cannot be put an overlay above; nor is anything done if somebody wants to abort.
    for last in [Action::Abort, Action::SnapshotSync(over.clone())] {
        let mut actions = actions.clone();
        actions.push(last);
        let failed = rig.storage.transaction(actions, CompletionMode::Individual).unwrap_err();
        assert!(failed.to_string().contains("abort") || failed.to_string().contains("is busy"), "{failed}");
        assert_eq!(rig.storage.bitmaps(&backend.node()).unwrap(), before);
        assert!(rig.storage.query_jobs().unwrap().is_empty() && rig.storage.find("over").is_err());
        assert!(backend.node().driver().image().unwrap().snapshots().is_empty());
        assert_eq!(backend.node().name(), "layer1");
    }
    // Without that, all of it happens.
    rig.events.lock().clear();
    rig.storage.transaction(actions, CompletionMode::Individual).unwrap();
    assert_eq!(rig.end_of("job"), Ok(None));
    let after = rig.storage.bitmaps(&backend.node()).unwrap();
    assert_eq!(
        after.iter().map(|b| (b.name.as_str(), b.count)).collect::<Vec<_>>(),
        [("c", 65536), ("a", 0)]
    );
    assert_eq!(backend.node().driver().image().unwrap().snapshots()[0].name, "moment");
    let deleted = rig.storage.blockdev_snapshot_delete_internal("disk", None, Some("moment")).unwrap();
    assert_eq!(deleted.disk_size, LEN as u64);
    assert!(rig.storage.blockdev_snapshot_delete_internal("disk", None, Some("moment")).is_err());
    // Both of two overlays, or none.
    rig.storage.transaction(vec![Action::SnapshotSync(over)], CompletionMode::Individual).unwrap();
    let mut model = model;
    model[..4096].fill(7);
    model[1 << 20..(1 << 20) + 4096].fill(7);
    rig.check("over", "qcow2", &model);
}

#[test]
fn nodes_come_and_go_by_name() {
    let rig = Rig::new();
    rig.chain(2, 34);
    let backend = rig.open_chain(2);
    let refused = |options: Options| rig.storage.blockdev_add(options).unwrap_err().to_string();
    let null = |name: &str| {
        let mut options = Options::with("driver", "null-co");
        options.set("node-name", name);
        options.set("size", 1 << 20);
        options
    };
    assert_eq!(refused(null("9a")), "Invalid node-name: '9a'");
    assert_eq!(refused(null("disk")), "node-name=disk is conflicting with a device id");
    assert_eq!(refused(null("layer1")), "Duplicate nodes with node-name='layer1'");
    assert_eq!(
        refused(Options::with("driver", "null-co")),
        "'node-name' must be specified for the root node"
    );
    rig.storage.blockdev_add(null("n")).unwrap();
    assert_eq!(rig.storage.added_nodes().unwrap(), ["layer0", "layer1", "n"]);
    let refused = |name: &str| rig.storage.blockdev_del(name).unwrap_err().to_string();
    assert_eq!(refused("x"), "Failed to find node with node-name='x'");
    assert_eq!(refused("layer1"), "Node layer1 is in use");
    assert!(refused("layer0").starts_with("Node 'layer0' is busy"));
    let file = backend.node().driver().edges()[0].node();
    assert_eq!(refused(file.name()), format!("Node {} is not owned by the monitor", file.name()));
    rig.storage.blockdev_del("n").unwrap();
    rig.storage.blockdev_add(null("n")).unwrap();

    // Made by a job, which is dismissed.
    let mut options = Options::with("size", LEN as i64);
    options.set("cluster_size", "4k");
    let filename = rig.path("made");
    let create = BlockdevCreate { job_id: "make".into(), driver: "qcow2".into(), filename, options };
    rig.storage.blockdev_create(create.clone()).unwrap();
    rig.wait_for("make", JobStatus::Concluded);
    assert!(rig.storage.job_cancel("make", true).is_err() && rig.storage.blockdev_create(create).is_err());
    rig.storage.job_dismiss("make").unwrap();
    rig.add("made", "qcow2");

    // Reopened: without its backing file, then with it, read-only and writable again.
    let reopen = |backing: Value, read_only: bool| {
        let mut options = Options::with("driver", "qcow2");
        options.set("node-name", "made");
        options.set("backing", backing);
        options.set("read-only", read_only);
        rig.storage.blockdev_reopen(vec![options])
    };
    reopen(Value::from("layer0"), true).unwrap();
    let made = rig.storage.find("made").unwrap();
    assert!(made.read_only() && made.backing().is_some_and(|node| node.name() == "layer0"));
    assert!(block_on(made.write(0, &IoBuffer::zeroed(512).into_io(), WriteFlags::empty())).is_err());
    reopen(Value::Null, false).unwrap();
    assert!(made.backing().is_none());
    block_on(made.write(0, &IoBuffer::zeroed(512).into_io(), WriteFlags::empty())).unwrap();
    let itself = reopen(Value::from("made"), false).unwrap_err();
    assert!(itself.to_string().contains("cycle"), "{itself}");
    let no_overlay = rig.storage.blockdev_snapshot(Snapshot { node: "disk".into(), overlay: "n".into() });
    assert_eq!(no_overlay.unwrap_err().to_string(), "The overlay does not support backing images");

    // Longer, and told so.
    let told = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let ear = told.clone();
    backend.on_resize(move || {
        ear.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    });
    rig.storage.block_resize("disk", LEN as u64 + 65536).unwrap();
    assert_eq!((backend.len(), told.load(std::sync::atomic::Ordering::SeqCst)), (LEN as u64 + 65536, 1));

    // Slower.
    let mut limits = ThrottleLimits::default();
    limits.limits[5] = Limit { rate: 20, ..Limit::default() };
    rig.storage.set_io_throttle("disk", None, limits).unwrap();
    assert!(rig.storage.set_io_throttle("x", None, limits).is_err());
    let begin = std::time::Instant::now();
    for _ in 0..8 {
        block_on(backend.write(0, &IoBuffer::zeroed(512).into_io(), WriteFlags::empty())).unwrap();
    }
    assert!(begin.elapsed().as_millis() >= 150, "{:?}", begin.elapsed());
    assert_eq!(rig.storage.io_throttle("disk").map(|(group, _)| group), Some("disk".into()));
    rig.storage.set_io_throttle("disk", None, ThrottleLimits::default()).unwrap();
    assert!(rig.storage.io_throttle("disk").is_none());
    rig.storage.close().unwrap();
    assert!(rig.storage.query_jobs().is_err());
}

/// The disks are closed while jobs work: they end, and the disk is what was written to it.
#[test]
fn all_is_closed_while_jobs_work() {
    let rig = Rig::new();
    let model = rig.chain(2, 35);
    let backend = rig.open_chain(2);
    rig.make("copy", "qcow2", None, &[]);
    rig.add("copy", "qcow2");
    let writer = Writer::start(&backend, model, 35);
    let mut slow = mirror(OnError::Report);
    slow.mirror.job.speed = 1 << 20;
    slow.mirror.job.auto_dismiss = false;
    rig.storage.blockdev_mirror(slow).unwrap();
    writer.wait(50);
    let model = writer.finish();
    rig.storage.close().unwrap();
    assert_eq!(rig.outcome("job"), Err(()));
    rig.check_file("layer1", "qcow2", &model);
}
