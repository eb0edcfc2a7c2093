//! Tables for a machine without a chipset: hardware-reduced ACPI (ACPI 6.5, 4.1), no PCI, virtio devices in
//! memory-mapped registers.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, Interrupt, Memory32Fixed, Name, ONE, PackageBuilder, Path, ResourceTemplate, Scope,
    ZERO,
};

use crate::config::{IoApic, SerialPort};
use crate::dsdt::{isa_device, isa_irq, port, processor};
use crate::fixed_tables::{self, port_address};
use crate::table::with_body;
use crate::{AcpiConfig, AcpiError, Layout, Numa, Tables, madt, numa};

/// A virtio device in memory-mapped registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtioNode {
    /// Where its registers are, below 4 GiB.
    pub registers: Range<u64>,
    /// Its global system interrupt: level-triggered, active high, perhaps shared.
    pub gsi: u32,
}

/// A machine without a chipset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroConfig {
    /// The APIC ids of the vCPUs; a vCPU's place is its ACPI processor UID.
    pub apic_ids: Vec<u32>,
    /// Where every vCPU finds its local APIC.
    pub local_apic_address: u32,
    /// The I/O APIC.
    pub io_apic: IoApic,
    /// The port of the sleep control register (ACPI 6.5, 4.8.3.7).
    pub sleep_control: u16,
    /// The port of the sleep status register.
    pub sleep_status: u16,
    /// SLP_TYPx for S5, soft off: 3 bits.
    pub s5_sleep_type: u8,
    /// The reset register's port.
    pub reset_port: u16,
    /// What resets when written to it.
    pub reset_value: u8,
    /// Serial ports.
    pub serials: Vec<SerialPort>,
    /// Whether there's a CMOS clock.
    pub rtc: bool,
    /// The port of the panic notification device, if there's one.
    pub pvpanic: Option<u16>,
    /// NUMA nodes, if the machine has more than one.
    pub numa: Option<Numa>,
    /// Virtio devices.
    pub virtio: Vec<VirtioNode>,
}

impl MicroConfig {
    /// The most virtio devices that can be described.
    pub const MAX_VIRTIO: usize = 256;

    fn validate(&self) -> Result<(), AcpiError> {
        const FOUR_GIB: u64 = 1 << 32;
        AcpiConfig::validate_processors(&self.apic_ids)?;
        AcpiConfig::validate_serials(&self.serials)?;
        if let Some(numa) = &self.numa {
            numa.validate(&self.apic_ids)?;
        }
        if self.virtio.len() > Self::MAX_VIRTIO {
            return Err(AcpiError::VirtioCount { count: self.virtio.len(), max: Self::MAX_VIRTIO });
        }
        for node in &self.virtio {
            let Range { start, end } = node.registers;
            if start >= end || end > FOUR_GIB {
                return Err(AcpiError::Range { what: "virtio device", start, end });
            }
        }
        Ok(())
    }
}

/// Builds all tables of a machine without a chipset, to be placed from the start of `window` on.
///
/// # Errors
/// As [`crate::build`].
pub fn build_micro(config: &MicroConfig, window: Range<u64>) -> Result<Tables, AcpiError> {
    config.validate()?;
    let mut layout = Layout::new(window);
    let root = layout.reserve(fixed_tables::RSDP_SIZE, 16);
    let dsdt = layout.append(&dsdt(config), 16);
    let fadt = layout.append(&fadt(config, layout.low(dsdt)?), 16);
    let madt = madt::build_without_pics(&config.apic_ids, config.local_apic_address, &config.io_apic);
    let mut listed = vec![fadt, layout.append(&madt, 16)];
    if let Some(numa) = &config.numa {
        listed.push(layout.append(&numa::srat(numa), 16));
        listed.push(layout.append(&numa::slit(numa), 16));
    }
    layout.finish_with_roots(root, &listed)
}

