//! The pair of 8259 interrupt controllers.
#![no_main]

use chipset_x86::Pic;
use irq::IrqSink;
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vireo_fuzz::{Bench, Input, Rig, drive};

struct Target {
    rig: Rig,
    pic: Arc<Pic>,
}

impl Bench for Target {
    fn new() -> Self {
        let mut rig = Rig::new();
        let pic = Pic::new(rig.outside.line(0));
        rig.add_ports(pic.port_regions());
        rig.add_device(pic.clone());
        Self { rig, pic }
    }

    fn rig(&self) -> &Rig {
        &self.rig
    }

    fn special(&self, input: &mut Input<'_>) {
        match input.u8() % 4 {
            0 => {
                let (pending, vector) = (self.pic.is_pending(), self.pic.acknowledge());
                assert!(pending || vector & 7 == 7, "vector {vector:#x} out of nowhere");
            }
            _ => self.pic.set_level(u32::from(input.u8() % 18), input.flag()),
        }
    }

    fn check(&self) {
        assert_eq!(self.rig.outside.level(0), self.pic.is_pending(), "INTR follows the state");
    }
}

fuzz_target!(|data: &[u8]| drive::<Target>(data));
