mod mmio;

use super::*;
use crate::test_driver::{BUFFERS, Driver, DriverQueue, MEMORY_SIZE, copy_memory, test_memory};
use ::device::{Device, MmioDevice, SavedState, StateError, decode, encode};
use irq::IrqLine;
use parking_lot::Mutex;
use pci::{DevFn, PciDevice};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A device that copies what it reads to what it writes, incremented, on its queues 0 and 1.
#[derive(Default)]
struct Echo {
    threads: QueueThreads,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
    served: Arc<AtomicU32>,
    register: Mutex<u8>,
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_registers(&[*self.register.lock(), 0xab], offset, data);
    }
    fn config_write(&self, offset: u64, data: &[u8]) {
        if let (0, [value]) = (offset, data) {
            *self.register.lock() = *value;
        }
    }
    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        *self.interrupt.lock() = Some(activation.interrupt.clone());
        for queue in activation.queues {
            let served = self.served.clone();
            let interrupt = activation.interrupt.clone();
            self.threads.spawn(queue.index, "echo", interrupt, move |stop| {
                queue.serve(stop, |chain| {
                    let len = chain.readable_len().min(chain.writable_len()).min(4096);
                    let mut data = vec![0; len as usize];
                    chain.read(&queue.memory, 0, &mut data)?;
                    assert_ne!(data.first(), Some(&0xee), "a bug in the device");
                    data.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
                    chain.write(&queue.memory, 0, &data)?;
                    served.fetch_add(1, Ordering::SeqCst);
                    Ok(len)
                })
            })?;
        }
        Ok(())
    }
    fn notify(&self, queue: u16) {
        self.threads.notify(queue);
    }
    fn doorbell(&self, queue: u16) -> Option<Arc<std::os::fd::OwnedFd>> {
        self.threads.doorbell(queue)
    }
    fn reset(&self) {
        self.threads.clear();
        *self.interrupt.lock() = None;
        *self.register.lock() = 0;
    }
    fn start(&self) {
        self.threads.start();
    }
    fn stop(&self) {
        self.threads.stop();
    }
    fn save(&self) -> SavedState {
        encode("echo", 1, &*self.register.lock())
    }
    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        *self.register.lock() = decode("echo", 1, state)?;
        Ok(())
    }
}

fn echo(driver: &Driver, queue: &mut DriverQueue, text: &[u8]) -> Vec<u8> {
    driver.memory.write(BUFFERS, text).unwrap();
    let len = text.len() as u32;
    let half = len / 2;
    let written = driver.transact(
        queue,
        &[
            (BUFFERS, half, false),
            (BUFFERS + u64::from(half), len - half, false),
            (BUFFERS + 0x1000, 3, true),
            (BUFFERS + 0x1003, 4096, true),
        ],
    );
    assert_eq!(written, len);
    let mut answer = vec![0; text.len()];
    driver.memory.read(BUFFERS + 0x1000, &mut answer).unwrap();
    answer
}

#[test]
fn a_queue_that_is_not_enabled_is_not_looked_at() {
    let memory = test_memory();
    let mut queue = Queue::new(16);
    queue.set_features(RingFeatures { indirect: true, event_idx: true });
    queue
        .configure(|state| (state.descriptors, state.available, state.used) = (u64::MAX, u64::MAX, u64::MAX));
    assert!(!queue.has_available(&memory).unwrap());
    assert!(!queue.needs_interrupt(&memory).unwrap());
}

#[test]
fn buffers_go_round_and_messages_come() {
    for features in [0, feature::RING_EVENT_IDX, feature::TRANSPORT] {
        let driver = Driver::new(Arc::new(Echo::default()));
        assert_eq!(driver.offered(), 1 << 5 | feature::TRANSPORT);
        let mut queues = driver.set_up(features, &[16, 64]);
        for round in 0..100u16 {
            queues[1].set_used_event(round);
            assert_eq!(echo(&driver, &mut queues[1], b"HAL9000"), b"IBM:111");
        }
        driver.wait_for("100 messages", || driver.recorder.messages.lock().len() == 100);
        assert!(driver.recorder.messages.lock().iter().all(|message| message.data == 0x42));
        assert!(driver.recorder.levels.lock().is_empty());
    }
}

