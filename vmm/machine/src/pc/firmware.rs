//! The tables that firmware would leave in memory.

use crate::{MachineError, MachineSpec};
use acpi::smbios::SmbiosConfig;
use acpi::{ACPI_WINDOW, AcpiConfig, SMBIOS_WINDOW, SerialPort, Tables, smbios};
use chipset_x86::addresses;

/// ACPI and SMBIOS tables, ready to be written at every reset.
#[derive(Debug)]
pub(super) struct Firmware {
    acpi: Tables,
    smbios: Tables,
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
    ports.s5_sleep_type = addresses::SLEEP_TYPE_S5;
    ports.timer_32_bit = chipset_x86::PmConfig::default().timer_32_bits;
    config.pvpanic = Some(addresses::PVPANIC_PORT);
    config.serials = super::serials::PORTS[..spec.serials.len().min(super::serials::PORTS.len())]
        .iter()
        .map(|(port, irq)| SerialPort { port: *port, irq: *irq as u8 })
        .collect();
    config
}

impl Firmware {
    /// The tables for a machine with memory at `ram`.
    pub(super) fn new(
        config: &AcpiConfig,
        vcpus: u32,
        ram: Vec<std::ops::Range<u64>>,
    ) -> Result<Self, MachineError> {
        let wiring = |error: acpi::AcpiError| MachineError::Wiring(error.to_string());
        Ok(Self {
            acpi: acpi::build(config, ACPI_WINDOW).map_err(wiring)?,
            smbios: smbios::build(&SmbiosConfig::pc(vcpus as u16, ram), SMBIOS_WINDOW).map_err(wiring)?,
        })
    }

    /// Writes the tables; returns where the ACPI tables' root pointer is.
    pub(super) fn write(&self, memory: &guest_memory::GuestMemory) -> Result<u64, MachineError> {
        memory.write(self.acpi.base, &self.acpi.bytes)?;
        memory.write(self.smbios.base, &self.smbios.bytes)?;
        Ok(self.acpi.root)
    }
}
