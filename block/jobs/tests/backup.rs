//! Backups of a disk that is written to: each is of the moment when it began.

mod rig;

use block_graph::Options;
use jobs::parameters::{
    Action, Backup, BitmapAdd, BitmapMode, BitmapName, BlockdevBackup, CompletionMode, DriveBackup,
    JobOptions, NewTarget, SyncMode,
};
use jobs::{Event, JobStatus};
use rig::{Rig, Writer};

fn backup(id: &str, sync: SyncMode) -> Backup {
    let job = JobOptions { job_id: Some(id.into()), ..JobOptions::default() };
    Backup { job, device: "disk".into(), sync, ..Backup::default() }
}

fn backed_up(sync: SyncMode, format: &str, compress: bool) {
    let rig = Rig::new();
    let model = rig.chain(2, 11);
    let backend = rig.open_chain(2);
    let backing = (sync == SyncMode::Top).then_some(("layer0", "raw"));
    rig.make("copy", format, backing, &[]);
    rig.add("copy", format);
    let writer = Writer::start(&backend, model, 11);
    writer.wait(100);
    let mut backup = backup("job", sync);
    backup.compress = compress;
    // So slow that the writer overtakes it.
    backup.job.speed = 20 << 20;
    let (started, model) =
        writer.paused(|| rig.storage.blockdev_backup(BlockdevBackup { backup, target: "copy".into() }));
    started.unwrap();
    assert!(rig.storage.blockdev_del("copy").is_err());
    writer.wait(200);
    rig.storage.job_set_speed("job", 0).unwrap();
    assert_eq!(rig.end_of("job"), Ok(None));
    writer.wait(20);
    rig.storage.blockdev_del("copy").unwrap();
    rig.check_file("copy", format, &model);
    let model = writer.finish();
    rig.check("layer1", "qcow2", &model);
}

#[test]
fn all_is_backed_up_to_qcow2() {
    backed_up(SyncMode::Full, "qcow2", false);
}

#[test]
fn all_is_backed_up_to_raw() {
    backed_up(SyncMode::Full, "raw", false);
}

#[test]
fn all_is_backed_up_compressed() {
    backed_up(SyncMode::Full, "qcow2", true);
}

#[test]
fn the_top_is_backed_up() {
    backed_up(SyncMode::Top, "qcow2", false);
}

/// A full backup and increments on it, each of its moment; one is cancelled, and the next has what it would have had.
#[test]
fn increments_follow_one_another() {
    let rig = Rig::new();
    let model = rig.chain(2, 12);
    let backend = rig.open_chain(2);
    let writer = Writer::start(&backend, model, 12);
    let add = BitmapAdd { node: "disk".into(), name: "b".into(), persistent: true, ..BitmapAdd::default() };
    let target = |name: &str| NewTarget { target: rig.path(name), ..NewTarget::default() };
    let actions = vec![
        Action::BitmapAdd(add),
        Action::DriveBackup(DriveBackup {
            backup: backup("full", SyncMode::Full),
            target: target("backup0"),
        }),
    ];
    let (started, model) = writer.paused(|| rig.storage.transaction(actions, CompletionMode::Individual));
    started.unwrap();
    assert_eq!(rig.end_of("full"), Ok(None));
    rig.check_file("backup0", "qcow2", &model);
    for number in 1..=4 {
        writer.wait(60);
        let (name, below) = (format!("backup{number}"), format!("backup{}", number - 1));
        let cancelled = number == 2;
        let below = if number == 3 { "backup1".to_owned() } else { below };
        rig.make(&name, "qcow2", Some((&below, "qcow2")), &[]);
        rig.add(&name, "qcow2");
        let mut backup = backup(&name, SyncMode::Incremental);
        backup.bitmap = Some("b".into());
        backup.job.speed = if cancelled { 1 << 20 } else { 8 << 20 };
        let (started, model) =
            writer.paused(|| rig.storage.blockdev_backup(BlockdevBackup { backup, target: name.clone() }));
        started.unwrap();
        let which = BitmapName { node: "disk".into(), name: "b".into() };
        assert!(rig.storage.bitmap_clear(which.clone()).is_err(), "it is busy");
        assert!(rig.storage.bitmap_remove(which.clone()).is_err(), "it is busy");
        writer.wait(30);
        if cancelled {
            rig.storage.job_cancel(&name, true).unwrap();
            assert_eq!(rig.end_of(&name), Err(()));
            rig.storage.blockdev_del(&name).unwrap();
            continue;
        }
        rig.storage.job_set_speed(&name, 0).unwrap();
        assert_eq!(rig.end_of(&name), Ok(None));
        rig.storage.blockdev_del(&name).unwrap();
        rig.check_file(&name, "qcow2", &model);
        let dirty = rig.storage.bitmaps(&rig.storage.find("disk").unwrap()).unwrap();
        assert!(dirty[0].persistent && !dirty[0].busy && dirty[0].recording, "{dirty:?}");
    }
    let model = writer.finish();
    rig.check("layer1", "qcow2", &model);
}

