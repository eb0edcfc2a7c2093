//! The guest's physical memory as a boot loader tells of it, and finding room in it.

use std::ops::Range;

/// What a stretch of guest physical addresses is, with the type numbers of ACPI's address range types
/// (ACPI 6.5, table 15.4), which E820, PVH and multiboot share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RegionKind {
    /// RAM that the guest may use.
    Ram = 1,
    /// Not for the guest's use: firmware, memory-mapped configuration space.
    Reserved = 2,
    /// ACPI tables, which the guest may reuse once it has read them.
    AcpiReclaimable = 3,
    /// ACPI storage to keep across sleep.
    AcpiNvs = 4,
}

/// One stretch of the map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryRegion {
    /// The guest physical addresses.
    pub range: Range<u64>,
    /// What they are.
    pub kind: RegionKind,
}

/// Why a memory map isn't one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryMapError {
    /// A region without bytes.
    #[error("region {start:#x}..{end:#x} is empty")]
    Empty {
        /// Its start.
        start: u64,
        /// Its end.
        end: u64,
    },
    /// Two RAM regions, or two regions of different reserved kinds, share addresses.
    #[error("regions that start at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Start of one.
        first: u64,
        /// Start of the other.
        second: u64,
    },
}

/// Where the EBDA lies in a map made by [`MemoryMap::pc`]; conventional memory ends here.
pub const EBDA_START: u64 = 0x9_fc00;
/// Start of the firmware area of a map made by [`MemoryMap::pc`], where ACPI tables and SMBIOS go.
pub const FIRMWARE_START: u64 = 0xe_0000;
const MIB: u64 = 1 << 20;
pub(crate) const FOUR_GIB: u64 = 1 << 32;

/// The guest's physical memory: sorted regions without overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryMap {
    regions: Vec<MemoryRegion>,
}

impl MemoryMap {
    /// A map of `ram`, out of which `reserved` regions are cut.
    ///
    /// # Errors
    /// Regions that are empty or overlap others of their sort.
    pub fn new(ram: &[Range<u64>], reserved: &[MemoryRegion]) -> Result<Self, MemoryMapError> {
        let mut ram = ram.to_vec();
        ram.sort_by_key(|range| range.start);
        let mut regions: Vec<MemoryRegion> = reserved.to_vec();
        regions.sort_by_key(|region| region.range.start);
        for range in ram.iter().chain(regions.iter().map(|region| &region.range)) {
            if range.is_empty() {
                return Err(MemoryMapError::Empty { start: range.start, end: range.end });
            }
        }
        let overlap = |first: &Range<u64>, second: &Range<u64>| {
            (first.end > second.start)
                .then_some(MemoryMapError::Overlap { first: first.start, second: second.start })
        };
        if let Some(error) = ram
            .windows(2)
            .find_map(|pair| overlap(&pair[0], &pair[1]))
            .or_else(|| regions.windows(2).find_map(|pair| overlap(&pair[0].range, &pair[1].range)))
        {
            return Err(error);
        }
        let mut free = Placement { free: ram };
        for region in &regions {
            free.cut(&region.range);
        }
        regions.extend(free.free.into_iter().map(|range| MemoryRegion { range, kind: RegionKind::Ram }));
        regions.sort_by_key(|region| region.range.start);
        Ok(Self { regions })
    }

    /// The map of a PC: RAM from 0 to `low_end` except the EBDA and the hole from 640 KiB to 1 MiB, and
    /// `high_size` bytes from 4 GiB on. [`FIRMWARE_START`] to 1 MiB is reserved for tables; `reserved`
    /// names more, such as the PCI configuration space.
    ///
    /// # Errors
    /// As [`Self::new`]; `low_end` must be above 1 MiB.
    pub fn pc(low_end: u64, high_size: u64, reserved: &[MemoryRegion]) -> Result<Self, MemoryMapError> {
        let mut ram = vec![0..EBDA_START, MIB..low_end];
        if high_size > 0 {
            ram.push(FOUR_GIB..FOUR_GIB.saturating_add(high_size));
        }
        let mut all = vec![
            MemoryRegion { range: EBDA_START..0xa_0000, kind: RegionKind::Reserved },
            MemoryRegion { range: FIRMWARE_START..MIB, kind: RegionKind::Reserved },
        ];
        all.extend_from_slice(reserved);
        Self::new(&ram, &all)
    }

    /// The regions in order of their addresses.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// The stretches of RAM in order.
    pub fn ram(&self) -> impl Iterator<Item = &Range<u64>> {
        self.regions.iter().filter(|region| region.kind == RegionKind::Ram).map(|region| &region.range)
    }

    /// Everything free, for placing things.
    pub(crate) fn placement(&self) -> Placement {
        Placement { free: self.ram().cloned().collect() }
    }
}

/// Free RAM while a kernel and what belongs to it is being placed.
#[derive(Debug, Clone)]
pub(crate) struct Placement {
    free: Vec<Range<u64>>,
}

impl Placement {
    fn cut(&mut self, taken: &Range<u64>) {
        let free = std::mem::take(&mut self.free);
        for range in free {
            if range.end <= taken.start || range.start >= taken.end {
                self.free.push(range);
                continue;
            }
            if range.start < taken.start {
                self.free.push(range.start..taken.start);
            }
            if taken.end < range.end {
                self.free.push(taken.end..range.end);
            }
        }
    }

