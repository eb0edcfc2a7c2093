//! The virtio memory balloon.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vireo_fuzz::{Driven, Input, Request, drive_virtio};
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

    fn request(&self, queue: u16, input: &mut Input<'_>) -> Request {
        let mut readable = Vec::new();
        match queue {
            0 | 1 => {
                // Page numbers, from page 8 on: the rings lie below.
                for _ in 0..input.u8() % 40 {
                    let page = match input.u8() % 8 {
                        0 => input.u32(),
                        1 => (4 << 30 >> 12) + u32::from(input.u8() % 6),
                        _ => 8 + u32::from(input.u8() % 26),
                    };
                    readable.extend(page.to_le_bytes());
                }
                Request { readable, writable: 0 }
            }
            2 => {
                for _ in 0..input.u8() % 70 {
                    readable.extend(u16::from(input.u8() % 11).to_le_bytes());
                    readable.extend(input.number().to_le_bytes());
                }
                Request { readable, writable: 0 }
            }
            _ => Request { readable, writable: input.below(0x2000) as usize },
        }
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
