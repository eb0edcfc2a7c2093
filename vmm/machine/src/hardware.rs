//! A machine of any type, all but its vCPUs: what the types build, and what is done to it as a whole.

use crate::assembly::MachineBus;
use crate::boot_source::BootSource;
use crate::drives::Drives;
use crate::firmware::{Firmware, RealModeEntry};
use crate::kernel::KernelEntry;
use crate::{MachineError, bios};
use accel::AccelVm;
use boot::MemoryMap;
use chardev::PortConnection;
use chipset_x86::Pm;
use clock::TimerService;
use device::Device;
use guest_memory::GuestMemory;
use std::sync::Arc;
use std::time::Duration;

/// How long the end of the VM waits for output that nobody reads.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);

/// A machine of any type, all but its vCPUs.
pub(crate) struct Hardware {
    pub(crate) accel: Arc<dyn AccelVm>,
    pub(crate) bus: Arc<MachineBus>,
    pub(crate) memory: GuestMemory,
    pub(crate) map: MemoryMap,
    pub(crate) timers: Arc<TimerService>,
    pub(crate) devices: Vec<Arc<dyn Device>>,
    pub(crate) connections: Vec<PortConnection>,
    pub(crate) firmware: Firmware,
    pub(crate) boot: BootSource,
    /// Power management, where there is any.
    pub(crate) pm: Option<Arc<Pm>>,
    /// The images of the disks, which are closed when the devices are gone.
    pub(crate) drives: Drives,
}

impl Hardware {
    /// Writes what the machine begins with into memory; `fresh` says that nothing ever ran there. Returns how
    /// the boot processor begins, if not as after a reset.
    pub(crate) fn load(&self, fresh: bool) -> Result<Option<KernelEntry>, MachineError> {
        let entry = self.boot.load(&self.memory, &self.map, &self.firmware, fresh)?;
        if entry.as_ref().is_some_and(KernelEntry::is_after_bios) && self.pm.is_some() {
            bios::write_handlers(&self.memory)?;
            bios::program_chipset(&*self.bus);
        }
        Ok(entry)
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

    /// Everything is as after power-on, but what the chipset keeps of the sleep that has ended. Returns how the boot
    /// processor begins, if there is something that it can go on with.
    pub(crate) fn wake(&self) -> Option<RealModeEntry> {
        let kept = self.pm.as_ref().map(|pm| (pm, pm.waking()));
        self.reset();
        if let Some((pm, kept)) = kept {
            pm.woken(kept);
        }
        match self.boot {
            BootSource::Kernel(_) => self.firmware.waking_vector(&self.memory),
            BootSource::Firmware(_) => None,
        }
    }

    /// All devices are as after power-on. Memory keeps its content, as on a real board.
    pub(crate) fn reset(&self) {
        for device in &self.devices {
            device.reset();
        }
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        for connection in &self.connections {
            connection.drain(OUTPUT_PATIENCE);
        }
        self.drives.close();
    }
}
