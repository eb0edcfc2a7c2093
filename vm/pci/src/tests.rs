use super::*;
use bus::{MmioBus, PioBus};
use device::{MmioDevice, PioDevice, SavedState, StateError, decode, encode};
use irq::{IrqLine, IrqSink, MsiMessage, MsiTarget};
use parking_lot::Mutex;
use proptest::prelude::*;
use std::sync::Arc;

#[derive(Default)]
struct Recorder {
    messages: Mutex<Vec<MsiMessage>>,
    levels: Mutex<Vec<bool>>,
}

impl MsiTarget for Recorder {
    fn signal(&self, message: MsiMessage) {
        self.messages.lock().push(message);
    }
}

impl IrqSink for Recorder {
    fn set_level(&self, _pin: u32, level: bool) {
        self.levels.lock().push(level);
    }
}

struct Registers(u8);

impl MmioDevice for Registers {
    fn mmio_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn mmio_write(&self, _offset: u64, _data: &[u8]) {}
}

impl PioDevice for Registers {
    fn pio_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn pio_write(&self, _offset: u16, _data: &[u8]) {}
}

struct TestDevice(PciFunction);

impl Device for TestDevice {
    fn kind(&self) -> &'static str {
        "test"
    }
    fn version(&self) -> u32 {
        1
    }
    fn reset(&self) {
        self.0.reset();
    }
    fn save(&self) -> SavedState {
        encode("test", 1, &self.0.save())
    }
    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        self.0.restore("test", &decode("test", 1, state)?)
    }
}

impl PciDevice for TestDevice {
    fn function(&self) -> &PciFunction {
        &self.0
    }
}

struct Machine {
    mmio: Arc<MmioBus>,
    pio: Arc<PioBus>,
    bus: Arc<PciBus>,
    recorder: Arc<Recorder>,
}

const WINDOW: std::ops::Range<u64> = 0xc000_0000..0xd000_0000;

fn machine() -> Machine {
    let (mmio, pio) = (Arc::new(MmioBus::new()), Arc::new(PioBus::new()));
    let windows = Windows { memory32: WINDOW, memory64: 1 << 40..2 << 40, io: 0xc000..0xd000 };
    let bus = PciBus::new(mmio.clone(), pio.clone(), windows);
    Machine { mmio, pio, bus, recorder: Arc::new(Recorder::default()) }
}

impl Machine {
    /// A function with a 64-bit, an I/O and a 32-bit BAR, MSI-X and INTx.
    fn add(&self, device: u8, tag: u8) -> Arc<TestDevice> {
        let registers = Arc::new(Registers(tag));
        let memory = BarHandler::Memory(registers.clone());
        let identity =
            Identity { vendor: 0x1234, device: tag.into(), class: 0xff_0000, ..Identity::default() };
        let mut builder = PciFunction::builder(&identity)
            .intx(IrqLine::new(self.recorder.clone(), 0), 1, 11)
            .bar(0, BarKind::Memory64 { prefetchable: false }, 0x4000, memory.clone())
            .unwrap()
            .bar(2, BarKind::Io, 0x20, BarHandler::Io(registers))
            .unwrap()
            .bar(3, BarKind::Memory32 { prefetchable: true }, 0x1000, memory)
            .unwrap();
        builder.msix(3, 3, 0, 0x800, self.recorder.clone()).unwrap();
        let function = Arc::new(TestDevice(builder.build()));
        self.bus.attach(DevFn::new(device, 0).unwrap(), function.clone()).unwrap();
        function
    }

