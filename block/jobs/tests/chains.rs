//! Chains that grow and shrink under a disk that is written to.

mod rig;

use block_graph::Options;
use jobs::JobStatus;
use jobs::parameters::{BlockCommit, BlockStream, ChangeBackingFile, JobOptions, Snapshot, SnapshotSync};
use rig::{Rig, Writer};

fn options() -> JobOptions {
    JobOptions { job_id: Some("job".into()), ..JobOptions::default() }
}

fn backing_of(rig: &Rig, node: &str) -> Option<String> {
    rig.storage.find(node).unwrap().backing().map(|node| node.name().to_owned())
}

fn recorded_backing(rig: &Rig, node: &str) -> Option<String> {
    let node = rig.storage.find(node).unwrap();
    node.driver().image().unwrap().info().backing_filename
}

fn streamed(base: Option<&str>) {
    let rig = Rig::new();
    let model = rig.chain(4, 21);
    let backend = rig.open_chain(4);
    let writer = Writer::start(&backend, model, 21);
    writer.wait(50);
    let mut stream = BlockStream {
        job: options(),
        device: "disk".into(),
        base_node: base.map(str::to_owned),
        ..BlockStream::default()
    };
    stream.job.speed = 10 << 20;
    rig.storage.block_stream(stream).unwrap();
    writer.wait(200);
    assert!(rig.storage.blockdev_del("layer2").is_err(), "it is in use");
    rig.storage.job_set_speed("job", 0).unwrap();
    assert_eq!(rig.end_of("job"), Ok(None));
    assert_eq!(backing_of(&rig, "disk").as_deref(), base);
    assert_eq!(recorded_backing(&rig, "disk"), base.map(|base| rig.path(base)));
    // Nothing of it is needed any more.
    rig.storage.blockdev_del("layer2").unwrap();
    writer.wait(50);
    let model = writer.finish();
    std::fs::remove_file(rig.path("layer2")).unwrap();
    rig.check("layer3", "qcow2", &model);
}

#[test]
fn all_below_is_taken() {
    streamed(None);
}

#[test]
fn all_down_to_a_base_is_taken() {
    streamed(Some("layer1"));
}

/// An inner image of the chain takes what is below it, and stays read-only.
#[test]
fn an_inner_image_takes_what_is_below() {
    let rig = Rig::new();
    let model = rig.chain(4, 22);
    let backend = rig.open_chain(4);
    let writer = Writer::start(&backend, model, 22);
    let stream = BlockStream {
        job: options(),
        device: "layer2".into(),
        base: Some(rig.path("layer0")),
        ..BlockStream::default()
    };
    rig.storage.block_stream(stream).unwrap();
    assert_eq!(rig.end_of("job"), Ok(None));
    assert_eq!(backing_of(&rig, "layer2").as_deref(), Some("layer0"));
    assert!(rig.storage.find("layer2").unwrap().read_only());
    rig.storage.blockdev_del("layer1").unwrap();
    let model = writer.finish();
    std::fs::remove_file(rig.path("layer1")).unwrap();
    rig.check("layer3", "qcow2", &model);
}

fn committed(top: &str, base: &str, gone: &[&str]) {
    let rig = Rig::new();
    let model = rig.chain(5, 23);
    let backend = rig.open_chain(5);
    let writer = Writer::start(&backend, model, 23);
    writer.wait(50);
    let commit = BlockCommit {
        job: options(),
        device: "disk".into(),
        top_node: Some(top.into()),
        base_node: Some(base.into()),
        ..BlockCommit::default()
    };
    rig.storage.block_commit(commit.clone()).unwrap();
    assert!(rig.storage.block_commit(commit).is_err());
    assert_eq!(rig.end_of("job"), Ok(None));
    assert_eq!(recorded_backing(&rig, "disk").map(|_| ()), Some(()));
    assert!(rig.storage.find(base).unwrap().read_only());
    for name in gone {
        rig.storage.blockdev_del(name).unwrap();
        std::fs::remove_file(rig.path(name)).unwrap();
    }
    writer.wait(50);
    let model = writer.finish();
    rig.check("layer4", "qcow2", &model);
}

#[test]
fn inner_images_are_committed_to_the_base() {
    committed("layer3", "layer0", &["layer3", "layer2", "layer1"]);
}

#[test]
fn one_inner_image_is_committed_to_another() {
    committed("layer2", "layer1", &["layer2"]);
}

/// What is written to is committed to an image below, and that one is written to from then on.
fn active_committed(base: &str, format: &str) {
    let rig = Rig::new();
    let model = rig.chain(4, 24);
    let backend = rig.open_chain(4);
    let writer = Writer::start(&backend, model, 24);
    writer.wait(50);
    let commit = BlockCommit {
        job: options(),
        device: "disk".into(),
        base_node: Some(base.into()),
        ..BlockCommit::default()
    };
    rig.storage.block_commit(commit).unwrap();
    rig.wait_for("job", JobStatus::Ready);
    writer.wait(100);
    rig.storage.job_complete("job").unwrap();
    assert_eq!(rig.end_of("job"), Ok(None));
    assert_eq!(backend.node().name(), base);
    assert!(!backend.read_only());
    writer.wait(50);
    for name in ["layer3", "layer2"] {
        rig.storage.blockdev_del(name).unwrap();
    }
    let model = writer.finish();
    rig.check(base, format, &model);
}

