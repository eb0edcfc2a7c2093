//! PCI Express: configuration space, BARs, MSI-X, ECAM and the legacy configuration ports.
//!
//! One segment with one bus, the root complex's. A device function embeds a [`PciFunction`], made by a
//! [`FunctionBuilder`], which keeps its configuration space, places its BARs on the buses and owns its
//! interrupts; the function stands on a [`PciBus`], which the guest reaches through [`Ecam`] and
//! [`ConfigPorts`].
//!
//! Register layouts are those of the PCI Local Bus Specification 3.0 and the PCI Express Base
//! Specification 5.0; section numbers are the latter's unless said otherwise.

mod access;
mod allocator;
mod bar;
mod bridges;
mod config_space;
mod function;
mod intx;
mod msix;
mod pci_bus;

pub use access::{CONFIG_PORTS, CONFIG_PORTS_FIRST, ConfigPorts, ECAM_BYTES_PER_BUS, Ecam};
pub use allocator::{Allocator, Windows};
pub use bar::{BarHandler, BarKind, BarMapper};
pub use bridges::{HostBridge, LpcBridge};
pub use config_space::{CONFIG_SIZE, ConfigSpace, Identity};
pub use function::{FunctionBuilder, FunctionState, PciFunction};
pub use intx::Intx;
pub use msix::{MSIX_ENTRY_SIZE, MSIX_MAX_VECTORS, Msix, MsixState};
pub use pci_bus::{PciBus, intx_swizzle};

use device::Device;
use std::fmt;

/// Offsets of the registers of a type 0 header that others than this crate need (7.5.1).
pub mod register {
    /// Command: what the function may do.
    pub const COMMAND: u16 = 0x04;
    /// Status.
    pub const STATUS: u16 = 0x06;
    /// The first BAR; five more follow.
    pub const BAR0: u16 = 0x10;
    /// The offset of the first capability.
    pub const CAPABILITIES: u16 = 0x34;
    /// A scratch register for system software: the input of the interrupt controller that INTx reaches.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Which of INTA# to INTD# the function drives, counted from 1; 0 for none.
    pub const INTERRUPT_PIN: u16 = 0x3d;
}

/// Bits of the command register (7.5.1.1.3).
pub mod command {
    /// The function answers to its I/O BARs.
    pub const IO: u16 = 1 << 0;
    /// The function answers to its memory BARs.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may access memory by itself.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// The function must not drive INTx.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Capability identifiers that this workspace uses (PCI Code and ID Assignment Specification, section 2).
pub mod capability {
    /// Vendor specific.
    pub const VENDOR: u8 = 0x09;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
}

/// A place on the bus: device 0 to 31, function 0 to 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevFn(u8);

impl DevFn {
    /// Function `function` of device `device`; `None` if there is no such place.
    pub const fn new(device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 { Some(Self(device << 3 | function)) } else { None }
    }

    /// The place whose number, device times 8 plus function, is `number`.
    pub const fn from_number(number: u8) -> Self {
        Self(number)
    }

    /// The device number.
    pub const fn device(self) -> u8 {
        self.0 >> 3
    }

    /// The function number.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }

    /// Device times 8 plus function.
    pub const fn number(self) -> u8 {
        self.0
    }
}

impl fmt::Display for DevFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.device(), self.function())
    }
}

/// Why a function could not be made or put on the bus. All are mistakes of the machine's builder, none the
/// guest's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// Another function is there.
    #[error("PCI slot {0} is taken")]
    SlotTaken(DevFn),
    /// No device number is free.
    #[error("no PCI slot is free")]
    NoSlot,
    /// The function was put on a bus before.
    #[error("the PCI function for slot {0} is on a bus already")]
    AlreadyAttached(DevFn),
    /// A BAR's number, size or kind is impossible.
    #[error("BAR {index}: {reason}")]
    BadBar {
        /// The BAR's number.
        index: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Configuration space has no room for a capability.
    #[error("configuration space has no room for capability {id:#04x} of {len} bytes")]
    NoRoom {
        /// The capability's identifier.
        id: u8,
        /// Its length in bytes, header included.
        len: usize,
    },
    /// A window has no room for a BAR.
    #[error("no window has room for a BAR of {size:#x} bytes")]
    WindowFull {
        /// The BAR's size in bytes.
        size: u64,
    },
    /// The number of MSI-X vectors is 0 or above 2048.
    #[error("{0} MSI-X vectors are not 1 to 2048")]
    BadVectorCount(u16),
}

/// A device function on a PCI bus.
///
/// Accesses come with `offset + data.len() <= 4096` and never cross a dword.
pub trait PciDevice: Device {
    /// The function's configuration space, BARs and interrupts.
    fn function(&self) -> &PciFunction;

    /// A configuration read.
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.function().config_read(offset, data);
    }

    /// A configuration write.
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.function().config_write(offset, data);
    }
}

#[cfg(test)]
mod tests;
