//! The machine type `microvm`: made to start fast. No chipset and no PCI: an I/O APIC, serial ports, a clock,
//! the registers of hardware-reduced ACPI, and virtio devices in memory-mapped registers.

use crate::assembly::{Assembly, MachineBus, wiring};
use crate::boot_source::BootSource;
use crate::deterministic::{self, Determinism, Entropy};
use crate::firmware::Firmware;
use crate::hardware::Hardware;
use crate::layout::Layout;
use crate::pc;
use crate::ram::RamPlan;
use crate::requests::Requests;
use crate::virtio_devices::{self, Attach};
use crate::{MachineError, MachineSpec, isa_devices, serials};
use accel::{AccelVm, Accelerator, VmSpec};
use acpi::{AcpiConfig, MicroConfig, SerialPort, VirtioNode};
use chipset_x86::{Board, IoApic, PowerEvents, Pvpanic, ResetControl, SleepControl, addresses};
use device::PioDevice;
use guest_memory::{GuestMemory, PreallocProgress};
use irq::IrqSink;
use parking_lot::Mutex;
use std::sync::Arc;
use virtio::{MMIO_DEVICE_LEN, VirtioDevice, VirtioMmioConfig, VirtioMmioDevice};

/// Where the first virtio device's registers are; those of the others follow.
const VIRTIO_BASE: u64 = 0xd000_0000;
/// Global system interrupts for virtio devices: what serial ports (3, 4) and the clock (8) leave. With more
/// devices than these they are shared.
const VIRTIO_GSIS: [u32; 17] = [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
/// The ports of a PIT.
const ABSENT_PIT: (u16, u16) = (0x40, 4);

/// Builds the machine that `spec` describes. What its guest asks for goes to `requests`; `progress` is
/// told of memory that is allocated in advance. With `determinism` it is to do the same whenever it runs.
pub(crate) fn build(
    spec: &MachineSpec,
    accelerator: &dyn Accelerator,
    determinism: Option<&Arc<Determinism>>,
    requests: &Arc<Requests>,
    progress: PreallocProgress<'_>,
) -> Result<Hardware, MachineError> {
    virtio_devices::check(spec)?;
    let layout = Layout::new(spec.memory)?;
    let entropy = determinism.map_or(Entropy::Host, |determinism| determinism.entropy(deterministic::KERNEL));
    let mut boot = BootSource::open(spec, entropy)?;
    let mut acpi = acpi_config(spec);
    let ram = RamPlan::new(spec, layout.regions())?;
    acpi.numa = ram.numa();
    let map = layout.map(None)?;
    let firmware = Firmware::micro(&acpi, spec.vcpus, layout.regions())?;

    let memory = ram.allocate(boot.rom(), progress)?;
    let timers = deterministic::timers(determinism)?;
    let vm_spec = VmSpec {
        vcpus: spec.vcpus,
        socket_vcpus: ram.socket_vcpus(),
        cpu: spec.cpu.clone(),
        tier: spec.tier,
        halt_poll: spec.host.halt_poll,
    };
    let accel = accelerator.create_vm(&vm_spec, &memory, &timers)?;
    // There is no timer of known rate that Linux could learn the rate of the time-stamp counter by, and
    // nothing to find by looking for PCI.
    boot.add_word("tsc_early_khz", &format!("tsc_early_khz={}", accel.tsc_hertz() / 1000));
    boot.add_word("pci", "pci=off");

    let mut assembly = Assembly::new(determinism);
    let board = add_interrupt_controller(&mut assembly, &acpi, &accel)?;
    pc::chipset::add_clock(&mut assembly, spec, &layout, &timers, &board)?;
    add_power(&mut assembly, requests)?;
    assembly.map_ports(ABSENT_PIT.0, ABSENT_PIT.1, Arc::new(ReadsZero))?;
    let mut connections = serials::add(&mut assembly, &board, &spec.serials, requests)?;
    let nodes =
        Nodes { free: Mutex::new(acpi.virtio.into_iter()), board: &board, memory: &memory, accel: &accel };
    connections.extend(virtio_devices::add(&mut assembly, &nodes, spec, requests)?);
    connections.extend(isa_devices::add(&mut assembly, spec, requests, &board)?);

    let bus = MachineBus { mmio: assembly.mmio, pio: assembly.pio, pic: None };
    let devices = assembly.devices;
    Ok(Hardware {
        accel,
        bus: Arc::new(bus),
        memory,
        map,
        timers,
        devices,
        connections,
        firmware,
        boot,
        pm: None,
        drives: assembly.drives,
    })
}

/// What the ACPI tables say of the machine; everything else is wired by this.
fn acpi_config(spec: &MachineSpec) -> MicroConfig {
    let pc = AcpiConfig::pc((0..spec.vcpus).collect());
    let node = |index: usize| {
        let start = VIRTIO_BASE + index as u64 * MMIO_DEVICE_LEN;
        VirtioNode { registers: start..start + MMIO_DEVICE_LEN, gsi: VIRTIO_GSIS[index % VIRTIO_GSIS.len()] }
    };
    MicroConfig {
        apic_ids: pc.apic_ids,
        local_apic_address: pc.local_apic_address,
        io_apic: pc.io_apic,
        sleep_control: addresses::SLEEP_CONTROL_PORT,
        sleep_status: addresses::SLEEP_STATUS_PORT,
        s5_sleep_type: addresses::SLEEP_TYPE_S5,
        reset_port: addresses::RESET_CONTROL_PORT,
        reset_value: addresses::RESET_CONTROL_VALUE,
        serials: serials::PORTS[..spec.serials.len().min(serials::PORTS.len())]
            .iter()
            .map(|(port, irq)| SerialPort { port: *port, irq: *irq as u8 })
            .collect(),
        rtc: true,
        pvpanic: Some(addresses::PVPANIC_PORT),
        numa: None,
        virtio: (0..virtio_devices::count(spec)).map(node).collect(),
    }
}

/// There are no 8259s.
struct NoPic;

impl IrqSink for NoPic {
    fn set_level(&self, _pin: u32, _level: bool) {}
}

fn add_interrupt_controller(
    assembly: &mut Assembly,
    acpi: &MicroConfig,
    accel: &Arc<dyn AccelVm>,
) -> Result<Arc<Board>, MachineError> {
    let ioapic = IoApic::new(accel.msi_target());
    assembly.map_memory(acpi.io_apic.address.into(), addresses::IOAPIC_LEN, ioapic.clone())?;
    assembly.add(ioapic.clone());
    let listener = ioapic.clone();
    accel.set_eoi_listener(Arc::new(move |vector| listener.end_of_interrupt(vector)));
    Ok(Board::new(Arc::new(NoPic), ioapic))
}

/// The ways to switch off and to reset.
fn add_power(assembly: &mut Assembly, requests: &Arc<Requests>) -> Result<(), MachineError> {
    let events: Arc<dyn PowerEvents> = requests.clone();
    let sleep = SleepControl::new(events.clone());
    assembly.add_at_ports(sleep.clone(), sleep.port_regions())?;
    let reset = ResetControl::new(events.clone());
    assembly.add_at_ports(reset.clone(), reset.port_regions())?;
    let pvpanic = Pvpanic::new(events);
    assembly.add_at_ports(pvpanic.clone(), pvpanic.port_regions())?;
    Ok(())
}

/// The places for virtio devices, as the ACPI tables tell of them.
struct Nodes<'a> {
    free: Mutex<std::vec::IntoIter<VirtioNode>>,
    board: &'a Arc<Board>,
    memory: &'a GuestMemory,
    accel: &'a Arc<dyn AccelVm>,
}

impl Attach for Nodes<'_> {
    fn attach(&self, assembly: &mut Assembly, device: Arc<dyn VirtioDevice>) -> Result<(), MachineError> {
        let node = self.free.lock().next();
        let node = node.ok_or_else(|| wiring("there are more virtio devices than were counted"))?;
        let line = self.board.gsi_line(node.gsi);
        let config =
            VirtioMmioConfig { memory: self.memory.clone(), line, inline: assembly.determinism.is_some() };
        let device = Arc::new(VirtioMmioDevice::new(device, config).map_err(wiring)?);
        if let Some(sink) = crate::doorbells::sink(&**self.accel) {
            device.connect_doorbells(node.registers.start, sink);
        }
        let len = node.registers.end - node.registers.start;
        assembly.map_memory(node.registers.start, len, device.clone())?;
        assembly.add(device);
        Ok(())
    }
}

/// Where a PIT would be. Linux tries to learn the time-stamp counter's rate by one before it looks at
/// anything else, and takes the all ones of absent ports for a slow answer; of zeroes it makes nothing at once.
struct ReadsZero;

impl PioDevice for ReadsZero {
    fn pio_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn pio_write(&self, _offset: u16, _data: &[u8]) {}
}
