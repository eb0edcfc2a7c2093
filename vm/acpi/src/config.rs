//! The description of a machine that its tables are made from.

use std::collections::HashSet;
use std::ops::Range;

use crate::{AcpiError, Numa};

/// The first global system interrupt for PCI's INTx lines.
pub const INTX_GSI_BASE: u32 = 16;
/// How many inputs the INTx lines are spread over.
pub const INTX_GSI_COUNT: u32 = 8;

/// The global system interrupt of INTx `pin` (0 for INTA#) of the device in `slot` on the root bus. The
/// machine must wire its lines as this says.
pub fn intx_gsi(slot: u8, pin: u8) -> u32 {
    INTX_GSI_BASE + (u32::from(slot) + u32::from(pin)) % INTX_GSI_COUNT
}

/// The I/O APIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoApic {
    /// Its APIC id.
    pub id: u8,
    /// Where its registers are.
    pub address: u32,
}

/// To which PIC input each of the [`INTX_GSI_COUNT`] INTx lines goes while the guest uses the PICs instead
/// of the I/O APIC, by number of the line.
pub type PicIrqs = [u8; INTX_GSI_COUNT as usize];

/// The PCI Express host bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciHost {
    /// Where the enhanced configuration space (ECAM) is; 1 MiB for each bus.
    pub ecam_base: u64,
    /// Number of buses, 1 to 256.
    pub buses: u16,
    /// Addresses below 4 GiB for BARs.
    pub windows32: Vec<Range<u64>>,
    /// Addresses above 4 GiB for 64-bit BARs.
    pub window64: Option<Range<u64>>,
    /// Whether a VGA adapter decodes `0xa0000..0xc0000`.
    pub vga: bool,
    /// INTx lines in PIC mode; the lines are level-triggered there (ELCR).
    pub pic_irqs: PicIrqs,
}

/// The ports of power management (ACPI 6.5, 4.8) and what's written to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PowerPorts {
    /// PM1a event block, 4 bytes.
    pub pm1a_event: u16,
    /// PM1a control block, 2 bytes.
    pub pm1a_control: u16,
    /// The power management timer, 4 bytes.
    pub timer: u16,
    /// Whether the timer counts 32 bits instead of 24.
    pub timer_32_bit: bool,
    /// General-purpose event block 0.
    pub gpe0: u16,
    /// Its length in bytes, both halves.
    pub gpe0_len: u8,
    /// The SMI command port; 0 for a machine that's always in ACPI mode.
    pub smi_command: u16,
    /// The value that enters ACPI mode.
    pub acpi_enable: u8,
    /// The value that leaves it.
    pub acpi_disable: u8,
    /// The interrupt of power management events.
    pub sci_irq: u8,
    /// The reset register's port.
    pub reset_port: u16,
    /// What resets when written to it.
    pub reset_value: u8,
    /// SLP_TYPx for S3, suspend to RAM: 3 bits.
    pub s3_sleep_type: u8,
    /// SLP_TYPx for S5, soft off: 3 bits.
    pub s5_sleep_type: u8,
}

/// A 16550 serial port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SerialPort {
    /// First of its eight ports.
    pub port: u16,
    /// Its ISA interrupt.
    pub irq: u8,
}

/// A PC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiConfig {
    /// The APIC ids of the vCPUs; a vCPU's place is its ACPI processor UID.
    pub apic_ids: Vec<u32>,
    /// Where every vCPU finds its local APIC.
    pub local_apic_address: u32,
    /// The I/O APIC.
    pub io_apic: IoApic,
    /// The PCI host bridge.
    pub pci: PciHost,
    /// Power management.
    pub power: PowerPorts,
    /// Where the HPET is, if there's one.
    pub hpet: Option<u32>,
    /// The HPET's event timer block id: the low half of its capability register.
    pub hpet_block_id: u32,
    /// Serial ports.
    pub serials: Vec<SerialPort>,
    /// Whether there's an 8042 keyboard controller.
    pub i8042: bool,
    /// Whether there's a CMOS clock.
    pub rtc: bool,
    /// The port of the panic notification device, if there's one.
    pub pvpanic: Option<u16>,
    /// The NUMA nodes; without any, all processors and all memory are equally near.
    pub numa: Option<Numa>,
}

