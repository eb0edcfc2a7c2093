use super::*;
use crate::feature as blk;
use block_graph::{
    Backend, Driver as BlockDriver, Errno, Error, Node, OpenFlags, Result as BlockResult, WriteFlags,
    ZeroFlags, async_trait,
};
use io_loop::IoVec;
use proptest::prelude::*;
use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::time::Duration;
use virtio::status;
use virtio::test_driver::{BUFFERS, Driver, DriverQueue, MEMORY_SIZE, copy_memory};

use ::device::Device;

const SECTORS: u64 = 256;
/// Where the driver puts headers, data and status of the first queue.
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x10_0000;
/// The next queue's are so much further.
const STRIDE: u64 = 0x20_0000;

/// A disk in memory that counts what comes and can be made to wait.
#[derive(Debug)]
struct Disk {
    bytes: Mutex<Vec<u8>>,
    flushes: AtomicU32,
    writing: AtomicU32,
    hold: AtomicBool,
}

/// The driver of a [`Disk`].
#[derive(Debug)]
struct DiskDriver(Arc<Disk>);

#[async_trait(?Send)]
impl BlockDriver for DiskDriver {
    fn format_name(&self) -> &'static str {
        "test"
    }

    fn len(&self) -> u64 {
        self.0.bytes.lock().len() as u64
    }

    async fn read(&self, offset: u64, into: &IoVec) -> BlockResult<()> {
        io_loop::yield_now().await;
        into.copy_from(0, &self.0.bytes.lock()[offset as usize..][..into.len()]);
        Ok(())
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> BlockResult<()> {
        self.0.writing.fetch_add(1, Ordering::SeqCst);
        while self.0.hold.load(Ordering::SeqCst) {
            io_loop::sleep(Duration::from_millis(1)).await;
        }
        from.copy_to(0, &mut self.0.bytes.lock()[offset as usize..][..from.len()]);
        self.0.writing.fetch_sub(1, Ordering::SeqCst);
        if flags.contains(WriteFlags::FUA) { self.flush().await } else { Ok(()) }
    }

    async fn write_zeroes(&self, offset: u64, len: u64, _: ZeroFlags) -> BlockResult<()> {
        self.0.bytes.lock()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }

    async fn discard(&self, _: u64, _: u64) -> BlockResult<()> {
        Err(Error::errno_only(Errno::NO_SPACE))
    }

    async fn flush(&self) -> BlockResult<()> {
        self.0.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn image() -> Arc<Disk> {
    Arc::new(Disk {
        bytes: Mutex::new(vec![0; (SECTORS * SECTOR_SIZE) as usize]),
        flushes: AtomicU32::new(0),
        writing: AtomicU32::new(0),
        hold: AtomicBool::new(false),
    })
}

fn backend_of(disk: &Arc<Disk>, flags: OpenFlags) -> Arc<Backend> {
    Backend::new("disk", Node::new("disk", Box::new(DiskDriver(disk.clone())), flags))
}

fn device(disk: &Arc<Disk>, read_only: bool, queues: u16) -> Arc<VirtioBlk> {
    let config = VirtioBlkConfig { queues, serial: "vireo-0001".into(), ..VirtioBlkConfig::default() };
    Arc::new(VirtioBlk::new(
        config,
        backend_of(disk, if read_only { OpenFlags::READ } else { OpenFlags::WRITE }),
    ))
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
    assert_eq!(file.bytes.lock()[3 * 512..][..8192], data);
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
fn write_through_flushes_each_write() {
    let backend = image();
    let driver = Driver::new(device(&backend, false, 1));
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
    assert_eq!(ranges(&driver, &mut queue, 11, &range(0, 1, 0)), 1, "what the host refuses is an error");

    // A disk that is opened for write-through says so, and stays so whatever the driver wants.
    let flags = OpenFlags { write_through: true, ..OpenFlags::WRITE };
    let device = VirtioBlk::new(VirtioBlkConfig::default(), backend_of(&backend, flags));
    let driver = Driver::new(Arc::new(device));
    assert_eq!(driver.config_int(CONFIG_WRITEBACK, 1), 0);
    let mut queue = driver.set_up(blk::FLUSH | blk::CONFIG_WCE, &[64]).remove(0);
    driver.set_config(CONFIG_WRITEBACK, &[1]);
    let before = backend.flushes.load(Ordering::SeqCst);
    write(&driver, &mut queue, 0, &[1; 512]);
    assert_eq!(backend.flushes.load(Ordering::SeqCst) - before, 1);
}

#[test]
fn stopping_waits_for_requests_in_flight_and_holds_back_the_next() {
    let backend = image();
    let driver = Driver::new(device(&backend, false, 1));
    let mut queue = driver.set_up(blk::FLUSH, &[64]).remove(0);
    driver.memory.write(HEADER, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    backend.hold.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        queue.add(&[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)]);
    }
    driver.ring(0);
    driver.wait_for("both writes", || backend.writing.load(Ordering::SeqCst) == 2);
    std::thread::scope(|scope| {
        let stopper = scope.spawn(|| driver.device.stop());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!stopper.is_finished());
        queue.add(&[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)]);
        driver.ring(0);
        backend.hold.store(false, Ordering::SeqCst);
    });
    assert!(queue.take_used().is_some() && queue.take_used().is_some() && queue.take_used().is_none());
    driver.device.start();
    driver.wait_for("the third write", || queue.take_used().is_some());
}

#[test]
fn a_restored_disk_goes_on_with_what_was_left() {
    let file = image();
    let disk = || device(&file, false, 1);
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
        prop_assert!(*file.bytes.lock() == model);
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
