use super::*;
use crate::feature as blk;
use proptest::prelude::*;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32};
use tempfile::NamedTempFile;
use virtio::test_driver::{BUFFERS, Driver, DriverQueue, MEMORY_SIZE, copy_memory};
use virtio::{GuestSlice, status};

use ::device::Device;

const SECTORS: u64 = 256;
/// Where the driver puts headers, data and status of the first queue.
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x10_0000;
/// The next queue's are so much further.
const STRIDE: u64 = 0x20_0000;

fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(SECTORS * SECTOR_SIZE).unwrap();
    file
}

fn device(file: &NamedTempFile, read_only: bool, queues: u16) -> Arc<VirtioBlk> {
    let backend = Arc::new(RawFile::open(file.path(), read_only).unwrap());
    let config = VirtioBlkConfig { queues, serial: "vireo-0001".into(), ..VirtioBlkConfig::default() };
    Arc::new(VirtioBlk::new(config, backend))
}

/// Carries out a request whose data are in `pieces` pieces, and returns its status.
fn request(
    driver: &Driver,
    queue: &mut DriverQueue,
    kind: u32,
    sector: u64,
    data: (u32, bool),
    pieces: u32,
) -> u8 {
    let base = STRIDE * u64::from(queue.index);
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    driver.memory.write(base + HEADER, &header).unwrap();
    driver.memory.write(base + STATUS, &[0xff]).unwrap();
    let mut buffers = vec![(base + HEADER, 16, false)];
    let (len, device_writes) = data;
    for piece in 0..pieces {
        let (start, end) = (len * piece / pieces, len * (piece + 1) / pieces);
        buffers.push((base + DATA + u64::from(start), end - start, device_writes));
    }
    buffers.push((base + STATUS, 1, true));
    driver.transact(queue, &buffers);
    let mut status = [0];
    driver.memory.read(base + STATUS, &mut status).unwrap();
    status[0]
}

fn put_data(driver: &Driver, queue: &DriverQueue, data: &[u8]) {
    driver.memory.write(DATA + STRIDE * u64::from(queue.index), data).unwrap();
}

fn get_data(driver: &Driver, queue: &DriverQueue, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    driver.memory.read(DATA + STRIDE * u64::from(queue.index), &mut data).unwrap();
    data
}

fn read(driver: &Driver, queue: &mut DriverQueue, sector: u64, len: u32) -> Vec<u8> {
    assert_eq!(request(driver, queue, 0, sector, (len, true), 3), 0);
    get_data(driver, queue, len as usize)
}

fn write(driver: &Driver, queue: &mut DriverQueue, sector: u64, data: &[u8]) {
    put_data(driver, queue, data);
    assert_eq!(request(driver, queue, 1, sector, (data.len() as u32, false), 3), 0);
}

/// The data of discard and write-zeroes requests.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn ranges(driver: &Driver, queue: &mut DriverQueue, kind: u32, data: &[u8]) -> u8 {
    put_data(driver, queue, data);
    request(driver, queue, kind, 0, (data.len() as u32, false), 1)
}

