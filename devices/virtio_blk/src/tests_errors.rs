//! Requests that the host fails, with errors injected by `blkdebug`.

use super::*;
use block_graph::{Backend, Errno, OpenContext, OpenFlags, Options, RefuseAll, Secrets};
use virtio::status;
use virtio::test_driver::{BUFFERS, Driver, DriverQueue, copy_memory};

use ::device::Device;

const STATUS: u64 = BUFFERS + 0x100;

/// A disk whose writes and reads fail once with error number `errno`.
fn failing(errno: i32, times: usize) -> Arc<Backend> {
    let rule =
        |iotype: &str| format!(r#"{{"event":"none","iotype":"{iotype}","errno":{errno},"once":true}}"#);
    let rules: Vec<String> =
        ["write", "read", "flush"].iter().flat_map(|iotype| vec![rule(iotype); times]).collect();
    let options = format!(
        r#"{{"driver":"blkdebug","image":{{"driver":"null-co","size":65536,"read-zeroes":true}},"inject-error":[{}]}}"#,
        rules.join(",")
    );
    let context =
        OpenContext::new(Arc::new(blockdev::registry()), Arc::new(Secrets::default()), Arc::new(RefuseAll));
    let options = Options::from_json(&options).unwrap();
    let node = io_loop::block_on(context.open(options, OpenFlags::WRITE)).unwrap();
    Backend::new("disk", node)
}

type Heard = Arc<Mutex<Vec<(bool, ErrorAction, Errno)>>>;

fn device(backend: Arc<Backend>, reads: ErrorPolicy, writes: ErrorPolicy) -> (Arc<VirtioBlk>, Heard) {
    let config = VirtioBlkConfig { read_errors: reads, write_errors: writes, ..VirtioBlkConfig::default() };
    let (device, heard) = (VirtioBlk::new(config, backend), Heard::default());
    let hears = heard.clone();
    device.on_failure(move |failure| {
        hears.lock().push((failure.read, failure.action, failure.error.errno()));
    });
    (Arc::new(device), heard)
}

/// Puts a request of 512 bytes in the queue.
fn ask(driver: &Driver, queue: &mut DriverQueue, kind: u8) {
    driver.memory.write(STATUS, &[0xff]).unwrap();
    driver.memory.write(BUFFERS, &[kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    let mut buffers = vec![(BUFFERS, 16, false)];
    if kind != 4 {
        buffers.push((BUFFERS + 0x1000, 512, kind == 0));
    }
    buffers.push((STATUS, 1, true));
    queue.add(&buffers);
    driver.ring(0);
}

fn status(driver: &Driver) -> u8 {
    let mut status = [0];
    driver.memory.read(STATUS, &mut status).unwrap();
    status[0]
}

fn answer(driver: &Driver, queue: &mut DriverQueue, kind: u8) -> u8 {
    ask(driver, queue, kind);
    driver.wait_for("the request", || queue.take_used().is_some());
    status(driver)
}

#[test]
fn the_guest_is_told_or_not() {
    let no_space = Errno::NO_SPACE;
    for (policy, told, action) in
        [(ErrorPolicy::Report, 1, ErrorAction::Report), (ErrorPolicy::Ignore, 0, ErrorAction::Ignore)]
    {
        let (disk, heard) = device(failing(no_space.number(), 1), policy, policy);
        let driver = Driver::new(disk);
        let mut queue = driver.set_up(feature::FLUSH, &[64]).remove(0);
        for kind in [1, 0, 4] {
            assert_eq!(answer(&driver, &mut queue, kind), told, "{policy:?} {kind}");
            assert_eq!(answer(&driver, &mut queue, kind), 0, "it fails once");
        }
        let expected = [false, true, false].map(|read| (read, action, no_space));
        assert_eq!(*heard.lock(), expected);
    }
}

#[test]
fn a_request_is_kept_until_the_vm_runs_on_as_often_as_it_fails() {
    for kind in [1, 0, 4] {
        let (disk, heard) = device(failing(Errno::IO.number(), 2), ErrorPolicy::Stop, ErrorPolicy::Stop);
        let driver = Driver::new(disk);
        let mut queue = driver.set_up(feature::FLUSH, &[64]).remove(0);
        ask(&driver, &mut queue, kind);
        for round in 1..=2 {
            driver.wait_for("the failure", || heard.lock().len() == round);
            // Until the VM stands still doorbells do not have it tried again.
            driver.ring(0);
            driver.device.stop();
            assert_eq!((heard.lock().len(), status(&driver)), (round, 0xff));
            assert!(queue.take_used().is_none());
            driver.device.start();
        }
        driver.wait_for("the request", || queue.take_used().is_some());
        assert_eq!(status(&driver), 0);
        assert_eq!(answer(&driver, &mut queue, kind), 0);
        assert_eq!(driver.status() & status::NEEDS_RESET, 0);
    }
}

#[test]
fn only_want_of_space_stops_the_vm_by_default() {
    for (errno, action) in [(Errno::NO_SPACE, ErrorAction::Stop), (Errno::IO, ErrorAction::Report)] {
        let (disk, heard) = device(failing(errno.number(), 1), ErrorPolicy::Report, ErrorPolicy::Enospc);
        let driver = Driver::new(disk);
        let mut queue = driver.set_up(feature::FLUSH, &[64]).remove(0);
        ask(&driver, &mut queue, 1);
        driver.wait_for("the failure", || !heard.lock().is_empty());
        assert_eq!(*heard.lock(), [(false, action, errno)]);
    }
}

#[test]
fn what_is_kept_is_saved_and_forgotten_by_a_reset() {
    let (disk, heard) = device(failing(Errno::IO.number(), 1), ErrorPolicy::Stop, ErrorPolicy::Stop);
    let driver = Driver::new(disk);
    let mut queue = driver.set_up(feature::FLUSH, &[64]).remove(0);
    ask(&driver, &mut queue, 1);
    driver.wait_for("the failure", || !heard.lock().is_empty());
    driver.device.stop();
    let state = driver.device.save();
    let (other, heard) = device(failing(Errno::IO.number(), 0), ErrorPolicy::Stop, ErrorPolicy::Stop);
    let restored = Driver::with_memory(other, copy_memory(&driver.memory));
    restored.device.restore(&state).unwrap();
    assert_eq!(restored.device.save(), state);
    restored.device.start();
    let mut queue = queue.over(&restored.memory);
    restored.wait_for("the request", || queue.take_used().is_some());
    assert_eq!((status(&restored), heard.lock().len()), (0, 0));

    driver.device.reset();
    assert_ne!(driver.device.save(), state);
    driver.device.start();
    assert_eq!(status(&driver), 0xff, "nobody touches a queue that was reset");
}
