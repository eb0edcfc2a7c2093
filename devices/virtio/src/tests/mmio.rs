//! The transport in memory-mapped registers.

use super::*;
use crate::test_driver::{PATIENCE, Recorder};
use std::time::{Duration, Instant};

const QUEUE_SIZE: u16 = 16;

/// A device with these registers, and a driver in miniature.
struct Rig {
    memory: guest_memory::GuestMemory,
    device: VirtioMmioDevice,
    recorder: Arc<Recorder>,
}

impl Rig {
    fn new() -> Self {
        Self::with_memory(test_memory())
    }

    fn with_memory(memory: guest_memory::GuestMemory) -> Self {
        let recorder = Arc::new(Recorder::default());
        let line = IrqLine::new(recorder.clone(), 5);
        let config = VirtioMmioConfig { memory: memory.clone(), line, inline: false };
        let device = VirtioMmioDevice::new(Arc::new(Echo::default()), config).unwrap();
        Self { memory, device, recorder }
    }

    fn read(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.device.mmio_read(register, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u64, value: u32) {
        self.device.mmio_write(register, &value.to_le_bytes());
    }

    fn negotiate(&self, features: u64) -> bool {
        self.write(0x70, 0);
        self.write(0x70, 3);
        for half in [0, 1] {
            self.write(0x24, half);
            self.write(0x20, ((features | feature::VERSION_1) >> (32 * half)) as u32);
        }
        self.write(0x70, 11);
        self.read(0x70) & 8 != 0
    }

    fn enable(&self, queue: &DriverQueue) {
        self.write(0x30, queue.index.into());
        self.write(0x38, queue.size.into());
        for (register, address) in [(0x80, queue.descriptors), (0x90, queue.available), (0xa0, queue.used)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    /// Negotiates, enables queue 1 and is ready.
    fn set_up(&self) -> DriverQueue {
        self.device.start();
        assert!(self.negotiate(0));
        let queue = DriverQueue::new(&self.memory, 1, QUEUE_SIZE);
        self.enable(&queue);
        self.write(0x70, 15);
        queue
    }

    fn wait_for(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "waited in vain for {what}");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn echo(&self, queue: &mut DriverQueue, byte: u8) -> u8 {
        self.memory.write(BUFFERS, &[byte]).unwrap();
        queue.add(&[(BUFFERS, 1, false), (BUFFERS + 0x100, 1, true)]);
        self.write(0x50, queue.index.into());
        self.wait_for("a used buffer", || queue.take_used().is_some());
        let mut answer = [0];
        self.memory.read(BUFFERS + 0x100, &mut answer).unwrap();
        answer[0]
    }
}

#[test]
fn the_registers_say_what_there_is() {
    let rig = Rig::new();
    assert_eq!([rig.read(0), rig.read(4), rig.read(8)], [0x7472_6976, 2, 4]);
    let features = [0, 1].map(|half| {
        rig.write(0x14, half);
        rig.read(0x10)
    });
    assert_eq!(u64::from(features[0]) | u64::from(features[1]) << 32, 1 << 5 | feature::TRANSPORT);
    let sizes = [0u32, 1, 2, 0x1_0000].map(|queue| {
        rig.write(0x30, queue);
        rig.read(0x34)
    });
    assert_eq!(sizes, [64, 64, 0, 0]);
    // No shared memory.
    assert_eq!([rig.read(0xb0), rig.read(0xbc)], [u32::MAX; 2]);
    // The device's own registers take any width, the transport's only one.
    let mut data = [0; 2];
    rig.device.mmio_read(0x100, &mut data);
    assert_eq!(data, [0, 0xab]);
    rig.device.mmio_write(0x100, &[7]);
    assert_eq!(rig.read(0x100) & 0xff, 7);
    rig.device.mmio_read(0, &mut data);
    assert_eq!(data, [0, 0]);
    rig.device.mmio_write(0x70, &[1]);
    assert_eq!(rig.read(0x70), 0);
}

#[test]
fn buffers_go_round_and_the_line_follows_the_causes() {
    let rig = Rig::new();
    let mut queue = rig.set_up();
    for byte in 0..100 {
        assert_eq!(rig.echo(&mut queue, byte), byte + 1);
    }
    rig.wait_for("the interrupt", || rig.read(0x60) == 1);
    rig.device.stop();
    assert_eq!(rig.recorder.levels.lock().last(), Some(&true));
    // Reading does not acknowledge; other causes stay.
    assert_eq!(rig.read(0x60), 1);
    rig.write(0x64, 2);
    assert_eq!(rig.recorder.levels.lock().last(), Some(&true));
    rig.write(0x64, 1);
    assert_eq!((rig.read(0x60), rig.recorder.levels.lock().last().copied()), (0, Some(false)));
    rig.device.start();
    // An error says so through the configuration change interrupt.
    queue.set_available_index(5000);
    rig.write(0x50, 1);
    rig.wait_for("the error state", || rig.read(0x70) & u32::from(status::NEEDS_RESET) != 0);
    rig.wait_for("the interrupt", || rig.read(0x60) & 2 != 0);
    rig.write(0x70, 0);
    assert_eq!((rig.read(0x60), rig.recorder.levels.lock().last().copied()), (0, Some(false)));
}

#[test]
fn a_queue_can_be_taken_out_of_use() {
    let rig = Rig::new();
    let mut queue = rig.set_up();
    assert_eq!(rig.echo(&mut queue, 1), 2);
    assert_eq!(rig.read(0x44), 1);
    rig.write(0x44, 0);
    assert_eq!(rig.read(0x44), 0);
    queue.add(&[(BUFFERS, 1, false), (BUFFERS + 0x100, 1, true)]);
    rig.write(0x50, 1);
    rig.device.stop();
    assert!(queue.take_used().is_none());
    assert_eq!(rig.read(0x70) & u32::from(status::NEEDS_RESET), 0);
    rig.device.start();
    let mut queue = rig.set_up();
    assert_eq!(rig.echo(&mut queue, 3), 4);
}

#[test]
fn impossible_queues_and_features_are_refused() {
    let rig = Rig::new();
    assert!(!rig.negotiate(1 << 6));
    assert!(rig.negotiate(1 << 5));
    let good = DriverQueue::new(&rig.memory, 0, QUEUE_SIZE);
    for (size, used) in [(0, good.used), (24, good.used), (0x1_0010, good.used), (16, MEMORY_SIZE - 4)] {
        assert!(rig.negotiate(0));
        rig.write(0x30, 0);
        for (register, address) in [(0x80, good.descriptors), (0x90, good.available), (0xa0, used)] {
            rig.write(register, address as u32);
        }
        rig.write(0x38, size);
        rig.write(0x44, 1);
        assert_eq!(rig.read(0x44), 0, "{size:#x} {used:#x}");
        assert_ne!(rig.read(0x70) & u32::from(status::NEEDS_RESET), 0);
    }
}

#[test]
fn a_restored_device_goes_on_with_its_interrupt() {
    let rig = Rig::new();
    let mut queue = rig.set_up();
    assert_eq!(rig.echo(&mut queue, 1), 2);
    rig.wait_for("the interrupt", || rig.read(0x60) == 1);
    rig.device.stop();
    let state = rig.device.save();
    let other = Rig::with_memory(copy_memory(&rig.memory));
    other.device.restore(&state).unwrap();
    assert_eq!(other.device.save(), state);
    assert_eq!(*other.recorder.levels.lock(), [true]);
    other.device.start();
    assert_eq!(other.echo(&mut queue.over(&other.memory), 5), 6);
    for index in 0..state.bytes.len() {
        let mut damaged = state.clone();
        damaged.bytes[index] ^= 0x80;
        let other = Rig::with_memory(copy_memory(&rig.memory));
        if other.device.restore(&damaged).is_err() {
            assert_eq!(other.read(0x70), 0);
            assert!(other.negotiate(0));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever a guest writes, the state can be saved and restored, and a reset makes everything well.
    #[test]
    fn any_accesses_leave_a_device_that_can_be_saved(
        accesses in prop::collection::vec(
            (prop_oneof![(0u64..0x44).prop_map(|word| word * 4), 0u64..0x1000],
             prop_oneof![0u32..20, any::<u32>()],
             prop::sample::select(&[4usize, 4, 4, 1, 2, 8][..])),
            0..60),
        set_up in any::<bool>(),
    ) {
        let rig = Rig::new();
        if set_up {
            rig.set_up();
        }
        for (register, value, len) in accesses {
            let mut data = [0; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            rig.device.mmio_write(register, &data[..len]);
            rig.device.mmio_read(register, &mut data[..len]);
        }
        rig.device.stop();
        let state = rig.device.save();
        let other = Rig::with_memory(copy_memory(&rig.memory));
        other.device.restore(&state).unwrap();
        prop_assert_eq!(other.device.save(), state);
        rig.device.start();
        let mut queue = rig.set_up();
        prop_assert_eq!(rig.echo(&mut queue, 8), 9);
    }
}