#[test]
fn a_snapshot_reads_what_was_written_and_leaves_its_image_alone() {
    let mut file = image();
    let content: Vec<u8> =
        (0..SECTORS * SECTOR_SIZE).map(|index| (index / 512 + index % 251) as u8).collect();
    io::Write::write_all(&mut file, &content).unwrap();
    let backend = Snapshot::new(RawFile::open(file.path(), true).unwrap()).unwrap();
    let device = VirtioBlk::new(VirtioBlkConfig::default(), Arc::new(backend));
    let driver = Driver::new(Arc::new(device));
    assert_eq!(driver.offered() & blk::RO, 0);
    let features = blk::FLUSH | blk::DISCARD | blk::WRITE_ZEROES | virtio::feature::TRANSPORT;
    let mut queue = driver.set_up(features, &[64]).remove(0);
    let mut expected = content.clone();
    // Within a word of the map, over its end, whole words, and what was written before.
    for (number, (sector, sectors)) in
        [(3, 1), (5, 2), (60, 10), (64, 130), (4, 1), (255, 1)].into_iter().enumerate()
    {
        let data: Vec<u8> = (0..sectors * 512).map(|index| (index * 3 + number * 77) as u8).collect();
        write(&driver, &mut queue, sector as u64, &data);
        expected[sector * 512..][..data.len()].copy_from_slice(&data);
    }
    assert_eq!(ranges(&driver, &mut queue, 13, &range(100, 20, 1)), 0);
    expected[100 * 512..120 * 512].fill(0);
    assert_eq!(ranges(&driver, &mut queue, 11, &range(0, 2, 0)), 0);
    assert_eq!(request(&driver, &mut queue, 4, 0, (0, false), 0), 0);
    for (sector, sectors) in [(0, 256), (2, 5), (63, 2), (119, 3), (250, 6)] {
        let part = &expected[sector * 512..(sector + sectors) * 512];
        assert!(
            read(&driver, &mut queue, sector as u64, (sectors * 512) as u32) == part,
            "from sector {sector}"
        );
    }
    assert!(std::fs::read(file.path()).unwrap() == content);
}

#[test]
fn configuration_space_describes_the_disk() {
    let file = image();
    let driver = Driver::new(device(&file, false, 4));
    assert_eq!(driver.config_int(0, 8), SECTORS);
    assert_eq!(driver.config_int(12, 4), 254);
    assert_eq!(driver.config_int(20, 4), 512);
    assert_eq!(driver.config_int(24, 4), 0x0008_0003);
    assert_eq!(driver.config_int(34, 2), 4);
    assert_eq!(driver.offered() & (blk::MQ | blk::DISCARD | blk::RO), blk::MQ | blk::DISCARD);
}

