//! The device as a guest sees it.

use super::*;
use proptest::prelude::*;

/// Bytes of guest memory, from address 0.
const MEMORY: u64 = 0x1_0000;

fn device() -> Arc<FwCfg> {
    let items = Items::new().u16(key::NB_CPUS, 3).file("etc/a", b"hello".to_vec()).unwrap();
    FwCfg::new(items, GuestMemory::new(std::slice::from_ref(&(0..MEMORY))).unwrap())
}

fn select(device: &Arc<FwCfg>, key: u16) {
    device.selector().pio_write(0, &key.to_le_bytes());
}

fn read(device: &Arc<FwCfg>, count: usize) -> Vec<u8> {
    let byte = |_| {
        let mut data = [0xff];
        device.selector().pio_read(1, &mut data);
        data[0]
    };
    (0..count).map(byte).collect()
}

/// Has the description at `address` carried out.
fn start(device: &Arc<FwCfg>, address: u64) {
    let (high, low) = ((address >> 32) as u32, address as u32);
    device.dma().pio_write(0, &high.to_be_bytes());
    device.dma().pio_write(4, &low.to_be_bytes());
}

/// Has the description at 0x100 carried out; returns its control field.
fn copy(device: &Arc<FwCfg>, control: u32, length: u32, target: u64) -> u32 {
    let mut description = [control.to_be_bytes(), length.to_be_bytes()].concat();
    description.extend(target.to_be_bytes());
    device.memory.write(0x100, &description).unwrap();
    start(device, 0x100);
    let mut result = [0; 4];
    device.memory.read(0x100, &mut result).unwrap();
    u32::from_be_bytes(result)
}

#[test]
fn items_are_read_byte_by_byte_and_end_in_zeroes() {
    let device = device();
    select(&device, key::SIGNATURE);
    assert_eq!(read(&device, 6), b"QEMU\0\0");
    select(&device, key::NB_CPUS);
    assert_eq!(read(&device, 2), [3, 0]);
    select(&device, 0x7777);
    assert_eq!(read(&device, 2), [0, 0]);
    select(&device, key::FILE_DIR);
    let directory = read(&device, 4 + 64);
    assert_eq!(directory[..14], [0, 0, 0, 1, 0, 0, 0, 5, 0, 0x20, 0, 0, b'e', b't']);
    select(&device, key::FILE_FIRST);
    assert_eq!(read(&device, 5), b"hello");
}

#[test]
fn items_are_copied_to_memory() {
    let device = device();
    let mut signature = [0; 8];
    device.dma().pio_read(0, &mut signature);
    assert_eq!(&signature, b"QEMU CFG");
    device.memory.write(0x200, &[0xaa; 8]).unwrap();
    let select = u32::from(key::FILE_FIRST) << 16 | CONTROL_SELECT;
    assert_eq!(copy(&device, select | CONTROL_SKIP, 1, 0), 0);
    assert_eq!(copy(&device, CONTROL_READ, 6, 0x200), 0);
    let mut copied = [0; 7];
    device.memory.read(0x200, &mut copied).unwrap();
    assert_eq!(copied, *b"ello\0\0\xaa");
    assert_eq!(copy(&device, select | CONTROL_WRITE, 1, 0x200), CONTROL_ERROR);
    assert_eq!(copy(&device, select | CONTROL_READ, u32::MAX, 0x200), CONTROL_ERROR);
    assert_eq!(copy(&device, select | CONTROL_READ, 5, u64::MAX - 1), CONTROL_ERROR);
}

#[test]
fn impossible_files_are_refused() {
    let items = Items::new();
    assert!(matches!(items.clone().file("", vec![]), Err(FwCfgError::Name(_))));
    assert!(matches!(items.clone().file(&"x".repeat(56), vec![]), Err(FwCfgError::Name(_))));
    let once = items.file("a", vec![]).unwrap();
    assert!(matches!(once.file("a", vec![]), Err(FwCfgError::Twice(_))));
}

fn all_memory(device: &Arc<FwCfg>) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY as usize];
    device.memory.read(0, &mut bytes).unwrap();
    bytes
}

proptest! {
    #[test]
    fn any_description_changes_its_target_and_itself_alone(
        control: u32,
        length in prop_oneof![0u32..0x200, any::<u32>()],
        target in prop_oneof![0..MEMORY + 0x100, any::<u64>()],
        at in prop_oneof![0..MEMORY + 0x10, any::<u64>()],
    ) {
        let device = device();
        device.memory.write(0, &[0xaa; MEMORY as usize]).unwrap();
        let description = [u64::from(control) << 32 | u64::from(length), target].map(u64::to_be_bytes).concat();
        let there = device.memory.write(at, &description).is_ok();
        let before = all_memory(&device);
        start(&device, at);
        let mut all = before.iter().zip(all_memory(&device)).zip(0u64..);
        let own = |gpa: u64| gpa.wrapping_sub(at) < 4 || gpa.wrapping_sub(target) < length.into();
        prop_assert!(all.all(|((old, new), gpa)| *old == new || there && own(gpa)));
    }

    #[test]
    fn any_state_is_restored(selected: u16, offset: u32, dma_high: u32) {
        let (from, to) = (device(), device());
        *from.state.lock() = State { selected, offset, dma_high };
        to.restore(&from.save()).unwrap();
        prop_assert_eq!(&*from.state.lock(), &*to.state.lock());
        // An offset past everything reads zeroes.
        read(&to, 2);
        prop_assert!(to.restore(&encode(FwCfg::KIND, 9, &0u8)).is_err());
    }
}
