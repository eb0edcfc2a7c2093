//! A processor's surroundings: the bus, and the local APIC in front of it.

use crate::counted::Counted;
use crate::tsc::TscSource;
use accel::VcpuBus;
use lapic::{Lapic, MMIO_LEN};
use std::cell::Cell;
use x86_core::Platform;

/// A processor's surroundings.
pub(crate) struct VcpuPlatform<'a> {
    pub(crate) bus: &'a dyn VcpuBus,
    pub(crate) lapic: &'a Lapic,
    pub(crate) tsc: &'a TscSource,
    /// If instructions are counted.
    pub(crate) counted: Option<&'a Counted>,
    /// PAUSEs since this last let go of the host's processor.
    pub(crate) pauses: Cell<u32>,
}

/// PAUSEs after which a vCPU lets others have its host processor. What it waits for may be a vCPU whose
/// thread cannot run while this one does; some microseconds of waiting are cheaper than a switch.
const PAUSES: u32 = 64;

impl VcpuPlatform<'_> {
    fn lapic_offset(&self, gpa: u64) -> Option<u64> {
        let base = self.lapic.mmio_base()?;
        Some(gpa.wrapping_sub(base)).filter(|offset| *offset < MMIO_LEN)
    }
}

impl Platform for VcpuPlatform<'_> {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        match self.lapic_offset(gpa) {
            Some(offset) => self.lapic.mmio_read(offset, data),
            None => self.bus.mmio_read(gpa, data),
        }
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        match self.lapic_offset(gpa) {
            Some(offset) => self.lapic.mmio_write(offset, data),
            None => self.bus.mmio_write(gpa, data),
        }
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.bus.pio_read(port, data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.bus.pio_write(port, data);
    }

    fn pause(&self) {
        let pauses = self.pauses.get() + 1;
        self.pauses.set(pauses % PAUSES);
        if pauses == PAUSES {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }

    fn tsc(&self) -> u64 {
        self.tsc.read()
    }

    fn host_tsc_offset(&self) -> Option<u64> {
        self.tsc.host_offset()
    }

    fn tsc_hertz(&self) -> u64 {
        self.tsc.hertz()
    }

    fn at_instruction(&self, count: u64) {
        if let Some(counted) = self.counted {
            counted.counter.set_count(count);
        }
    }

    fn random(&self) -> Option<u64> {
        self.counted.and_then(Counted::random).or_else(x86_core::system::host_random)
    }

    fn cr8(&self) -> u8 {
        self.lapic.cr8()
    }

    fn set_cr8(&self, priority: u8) {
        self.lapic.set_cr8(priority);
    }

    fn apic_msr(&self, msr: u32) -> Option<u64> {
        self.lapic.read_msr(msr).ok()
    }

    fn set_apic_msr(&self, msr: u32, value: u64) -> Option<()> {
        // A deadline comes without the guest's offset.
        self.lapic.write_msr(msr, value, self.tsc.read()).ok()
    }
}

/// A bus with nothing on it, for what a processor does while it does not run.
pub(crate) struct NoBus;

impl VcpuBus for NoBus {
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _port: u16, _data: &[u8]) {}
    fn acknowledge_ext_int(&self) -> u8 {
        0
    }
}