#[test]
fn sectors_keep_what_is_written_and_flushes_and_identity_work() {
    let file = image();
    let driver = Driver::new(device(&file, false, 2));
    let mut queues = driver.set_up(blk::FLUSH | blk::MQ | virtio::feature::TRANSPORT, &[64, 64]);
    let data: Vec<u8> = (0..8192u32).map(|index| (index * 7 / 3) as u8).collect();
    write(&driver, &mut queues[0], 3, &data);
    assert_eq!(read(&driver, &mut queues[1], 3, 8192), data);
    assert_eq!(std::fs::read(file.path()).unwrap()[3 * 512..][..8192], data);
    assert_eq!(request(&driver, &mut queues[0], 4, 0, (0, false), 0), 0);
    assert_eq!(request(&driver, &mut queues[0], 8, 0, (20, true), 1), 0);
    let mut serial = [0xff; 20];
    driver.memory.read(DATA, &mut serial).unwrap();
    assert_eq!(&serial, b"vireo-0001\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(request(&driver, &mut queues[0], 99, 0, (20, true), 1), 2);
}

#[test]
fn bad_requests_fail_alone_and_malformed_ones_stop_the_device() {
    let file = image();
    let driver = Driver::new(device(&file, false, 1));
    let mut queue = driver.set_up(blk::FLUSH, &[64]).remove(0);
    for (sector, len) in [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (1 << 55, 512), (0, 511)] {
        assert_eq!(request(&driver, &mut queue, 0, sector, (len, true), 1), 1);
        assert_eq!(request(&driver, &mut queue, 1, sector, (len, false), 1), 1);
    }
    assert_eq!(ranges(&driver, &mut queue, 11, &range(SECTORS, 1, 0)), 1);
    assert_eq!(ranges(&driver, &mut queue, 11, &range(0, 1, 1)), 2);
    assert_eq!(ranges(&driver, &mut queue, 13, &range(0, 1, 2)), 2);
    assert_eq!(ranges(&driver, &mut queue, 13, &range(0, u32::MAX, 0)), 1);
    assert_eq!(ranges(&driver, &mut queue, 13, &[0; 15]), 1);
    assert_eq!(ranges(&driver, &mut queue, 13, &[0; 17 * 16]), 1);
    assert_eq!(driver.status() & status::NEEDS_RESET, 0);
    for buffers in [&[(HEADER, 15, false), (STATUS, 1, true)][..], &[(HEADER, 16, false)]] {
        let mut queue = driver.set_up(blk::FLUSH, &[64]).remove(0);
        queue.add(buffers);
        driver.ring(0);
        driver.wait_needs_reset();
    }
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let file = image();
    let driver = Driver::new(device(&file, true, 1));
    assert_eq!(driver.offered() & (blk::RO | blk::DISCARD), blk::RO);
    let mut queue = driver.set_up(blk::RO, &[64]).remove(0);
    driver.memory.write(DATA, &[1; 512]).unwrap();
    assert_eq!(request(&driver, &mut queue, 1, 0, (512, false), 1), 1);
    assert_eq!(ranges(&driver, &mut queue, 13, &range(0, 1, 0)), 1);
    assert_eq!(read(&driver, &mut queue, 0, 512), [0; 512]);
    assert_eq!(request(&driver, &mut queue, 4, 0, (0, false), 0), 0);
}

#[test]
fn a_second_writer_is_refused() {
    let file = image();
    let writer = RawFile::open(file.path(), false).unwrap();
    let error = RawFile::open(file.path(), false).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    assert!(matches!(RawFile::open(file.path(), true), Err(RawError::InUse(_))));
    drop(writer);
    let _reader = RawFile::open(file.path(), true).unwrap();
    RawFile::open(file.path(), true).unwrap();
    assert!(matches!(RawFile::open(file.path(), false), Err(RawError::InUse(_))));
    assert!(matches!(RawFile::open("/dev/null", true), Err(RawError::NotADisk(_))));
    assert!(matches!(RawFile::open("/nonexistent", true), Err(RawError::Open { .. })));
}

/// A backend that counts flushes and can be made to wait.
#[derive(Default)]
struct Observed {
    flushes: AtomicU32,
    writing: AtomicU32,
    hold: AtomicBool,
}

impl BlockBackend for Observed {
    fn size_bytes(&self) -> u64 {
        SECTORS * SECTOR_SIZE
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, _offset: u64, _buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
    fn write_at(&self, _offset: u64, _buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        self.writing.fetch_add(1, Ordering::SeqCst);
        while self.hold.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        self.writing.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn write_zeroes(&self, _offset: u64, _len: u64, _may_unmap: bool) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn write_through_flushes_each_write() {
    let backend = Arc::new(Observed::default());
    let driver = Driver::new(Arc::new(VirtioBlk::new(VirtioBlkConfig::default(), backend.clone())));
    let flushes_of_a_write = |features: u64, write_back: Option<u8>| {
        let mut queue = driver.set_up(features, &[64]).remove(0);
        if let Some(value) = write_back {
            driver.set_config(CONFIG_WRITEBACK, &[value]);
        }
        let before = backend.flushes.load(Ordering::SeqCst);
        write(&driver, &mut queue, 0, &[1; 512]);
        backend.flushes.load(Ordering::SeqCst) - before
    };
    assert_eq!(flushes_of_a_write(0, None), 1);
    assert_eq!(flushes_of_a_write(blk::FLUSH, None), 0);
    assert_eq!(flushes_of_a_write(blk::FLUSH, Some(0)), 0); // not negotiated
    assert_eq!(flushes_of_a_write(blk::FLUSH | blk::CONFIG_WCE, None), 0);
    assert_eq!(flushes_of_a_write(blk::FLUSH | blk::CONFIG_WCE, Some(0)), 1);
    let mut queue = driver.set_up(blk::FLUSH, &[64]).remove(0);
    assert_eq!(ranges(&driver, &mut queue, 11, &range(0, 1, 0)), 2);
    assert_eq!(request(&driver, &mut queue, 0, 0, (512, true), 1), 1);
}

#[test]
fn stopping_waits_for_the_request_under_way_and_holds_back_the_next() {
    let backend = Arc::new(Observed::default());
    let driver = Driver::new(Arc::new(VirtioBlk::new(VirtioBlkConfig::default(), backend.clone())));
    let mut queue = driver.set_up(blk::FLUSH, &[64]).remove(0);
    driver.memory.write(HEADER, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    backend.hold.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        queue.add(&[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)]);
    }
    driver.ring(0);
    driver.wait_for("the first write", || backend.writing.load(Ordering::SeqCst) == 1);
    std::thread::scope(|scope| {
        let stopper = scope.spawn(|| driver.device.stop());
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!stopper.is_finished());
        backend.hold.store(false, Ordering::SeqCst);
    });
    assert!(queue.take_used().is_some() && queue.take_used().is_none());
    driver.device.start();
    driver.wait_for("the second write", || queue.take_used().is_some());
}

#[test]
fn a_restored_disk_goes_on_with_what_was_left() {
    let file = image();
    let backend: Arc<dyn BlockBackend> = Arc::new(RawFile::open(file.path(), false).unwrap());
    let disk = || Arc::new(VirtioBlk::new(VirtioBlkConfig::default(), backend.clone()));
    let driver = Driver::new(disk());
    let mut queue = driver.set_up(blk::FLUSH | blk::CONFIG_WCE, &[64]).remove(0);
    driver.set_config(CONFIG_WRITEBACK, &[0]);
    write(&driver, &mut queue, 7, &[0x77; 512]);
    driver.device.stop();
    driver.memory.write(HEADER, &[0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    queue.add(&[(HEADER, 16, false), (DATA + 0x1000, 512, true), (STATUS, 1, true)]);
    driver.ring(0);
    let state = driver.device.save();
    let restored = Driver::with_memory(disk(), copy_memory(&driver.memory));
    restored.device.restore(&state).unwrap();
    assert_eq!(restored.device.save(), state);
    restored.device.start();
    let mut queue = queue.over(&restored.memory);
    restored.wait_for("the read", || queue.take_used().is_some());
    let mut data = [0; 512];
    restored.memory.read(DATA + 0x1000, &mut data).unwrap();
    assert_eq!(data, [0x77; 512]);
    assert_eq!(restored.config_int(CONFIG_WRITEBACK, 1), 0);
    assert_eq!(read(&restored, &mut queue, 7, 512), [0x77; 512]);
}

#[test]
fn queues_work_side_by_side_while_the_vm_stops_and_starts() {
    let file = image();
    let driver = Driver::new(device(&file, false, 2));
    let queues = driver.set_up(blk::FLUSH | blk::MQ | virtio::feature::TRANSPORT, &[64, 64]);
    std::thread::scope(|scope| {
        let drivers: Vec<_> = queues
            .into_iter()
            .map(|mut queue| {
                let driver = &driver;
                scope.spawn(move || {
                    for round in 0..200u64 {
                        let sector = 2 * (round % 60) + u64::from(queue.index);
                        write(driver, &mut queue, sector, &[round as u8; 512]);
                        assert_eq!(read(driver, &mut queue, sector, 512), [round as u8; 512]);
                    }
                })
            })
            .collect();
        while drivers.iter().any(|thread| !thread.is_finished()) {
            driver.device.stop();
            driver.device.save();
            driver.device.start();
            std::thread::yield_now();
        }
    });
    assert_eq!(driver.status() & status::NEEDS_RESET, 0);
}

#[test]
fn reads_mark_the_pages_dirty() {
    let file = image();
    let driver = Driver::new(device(&file, false, 1));
    let mut queue = driver.set_up(blk::FLUSH, &[64]).remove(0);
    driver.memory.set_dirty_log(true);
    read(&driver, &mut queue, 0, 8192);
    let mut pages = Vec::new();
    driver.memory.take_dirty(|page| pages.push(page));
    assert!(pages.contains(&DATA) && pages.contains(&(DATA + 4096)));
}

#[derive(Debug, Clone)]
enum Operation {
    Read(u64, u32),
    Write(u64, u32, u8),
    Zero(u64, u32, bool),
    StopAndStart,
    Flush,
}

fn operation() -> impl Strategy<Value = Operation> {
    let place = || (0..SECTORS + 2, 1u32..40);
    prop_oneof![
        place().prop_map(|(sector, count)| Operation::Read(sector, count)),
        (place(), any::<u8>()).prop_map(|((sector, count), fill)| Operation::Write(sector, count, fill)),
        (place(), any::<bool>()).prop_map(|((sector, count), unmap)| Operation::Zero(sector, count, unmap)),
        Just(Operation::StopAndStart),
        Just(Operation::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// The disk holds what a plain array would.
    #[test]
    fn the_disk_behaves_like_an_array(
        operations in prop::collection::vec((operation(), 0usize..2, 1u32..9), 1..40),
    ) {
        let file = image();
        let driver = Driver::new(device(&file, false, 2));
        let features = blk::FLUSH | blk::MQ | blk::WRITE_ZEROES | virtio::feature::TRANSPORT;
        let mut queues = driver.set_up(features, &[64, 64]);
        let mut model = vec![0u8; (SECTORS * SECTOR_SIZE) as usize];
        for (operation, queue, pieces) in operations {
            let queue = &mut queues[queue];
            let bytes = |sector: u64, count: u32| {
                let start = (sector * SECTOR_SIZE) as usize;
                start..start + (u64::from(count) * SECTOR_SIZE) as usize
            };
            let expected = |range: &std::ops::Range<usize>| u8::from(range.end as u64 > SECTORS * SECTOR_SIZE);
            match operation {
                Operation::Read(sector, count) => {
                    let range = bytes(sector, count);
                    let status = request(&driver, queue, 0, sector, (range.len() as u32, true), pieces);
                    prop_assert_eq!(status, expected(&range));
                    if status == 0 {
                        prop_assert!(get_data(&driver, queue, range.len()) == model[range]);
                    }
                }
                Operation::Write(sector, count, fill) => {
                    let range = bytes(sector, count);
                    let data: Vec<u8> = (0..range.len()).map(|at| fill ^ (at / 5) as u8).collect();
                    put_data(&driver, queue, &data);
                    let status = request(&driver, queue, 1, sector, (data.len() as u32, false), pieces);
                    prop_assert_eq!(status, expected(&range));
                    if status == 0 {
                        model[range].copy_from_slice(&data);
                    }
                }
                Operation::Zero(sector, count, unmap) => {
                    let place = bytes(sector, count);
                    let status = ranges(&driver, queue, 13, &range(sector, count, unmap.into()));
                    prop_assert_eq!(status, expected(&place));
                    if status == 0 {
                        model[place].fill(0);
                    }
                }
                Operation::StopAndStart => {
                    driver.device.stop();
                    driver.device.start();
                }
                Operation::Flush => prop_assert_eq!(request(&driver, queue, 4, 0, (0, false), 0), 0),
            }
        }
        driver.device.stop();
        prop_assert!(std::fs::read(file.path()).unwrap() == model);
    }

    /// Random requests never end in anything but a status or the error state.
    #[test]
    fn random_requests_are_answered_or_stop_the_device(
        header in prop::collection::vec(prop_oneof![Just(0u8), 0u8..16, any::<u8>()], 16),
        buffers in prop::collection::vec(
            (prop_oneof![Just(HEADER), BUFFERS..MEMORY_SIZE], 0u32..5000, any::<bool>()), 1..8),
    ) {
        let file = image();
        let driver = Driver::new(device(&file, false, 1));
        let mut queue = driver.set_up(blk::FLUSH, &[64]).remove(0);
        driver.memory.write(HEADER, &header).unwrap();
        queue.add(&buffers);
        driver.ring(0);
        driver.wait_for("an answer", || {
            queue.take_used().is_some() || driver.status() & status::NEEDS_RESET != 0
        });
        let mut queue = driver.set_up(blk::FLUSH, &[64]).remove(0);
        read(&driver, &mut queue, 0, 512);
    }
}
