//! The virtio entropy device.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vireo_fuzz::{Driven, drive_virtio};
use virtio::VirtioDevice;
use virtio_rng::VirtioRng;

struct Target(Arc<VirtioRng>);

impl Driven for Target {
    fn new() -> Self {
        Self(Arc::new(VirtioRng::new()))
    }

    fn device(&self) -> Arc<dyn VirtioDevice> {
        self.0.clone()
    }
}

fuzz_target!(|data: &[u8]| drive_virtio::<Target>(data));
