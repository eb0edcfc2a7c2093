//! The virtio entropy device.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vireo_fuzz::{Driven, Input, Request, drive_virtio};
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

    fn request(&self, _queue: u16, input: &mut Input<'_>) -> Request {
        let readable = if input.one_in(8) { vec![1] } else { Vec::new() };
        Request { readable, writable: input.below(0x2000) as usize }
    }
}

fuzz_target!(|data: &[u8]| drive_virtio::<Target>(data));