    fn read(&self, device: u8, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.bus.config_read(DevFn::new(device, 0).unwrap(), offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, device: u8, offset: u16, value: u32) {
        self.bus.config_write(DevFn::new(device, 0).unwrap(), offset, &value.to_le_bytes());
    }

    fn load(&self, gpa: u64) -> u8 {
        let mut data = [0];
        self.mmio.read(gpa, &mut data);
        data[0]
    }
}

#[test]
fn bars_are_assigned_enabled_sized_and_moved() {
    let machine = machine();
    machine.add(1, 7);
    assert_eq!(machine.read(1, 0x04) & 7, 3);
    let bar0 = machine.read(1, 0x10);
    assert_eq!(bar0 & 0xf, 4);
    assert_eq!(machine.read(1, 0x18) & 3, 1);
    assert_eq!(machine.load(u64::from(bar0 & !0xf)), 7);
    let mut port = [0];
    machine.pio.read((machine.read(1, 0x18) & !3) as u16, &mut port);
    assert_eq!(port, [7]);
    // Sizing.
    machine.write(1, 0x10, u32::MAX);
    machine.write(1, 0x14, u32::MAX);
    assert_eq!((machine.read(1, 0x10), machine.read(1, 0x14)), (0xffff_c004, u32::MAX));
    assert_eq!(machine.load(u64::from(bar0 & !0xf)), 0xff);
    // Moving, above 4 GiB and back.
    machine.write(1, 0x10, 0);
    machine.write(1, 0x14, 0x100);
    assert_eq!(machine.load(1 << 40), 7);
    machine.write(1, 0x14, 0);
    machine.write(1, 0x10, 0xc100_0000);
    assert_eq!((machine.load(1 << 40), machine.load(0xc100_3fff)), (0xff, 7));
    // Memory decoding off and on.
    machine.write(1, 0x04, 1);
    assert_eq!(machine.load(0xc100_0000), 0xff);
    machine.write(1, 0x04, 3);
    assert_eq!(machine.load(0xc100_0000), 7);
    // Registers that do not exist.
    machine.write(1, 0x20, u32::MAX);
    assert_eq!(machine.read(1, 0x20), 0);
    assert_eq!(machine.read(2, 0), u32::MAX);
}

#[test]
fn a_bar_in_the_way_or_outside_the_windows_stays_unmapped_until_there_is_room() {
    let machine = machine();
    let first = machine.add(1, 1);
    machine.add(2, 2);
    let place = first.function().bar_address(0).unwrap();
    machine.write(2, 0x10, place as u32);
    assert_eq!(machine.load(place), 1);
    assert_eq!(machine.bus.device(DevFn::new(2, 0).unwrap()).unwrap().function().bar_address(0), None);
    machine.write(1, 0x10, 0x1000); // not in a window: RAM may be there
    assert_eq!(first.function().bar_address(0), None);
    assert_eq!(machine.load(place), 2);
    first.reset();
    machine.bus.device(DevFn::new(2, 0).unwrap()).unwrap().reset();
    assert_eq!(machine.load(place), 1);
}

#[test]
fn msix_masks_hold_messages_back_and_let_them_go() {
    let machine = machine();
    let device = machine.add(1, 1);
    let msix = device.function().msix().unwrap().clone();
    let cap = (machine.read(1, 0x34) & 0xff) as u16;
    assert_eq!(machine.read(1, cap) & 0x07ff_00ff, 0x0002_0011);
    msix.signal(0);
    assert!(!msix.enabled() && machine.recorder.messages.lock().is_empty());
    machine.write(1, cap, 0xc000_0000);
    assert!(msix.enabled());
    msix.table_write(16, &0xfee0_1000u64.to_le_bytes());
    msix.table_write(24, &0x41u64.to_le_bytes()); // data, and unmasked
    msix.signal(1);
    let mut pba = [0; 8];
    msix.pba_read(0, &mut pba);
    assert_eq!((pba[0], machine.recorder.messages.lock().len()), (2, 0));
    machine.write(1, cap, 0x8000_0000);
    let message = MsiMessage { address: 0xfee0_1000, data: 0x41 };
    assert_eq!(*machine.recorder.messages.lock(), [message]);
    msix.table_write(28, &1u32.to_le_bytes());
    msix.signal(1);
    msix.signal(1);
    let state = device.save();
    msix.table_write(28, &0u32.to_le_bytes());
    assert_eq!(*machine.recorder.messages.lock(), [message; 2]);
    msix.signal(99);
    // The pending vector survives saving.
    device.restore(&state).unwrap();
    msix.table_write(28, &0u32.to_le_bytes());
    assert_eq!(*machine.recorder.messages.lock(), [message; 3]);
}

#[test]
fn intx_is_gated_by_the_command_register_and_by_msix() {
    let machine = machine();
    let device = machine.add(1, 1);
    let pin = device.function().intx();
    pin.set(true);
    assert_eq!(machine.read(1, 0x04) >> 16 & 8, 8);
    machine.write(1, 0x04, 0x403);
    assert_eq!(machine.read(1, 0x04) >> 16 & 8, 8);
    machine.write(1, 0x04, 0x003);
    let cap = (machine.read(1, 0x34) & 0xff) as u16;
    machine.write(1, cap, 0x8000_0000);
    pin.set(false);
    machine.write(1, cap, 0);
    assert_eq!(*machine.recorder.levels.lock(), [true, false, true, false]);
    assert_eq!(machine.read(1, 0x3c) & 0xffff, 0x010b);
}

#[test]
fn both_ways_into_configuration_space_agree_and_the_reset_port_is_let_through() {
    let machine = machine();
    machine.bus.attach(DevFn::new(0, 0).unwrap(), Arc::new(HostBridge::new(0xe000_0000, 0))).unwrap();
    machine.bus.attach(DevFn::new(31, 0).unwrap(), Arc::new(LpcBridge::new(0x600))).unwrap();
    machine.bus.attach(DevFn::new(31, 2).unwrap(), Arc::new(LpcBridge::new(0x600))).unwrap();
    let ports = Arc::new(ConfigPorts::new(machine.bus.clone(), Some(Arc::new(Registers(0x5a)))));
    machine.pio.map(CONFIG_PORTS_FIRST, CONFIG_PORTS, ports.clone()).unwrap();
    let ecam = Ecam::new(machine.bus.clone());

    let mut data = [0; 4];
    ecam.mmio_read(0x60, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0xe000_0005);
    ecam.mmio_read(ECAM_BYTES_PER_BUS, &mut data);
    assert_eq!(data, [0xff; 4]);

    machine.pio.write(0xcf8, &0x8000_f80cu32.to_le_bytes());
    machine.pio.read(0xcfc, &mut data);
    assert_eq!(data[2], 0x80, "device 31 has two functions");
    machine.pio.write(0xcf8, &0x8000_f800u32.to_le_bytes());
    let mut word = [0; 2];
    machine.pio.read(0xcfe, &mut word);
    assert_eq!(word, [0x18, 0x29]);
    let mut byte = [0];
    machine.pio.read(0xcf9, &mut byte);
    assert_eq!(byte, [0x5a]);
    machine.pio.read(0xcf8, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_f800);
    let state = ports.save();
    ports.reset();
    machine.pio.read(0xcfc, &mut data);
    assert_eq!(data, [0xff; 4]);
    ports.restore(&state).unwrap();
    machine.pio.read(0xcfc, &mut data);
    assert_eq!(data, [0x86, 0x80, 0x18, 0x29]);
}

#[test]
fn impossible_bars_are_refused() {
    let memory = || BarHandler::Memory(Arc::new(Registers(0)));
    let kind = BarKind::Memory32 { prefetchable: false };
    let builder = || PciFunction::builder(&Identity::default());
    assert!(builder().bar(6, kind, 0x1000, memory()).is_err());
    assert!(builder().bar(0, kind, 0x1800, memory()).is_err());
    assert!(builder().bar(0, BarKind::Io, 0x10, memory()).is_err());
    assert!(builder().bar(5, BarKind::Memory64 { prefetchable: false }, 0x1000, memory()).is_err());
    assert!(builder().bar(0, kind, 0x1000, memory()).unwrap().bar(0, kind, 0x1000, memory()).is_err());
    let machine = machine();
    machine.add(1, 1);
    let bridge = Arc::new(LpcBridge::new(0));
    machine.bus.attach(DevFn::new(2, 0).unwrap(), bridge.clone()).unwrap();
    assert!(matches!(
        machine.bus.attach(DevFn::new(2, 0).unwrap(), bridge.clone()),
        Err(PciError::SlotTaken(_))
    ));
    assert!(machine.bus.attach(DevFn::new(3, 0).unwrap(), bridge).is_err());
    assert_eq!(machine.bus.free_slot().unwrap(), DevFn::new(3, 0).unwrap());
}

#[derive(Debug, Clone)]
enum Access {
    Config(u16, Vec<u8>),
    Table(u64, Vec<u8>),
    Signal(u16),
    Pin(bool),
}

fn access() -> impl Strategy<Value = Access> {
    let bytes = prop_oneof![
        any::<[u8; 1]>().prop_map(Vec::from),
        any::<[u8; 2]>().prop_map(Vec::from),
        any::<[u8; 4]>().prop_map(Vec::from),
        any::<[u8; 8]>().prop_map(Vec::from),
    ];
    prop_oneof![
        (prop_oneof![0u16..0x100, 0u16..0x1000], bytes.clone())
            .prop_map(|(at, data)| Access::Config(at, data)),
        (0u64..64, bytes).prop_map(|(at, data)| Access::Table(at, data)),
        (0u16..4).prop_map(Access::Signal),
        any::<bool>().prop_map(Access::Pin),
    ]
}

/// Applies `accesses` to the device at 1 and returns all that can be seen of it.
fn apply(
    machine: &Machine,
    device: &TestDevice,
    accesses: &[Access],
) -> (Vec<u8>, Vec<u8>, Vec<Option<u64>>) {
    let place = DevFn::new(1, 0).unwrap();
    let msix = device.function().msix().unwrap();
    for access in accesses {
        match access {
            Access::Config(at, data) => machine.bus.config_write(place, *at, data),
            Access::Table(at, data) => msix.table_write(*at, data),
            Access::Signal(vector) => msix.signal(*vector),
            Access::Pin(level) => device.function().intx().set(*level),
        }
    }
    let mut config = vec![0; CONFIG_SIZE];
    for (index, byte) in config.iter_mut().enumerate() {
        machine.bus.config_read(place, index as u16, std::slice::from_mut(byte));
    }
    let mut table = vec![0; 56];
    msix.table_read(0, &mut table[..48]);
    msix.pba_read(0, &mut table[48..]);
    (config, table, [0, 2, 3].map(|bar| device.function().bar_address(bar)).into())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_restored_function_goes_on_like_the_saved_one(
        before in prop::collection::vec(access(), 0..40),
        after in prop::collection::vec(access(), 0..20),
    ) {
        let (old, new) = (machine(), machine());
        let (old_device, new_device) = (old.add(1, 1), new.add(1, 1));
        apply(&old, &old_device, &before);
        new_device.restore(&old_device.save()).unwrap();
        old.recorder.messages.lock().clear();
        prop_assert_eq!(old_device.save(), new_device.save());
        prop_assert_eq!(apply(&old, &old_device, &after), apply(&new, &new_device, &after));
        prop_assert_eq!(&*old.recorder.messages.lock(), &*new.recorder.messages.lock());
        prop_assert_eq!(old.mmio.ranges(), new.mmio.ranges());
    }
}
