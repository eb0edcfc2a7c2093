//! The layout of a virtio device's BAR and the capabilities that describe it (4.1.4).

use pci::{FunctionBuilder, PciError, capability};

/// The BAR that everything is in.
pub(crate) const BAR: u8 = 0;
/// Its size in bytes.
pub(crate) const BAR_SIZE: u64 = 0x8000;

/// A part of the BAR has a page of its own, so that an accelerator can treat it by itself.
pub(crate) const PART_SIZE: u64 = 0x1000;
pub(crate) const COMMON: u64 = 0x0000;
pub(crate) const ISR: u64 = 0x1000;
pub(crate) const DEVICE: u64 = 0x2000;
pub(crate) const NOTIFY: u64 = 0x3000;
pub(crate) const MSIX_TABLE: u64 = 0x4000;
pub(crate) const MSIX_PBA: u64 = 0x5000;

/// Bytes between the doorbells of two queues.
pub(crate) const NOTIFY_MULTIPLIER: u64 = 4;

/// The most queues of a device: as many as there is room for doorbells.
pub const MAX_QUEUES: usize = (PART_SIZE / NOTIFY_MULTIPLIER) as usize;

/// The most MSI-X vectors: as many as there is room for in the table.
pub(crate) const MAX_VECTORS: usize = (PART_SIZE / pci::MSIX_ENTRY_SIZE) as usize;

/// Bytes of the common configuration structure (4.1.4.3).
pub(crate) const COMMON_LEN: usize = 0x3c;

/// Offset of the address and length registers in a PCI configuration access capability, from its header.
pub(crate) const WINDOW_BAR: u16 = 4;
pub(crate) const WINDOW_OFFSET: u16 = 8;
pub(crate) const WINDOW_LENGTH: u16 = 12;
pub(crate) const WINDOW_DATA: u16 = 16;

/// The kinds of virtio PCI capabilities (4.1.4).
#[derive(Debug, Clone, Copy)]
enum Kind {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    Window = 5,
}

/// Everything of a capability but its two header bytes.
fn body(kind: Kind, offset: u64, len: u64, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + extra.len()) as u8, kind as u8, BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body.extend(extra);
    body
}

/// Adds the capabilities and returns the offset of the PCI configuration access capability, the window.
pub(crate) fn add_capabilities(builder: &mut FunctionBuilder) -> Result<u16, PciError> {
    let multiplier = (NOTIFY_MULTIPLIER as u32).to_le_bytes();
    let parts = [
        body(Kind::Common, COMMON, COMMON_LEN as u64, &[]),
        body(Kind::Notify, NOTIFY, PART_SIZE, &multiplier),
        body(Kind::Isr, ISR, 1, &[]),
        body(Kind::Device, DEVICE, PART_SIZE, &[]),
    ];
    for part in parts {
        builder.capability(capability::VENDOR, &part, &[])?;
    }
    let window = body(Kind::Window, 0, 0, &[0; 4]);
    let mut writable = vec![0; window.len()];
    writable[usize::from(WINDOW_BAR) - 2] = 0xff;
    writable[usize::from(WINDOW_OFFSET) - 2..].fill(0xff);
    builder.capability(capability::VENDOR, &window, &writable)
}
