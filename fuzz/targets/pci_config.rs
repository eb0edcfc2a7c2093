//! PCI configuration space by ECAM and by ports, BARs that move, MSI-X and INTx.
#![no_main]

use chipset_x86::ResetControl;
use device::{Device, MmioDevice, PioDevice, SavedState, StateError, decode, encode};
use irq::IrqLine;
use libfuzzer_sys::fuzz_target;
use pci::{
    BarHandler, BarKind, CONFIG_PORTS, CONFIG_PORTS_FIRST, ConfigPorts, DevFn, Ecam, HostBridge, Identity,
    LpcBridge, PciBus, PciDevice, PciFunction, Windows,
};
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use vireo_fuzz::{Bench, Input, Rig, drive};

const ECAM: u64 = 0xe000_0000;
const MEMORY32: Range<u64> = 0xc000_0000..0xc010_0000;
const MEMORY64: Range<u64> = 1 << 40..(1 << 40) + (1 << 20);
const IO: Range<u64> = 0xc000..0xc100;
const BAR_LEN: u64 = 0x4000;
const TABLE: u64 = 0x1000;
const PBA: u64 = 0x2000;

/// What is behind the BARs.
#[derive(Default)]
struct Registers(OnceLock<Arc<pci::Msix>>);

impl MmioDevice for Registers {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        assert!(offset + data.len() as u64 <= BAR_LEN);
        match self.0.get() {
            Some(msix) if offset >= PBA => msix.pba_read(offset - PBA, data),
            Some(msix) if offset >= TABLE => msix.table_read(offset - TABLE, data),
            _ => data.fill(0),
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        assert!(offset + data.len() as u64 <= BAR_LEN);
        if let (Some(msix), TABLE..PBA) = (self.0.get(), offset) {
            msix.table_write(offset - TABLE, data);
        }
    }
}

impl PioDevice for Registers {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        assert!(usize::from(offset) + data.len() <= 0x20);
        data.fill(0);
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        assert!(usize::from(offset) + data.len() <= 0x20);
    }
}

struct Function(PciFunction);

impl Function {
    fn new(rig: &Rig, line: IrqLine, device: u16) -> Arc<Self> {
        let registers = Arc::new(Registers::default());
        let memory = BarHandler::Memory(registers.clone());
        let identity = Identity { vendor: 0x1234, device, class: 0xff_0000, ..Identity::default() };
        let mut builder = PciFunction::builder(&identity)
            .intx(line, 1, 11)
            .bar(0, BarKind::Memory64 { prefetchable: false }, BAR_LEN, memory.clone())
            .and_then(|builder| builder.bar(2, BarKind::Io, 0x20, BarHandler::Io(registers.clone())))
            .and_then(|builder| builder.bar(3, BarKind::Memory32 { prefetchable: true }, 0x1000, memory))
            .expect("the BARs are possible");
        let msix = builder.msix(5, 0, TABLE as u32, PBA as u32, rig.outside.clone()).expect("there is room");
        assert!(registers.0.set(msix).is_ok());
        Arc::new(Self(builder.build()))
    }
}

impl Device for Function {
    fn kind(&self) -> &'static str {
        "function"
    }

    fn version(&self) -> u32 {
        1
    }

    fn reset(&self) {
        self.0.reset();
    }

    fn save(&self) -> SavedState {
        encode("function", 1, &self.0.save())
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let result = decode("function", 1, state).and_then(|state| self.0.restore("function", &state));
        if result.is_err() {
            self.0.reset();
        }
        result
    }
}

impl PciDevice for Function {
    fn function(&self) -> &PciFunction {
        &self.0
    }
}

struct Target {
    rig: Rig,
    functions: [Arc<Function>; 2],
}

impl Bench for Target {
    fn new() -> Self {
        let mut rig = Rig::new();
        let windows = Windows { memory32: MEMORY32, memory64: MEMORY64, io: IO };
        let bus = PciBus::new(rig.memory.clone(), rig.ports.clone(), windows);
        let place = DevFn::from_number;
        let host = Arc::new(HostBridge::new(ECAM, 0));
        let lpc = Arc::new(LpcBridge::new(0x600));
        let functions = [0, 1].map(|index| Function::new(&rig, rig.outside.line(index), index as u16));
        bus.attach(place(0), host.clone()).expect("the bus is empty");
        bus.attach(place(0xf8), lpc.clone()).expect("there is room");
        bus.attach(place(8), functions[0].clone()).expect("there is room");
        bus.attach(place(9), functions[1].clone()).expect("there is room");
        let ecam = Arc::new(Ecam::new(bus.clone()));
        rig.memory.map(ECAM, 2 << 20, ecam).expect("addresses are free");
        let reset = ResetControl::new(rig.outside.clone());
        let reset_port = reset.port_regions().remove(0).device;
        let ports = Arc::new(ConfigPorts::new(bus, Some(reset_port)));
        rig.map_ports(CONFIG_PORTS_FIRST, CONFIG_PORTS, ports.clone());
        for device in [0u64, 8, 9, 0xf8] {
            rig.add_window(ECAM + (device << 12), 0x100);
        }
        rig.add_window(ECAM, 2 << 20);
        rig.add_window(MEMORY32.start, 0x1_0000);
        rig.add_window(MEMORY64.start, 0x1_0000);
        rig.add_device(host);
        rig.add_device(lpc);
        rig.add_device(functions[0].clone());
        rig.add_device(functions[1].clone());
        rig.add_device(ports);
        rig.add_device(reset);
        Self { rig, functions }
    }

    fn rig(&self) -> &Rig {
        &self.rig
    }

    fn special(&self, input: &mut Input<'_>) {
        let index = usize::from(input.u8() & 1);
        let function = self.functions[index].function();
        match input.u8() % 6 {
            0 => function.intx().set(input.flag()),
            1 => function.msix().expect("it has vectors").signal(input.u8().into()),
            2 => {
                // A BAR moves.
                let register = 0x10 + 4 * u64::from(input.u8() % 6);
                let base = input.pick(&[MEMORY32.start as u32, IO.start as u32, 0, u32::MAX << 14]);
                let value = base.wrapping_add(u32::from(input.u16()) << 4);
                self.rig.memory.write(ECAM + ((8 + index as u64) << 12) + register, &value.to_le_bytes());
            }
            3 => {
                let port = IO.start as u16 + u16::from(input.u8());
                self.rig.ports.read(port, &mut [0; 4]);
                self.rig.ports.write(port, &[0; 2]);
            }
            _ => {
                let Some(bar) = function.bar_address(0) else { return };
                let offset = TABLE + u64::from(input.u8() % 0x60);
                let len = input.pick(&[4, 8, 2, 1]);
                self.rig.memory.read(bar + offset, &mut [0; 8][..len]);
                self.rig.memory.write(bar + offset, &input.number().to_le_bytes()[..len]);
            }
        }
    }

    fn check(&self) {
        for function in &self.functions {
            for (index, len) in [(0, BAR_LEN), (2, 0x20), (3, 0x1000)] {
                let Some(start) = function.0.bar_address(index) else { continue };
                let windows = [MEMORY32, MEMORY64, IO];
                let inside = windows.iter().any(|window| window.start <= start && start + len <= window.end);
                assert!(inside, "BAR {index} is at {start:#x}");
            }
        }
    }
}

fuzz_target!(|data: &[u8]| drive::<Target>(data));
