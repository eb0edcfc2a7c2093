//! BARs: what lies behind them, and their place on the buses.

use crate::Windows;
use bus::{MmioBus, PioBus};
use device::{MmioDevice, PioDevice};
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;

/// What kind of address a BAR holds (7.5.1.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Memory below 4 GiB.
    Memory32 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere; takes two BAR registers.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// I/O ports.
    Io,
}

impl BarKind {
    /// The read-only low bits of the register.
    pub(crate) fn type_bits(self) -> u32 {
        match self {
            Self::Memory32 { prefetchable } => u32::from(prefetchable) << 3,
            Self::Memory64 { prefetchable } => 0b100 | u32::from(prefetchable) << 3,
            Self::Io => 0b01,
        }
    }
}

/// What answers to accesses through a BAR.
#[derive(Clone)]
pub enum BarHandler {
    /// Behind a memory BAR.
    Memory(Arc<dyn MmioDevice>),
    /// Behind an I/O BAR.
    Io(Arc<dyn PioDevice>),
}

impl fmt::Debug for BarHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory(_) => "Memory",
            Self::Io(_) => "Io",
        })
    }
}

struct Placement {
    kind: BarKind,
    size: u64,
    handler: BarHandler,
    /// Where the function's registers say it is; `None` while it does not answer.
    wanted: Option<u64>,
    /// Where it stands on the bus. Unlike `wanted` only when something else is in the way.
    mapped: Option<u64>,
}

/// Keeps the BARs of all functions of a bus on the system's buses. A BAR that lies outside the windows, or
/// on top of something else, stays unmapped; when what was in its way goes, it takes its place.
pub struct BarMapper {
    mmio: Arc<MmioBus>,
    pio: Arc<PioBus>,
    windows: Windows,
    placements: Mutex<Vec<Placement>>,
}

/// Names a BAR to its [`BarMapper`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BarId(usize);

impl BarMapper {
    /// A mapper onto these buses, inside `windows`.
    pub fn new(mmio: Arc<MmioBus>, pio: Arc<PioBus>, windows: Windows) -> Self {
        Self { mmio, pio, windows, placements: Mutex::new(Vec::new()) }
    }

    pub(crate) fn register(&self, kind: BarKind, size: u64, handler: BarHandler) -> BarId {
        let mut placements = self.placements.lock();
        placements.push(Placement { kind, size, handler, wanted: None, mapped: None });
        BarId(placements.len() - 1)
    }

    /// The BAR is to be at `address`, or nowhere.
    pub(crate) fn place(&self, id: BarId, address: Option<u64>) {
        let mut placements = self.placements.lock();
        let placement = &mut placements[id.0];
        if placement.wanted == address {
            return;
        }
        placement.wanted = address;
        let freed = placement.mapped.take();
        if let Some(old) = freed {
            self.unmap(placement.kind, old);
        }
        self.map(placement);
        if freed.is_some() {
            for placement in placements.iter_mut().filter(|placement| placement.mapped.is_none()) {
                self.map(placement);
            }
        }
    }

    /// Where the BAR stands on its bus now.
    pub(crate) fn mapped(&self, id: BarId) -> Option<u64> {
        self.placements.lock()[id.0].mapped
    }

    fn unmap(&self, kind: BarKind, start: u64) {
        match kind {
            BarKind::Io => self.pio.unmap(start as u16),
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => self.mmio.unmap(start),
        };
    }

    fn map(&self, placement: &mut Placement) {
        let Some(start) = placement.wanted else { return };
        if !self.windows.contain(placement.kind, start, placement.size) {
            return;
        }
        let result = match &placement.handler {
            BarHandler::Memory(device) => self.mmio.map(start, placement.size, device.clone()),
            BarHandler::Io(device) => match (u16::try_from(start), u16::try_from(placement.size)) {
                (Ok(first), Ok(count)) => self.pio.map(first, count, device.clone()),
                _ => return,
            },
        };
        match result {
            Ok(()) => placement.mapped = Some(start),
            Err(error) => tracing::debug!("a BAR stays unmapped: {error}"),
        }
    }
}

impl fmt::Debug for BarMapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BarMapper").field("windows", &self.windows).finish_non_exhaustive()
    }
}
