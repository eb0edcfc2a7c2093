//! Data breakpoints (Intel SDM volume 3, 18.2). While one is armed, every data access takes the slow path and
//! is compared.

use crate::Core;

/// The breakpoints of DR7 that are enabled, locally or globally, and what each watches: bits 0..=1 as R/W
/// has it, and the length in bytes.
fn armed(dr7: u64) -> impl Iterator<Item = (usize, u64, u64)> {
    (0..4).filter_map(move |index| {
        let enabled = dr7 >> (2 * index) & 3 != 0;
        let kind = dr7 >> (16 + 4 * index) & 3;
        let len = [1, 2, 8, 4][(dr7 >> (18 + 4 * index) & 3) as usize];
        enabled.then_some((index, kind, len))
    })
}

/// Stores.
const WRITE: u64 = 1;
/// Loads and stores.
const ACCESS: u64 = 3;

/// Whether DR7 asks for data breakpoints.
pub(super) fn watches_data(dr7: u64) -> bool {
    dr7 & 0xff != 0 && armed(dr7).any(|(_, kind, _)| matches!(kind, WRITE | ACCESS))
}

impl Core<'_> {
    /// Notes the data breakpoints, and what else a debugger watches, that an access of `bytes` bytes at the linear
    /// address `va` meets.
    #[inline]
    pub(super) fn watch(&mut self, va: u64, bytes: usize, write: bool) {
        if self.cpu.watched {
            self.note_breakpoints(va, bytes as u64, write);
        }
        self.note_watches(va, bytes as u64, write);
    }

    #[cold]
    fn note_breakpoints(&mut self, va: u64, bytes: u64, write: bool) {
        for (index, kind, len) in armed(self.cpu.dr[7]) {
            let start = self.cpu.dr[index] & !(len - 1);
            // Either range begins in the other.
            let met = va.wrapping_sub(start) < len || start.wrapping_sub(va) < bytes;
            if met && (kind == ACCESS || (kind == WRITE && write)) {
                self.cpu.breakpoints_met |= 1 << index;
            }
        }
    }

    /// The data breakpoints met since this was last called, as bits of DR6; to be asked when an instruction is
    /// done, for a #DB, and forgotten if it faults.
    #[inline]
    pub fn take_data_breakpoints(&mut self) -> u64 {
        u64::from(std::mem::take(&mut self.cpu.breakpoints_met))
    }
}
