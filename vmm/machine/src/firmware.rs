//! The tables that firmware would leave in memory.

use crate::{MachineError, MachineSpec, bios};
use accel::X86State;
use acpi::smbios::SmbiosConfig;
use acpi::{ACPI_WINDOW, AcpiConfig, AcpiError, MicroConfig, SMBIOS_WINDOW, SerialPort, Tables, smbios};
use chipset_x86::addresses;

/// Where a processor begins in real mode after a reset: here a few instructions that reset the whole machine,
/// for guests that jump there to have firmware start anew.
const RESET_VECTOR: u64 = 0xf_fff0;
/// `cli; mov dx, 0xcf9; mov al, 6; out dx, al; hlt; jmp` back to the `hlt`.
const RESET_CODE: [u8; 10] = [
    0xfa,
    0xba,
    addresses::RESET_CONTROL_PORT as u8,
    (addresses::RESET_CONTROL_PORT >> 8) as u8,
    0xb0,
    addresses::RESET_CONTROL_VALUE,
    0xee,
    0xf4,
    0xeb,
    0xfd,
];

/// ACPI and SMBIOS tables, ready to be written at every reset.
#[derive(Debug)]
pub(crate) struct Firmware {
    acpi: Tables,
    smbios: Tables,
}

/// How the boot processor begins after a sleep (ACPI 6.5, 16.3.2): at the waking vector, in real mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RealModeEntry {
    segment: u16,
    offset: u16,
}

impl RealModeEntry {
    fn new(vector: u32) -> Option<Self> {
        let segment = u16::try_from(vector >> 4).ok()?;
        (vector != 0).then_some(Self { segment, offset: (vector & 0xf) as u16 })
    }

    /// Changes `state`, that of a processor after reset.
    pub(crate) fn apply(&self, state: &mut X86State) {
        let code = &mut state.segments[X86State::CS];
        code.selector = self.segment;
        code.base = u64::from(self.segment) << 4;
        state.rip = self.offset.into();
    }
}

/// What the ACPI tables say of the machine; everything else is wired by this.
pub(super) fn acpi_config(spec: &MachineSpec) -> AcpiConfig {
    let mut config = AcpiConfig::pc((0..spec.vcpus).collect());
    let ports = &mut config.power;
    let base = addresses::PM_PORT_BASE;
    ports.pm1a_event = base + addresses::PM1_EVENT_OFFSET;
    ports.pm1a_control = base + addresses::PM1_CONTROL_OFFSET;
    ports.timer = base + addresses::PM_TIMER_OFFSET;
    ports.gpe0 = base + addresses::GPE0_OFFSET;
    ports.gpe0_len = addresses::GPE0_LEN as u8;
    ports.smi_command = addresses::SMI_COMMAND_PORT;
    ports.acpi_enable = addresses::ACPI_ENABLE;
    ports.acpi_disable = addresses::ACPI_DISABLE;
    ports.reset_port = addresses::RESET_CONTROL_PORT;
    ports.reset_value = addresses::RESET_CONTROL_VALUE;
    ports.s3_sleep_type = addresses::SLEEP_TYPE_S3;
    ports.s5_sleep_type = addresses::SLEEP_TYPE_S5;
    ports.timer_32_bit = chipset_x86::PmConfig::default().timer_32_bits;
    config.pvpanic = Some(addresses::PVPANIC_PORT);
    config.serials = crate::serials::PORTS[..spec.serials.len().min(crate::serials::PORTS.len())]
        .iter()
        .map(|(port, irq)| SerialPort { port: *port, irq: *irq as u8 })
        .collect();
    config
}

impl Firmware {
    /// The tables for a machine with memory at `ram`.
    pub(crate) fn new(
        config: &AcpiConfig,
        vcpus: u32,
        ram: Vec<std::ops::Range<u64>>,
    ) -> Result<Self, MachineError> {
        Self::with_acpi(acpi::build(config, ACPI_WINDOW), vcpus, ram)
    }

    /// The tables for a machine without a chipset.
    pub(crate) fn micro(
        config: &MicroConfig,
        vcpus: u32,
        ram: Vec<std::ops::Range<u64>>,
    ) -> Result<Self, MachineError> {
        Self::with_acpi(acpi::build_micro(config, ACPI_WINDOW), vcpus, ram)
    }

    fn with_acpi(
        acpi: Result<Tables, AcpiError>,
        vcpus: u32,
        ram: Vec<std::ops::Range<u64>>,
    ) -> Result<Self, MachineError> {
        let wiring = |error: AcpiError| MachineError::Wiring(error.to_string());
        Ok(Self {
            acpi: acpi.map_err(wiring)?,
            smbios: smbios::build(&SmbiosConfig::pc(vcpus as u16, ram), SMBIOS_WINDOW.start..bios::HANDLERS)
                .map_err(wiring)?,
        })
    }

    /// Writes the tables and the reset code; returns where the ACPI tables' root pointer is.
    pub(crate) fn write(&self, memory: &guest_memory::GuestMemory) -> Result<u64, MachineError> {
        memory.write(self.acpi.base, &self.acpi.bytes)?;
        memory.write(self.smbios.base, &self.smbios.bytes)?;
        memory.write(RESET_VECTOR, &RESET_CODE)?;
        Ok(self.acpi.root)
    }

    /// Where the guest wants the boot processor to begin in real mode after its sleep; `None` if it did not say, or
    /// said what is no address of real mode's.
    pub(crate) fn waking_vector(&self, memory: &guest_memory::GuestMemory) -> Option<RealModeEntry> {
        let mut vector = [0; 4];
        memory.read(self.acpi.waking_vector?, &mut vector).ok()?;
        RealModeEntry::new(u32::from_le_bytes(vector))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waking_vectors_are_of_real_mode() {
        assert_eq!(RealModeEntry::new(0), None);
        assert_eq!(RealModeEntry::new(0x10_0000), None);
        assert_eq!(RealModeEntry::new(0x9_a01c), Some(RealModeEntry { segment: 0x9a01, offset: 0xc }));
    }
}
