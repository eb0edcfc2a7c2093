//! The virtio memory balloon.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vireo_fuzz::{Driven, Input, drive_virtio};
use virtio::VirtioDevice;
use virtio_balloon::VirtioBalloon;

struct Target(Arc<VirtioBalloon>);

impl Driven for Target {
    fn new() -> Self {
        Self(Arc::new(VirtioBalloon::new()))
    }

    fn device(&self) -> Arc<dyn VirtioDevice> {
        self.0.clone()
    }

    fn host(&self, input: &mut Input<'_>) {
        if input.flag() {
            self.0.set_target(input.number());
        } else {
            self.0.request_stats();
        }
        let _ = (self.0.target(), self.0.actual(), self.0.stats());
    }
}

fuzz_target!(|data: &[u8]| drive_virtio::<Target>(data));
