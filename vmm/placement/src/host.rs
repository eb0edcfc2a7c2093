//! The host's processors.

use crate::cpu_list::CpuList;
use crate::error::PlacementError;
use std::io;

/// The processors that are online.
pub(crate) fn online() -> Result<CpuList, PlacementError> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/online").map_err(PlacementError::HostCpus)?;
    text.trim().parse().map_err(|error| PlacementError::HostCpus(io::Error::other(error)))
}
