//! The device as a guest sees it.

use super::*;
use proptest::prelude::*;

fn device() -> Arc<FwCfg> {
    let items = Items::new().u16(key::NB_CPUS, 3).file("etc/a", b"hello".to_vec()).unwrap();
    FwCfg::new(items, GuestMemory::new(std::slice::from_ref(&(0..0x1_0000))).unwrap())
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

/// Has the description at 0x100 carried out; returns its control field.
fn copy(device: &Arc<FwCfg>, control: u32, length: u32, target: u64) -> u32 {
    let mut description = [control.to_be_bytes(), length.to_be_bytes()].concat();
    description.extend(target.to_be_bytes());
    device.memory.write(0x100, &description).unwrap();
    device.dma().pio_write(0, &0u32.to_be_bytes());
    device.dma().pio_write(4, &0x100u32.to_be_bytes());
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

proptest! {
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