/// What is in the target of a backup that only saves what is overwritten is the disk of its start.
#[test]
fn what_is_overwritten_is_saved() {
    let rig = Rig::new();
    let model = rig.chain(2, 13);
    let backend = rig.open_chain(2);
    let writer = Writer::start(&backend, model, 13);
    let target =
        NewTarget { target: rig.path("copy"), node_name: Some("copy".into()), ..NewTarget::default() };
    let given = DriveBackup { backup: backup("job", SyncMode::None), target };
    let (started, model) = writer.paused(|| rig.storage.drive_backup(given));
    started.unwrap();
    let copy = rig.storage.find("copy").unwrap();
    writer.wait(200);
    let (seen, _) = writer.paused(|| Rig::read(&copy));
    rig::assert_same(&seen, &model, "the copy");
    drop(copy);
    rig.storage.job_cancel("job", false).unwrap();
    assert_eq!(rig.end_of("job"), Err(()));
    assert!(rig.storage.find("copy").is_err());
    let model = writer.finish();
    rig.check("layer1", "qcow2", &model);
}

/// The modes of a bitmap, after success and failure.
#[test]
fn bitmaps_become_what_their_mode_says() {
    let cases = [
        (BitmapMode::OnSuccess, true, false),
        (BitmapMode::OnSuccess, false, true),
        (BitmapMode::Never, true, true),
        (BitmapMode::Always, true, false),
    ];
    for (number, (mode, success, still_dirty)) in cases.into_iter().enumerate() {
        let rig = Rig::new();
        rig.chain(2, 14);
        let backend = rig.open_chain(2);
        let add = BitmapAdd { node: "disk".into(), name: "b".into(), ..BitmapAdd::default() };
        rig.storage.bitmap_add(add).unwrap();
        let write = |at: u64| {
            let io = io_loop::IoBuffer::from(&[9; 65536][..]).into_io();
            io_loop::block_on(backend.write(at, &io, block_graph::WriteFlags::empty())).unwrap();
        };
        write(1 << 20);
        write(9 << 20);
        rig.make("copy", "qcow2", None, &[]);
        rig.add("copy", "qcow2");
        let mut backup = backup("job", SyncMode::Bitmap);
        backup.bitmap = Some("b".into());
        assert!(
            rig.storage
                .blockdev_backup(BlockdevBackup { backup: backup.clone(), target: "copy".into() })
                .is_err(),
            "no mode"
        );
        backup.bitmap_mode = Some(mode);
        backup.job.speed = 65536;
        rig.storage.blockdev_backup(BlockdevBackup { backup, target: "copy".into() }).unwrap();
        write(3 << 20);
        if success {
            rig.storage.job_set_speed("job", 0).unwrap();
            assert_eq!(rig.end_of("job"), Ok(None), "case {number}");
        } else {
            rig.storage.job_cancel("job", true).unwrap();
            assert_eq!(rig.end_of("job"), Err(()));
        }
        let bitmap =
            rig.storage.bitmap_content(BitmapName { node: "disk".into(), name: "b".into() }).unwrap();
        assert!(bitmap.get(3 << 20), "what was written since is dirty: case {number}");
        assert_eq!(bitmap.get(1 << 20), still_dirty, "case {number}");
        assert_eq!(bitmap.get(9 << 20), still_dirty, "case {number}");
        assert!(!bitmap.get(5 << 20));
        rig.storage.close().unwrap();
    }
}