#[test]
fn event_indices_suppress_interrupts_and_doorbells() {
    let driver = Driver::new(Arc::new(Echo::default()));
    let queues = driver.set_up(feature::RING_EVENT_IDX, &[64]);
    let mut queue = queues[0].clone();
    echo(&driver, &mut queue, b"one"); // the first one always interrupts
    driver.wait_for("a message", || driver.recorder.messages.lock().len() == 1);
    driver.wait_for("the wish for a doorbell", || queue.avail_event() == 1);
    queue.set_used_event(9);
    for _ in 1..9 {
        echo(&driver, &mut queue, b"more");
    }
    assert_eq!(driver.recorder.messages.lock().len(), 1);
    echo(&driver, &mut queue, b"tenth");
    driver.wait_for("a message", || driver.recorder.messages.lock().len() == 2);
}

#[test]
fn without_event_indices_the_drivers_flag_suppresses_interrupts() {
    let driver = Driver::new(Arc::new(Echo::default()));
    let mut queue = driver.set_up(0, &[64]).remove(0);
    driver.memory.write(queue.available, &[1, 0]).unwrap();
    echo(&driver, &mut queue, b"quiet");
    assert!(driver.recorder.messages.lock().is_empty());
}

#[test]
fn indirect_chains_work_only_if_negotiated() {
    let driver = Driver::new(Arc::new(Echo::default()));
    let mut queue = driver.set_up(feature::RING_INDIRECT_DESC, &[16]).remove(0);
    driver.memory.write(BUFFERS, b"ab").unwrap();
    let buffers = [(BUFFERS, 1, false), (BUFFERS + 1, 1, false), (BUFFERS + 0x100, 2, true)];
    queue.add_indirect(BUFFERS + 0x1008, &buffers);
    driver.ring(0);
    driver.wait_for("a used buffer", || queue.take_used().is_some());
    let mut answer = [0; 2];
    driver.memory.read(BUFFERS + 0x100, &mut answer).unwrap();
    assert_eq!(&answer, b"bc");
    let mut queue = driver.set_up(0, &[16]).remove(0);
    queue.add_indirect(BUFFERS + 0x1008, &buffers);
    driver.ring(0);
    driver.wait_needs_reset();
}

#[test]
fn intx_follows_the_isr_register() {
    let driver = Driver::new(Arc::new(Echo::default()));
    driver.device.start();
    assert!(driver.negotiate(0));
    let mut queue = driver.queue(0, 16);
    driver.driver_ok();
    echo(&driver, &mut queue, b"x");
    driver.wait_for("the line", || *driver.recorder.levels.lock() == [true]);
    assert_eq!((driver.isr(), driver.isr()), (1, 0));
    assert_eq!(*driver.recorder.levels.lock(), [true, false]);
    // An error says so through the configuration change interrupt.
    queue.add(&[(u64::MAX - 5, 100, false)]);
    driver.ring(0);
    driver.wait_needs_reset();
    driver.wait_for("the interrupt", || driver.isr() & 2 != 0);
}

