//! Guest memory as the spec wants it, for every machine type.

use crate::numa::NumaNodes;
use crate::{MachineError, MachineSpec};
use acpi::Numa;
use guest_memory::{GuestMemory, MemoryOptions, MemorySource, PAGE_SIZE, PreallocProgress};
use std::ops::Range;

/// Where memory is to be, of what, and near which vCPUs: checked, and not allocated.
#[derive(Debug)]
pub(crate) struct RamPlan {
    regions: Vec<Range<u64>>,
    options: MemoryOptions,
    numa: Option<NumaNodes>,
}

impl RamPlan {
    /// The plan for a machine that has its memory at `regions`.
    pub(crate) fn new(spec: &MachineSpec, regions: Vec<Range<u64>>) -> Result<Self, MachineError> {
        let mut options = spec.host.memory.clone();
        let page = match options.source {
            MemorySource::HugePages(size) => size,
            MemorySource::Anonymous | MemorySource::File(_) => PAGE_SIZE,
        };
        let numa = NumaNodes::new(&spec.numa, spec.vcpus, spec.memory, page)?;
        if let Some(numa) = &numa {
            options.bindings = numa.bindings(&regions);
        }
        Ok(Self { regions, options, numa })
    }

    /// What the guest is told of its NUMA nodes.
    pub(crate) fn numa(&self) -> Option<Numa> {
        self.numa.as_ref().map(|numa| numa.acpi(&self.regions))
    }

    /// How many vCPUs a socket has.
    pub(crate) fn socket_vcpus(&self) -> u32 {
        self.numa.as_ref().map_or(u32::MAX, NumaNodes::socket_vcpus)
    }

    /// The memory, with a region for firmware if that needs one. `progress` is told of what is allocated in
    /// advance.
    pub(crate) fn allocate(
        &self,
        rom: Option<Range<u64>>,
        progress: PreallocProgress<'_>,
    ) -> Result<GuestMemory, MachineError> {
        let regions: Vec<_> = self.regions.iter().cloned().chain(rom).collect();
        Ok(GuestMemory::with_options(&regions, &self.options, progress)?)
    }
}