    /// Takes exactly `range`; false if some of it isn't free. An empty range is always free.
    pub(crate) fn take(&mut self, range: &Range<u64>) -> bool {
        if range.start > range.end {
            return false;
        }
        if range.start == range.end {
            return true;
        }
        let fits = self.free.iter().any(|free| free.start <= range.start && range.end <= free.end);
        if fits {
            self.cut(range);
        }
        fits
    }

    /// Takes `size` bytes at the lowest multiple of `align` (a power of two) within `bounds`.
    pub(crate) fn take_lowest(&mut self, size: u64, align: u64, bounds: &Range<u64>) -> Option<Range<u64>> {
        let found = self.free.iter().find_map(|free| {
            let start = free.start.max(bounds.start).checked_next_multiple_of(align)?;
            let end = start.checked_add(size)?;
            (end <= free.end.min(bounds.end)).then_some(start..end)
        })?;
        self.cut(&found);
        Some(found)
    }

    /// Takes `size` bytes at the highest multiple of `align` (a power of two) within `bounds`.
    pub(crate) fn take_highest(&mut self, size: u64, align: u64, bounds: &Range<u64>) -> Option<Range<u64>> {
        let found = self.free.iter().rev().find_map(|free| {
            let start = free.end.min(bounds.end).checked_sub(size)? & !(align - 1);
            (start >= free.start.max(bounds.start)).then(|| start..start + size)
        })?;
        self.cut(&found);
        Some(found)
    }

    /// Takes `size` bytes at one of the multiples of `align` (a power of two) within `bounds`, the one that
    /// `random` picks.
    pub(crate) fn take_any(
        &mut self,
        size: u64,
        align: u64,
        bounds: &Range<u64>,
        random: u64,
    ) -> Option<Range<u64>> {
        // The first place in each free stretch, and how many there are.
        let places = |free: &Range<u64>| {
            let start = free.start.max(bounds.start).checked_next_multiple_of(align)?;
            let room = free.end.min(bounds.end).checked_sub(start)?.checked_sub(size)?;
            Some((start, room / align + 1))
        };
        let all: Vec<(u64, u64)> = self.free.iter().filter_map(places).collect();
        let count = all.iter().map(|(_, count)| count).sum::<u64>();
        let mut index = random.checked_rem(count)?;
        for (start, count) in all {
            if index < count {
                let start = start + index * align;
                let found = start..start + size;
                self.cut(&found);
                return Some(found);
            }
            index -= count;
        }
        None
    }

    /// The length of the longest free stretch within `bounds`.
    pub(crate) fn longest(&self, bounds: &Range<u64>) -> u64 {
        let within =
            |free: &Range<u64>| free.end.min(bounds.end).saturating_sub(free.start.max(bounds.start));
        self.free.iter().map(within).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pc_has_its_holes() {
        let ecam = MemoryRegion { range: 0xb000_0000..0xc000_0000, kind: RegionKind::Reserved };
        let map = MemoryMap::pc(0x8000_0000, 0x4000_0000, std::slice::from_ref(&ecam)).unwrap();
        let seen: Vec<_> =
            map.regions().iter().map(|r| (r.range.start, r.range.end, r.kind as u32)).collect();
        assert_eq!(
            seen,
            [
                (0, 0x9_fc00, 1),
                (0x9_fc00, 0xa_0000, 2),
                (0xe_0000, 0x10_0000, 2),
                (0x10_0000, 0x8000_0000, 1),
                (0xb000_0000, 0xc000_0000, 2),
                (0x1_0000_0000, 0x1_4000_0000, 1),
            ]
        );
    }

    #[test]
    fn reserved_regions_are_cut_out_of_ram() {
        let tables = MemoryRegion { range: 0x5000..0x6000, kind: RegionKind::AcpiReclaimable };
        let map = MemoryMap::new(std::slice::from_ref(&(0..0x1_0000)), &[tables]).unwrap();
        let seen: Vec<_> = map.regions().iter().map(|r| (r.range.clone(), r.kind as u32)).collect();
        assert_eq!(seen, [(0..0x5000, 1), (0x5000..0x6000, 3), (0x6000..0x1_0000, 1)]);
    }

    #[test]
    fn nonsense_maps_are_refused() {
        assert_eq!(
            MemoryMap::new(&[0..0x2000, 0x1000..0x3000], &[]),
            Err(MemoryMapError::Overlap { first: 0, second: 0x1000 })
        );
        assert_eq!(MemoryMap::pc(1 << 20, 0, &[]), Err(MemoryMapError::Empty { start: MIB, end: MIB }));
    }

    #[test]
    fn room_is_found_from_either_end() {
        let mut room = Placement { free: vec![0x1000..0x4000, 0x8000..0x9800] };
        assert_eq!(room.longest(&(0..u64::MAX)), 0x3000);
        assert_eq!(room.take_highest(0x1000, 0x1000, &(0..u64::MAX)), Some(0x8000..0x9000));
        assert_eq!(room.take_highest(0x1000, 0x1000, &(0..u64::MAX)), Some(0x3000..0x4000));
        assert_eq!(room.take_lowest(0x800, 0x800, &(0x1001..u64::MAX)), Some(0x1800..0x2000));
        assert_eq!(room.take_lowest(0x4000, 1, &(0..u64::MAX)), None);
        assert!(!room.take(&(0x1700..0x1900)));
        assert!(room.take(&(0x1100..0x1200)));
        assert!(!room.take(&(0x1100..0x1200)));
    }
}
