use super::*;
use ::device::Device;
use guest_memory::GuestMemory;
use proptest::prelude::*;
use virtio::status;
use virtio::test_driver::{BUFFERS, Driver, DriverQueue, MEMORY_SIZE, copy_memory};

/// All features that the balloon offers.
const ALL: u64 = feature::STATS_VQ | feature::DEFLATE_ON_OOM | feature::PAGE_POISON | feature::PAGE_REPORTING;

/// A page that tests give up.
const VICTIM: u64 = BUFFERS + 0x10_0000;

/// Bytes that the host spends on the guest's memory.
fn spent(memory: &GuestMemory) -> u64 {
    memory.pages_in_use().unwrap().len() as u64 * 4096
}

fn fill(driver: &Driver, address: u64, len: usize) {
    driver.memory.write(address, &vec![0xaa; len]).unwrap();
}

fn byte(driver: &Driver, address: u64) -> u8 {
    let mut data = [0];
    driver.memory.read(address, &mut data).unwrap();
    data[0]
}

fn send_pages(driver: &Driver, queue: &mut DriverQueue, pages: &[u64]) {
    let numbers: Vec<u8> = pages.iter().flat_map(|page| ((page / 4096) as u32).to_le_bytes()).collect();
    driver.memory.write(BUFFERS, &numbers).unwrap();
    driver.transact(queue, &[(BUFFERS, numbers.len() as u32, false)]);
}

#[test]
fn the_balloon_takes_pages_and_gives_them_back_empty() {
    let balloon = Arc::new(VirtioBalloon::new());
    let driver = Driver::new(balloon.clone());
    let mut queues = driver.set_up(feature::DEFLATE_ON_OOM, &[64, 64]);
    fill(&driver, BUFFERS, 0x1000); // where the page numbers will be
    fill(&driver, VICTIM, 0x8000);
    let before = spent(&driver.memory);
    balloon.set_target(5 * 4096 + 1);
    assert_eq!((balloon.target(), driver.config_int(0, 4)), (5 * 4096, 5));
    assert_eq!(driver.recorder.messages.lock().last().unwrap().data, 0x40);
    driver.memory.set_dirty_log(true);
    // Upwards, downwards, and alone.
    let pages = [0u64, 1, 4, 3, 6].map(|page| VICTIM + page * 4096);
    send_pages(&driver, &mut queues[0], &pages);
    driver.set_config(CONFIG_ACTUAL, &5u32.to_le_bytes());
    assert_eq!(balloon.actual(), 5 * 4096);
    assert_eq!(before - spent(&driver.memory), 5 * 4096);
    for page in 0..8 {
        let gone = pages.contains(&(VICTIM + page * 4096));
        assert_eq!(byte(&driver, VICTIM + page * 4096 + 7), if gone { 0 } else { 0xaa });
        assert_eq!(driver.memory.is_dirty(VICTIM + page * 4096), gone);
    }
    send_pages(&driver, &mut queues[1], &pages);
    fill(&driver, VICTIM, 0x1000);
    assert_eq!(byte(&driver, VICTIM), 0xaa);
    driver.set_status(0);
    assert_eq!((balloon.actual(), balloon.target()), (0, 5 * 4096));
}

#[test]
fn pages_that_are_no_memory_stop_the_device() {
    let driver = Driver::new(Arc::new(VirtioBalloon::new()));
    for page in [MEMORY_SIZE, u64::from(u32::MAX) * 4096] {
        let mut queue = driver.set_up(0, &[64, 64]).remove(0);
        driver.memory.write(BUFFERS, &((page / 4096) as u32).to_le_bytes()).unwrap();
        queue.add(&[(BUFFERS, 4, false)]);
        driver.ring(0);
        driver.wait_needs_reset();
    }
}

#[test]
fn reported_pages_go_unless_they_are_poisoned() {
    // By Linux's numbering, with and without statistics, and by the specification's.
    for (features, number) in [(ALL, 3u16), (ALL & !feature::STATS_VQ, 2), (ALL, 4)] {
        let driver = Driver::new(Arc::new(VirtioBalloon::new()));
        let mut queues = driver.set_up(features, &[64; 5]);
        let queue = &mut queues[usize::from(number)];
        fill(&driver, VICTIM, 0x4000);
        driver.set_config(CONFIG_POISON, &0xaaaa_aaaau32.to_le_bytes());
        driver.transact(queue, &[(VICTIM, 0x1000, true)]);
        assert_eq!(byte(&driver, VICTIM), 0xaa);
        driver.set_config(CONFIG_POISON, &[0; 4]);
        // Only whole pages are free.
        driver.transact(queue, &[(VICTIM + 0x1000, 0x1000, true), (VICTIM + 0x2800, 0x17ff, true)]);
        assert_eq!([0u64, 1, 2, 3].map(|page| byte(&driver, VICTIM + page * 4096)), [0xaa, 0, 0xaa, 0xaa]);
    }
}

