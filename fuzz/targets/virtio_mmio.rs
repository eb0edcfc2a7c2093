//! The virtio transport in memory-mapped registers, with a device that gives back what it is given.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo_fuzz::{Echoing, drive_virtio_mmio};

fuzz_target!(|data: &[u8]| drive_virtio_mmio::<Echoing>(data));
