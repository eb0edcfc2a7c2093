//! What the firmware configuration device says of a machine.

use crate::assembly::Assembly;
use crate::{MachineError, MachineSpec};
use fw_cfg::{DMA_PORT, DMA_PORT_COUNT, FwCfg, Items, SELECTOR_PORT, SELECTOR_PORT_COUNT, key};
use guest_memory::GuestMemory;

/// Adds the device.
pub(super) fn add(
    assembly: &mut Assembly,
    spec: &MachineSpec,
    memory: &GuestMemory,
) -> Result<(), MachineError> {
    // There are at most MAX_VCPUS.
    let vcpus = spec.vcpus as u16;
    let items = Items::new()
        .u64(key::RAM_SIZE, spec.memory)
        .u16(key::NOGRAPHIC, 1)
        .u16(key::NB_CPUS, vcpus)
        .u16(key::MAX_CPUS, vcpus);
    let device = FwCfg::new(items, memory.clone());
    assembly.map_ports(SELECTOR_PORT, SELECTOR_PORT_COUNT, device.selector())?;
    assembly.map_ports(DMA_PORT, DMA_PORT_COUNT, device.dma())?;
    assembly.add(device);
    Ok(())
}
