//! Where memory lies in a machine's physical address space.

use crate::{MAX_MEMORY, MIN_MEMORY, MachineError};
use boot::{MemoryMap, MemoryRegion, RegionKind};
use guest_memory::PAGE_SIZE;
use std::ops::Range;

/// Memory below 4 GiB ends here at the latest; above it are configuration space, BARs and the APICs.
const LOW_END: u64 = 0xc000_0000;
/// The rest of the memory starts here.
const HIGH_START: u64 = 1 << 32;

/// Where a PC's memory is.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    low: Range<u64>,
    high: Option<Range<u64>>,
}

impl Layout {
    /// The layout of `memory` bytes.
    pub(super) fn new(memory: u64) -> Result<Self, MachineError> {
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&memory) || !memory.is_multiple_of(PAGE_SIZE) {
            return Err(MachineError::MemorySize { bytes: memory, least: MIN_MEMORY, most: MAX_MEMORY });
        }
        let low = 0..memory.min(LOW_END);
        let high = (memory > LOW_END).then(|| HIGH_START..HIGH_START + (memory - LOW_END));
        Ok(Self { low, high })
    }

    /// All memory, in order.
    pub(super) fn regions(&self) -> Vec<Range<u64>> {
        std::iter::once(self.low.clone()).chain(self.high.clone()).collect()
    }

    /// Bytes of memory below 4 GiB.
    pub(super) fn low(&self) -> u64 {
        self.low.end
    }

    /// Bytes of memory above 4 GiB.
    pub(super) fn high(&self) -> u64 {
        self.high.as_ref().map_or(0, |high| high.end - high.start)
    }

    /// What the guest is told of its memory; `reserved` is what else it must not use.
    pub(super) fn map(&self, reserved: Option<Range<u64>>) -> Result<MemoryMap, MachineError> {
        let reserved: Vec<_> =
            reserved.map(|range| MemoryRegion { range, kind: RegionKind::Reserved }).into_iter().collect();
        MemoryMap::pc(self.low(), self.high(), &reserved)
            .map_err(|error| MachineError::Wiring(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_hole() {
        assert_eq!(Layout::new(1 << 30).unwrap().regions(), vec![0..1 << 30]);
        assert_eq!(Layout::new(4 << 30).unwrap().regions(), [0..LOW_END, HIGH_START..HIGH_START + (1 << 30)]);
        for memory in [0, 4096, MIN_MEMORY + 1, MAX_MEMORY + 4096] {
            assert!(Layout::new(memory).is_err(), "{memory}");
        }
    }
}
