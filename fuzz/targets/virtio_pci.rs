//! The virtio PCI transport, with a device that gives back what it is given.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vireo_fuzz::{Echoing, drive_virtio};

fuzz_target!(|data: &[u8]| drive_virtio::<Echoing>(data));