impl AcpiConfig {
    /// The most vCPUs that can be described.
    pub const MAX_CPUS: usize = 1024;
    /// The most serial ports that can be described.
    pub const MAX_SERIALS: usize = 4;

    /// The machine `pc` with vCPUs of these APIC ids and its usual addresses: configuration space for 256
    /// buses at `0xc000_0000`, BARs from `0xd000_0000` to the I/O APIC, a 64-bit window of 256 GiB at
    /// 512 GiB.
    pub fn pc(apic_ids: Vec<u32>) -> Self {
        Self {
            apic_ids,
            local_apic_address: 0xfee0_0000,
            io_apic: IoApic { id: 0, address: 0xfec0_0000 },
            pci: PciHost {
                ecam_base: 0xc000_0000,
                buses: 256,
                windows32: std::iter::once(0xd000_0000..0xfe00_0000).collect(),
                window64: Some(0x80_0000_0000..0xc0_0000_0000),
                vga: false,
                pic_irqs: [10, 11, 10, 11, 10, 11, 10, 11],
            },
            power: PowerPorts {
                pm1a_event: 0x600,
                pm1a_control: 0x604,
                timer: 0x608,
                timer_32_bit: false,
                gpe0: 0x620,
                gpe0_len: 16,
                smi_command: 0xb2,
                acpi_enable: 2,
                acpi_disable: 3,
                sci_irq: 9,
                reset_port: 0xcf9,
                reset_value: 6,
                s3_sleep_type: 1,
                s5_sleep_type: 5,
            },
            hpet: Some(0xfed0_0000),
            hpet_block_id: 0x8086_a201,
            serials: vec![SerialPort { port: 0x3f8, irq: 4 }],
            i8042: true,
            rtc: true,
            pvpanic: Some(0x505),
            numa: None,
        }
    }

    /// The range of the enhanced configuration space.
    pub fn ecam(&self) -> Range<u64> {
        self.pci.ecam_base..self.pci.ecam_base.saturating_add(u64::from(self.pci.buses) << 20)
    }

    pub(crate) fn validate_processors(apic_ids: &[u32]) -> Result<(), AcpiError> {
        let count = apic_ids.len();
        if count == 0 || count > Self::MAX_CPUS {
            return Err(AcpiError::CpuCount { count, max: Self::MAX_CPUS });
        }
        let mut seen = HashSet::new();
        match apic_ids.iter().find(|id| !seen.insert(**id)) {
            Some(id) => Err(AcpiError::DuplicateApicId { id: *id }),
            None => Ok(()),
        }
    }

    pub(crate) fn validate_serials(serials: &[SerialPort]) -> Result<(), AcpiError> {
        if serials.len() > Self::MAX_SERIALS {
            return Err(AcpiError::SerialCount { count: serials.len(), max: Self::MAX_SERIALS });
        }
        for start in serials.iter().map(|serial| u64::from(serial.port)) {
            if start == 0 || start + 8 > 1 << 16 {
                return Err(AcpiError::Range { what: "serial port", start, end: start + 8 });
            }
        }
        Ok(())
    }

    pub(crate) fn validate(&self) -> Result<(), AcpiError> {
        const FOUR_GIB: u64 = 1 << 32;
        Self::validate_processors(&self.apic_ids)?;
        if !(1..=256).contains(&self.pci.buses) {
            return Err(AcpiError::BusCount { buses: self.pci.buses });
        }
        if let Some(numa) = &self.numa {
            numa.validate(&self.apic_ids)?;
        }
        let check = |what, range: &Range<u64>, within: Range<u64>| {
            if range.is_empty() || range.start < within.start || range.end > within.end {
                return Err(AcpiError::Range { what, start: range.start, end: range.end });
            }
            Ok(())
        };
        check("PCI configuration space", &self.ecam(), 1..FOUR_GIB)?;
        for window in &self.pci.windows32 {
            check("32-bit PCI window", window, 1 << 20..FOUR_GIB)?;
        }
        if let Some(window) = &self.pci.window64 {
            check("64-bit PCI window", window, FOUR_GIB..1 << 52)?;
        }
        Self::validate_serials(&self.serials)?;
        let gpe0 = u64::from(self.power.gpe0);
        check("GPE block 0", &(gpe0..gpe0 + u64::from(self.power.gpe0_len)), 1..1 << 16)
    }
}
