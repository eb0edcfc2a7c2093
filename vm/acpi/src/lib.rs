//! ACPI tables and SMBIOS for the machines.
//!
//! [`AcpiConfig`] describes a q35-like PC; [`build`] turns it into the bytes of all its tables (ACPI 6.5)
//! with absolute pointers, for one window of guest memory. [`smbios::build`] does the same for SMBIOS.

mod config;
mod dsdt;
mod error;
mod fixed_tables;
mod madt;
mod micro;
mod numa;
pub mod smbios;
mod table;

use std::ops::Range;

pub use config::{
    AcpiConfig, INTX_GSI_BASE, INTX_GSI_COUNT, IoApic, PciHost, PicIrqs, PowerPorts, SerialPort, intx_gsi,
};
pub use error::AcpiError;
pub use micro::{MicroConfig, VirtioNode, build_micro};
pub use numa::{LOCAL_DISTANCE, Numa, NumaNode};

/// The window that the PC's ACPI tables go to by default; the root pointer is where the BIOS's area for it
/// begins (ACPI 6.5, 5.2.5.1), so that guests without a boot protocol find it too.
pub const ACPI_WINDOW: Range<u64> = 0xe_0000..0xf_0000;
/// The window for SMBIOS, within the area where guests search for its entry point (SMBIOS 3.7, 5.2).
pub const SMBIOS_WINDOW: Range<u64> = 0xf_0000..0x10_0000;

/// Tables to be written to guest memory in one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// The guest physical address of the first byte.
    pub base: u64,
    /// The tables.
    pub bytes: Vec<u8>,
    /// The guest physical address of the root: ACPI's RSDP, or SMBIOS's entry point.
    pub root: u64,
    /// The guest physical address of the 32-bit word in which a guest says where the processor is to begin, in real
    /// mode, when it wakes from S3 (ACPI 6.5, 5.2.10). `None` if the machine does not sleep.
    pub waking_vector: Option<u64>,
}

/// Builds all ACPI tables, to be placed from the start of `window` on.
///
/// # Errors
/// The configuration is contradictory, or the tables don't fit into `window`.
pub fn build(config: &AcpiConfig, window: Range<u64>) -> Result<Tables, AcpiError> {
    config.validate()?;
    let mut layout = Layout::new(window.clone());
    let root = layout.reserve(fixed_tables::RSDP_SIZE, 16);
    let facs = layout.append(&fixed_tables::facs(), 64);
    let dsdt = layout.append(&dsdt::build(config), 16);
    let fadt = layout.append(&fixed_tables::fadt(config, layout.low(facs)?, layout.low(dsdt)?), 16);
    let mut listed = vec![fadt, layout.append(&madt::build(config), 16)];
    listed.push(layout.append(&fixed_tables::mcfg(config), 16));
    if let Some(address) = config.hpet {
        listed.push(layout.append(&fixed_tables::hpet(address, config.hpet_block_id), 16));
    }
    if let Some(numa) = &config.numa {
        listed.push(layout.append(&numa::srat(numa), 16));
        listed.push(layout.append(&numa::slit(numa), 16));
    }
    let tables = layout.finish_with_roots(root, &listed)?;
    Ok(Tables { waking_vector: Some(facs + fixed_tables::WAKING_VECTOR), ..tables })
}

/// Addresses handed out one after the other in a window.
struct Layout {
    window: Range<u64>,
    bytes: Vec<u8>,
}

impl Layout {
    fn new(window: Range<u64>) -> Self {
        Self { window, bytes: Vec::new() }
    }

    fn reserve(&mut self, size: usize, align: u64) -> u64 {
        self.append(&vec![0; size], align)
    }

    /// Appends `bytes` at the next multiple of `align`, a power of two, and returns their address.
    fn append(&mut self, bytes: &[u8], align: u64) -> u64 {
        let next = self.window.start.saturating_add(self.bytes.len() as u64);
        let padding = next.wrapping_neg() & (align - 1);
        self.bytes.resize(self.bytes.len() + padding as usize, 0);
        self.bytes.extend_from_slice(bytes);
        next.saturating_add(padding)
    }

    /// An address for a 32-bit pointer.
    fn low(&self, address: u64) -> Result<u32, AcpiError> {
        u32::try_from(address).map_err(|_| AcpiError::WindowTooHigh { window: self.window.clone() })
    }

    /// Appends the tables that list `listed`, and fills in the pointer to them at the window's start.
    fn finish_with_roots(mut self, root: u64, listed: &[u64]) -> Result<Tables, AcpiError> {
        let low = listed.iter().map(|address| self.low(*address)).collect::<Result<Vec<u32>, _>>()?;
        let rsdt = self.append(&fixed_tables::rsdt(&low), 16);
        let xsdt = self.append(&fixed_tables::xsdt(listed), 16);
        let rsdp = fixed_tables::rsdp(self.low(rsdt)?, xsdt);
        self.bytes[..rsdp.len()].copy_from_slice(&rsdp);
        self.finish(root)
    }

    fn finish(self, root: u64) -> Result<Tables, AcpiError> {
        let have = self.window.end.saturating_sub(self.window.start);
        if self.bytes.len() as u64 > have {
            return Err(AcpiError::WindowTooSmall { need: self.bytes.len() as u64, window: self.window });
        }
        Ok(Tables { base: self.window.start, bytes: self.bytes, root, waking_vector: None })
    }
}

#[cfg(test)]
mod tests;
