//! The 8254 interval timer and system control port B.
#![no_main]

use chipset_x86::Pit;
use libfuzzer_sys::fuzz_target;
use vireo_fuzz::{Bench, Rig, drive};

struct Target(Rig);

impl Bench for Target {
    fn new() -> Self {
        let mut rig = Rig::new();
        let pit = Pit::new(&rig.timers, rig.outside.line(0));
        rig.add_ports(pit.port_regions());
        rig.add_device(pit);
        Self(rig)
    }

    fn rig(&self) -> &Rig {
        &self.0
    }

    fn check(&self) {
        assert!(!self.0.outside.level(0), "interrupts are pulses");
    }
}

fuzz_target!(|data: &[u8]| drive::<Target>(data));