fn dsdt(config: &MicroConfig) -> Vec<u8> {
    let mut aml = Vec::new();
    let mut package = PackageBuilder::new();
    package.add_element(&config.s5_sleep_type);
    for _ in 0..3 {
        package.add_element(&ZERO);
    }
    Name::new(Path::new("\\_S5_"), &package).to_aml_bytes(&mut aml);

    let mut devices = Vec::new();
    for uid in 0..config.apic_ids.len() {
        processor(uid as u32, &mut devices);
    }
    for (index, serial) in config.serials.iter().enumerate() {
        let (ports, irq) = (port(serial.port, 8), isa_irq(serial.irq));
        let name = format!("COM{:X}", index + 1);
        devices.extend(isa_device(&name, &EISAName::new("PNP0501"), index as u32, vec![&ports, &irq]).0);
    }
    if config.rtc {
        let (ports, irq) = (port(0x70, 2), isa_irq(8));
        devices.extend(isa_device("RTC0", &EISAName::new("PNP0B00"), 0, vec![&ports, &irq]).0);
    }
    if let Some(first) = config.pvpanic {
        devices.extend(isa_device("PEVT", &"QEMU0001", 0, vec![&port(first, 1)]).0);
    }
    for (index, node) in config.virtio.iter().enumerate() {
        virtio(index as u32, node, &mut devices);
    }
    let devices = crate::dsdt::Raw(devices);
    Scope::new(Path::new("\\_SB_"), vec![&devices]).to_aml_bytes(&mut aml);
    with_body(b"DSDT", 2, &aml)
}

/// The id by which guests know virtio's registers is Linaro's.
fn virtio(index: u32, node: &VirtioNode, aml: &mut Vec<u8>) {
    let (start, len) = (node.registers.start as u32, (node.registers.end - node.registers.start) as u32);
    let registers = Memory32Fixed::new(true, start, len);
    let interrupt = Interrupt::new(true, false, false, true, node.gsi);
    let name = format!("V{index:03X}");
    Device::new(
        Path::new(&name),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &index),
            &Name::new(Path::new("_CCA"), &ONE),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    )
    .to_aml_bytes(aml);
}

/// Fixed ACPI description table (ACPI 6.5, 5.2.9) of hardware-reduced ACPI.
fn fadt(config: &MicroConfig, dsdt: u32) -> Vec<u8> {
    const SIZE: usize = 276;
    const HEADER: usize = 36;
    const WBINVD: u32 = 1;
    const RESET_REG_SUP: u32 = 1 << 10;
    const HW_REDUCED_ACPI: u32 = 1 << 20;
    const BOOT_NO_VGA: u16 = 1 << 2;
    const BOOT_NO_MSI: u16 = 1 << 3;
    const BOOT_NO_CMOS_RTC: u16 = 1 << 5;
    let mut body = vec![0u8; SIZE - HEADER];
    let mut put = |offset: usize, bytes: &[u8]| {
        body[offset - HEADER..offset - HEADER + bytes.len()].copy_from_slice(bytes);
    };
    put(40, &dsdt.to_le_bytes());
    put(96, &0x0fffu16.to_le_bytes()); // No C2,
    put(98, &0xffffu16.to_le_bytes()); // no C3.
    if config.rtc {
        put(108, &[0x32]); // Century in CMOS.
    }
    let no_clock = if config.rtc { 0 } else { BOOT_NO_CMOS_RTC };
    put(109, &(BOOT_NO_VGA | BOOT_NO_MSI | no_clock).to_le_bytes());
    put(112, &(WBINVD | RESET_REG_SUP | HW_REDUCED_ACPI).to_le_bytes());
    put(116, &port_address(config.reset_port, 1, 1));
    put(128, &[config.reset_value]);
    put(131, &[5]); // ACPI 6.5.
    put(140, &u64::from(dsdt).to_le_bytes());
    put(244, &port_address(config.sleep_control, 1, 1));
    put(256, &port_address(config.sleep_status, 1, 1));
    put(268, b"VIREO\0\0\0");
    with_body(b"FACP", 6, &body)
}
