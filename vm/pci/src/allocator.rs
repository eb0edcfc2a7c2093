//! Where BARs may lie, and who gets which part of it when the machine is built.

use crate::{BarKind, PciError};
use std::ops::Range;

/// The address ranges that the root complex forwards to its bus. BARs outside them are not reachable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Memory below 4 GiB.
    pub memory32: Range<u64>,
    /// Memory above 4 GiB; may be empty.
    pub memory64: Range<u64>,
    /// I/O ports; may be empty.
    pub io: Range<u64>,
}

impl Windows {
    /// Whether `len` bytes at `start` lie in one window for BARs of `kind`.
    pub fn contain(&self, kind: BarKind, start: u64, len: u64) -> bool {
        let inside = |window: &Range<u64>| {
            start >= window.start && start.checked_add(len).is_some_and(|end| end <= window.end)
        };
        match kind {
            BarKind::Io => inside(&self.io),
            BarKind::Memory32 { .. } => inside(&self.memory32),
            BarKind::Memory64 { .. } => inside(&self.memory32) || inside(&self.memory64),
        }
    }
}

/// Gives out addresses in the windows, as firmware would.
#[derive(Debug)]
pub struct Allocator {
    windows: Windows,
    taken: Vec<(bool, Range<u64>)>,
}

/// 64-bit BARs from this size on go above 4 GiB where there is a window: the space below is scarce.
const LARGE_BAR: u64 = 64 << 20;

impl Allocator {
    /// An allocator with all of `windows` free.
    pub fn new(windows: Windows) -> Self {
        Self { windows, taken: Vec::new() }
    }

    /// An address for a BAR, aligned to its size.
    ///
    /// # Errors
    /// [`PciError::WindowFull`] if no window has room.
    pub fn allocate(&mut self, kind: BarKind, size: u64) -> Result<u64, PciError> {
        let Windows { memory32, memory64, io } = self.windows.clone();
        let candidates = match kind {
            BarKind::Io => vec![io],
            BarKind::Memory32 { .. } => vec![memory32],
            BarKind::Memory64 { .. } if size >= LARGE_BAR => vec![memory64, memory32],
            BarKind::Memory64 { .. } => vec![memory32, memory64],
        };
        let is_io = kind == BarKind::Io;
        for window in candidates {
            if let Some(start) = self.first_fit(is_io, &window, size) {
                self.taken.push((is_io, start..start + size));
                return Ok(start);
            }
        }
        Err(PciError::WindowFull { size })
    }

    /// Gives back what [`Allocator::allocate`] returned.
    pub fn free(&mut self, kind: BarKind, start: u64) {
        self.taken.retain(|(io, range)| *io != (kind == BarKind::Io) || range.start != start);
    }

    fn first_fit(&self, io: bool, window: &Range<u64>, size: u64) -> Option<u64> {
        // Port or address 0 in a BAR means unassigned.
        let mut start = window.start.max(1).checked_next_multiple_of(size)?;
        loop {
            let end = start.checked_add(size)?;
            if end > window.end {
                return None;
            }
            let clash = self
                .taken
                .iter()
                .find(|(taken_io, range)| *taken_io == io && range.start < end && start < range.end);
            match clash {
                None => return Some(start),
                Some((_, range)) => start = range.end.checked_next_multiple_of(size)?,
            }
        }
    }
}
