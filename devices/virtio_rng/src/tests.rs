use super::*;
use ::device::Device;
use proptest::prelude::*;
use virtio::status;
use virtio::test_driver::{BUFFERS, Driver, MEMORY_SIZE, copy_memory};

/// Whether `len` bytes at `address` look random: 256 bytes contain far more than 64 different values.
fn is_random(driver: &Driver, address: u64, len: usize) -> bool {
    let mut data = vec![0; len];
    driver.memory.read(address, &mut data).unwrap();
    data.chunks_exact(256).all(|part| {
        let mut seen = [false; 256];
        part.iter().for_each(|byte| seen[usize::from(*byte)] = true);
        seen.iter().filter(|seen| **seen).count() > 64
    })
}

#[test]
fn buffers_are_filled_and_nothing_else_is() {
    let driver = Driver::new(Arc::new(VirtioRng::new()));
    let mut queue = driver.set_up(virtio::feature::TRANSPORT, &[16]).remove(0);
    let written = driver.transact(&mut queue, &[(BUFFERS, 100, true), (BUFFERS + 100, 0x1_0000, true)]);
    assert_eq!(written, 1 << 16);
    assert!(is_random(&driver, BUFFERS, 1 << 16));
    let mut after = [0xff; 100];
    driver.memory.read(BUFFERS + (1 << 16), &mut after).unwrap();
    assert_eq!(after, [0; 100]);
}

#[test]
fn a_buffer_to_be_read_stops_the_device() {
    let driver = Driver::new(Arc::new(VirtioRng::new()));
    let mut queue = driver.set_up(0, &[16]).remove(0);
    queue.add(&[(BUFFERS, 100, false)]);
    driver.ring(0);
    driver.wait_needs_reset();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_restored_device_answers_what_was_left(
        before in prop::collection::vec((BUFFERS..MEMORY_SIZE, 0u32..0x2_0000, any::<bool>()), 0..8),
    ) {
        let driver = Driver::new(Arc::new(VirtioRng::new()));
        let mut queue = driver.set_up(0, &[16]).remove(0);
        for buffer in before {
            queue.add(&[buffer]);
            driver.ring(0);
        }
        driver.device.stop();
        let state = driver.device.save();
        let restored = Driver::with_memory(Arc::new(VirtioRng::new()), copy_memory(&driver.memory));
        restored.device.restore(&state).unwrap();
        prop_assert_eq!(restored.device.save(), state);
        restored.device.start();
        let mut queue = queue.over(&restored.memory);
        queue.add(&[(BUFFERS, 256, true)]);
        restored.ring(0);
        restored.wait_for("an answer", || {
            while let Some((_, written)) = queue.take_used() {
                if written == 256 {
                    return true;
                }
            }
            restored.status() & status::NEEDS_RESET != 0
        });
    }
}