/// Two backups of one moment that end together: one fails, and neither is a success.
#[test]
fn a_group_succeeds_or_fails_as_a_whole() {
    for fails in [false, true] {
        let rig = Rig::new();
        let model = rig.chain(2, 15);
        let backend = rig.open_chain(2);
        for name in ["one", "two"] {
            rig.make(name, "qcow2", None, &[]);
        }
        rig.add("one", "qcow2");
        let mut options = Options::with("driver", "qcow2");
        options.set("node-name", "two");
        options.set("file.driver", "blkdebug");
        options.set("file.image.driver", "file");
        options.set("file.image.filename", rig.path("two"));
        if fails {
            options.set("file.inject-error.0.event", "write_aio");
            options.set("file.inject-error.0.errno", 28);
            options.set("file.inject-error.0.once", true);
        }
        rig.storage.blockdev_add(options).unwrap();
        let writer = Writer::start(&backend, model, 15);
        let one = |name: &str| {
            let mut backup = backup(name, SyncMode::Full);
            backup.job.auto_finalize = false;
            // What cannot be saved must not keep the guest from writing here.
            backup.on_cbw_error = jobs::parameters::OnCbwError::BreakSnapshot;
            Action::BlockdevBackup(BlockdevBackup { backup, target: name.into() })
        };
        let actions = vec![one("one"), one("two")];
        let (started, model) = writer.paused(|| rig.storage.transaction(actions, CompletionMode::Grouped));
        started.unwrap();
        if fails {
            assert_eq!(rig.end_of("one"), Err(()), "it is cancelled");
            assert_eq!(rig.end_of("two"), Ok(Some("No space left on device".into())));
        } else {
            rig.wait_for("one", JobStatus::Pending);
            rig.wait_for("two", JobStatus::Pending);
            let pending = rig.events.lock().iter().filter(|e| matches!(e, Event::Pending { .. })).count();
            assert!(pending >= 1);
            rig.storage.job_finalize("one").unwrap();
            assert_eq!((rig.end_of("one"), rig.end_of("two")), (Ok(None), Ok(None)));
            for name in ["one", "two"] {
                rig.storage.blockdev_del(name).unwrap();
                rig.check_file(name, "qcow2", &model);
            }
        }
        let model = writer.finish();
        rig.check("layer1", "qcow2", &model);
    }
}

/// Two places are written one after the other: no copy has the second without the first, though nobody stops writing
/// when it is begun.
#[test]
fn a_backup_is_of_one_moment() {
    use block_graph::WriteFlags;
    use io_loop::{IoBuffer, block_on};
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    let rig = Rig::new();
    rig.chain(1, 16);
    let backend = rig.open_chain(1);
    let places = [1_u64 << 20, 20 << 20];
    let (stop, count) = (std::sync::Arc::new(AtomicBool::new(false)), std::sync::Arc::new(AtomicU64::new(0)));
    let (told, counted, writes_to) = (stop.clone(), count.clone(), backend.clone());
    let thread = std::thread::spawn(move || {
        block_on(async {
            let mut number = 0_u64;
            while !told.load(Ordering::SeqCst) {
                number += 1;
                for place in places {
                    let io = IoBuffer::from(&number.to_le_bytes().repeat(512)[..]).into_io();
                    writes_to.write(place, &io, WriteFlags::empty()).await.unwrap();
                }
                counted.store(number, Ordering::SeqCst);
            }
        });
    });
    for round in 0..20 {
        let before = count.load(Ordering::SeqCst);
        rig::wait_until("writes", || count.load(Ordering::SeqCst) > before + 3);
        let before = count.load(Ordering::SeqCst);
        let (name, id) = (format!("copy{round}"), format!("job{round}"));
        let target =
            NewTarget { target: rig.path(&name), format: Some("qcow2".into()), ..NewTarget::default() };
        let backup = backup(&id, SyncMode::Full);
        rig.storage.drive_backup(DriveBackup { backup, target }).unwrap();
        let after = count.load(Ordering::SeqCst) + 1;
        assert_eq!(rig.end_of(&id), Ok(None));
        let mut options = Options::with("driver", "qcow2");
        options.set("node-name", name.as_str());
        options.set("file.driver", "file");
        options.set("file.filename", rig.path(&name));
        rig.storage.blockdev_add(options).unwrap();
        let bytes = Rig::read(&rig.storage.find(&name).unwrap());
        let [first, second] = places.map(|place| {
            let part = &bytes[place as usize..place as usize + 4096];
            assert_eq!(part, part[..8].repeat(512), "a write is there as a whole");
            u64::from_le_bytes(part[..8].try_into().unwrap())
        });
        assert!(first == second || first == second + 1, "{first} and {second}");
        assert!((before..=after).contains(&second), "{second} is not in {before}..={after}");
        rig.storage.blockdev_del(&name).unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    thread.join().unwrap();
    rig.storage.close().unwrap();
}
