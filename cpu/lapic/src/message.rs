//! Interrupt messages on the bus between the local APICs.

use irq::MsiMessage;

/// What an interrupt message does at its destination (Intel SDM volume 3, 11.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeliveryMode {
    /// To all destinations.
    Fixed,
    /// To the one destination that does the least important work.
    LowestPriority,
    /// System management interrupt. Nobody here has a system management mode: ignored.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI.
    StartUp,
    /// An interrupt whose vector the 8259 pair supplies.
    ExtInt,
}

impl DeliveryMode {
    /// From the three bits of registers and messages; one code is reserved.
    pub fn from_bits(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => return None,
        })
    }
}

/// Whom an interrupt message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Destination {
    /// Every local APIC.
    All,
    /// Every local APIC but this one.
    AllBut(u32),
    /// The local APICs with this id, which a guest may have changed.
    Physical(u32),
    /// The local APIC that had this id at power-on.
    Only(u32),
    /// The local APICs whose logical id matches: 8 bits against those in xAPIC mode, 32 bits against those
    /// in x2APIC mode.
    Logical(u32),
}

/// An interrupt message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Message {
    /// Whom it is for.
    pub destination: Destination,
    /// What it does.
    pub mode: DeliveryMode,
    /// The vector, where the mode has one.
    pub vector: u8,
    /// Whether the interrupt is level-triggered: its end is then told to the I/O APIC.
    pub level_triggered: bool,
}

impl Message {
    /// From a write to the interrupt address range (Intel SDM volume 3, 11.11). `None` if the address is
    /// not in it or the delivery mode is reserved.
    pub fn from_msi(msi: MsiMessage) -> Option<Self> {
        if msi.address >> 20 != 0xfee {
            return None;
        }
        let id = (msi.address >> 12 & 0xff) as u32;
        let logical = msi.address & 1 << 2 != 0;
        let redirected = msi.address & 1 << 3 != 0;
        let mode = match DeliveryMode::from_bits(msi.data >> 8)? {
            // The redirection hint asks for one destination of those that the logical id names.
            DeliveryMode::Fixed if redirected && logical => DeliveryMode::LowestPriority,
            mode => mode,
        };
        Some(Self {
            destination: Self::xapic_destination(id, logical),
            mode,
            vector: msi.data as u8,
            level_triggered: msi.data & 1 << 15 != 0,
        })
    }

    /// The destination that an 8-bit id means.
    pub(crate) fn xapic_destination(id: u32, logical: bool) -> Destination {
        match (id, logical) {
            (0xff, _) => Destination::All,
            (id, false) => Destination::Physical(id),
            (id, true) => Destination::Logical(id),
        }
    }

    /// The destination that a 32-bit id means.
    pub(crate) fn x2apic_destination(id: u32, logical: bool) -> Destination {
        match (id, logical) {
            (u32::MAX, _) => Destination::All,
            (id, false) => Destination::Physical(id),
            (id, true) => Destination::Logical(id),
        }
    }
}
