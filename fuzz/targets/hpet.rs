//! The high precision event timer.
#![no_main]

use chipset_x86::addresses::{HPET_ADDRESS, HPET_LEN};
use chipset_x86::{Hpet, HpetWiring};
use libfuzzer_sys::fuzz_target;
use vireo_fuzz::{Bench, Rig, drive};

struct Target(Rig);

impl Bench for Target {
    fn new() -> Self {
        let mut rig = Rig::new();
        let wiring = HpetWiring {
            legacy: [rig.outside.line(0), rig.outside.line(8)],
            routes: (20..24).map(|input| (input, rig.outside.line(input))).collect(),
            set_legacy_replacement: Box::new(|_| {}),
            messages: Some(rig.outside.clone()),
        };
        let hpet = Hpet::new(&rig.timers, wiring);
        rig.map_memory(HPET_ADDRESS, HPET_LEN, hpet.clone());
        rig.add_window(HPET_ADDRESS + 0x100, 0x60);
        rig.add_window(HPET_ADDRESS + 0x10, 1);
        rig.add_device(hpet);
        Self(rig)
    }

    fn rig(&self) -> &Rig {
        &self.0
    }
}

fuzz_target!(|data: &[u8]| drive::<Target>(data));
