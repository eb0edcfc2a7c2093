//! The machine type `pc`: what a stock kernel expects of a Q35-like PC, one function per device family.

pub(crate) mod chipset;
mod pci_devices;

use crate::assembly::{Assembly, MachineBus};
use crate::firmware::{self, Firmware};
use crate::kernel::{KernelEntry, KernelImage};
use crate::layout::Layout;
use crate::ram::RamPlan;
use crate::requests::Requests;
use crate::{MachineError, MachineSpec, serials, virtio_devices};
use accel::{AccelVm, Accelerator, VmSpec};
use boot::MemoryMap;
use chardev::PortConnection;
use clock::{TimerService, VmClock};
use device::Device;
use guest_memory::{GuestMemory, PreallocProgress};
use std::sync::Arc;
use std::time::Duration;

/// How long the end of the VM waits for output that nobody reads.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);

/// A machine of any type, all but its vCPUs.
pub(crate) struct Pc {
    pub(crate) accel: Arc<dyn AccelVm>,
    pub(crate) bus: Arc<MachineBus>,
    pub(crate) memory: GuestMemory,
    pub(crate) map: MemoryMap,
    pub(crate) timers: Arc<TimerService>,
    pub(crate) devices: Vec<Arc<dyn Device>>,
    pub(crate) connections: Vec<PortConnection>,
    pub(crate) firmware: Firmware,
    pub(crate) kernel: KernelImage,
}

impl Pc {
    /// Builds the machine that `spec` describes. What its guest asks for goes to `requests`; `progress` is
    /// told of memory that is allocated in advance.
    pub(crate) fn build(
        spec: &MachineSpec,
        accelerator: &dyn Accelerator,
        requests: &Arc<Requests>,
        progress: PreallocProgress<'_>,
    ) -> Result<Self, MachineError> {
        let layout = Layout::new(spec.memory)?;
        let kernel = KernelImage::open(&spec.kernel, spec.memory)?;
        let mut acpi = firmware::acpi_config(spec);
        let ram = RamPlan::new(spec, layout.regions())?;
        acpi.numa = ram.numa();
        let map = layout.map(Some(acpi.ecam()))?;
        let firmware = Firmware::new(&acpi, spec.vcpus, layout.regions())?;

        let memory = ram.allocate(progress)?;
        let timers = TimerService::new(VmClock::new()).map_err(MachineError::Thread)?;
        let vm_spec = VmSpec {
            vcpus: spec.vcpus,
            socket_vcpus: ram.socket_vcpus(),
            cpu: spec.cpu.clone(),
            tier: spec.tier,
            halt_poll: spec.host.halt_poll,
        };
        let accel = accelerator.create_vm(&vm_spec, &memory, &timers)?;

        let mut assembly = Assembly::new();
        let chipset = chipset::add(&mut assembly, &acpi, spec, &layout, &accel, &timers, requests)?;
        let mut connections = serials::add(&mut assembly, &chipset.board, &spec.serials, requests)?;
        let root = pci_devices::add_root(&mut assembly, &acpi, &chipset)?;
        let slots = pci_devices::Slots { root, board: &chipset.board, memory: &memory, accel: &accel };
        connections.extend(virtio_devices::add(&mut assembly, &slots, spec, requests)?);

        let bus = MachineBus { mmio: assembly.mmio, pio: assembly.pio, pic: Some(chipset.pic) };
        let devices = assembly.devices;
        Ok(Self { accel, bus: Arc::new(bus), memory, map, timers, devices, connections, firmware, kernel })
    }

    /// Writes the firmware's tables and the kernel into memory; `fresh` says that nothing ever ran there.
    pub(crate) fn load_kernel(&self, fresh: bool) -> Result<KernelEntry, MachineError> {
        let rsdp = self.firmware.write(&self.memory)?;
        self.kernel.load(&self.memory, &self.map, rsdp, fresh)
    }

    /// All devices and the clock begin to run.
    pub(crate) fn start(&self) {
        for device in &self.devices {
            device.start();
        }
        self.timers.clock().start();
        self.timers.clock_changed();
    }

    /// All devices and the clock stand still when this returns.
    pub(crate) fn stop(&self) {
        self.timers.clock().stop();
        self.timers.clock_changed();
        for device in &self.devices {
            device.stop();
        }
    }

    /// All devices are as after power-on. Memory keeps its content, as on a real board.
    pub(crate) fn reset(&self) {
        for device in &self.devices {
            device.reset();
        }
    }
}

impl Drop for Pc {
    fn drop(&mut self) {
        for connection in &self.connections {
            connection.drain(OUTPUT_PATIENCE);
        }
    }
}
