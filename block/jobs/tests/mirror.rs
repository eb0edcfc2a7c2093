//! Mirrors of a disk that is written to.

mod rig;

use jobs::parameters::{BlockdevMirror, CopyMode, DriveMirror, JobOptions, Mirror, NewTarget, SyncMode};
use jobs::{Event, JobStatus};
use rig::{LEN, Rig, Writer};

fn mirror(sync: SyncMode, copy_mode: CopyMode) -> Mirror {
    let job = JobOptions { job_id: Some("job".into()), ..JobOptions::default() };
    Mirror { job, device: "disk".into(), sync, copy_mode, ..Mirror::default() }
}

/// Mirrors while somebody writes, completes, and goes on writing to the copy.
fn mirrored(sync: SyncMode, copy_mode: CopyMode, format: &str) {
    let rig = Rig::new();
    let model = rig.chain(2, 1);
    let backend = rig.open_chain(2);
    let backing = (sync == SyncMode::Top).then_some(("layer0", "raw"));
    rig.make("copy", format, backing, &[]);
    rig.add("copy", format);
    let writer = Writer::start(&backend, model, 1);
    writer.wait(50);
    let mirror = BlockdevMirror { mirror: mirror(sync, copy_mode), target: "copy".into() };
    rig.storage.blockdev_mirror(mirror.clone()).unwrap();
    assert!(rig.storage.blockdev_mirror(mirror).is_err(), "the id is used");
    assert!(rig.storage.blockdev_del("copy").is_err(), "the target is used");
    assert!(rig.storage.block_resize("disk", 1 << 20).is_err(), "the source is used");
    rig.wait_for("job", JobStatus::Ready);
    assert!(rig.job("job").unwrap().ready);
    writer.wait(200);
    let old = backend.node();
    rig.storage.job_complete("job").unwrap();
    assert_eq!(rig.end_of("job"), Ok(None));
    assert_eq!(backend.node().name(), "copy");
    assert!(old.bitmaps().is_empty() && rig.storage.query_jobs().unwrap().is_empty());
    writer.wait(100);
    let model = writer.finish();
    rig.storage.blockdev_del("layer1").unwrap();
    let ready = rig.events.lock().iter().filter(|event| matches!(event, Event::Ready(_))).count();
    assert_eq!(ready, 1);
    rig.check("copy", format, &model);
}

#[test]
fn all_is_mirrored_to_qcow2() {
    mirrored(SyncMode::Full, CopyMode::Background, "qcow2");
}

#[test]
fn all_is_mirrored_to_raw_before_writes_end() {
    mirrored(SyncMode::Full, CopyMode::WriteBlocking, "raw");
}

#[test]
fn the_top_is_mirrored() {
    mirrored(SyncMode::Top, CopyMode::Background, "qcow2");
}

#[test]
fn the_top_is_mirrored_before_writes_end() {
    mirrored(SyncMode::Top, CopyMode::WriteBlocking, "qcow2");
}

#[test]
fn a_mirror_that_is_cancelled_when_ready_is_a_copy() {
    let rig = Rig::new();
    let model = rig.chain(2, 2);
    let backend = rig.open_chain(2);
    let writer = Writer::start(&backend, model, 2);
    let target =
        NewTarget { target: rig.path("copy"), node_name: Some("copy".into()), ..NewTarget::default() };
    rig.storage
        .drive_mirror(DriveMirror { mirror: mirror(SyncMode::Full, CopyMode::Background), target })
        .unwrap();
    rig.wait_for("job", JobStatus::Ready);
    let (_, copied) = writer.paused(|| {
        rig.storage.job_cancel("job", false).unwrap();
        assert_eq!(rig.end_of("job"), Ok(None));
    });
    writer.wait(50);
    assert_eq!(backend.node().name(), "layer1");
    assert!(rig.storage.find("copy").is_err(), "it is closed");
    rig.check_file("copy", "qcow2", &copied);
    let model = writer.finish();
    rig.check("layer1", "qcow2", &model);
}

#[test]
fn a_mirror_that_is_cancelled_leaves_the_disk_as_it_is() {
    let rig = Rig::new();
    let model = rig.chain(1, 3);
    let backend = rig.open_chain(1);
    rig.make("copy", "qcow2", None, &[]);
    rig.add("copy", "qcow2");
    let writer = Writer::start(&backend, model, 3);
    let mut mirror = mirror(SyncMode::Full, CopyMode::WriteBlocking);
    mirror.job.speed = 1 << 20;
    rig.storage.blockdev_mirror(BlockdevMirror { mirror, target: "copy".into() }).unwrap();
    writer.wait(100);
    let job = rig.job("job").unwrap();
    assert!(job.offset < job.len && job.len <= LEN as u64 * 2, "{job:?}");
    assert!(rig.storage.job_complete("job").is_err(), "it is not ready");
    rig.storage.job_pause("job").unwrap();
    rig.wait_for("job", JobStatus::Paused);
    let before = rig.job("job").unwrap();
    writer.wait(100);
    assert_eq!(rig.job("job").unwrap().offset, before.offset);
    assert!(rig.storage.job_pause("job").is_err());
    rig.storage.job_resume("job").unwrap();
    rig.storage.job_cancel("job", true).unwrap();
    assert_eq!(rig.end_of("job"), Err(()));
    rig.storage.blockdev_del("copy").unwrap();
    writer.wait(50);
    let model = writer.finish();
    rig.check("layer0", "raw", &model);
}