#[test]
fn what_is_written_to_is_committed_to_the_base() {
    active_committed("layer0", "raw");
}

#[test]
fn what_is_written_to_is_committed_to_a_layer() {
    active_committed("layer1", "qcow2");
}

#[test]
fn a_commit_that_is_cancelled_leaves_the_chain() {
    let rig = Rig::new();
    let model = rig.chain(3, 25);
    let backend = rig.open_chain(3);
    let writer = Writer::start(&backend, model, 25);
    for top in [None, Some("layer1".to_owned())] {
        let mut commit =
            BlockCommit { job: options(), device: "disk".into(), top_node: top, ..BlockCommit::default() };
        commit.job.speed = 1 << 20;
        rig.storage.block_commit(commit).unwrap();
        writer.wait(60);
        rig.storage.job_cancel("job", true).unwrap();
        assert_eq!(rig.end_of("job"), Err(()));
        rig.events.lock().clear();
        assert_eq!(backend.node().name(), "layer2");
        assert!(rig.storage.find("layer0").unwrap().read_only());
    }
    let model = writer.finish();
    rig.check("layer2", "qcow2", &model);
}

/// Overlays come while somebody writes, and go again.
#[test]
fn overlays_come_and_go() {
    let rig = Rig::new();
    let model = rig.chain(1, 26);
    let backend = rig.open_chain(1);
    let writer = Writer::start(&backend, model, 26);
    let mut moments = Vec::new();
    for number in 1..=4 {
        writer.wait(60);
        let name = format!("over{number}");
        let snapshot = SnapshotSync {
            device: "disk".into(),
            snapshot_file: rig.path(&name),
            snapshot_node_name: Some(name.clone()),
            ..SnapshotSync::default()
        };
        let old = backend.node();
        let (taken, model) = writer.paused(|| rig.storage.blockdev_snapshot_sync(snapshot));
        taken.unwrap();
        assert_eq!(backend.node().name(), name);
        assert!(old.read_only());
        moments.push((old, model));
    }
    writer.wait(60);
    for (node, model) in &moments {
        rig::assert_same(&Rig::read(node), model, node.name());
    }
    drop(moments);
    let node = rig.storage.find("over4").unwrap();
    let info = node.driver().image().unwrap().info();
    assert_eq!((info.backing_filename, info.backing_format), (Some(rig.path("over3")), Some("qcow2".into())));
    drop(node);
    // All of them into the base again.
    rig.storage
        .block_commit(BlockCommit { job: options(), device: "disk".into(), ..BlockCommit::default() })
        .unwrap();
    rig.wait_for("job", JobStatus::Ready);
    rig.storage.job_complete("job").unwrap();
    assert_eq!(rig.end_of("job"), Ok(None));
    assert_eq!(backend.node().name(), "layer0");
    assert_eq!(rig.storage.nodes().len(), 2, "the overlays are closed: {:?}", rig.storage.nodes());
    let model = writer.finish();
    rig.check("layer0", "raw", &model);
}

#[test]
fn an_overlay_that_was_added_is_put_above() {
    let rig = Rig::new();
    let model = rig.chain(1, 27);
    rig.make("over", "qcow2", Some(("layer0", "raw")), &[]);
    let backend = rig.open_chain(1);
    let writer = Writer::start(&backend, model, 27);
    let mut options = Options::with("driver", "qcow2");
    options.set("node-name", "over");
    options.set("file.driver", "file");
    options.set("file.filename", rig.path("over"));
    options.set("backing", block_graph::Value::Null);
    rig.storage.blockdev_add(options).unwrap();
    let snapshot = |node: &str, overlay: &str| Snapshot { node: node.into(), overlay: overlay.into() };
    let itself = rig.storage.blockdev_snapshot(snapshot("layer0", "layer0")).unwrap_err();
    assert_eq!(itself.to_string(), "The overlay is already in use");
    rig.storage.blockdev_snapshot(snapshot("disk", "over")).unwrap();
    assert_eq!(backend.node().name(), "over");
    assert_eq!(backing_of(&rig, "over").as_deref(), Some("layer0"));
    let twice = rig.storage.blockdev_snapshot(snapshot("layer0", "over")).unwrap_err();
    assert_eq!(twice.to_string(), "The overlay is already in use");
    writer.wait(50);
    rig.storage
        .change_backing_file(ChangeBackingFile {
            device: "disk".into(),
            image_node_name: "over".into(),
            backing_file: "layer0".into(),
        })
        .unwrap();
    assert_eq!(recorded_backing(&rig, "over").as_deref(), Some("layer0"));
    let model = writer.finish();
    rig.check("over", "qcow2", &model);
}