/// Each of these breaks the rules in one way.
#[test]
fn malformed_rings_put_the_device_into_the_error_state_until_reset() {
    type Breaker = (&'static str, fn(&mut DriverQueue));
    let breakers: [Breaker; 9] = [
        ("index too far", |queue| queue.set_available_index(17)),
        ("head past the table", |queue| queue.make_available(16)),
        ("loop", |queue| {
            queue.write_descriptor(0, BUFFERS, 16, 1, 1);
            queue.write_descriptor(1, BUFFERS, 16, 1, 0);
            queue.make_available(0);
        }),
        ("next past the table", |queue| {
            queue.write_descriptor(0, BUFFERS, 16, 1, 99);
            queue.make_available(0);
        }),
        ("buffer past memory", |queue| {
            queue.add(&[(MEMORY_SIZE - 1, 2, true)]);
        }),
        ("readable after writable", |queue| {
            queue.add(&[(BUFFERS, 2, true), (BUFFERS, 2, false)]);
        }),
        ("indirect in indirect", |queue| {
            queue.write_descriptor(0, queue.descriptors, 16, 4, 0);
            queue.make_available(0);
        }),
        ("indirect table of odd length", |queue| {
            queue.write_descriptor(0, BUFFERS, 17, 4, 0);
            queue.make_available(0);
        }),
        ("a panic in the device", |queue| {
            queue.add(&[(BUFFERS, 2, false), (BUFFERS, 2, true)]);
        }),
    ];
    let device = Arc::new(Echo::default());
    let driver = Driver::new(device.clone());
    for (what, breaker) in breakers {
        driver.memory.write(BUFFERS, &[0xee; 64]).unwrap();
        let mut queues = driver.set_up(feature::TRANSPORT, &[16, 16]);
        assert_eq!(echo(&driver, &mut queues[0], b"a"), b"b", "before {what}");
        driver.memory.write(BUFFERS, &[0xee; 64]).unwrap();
        let served = device.served.load(Ordering::SeqCst);
        breaker(&mut queues[0]);
        driver.ring(0);
        driver.wait_needs_reset();
        // The other queue stands still too.
        queues[1].add(&[(BUFFERS, 1, false), (BUFFERS, 1, true)]);
        driver.ring(1);
        driver.device.stop();
        driver.device.start();
        driver.device.stop();
        assert_eq!(device.served.load(Ordering::SeqCst), served, "after {what}");
    }
}

#[test]
fn impossible_queues_are_refused() {
    let driver = Driver::new(Arc::new(Echo::default()));
    let good = {
        assert!(driver.negotiate(0));
        driver.queue(0, 16)
    };
    assert!(driver.is_enabled(0) && !driver.is_enabled(1) && !driver.is_enabled(7));
    let with = |change: &dyn Fn(&mut DriverQueue)| {
        let mut queue = good.clone();
        change(&mut queue);
        queue
    };
    let bad = [
        with(&|queue| queue.size = 128),
        with(&|queue| queue.size = 24),
        with(&|queue| queue.size = 0),
        with(&|queue| queue.descriptors = 0x1_0008),
        with(&|queue| queue.used = MEMORY_SIZE - 8),
        with(&|queue| queue.available = u64::MAX - 1),
    ];
    for queue in bad {
        assert!(driver.negotiate(0));
        driver.enable(&queue);
        assert!(!driver.is_enabled(0), "{queue:?}");
        assert_ne!(driver.status() & status::NEEDS_RESET, 0);
    }
}

#[test]
fn features_that_are_not_offered_are_refused() {
    let driver = Driver::new(Arc::new(Echo::default()));
    assert!(!driver.negotiate(1 << 6));
    driver.driver_ok();
    assert_eq!(driver.status() & (status::DRIVER_OK | status::FEATURES_OK), 0);
    assert!(driver.negotiate(1 << 5));
}

#[test]
fn the_configuration_access_window_reaches_the_registers() {
    let driver = Driver::new(Arc::new(Echo::default()));
    let place = DevFn::new(1, 0).unwrap();
    let read = |offset: u16, len: usize| {
        let mut data = [0; 4];
        driver.pci.config_read(place, offset, &mut data[..len]);
        u32::from_le_bytes(data)
    };
    let mut window = driver.find_capability(pci::capability::VENDOR);
    while read(window + 3, 1) != 5 {
        window = read(window + 1, 1) as u16;
    }
    driver.pci.config_write(place, window + 8, &0x2001u32.to_le_bytes());
    driver.pci.config_write(place, window + 12, &1u32.to_le_bytes());
    assert_eq!(read(window + 16, 4), 0xab);
    driver.pci.config_write(place, window + 8, &0x2000u32.to_le_bytes());
    driver.pci.config_write(place, window + 16, &[0x77]);
    assert_eq!(driver.config_int(0, 1), 0x77);
    // Accesses that cannot be are not made.
    driver.pci.config_write(place, window + 8, &u32::MAX.to_le_bytes());
    driver.pci.config_write(place, window + 12, &4u32.to_le_bytes());
    driver.pci.config_write(place, window + 16, &[1, 2, 3, 4]);
    assert_eq!(read(window + 16, 4), 0x0403_0201);
}

/// Keeps the doorbells that it was told of last.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<Doorbell>>>);

impl DoorbellSink for Told {
    fn replace(&self, doorbells: Vec<Doorbell>) {
        *self.0.lock() = doorbells;
    }
}

#[test]
fn doorbells_can_be_events() {
    let driver = Driver::new(Arc::new(Echo::default()));
    let told = Told::default();
    driver.device.connect_doorbells(Box::new(told.clone()));
    assert!(told.0.lock().is_empty());
    let mut queues = driver.set_up(0, &[16, 16]);
    let doorbells = told.0.lock().clone();
    assert_eq!(doorbells.len(), 2);
    let bar = driver.device.function().bar_address(0).unwrap();
    assert_eq!((doorbells[1].address, doorbells[1].data), (bar + 0x3004, None));
    driver.memory.write(BUFFERS, &[1]).unwrap();
    queues[1].add(&[(BUFFERS, 1, false), (BUFFERS, 1, true)]);
    rustix::io::write(&*doorbells[1].event, &1u64.to_ne_bytes()).unwrap();
    driver.wait_for("a used buffer", || queues[1].take_used().is_some());

    // They move with the BAR, and are gone while it does not answer and when the driver goes.
    let place = DevFn::new(1, 0).unwrap();
    let config_write = |offset, value: u32| driver.pci.config_write(place, offset, &value.to_le_bytes());
    let mut command = [0; 4];
    driver.pci.config_read(place, 4, &mut command);
    let command = u32::from_le_bytes(command);
    config_write(4, command & !2);
    assert!(told.0.lock().is_empty());
    config_write(0x10, (bar + 0x10_0000) as u32 | 4);
    config_write(4, command);
    assert_eq!(told.0.lock()[0].address, bar + 0x10_3000);
    driver.device.reset();
    assert!(told.0.lock().is_empty());
}

#[test]
fn doorbells_in_one_register_are_told_apart_by_value() {
    let device = Arc::new(Echo::default());
    let config = VirtioMmioConfig { memory: test_memory(), line: IrqLine::unconnected(), inline: false };
    let mmio = VirtioMmioDevice::new(device, config).unwrap();
    let told = Told::default();
    mmio.connect_doorbells(0xd000_0000, Box::new(told.clone()));
    for status in [1u32, 3] {
        mmio.mmio_write(0x70, &status.to_le_bytes());
    }
    mmio.mmio_write(0x24, &1u32.to_le_bytes());
    mmio.mmio_write(0x20, &1u32.to_le_bytes());
    for status in [11u32, 15] {
        mmio.mmio_write(0x70, &status.to_le_bytes());
    }
    let doorbells = told.0.lock().clone();
    let places: Vec<_> = doorbells.iter().map(|doorbell| (doorbell.address, doorbell.data)).collect();
    assert_eq!(places, [(0xd000_0050, Some(0)), (0xd000_0050, Some(1))]);
    mmio.mmio_write(0x70, &0u32.to_le_bytes());
    assert!(told.0.lock().is_empty());
}

#[test]
fn a_restored_device_goes_on_where_the_saved_one_stood() {
    let driver = Driver::new(Arc::new(Echo::default()));
    let mut queue = driver.set_up(feature::TRANSPORT, &[16]).remove(0);
    driver.set_config(0, &[42]);
    for _ in 0..20 {
        echo(&driver, &mut queue, b"abc");
    }
    driver.device.stop();
    // Available, but not served any more.
    driver.memory.write(BUFFERS, b"Z").unwrap();
    queue.add(&[(BUFFERS, 1, false), (BUFFERS + 0x100, 1, true)]);
    driver.ring(0);
    assert!(queue.take_used().is_none());
    let state = driver.device.save();

    let restored = Driver::with_memory(Arc::new(Echo::default()), copy_memory(&driver.memory));
    restored.device.restore(&state).unwrap();
    assert_eq!(restored.device.save(), state);
    let mut queue = queue.over(&restored.memory);
    assert!(queue.take_used().is_none());
    restored.device.start();
    restored.wait_for("the buffer left over", || queue.take_used().is_some());
    assert_eq!(echo(&restored, &mut queue, b"xyz"), b"yz{");
    assert_eq!(restored.config_int(0, 1), 42);
    restored.wait_for("a message", || !restored.recorder.messages.lock().is_empty());
}

#[test]
fn without_threads_a_queue_is_served_before_its_doorbell_returns() {
    let driver = Driver::inline(Arc::new(Echo::default()), test_memory());
    let mut queue = driver.set_up(feature::TRANSPORT, &[16]).remove(0);
    driver.set_config(0, &[1]);
    let send = |queue: &mut DriverQueue| {
        driver.memory.write(BUFFERS, b"A").unwrap();
        queue.add(&[(BUFFERS, 1, false), (BUFFERS + 0x100, 1, true)]);
    };
    for _ in 0..3 {
        send(&mut queue);
        driver.ring(0);
        assert!(queue.take_used().is_some());
    }
    // What a driver is in the middle of is left alone when the VM stops and goes on; what it rang for is not.
    send(&mut queue);
    driver.device.stop();
    driver.device.start();
    assert!(queue.take_used().is_none());
    driver.device.stop();
    driver.ring(0);
    assert!(queue.take_used().is_none());
    driver.device.start();
    assert!(queue.take_used().is_some());
}

#[test]
fn damaged_states_are_refused() {
    let driver = Driver::new(Arc::new(Echo::default()));
    driver.set_up(feature::TRANSPORT, &[16]);
    driver.device.stop();
    let state = driver.device.save();
    for index in 0..state.bytes.len() {
        // Most of it is configuration space.
        if index < 4100 && index % 61 != 0 {
            continue;
        }
        let mut damaged = state.clone();
        damaged.bytes[index] ^= 0x80;
        let other = Driver::new(Arc::new(Echo::default()));
        if other.device.restore(&damaged).is_err() {
            assert_eq!(other.status(), 0);
            assert!(other.negotiate(0));
        }
    }
}

#[test]
fn reset_start_and_stop_race_with_a_busy_guest() {
    let driver = Driver::new(Arc::new(Echo::default()));
    std::thread::scope(|scope| {
        let stopper = scope.spawn(|| {
            for _ in 0..300 {
                driver.device.stop();
                driver.device.save();
                driver.device.start();
            }
        });
        while !stopper.is_finished() {
            let mut queue = driver.set_up(feature::RING_EVENT_IDX, &[16]).remove(0);
            for _ in 0..20 {
                queue.set_used_event(0);
                echo(&driver, &mut queue, b"race");
            }
            assert_eq!(driver.status() & status::NEEDS_RESET, 0);
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever is in the rings, the device neither dies nor hangs, and works again after a reset.
    #[test]
    fn random_rings_end_in_progress_or_in_the_error_state(
        descriptors in prop::collection::vec(
            (prop_oneof![Just(BUFFERS), 0..MEMORY_SIZE, any::<u64>()],
             prop_oneof![0u32..64, any::<u32>()], 0u16..8, 0u16..18),
            16),
        heads in prop::collection::vec(0u16..18, 1..16),
        index in prop_oneof![4 => 1u16..17, 1 => any::<u16>()],
        features in prop_oneof![Just(0), Just(feature::TRANSPORT)],
    ) {
        let driver = Driver::new(Arc::new(Echo::default()));
        let mut queue = driver.set_up(features, &[16]).remove(0);
        for (position, (address, len, flags, next)) in descriptors.into_iter().enumerate() {
            queue.write_descriptor(position as u16, address, len, flags, next);
        }
        for head in &heads {
            queue.make_available(*head);
        }
        queue.set_available_index(index);
        driver.ring(0);
        driver.wait_for("progress", || {
            let mut used = [0; 2];
            driver.memory.read(queue.used + 2, &mut used).unwrap();
            u16::from_le_bytes(used) == index || driver.status() & status::NEEDS_RESET != 0
        });
        let mut queue = driver.set_up(features, &[16]).remove(0);
        prop_assert_eq!(echo(&driver, &mut queue, b"abc"), b"bcd");
    }

    /// Whatever registers are accessed in whatever way, the device neither dies nor hangs, works again
    /// after a reset, and a restored one shows the same registers.
    #[test]
    fn random_register_accesses_are_harmless(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![0u64..0x40, 0u64..0x8000],
             prop::sample::select(vec![1usize, 2, 4, 8]),
             prop_oneof![0u64..32, Just(0x1_0000), any::<u64>()]),
            0..60),
        negotiated in any::<bool>(),
    ) {
        let driver = Driver::new(Arc::new(Echo::default()));
        driver.device.start();
        if negotiated {
            prop_assert!(driver.negotiate(0));
        }
        for (write, offset, len, value) in accesses {
            let mut data = value.to_le_bytes();
            if write {
                driver.write(offset, &data[..len]);
            } else {
                driver.read(offset, &mut data[..len]);
            }
        }
        driver.device.stop();
        let registers = |driver: &Driver| {
            let mut data = [0; 0x3c];
            for (index, byte) in data.iter_mut().enumerate() {
                driver.read(index as u64, std::slice::from_mut(byte));
            }
            data.to_vec()
        };
        let memory = test_memory();
        let other = Driver::with_memory(Arc::new(Echo::default()), memory);
        other.device.restore(&driver.device.save()).unwrap();
        prop_assert_eq!(registers(&other), registers(&driver));
        let mut queue = driver.set_up(feature::TRANSPORT, &[16]).remove(0);
        prop_assert_eq!(echo(&driver, &mut queue, b"abc"), b"bcd");
    }
}