fn stats_buffer(driver: &Driver, stats: &[(u16, u64)]) -> u32 {
    let data: Vec<u8> = stats
        .iter()
        .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
        .collect();
    driver.memory.write(BUFFERS, &data).unwrap();
    data.len() as u32
}

#[test]
fn statistics_come_when_asked_for_even_over_save_and_restore() {
    let balloon = Arc::new(VirtioBalloon::new());
    let driver = Driver::new(balloon.clone());
    let mut queue = driver.set_up(ALL, &[64; 4]).remove(2);
    assert_eq!(balloon.stats(), None);
    let len = stats_buffer(&driver, &[(4, 1000), (5, 5000), (99, 1)]);
    queue.add(&[(BUFFERS, len, false)]);
    driver.ring(2);
    driver.wait_for("statistics", || balloon.stats().is_some());
    let stats = balloon.stats().unwrap();
    assert_eq!((stats.updates, stats.free_memory, stats.total_memory), (1, Some(1000), Some(5000)));
    assert_eq!(stats.swap_in, None);
    assert!(queue.take_used().is_none());
    balloon.request_stats();
    driver.wait_for("the buffer", || queue.take_used().is_some());
    let len = stats_buffer(&driver, &[(4, 900)]);
    queue.add(&[(BUFFERS, len, false)]);
    driver.ring(2);
    driver.wait_for("statistics", || balloon.stats().unwrap().updates == 2);

    driver.device.stop();
    let state = driver.device.save();
    let other = Arc::new(VirtioBalloon::new());
    let restored = Driver::with_memory(other.clone(), copy_memory(&driver.memory));
    restored.device.restore(&state).unwrap();
    assert_eq!(restored.device.save(), state);
    restored.device.start();
    restored.wait_for("the statistics again", || other.stats().is_some());
    assert_eq!(other.stats().unwrap().free_memory, Some(900));
    other.request_stats();
    let mut queue = queue.over(&restored.memory);
    restored.wait_for("the buffer", || queue.take_used().is_some());
    // More than one buffer is against the rules.
    for _ in 0..2 {
        queue.add(&[(BUFFERS, 10, false)]);
    }
    restored.ring(2);
    restored.wait_needs_reset();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever the driver puts into whichever queue, the device neither dies nor hangs; a restored one has
    /// the same registers and the same queues.
    #[test]
    fn random_buffers_are_harmless(
        actions in prop::collection::vec(
            (0usize..5, prop_oneof![Just(BUFFERS), BUFFERS..MEMORY_SIZE], 0u32..9000, any::<bool>()), 0..24),
        numbers in prop::collection::vec(prop_oneof![1000u32..2048, 1000u32..2050], 64),
        registers in any::<(u32, u32, u32)>(),
    ) {
        let balloon = Arc::new(VirtioBalloon::new());
        let driver = Driver::new(balloon.clone());
        let mut queues = driver.set_up(ALL, &[64; 5]);
        balloon.set_target(u64::from(registers.0) * 4096);
        driver.set_config(CONFIG_ACTUAL, &registers.1.to_le_bytes());
        driver.set_config(CONFIG_POISON, &registers.2.to_le_bytes());
        let data: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        driver.memory.write(BUFFERS, &data).unwrap();
        for (queue, address, len, write) in actions {
            queues[queue].add(&[(address, len, write)]);
            driver.ring(queue as u16);
            balloon.request_stats();
        }
        driver.device.stop();
        let state = driver.device.save();
        let other = Arc::new(VirtioBalloon::new());
        let restored = Driver::with_memory(other.clone(), copy_memory(&driver.memory));
        restored.device.restore(&state).unwrap();
        prop_assert_eq!(restored.device.save(), state);
        prop_assert_eq!(other.target(), balloon.target());
        prop_assert_eq!(other.actual(), balloon.actual());
        prop_assert_eq!(restored.status() & status::NEEDS_RESET, driver.status() & status::NEEDS_RESET);
        let mut queues = restored.set_up(ALL, &[64, 64]);
        send_pages(&restored, &mut queues[0], &[VICTIM]);
    }
}
