//! ACPI power management.
#![no_main]

use chipset_x86::{Pm, PmConfig};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vireo_fuzz::{Bench, Input, Rig, drive};

struct Target<const BITS_32: bool> {
    rig: Rig,
    pm: Arc<Pm>,
}

impl<const BITS_32: bool> Bench for Target<BITS_32> {
    fn new() -> Self {
        let mut rig = Rig::new();
        let config = PmConfig { timer_32_bits: BITS_32, acpi_at_reset: !BITS_32 };
        let pm = Pm::new(config, &rig.timers, rig.outside.line(9), rig.outside.clone());
        rig.add_ports(pm.port_regions());
        rig.add_device(pm.clone());
        Self { rig, pm }
    }

    fn rig(&self) -> &Rig {
        &self.rig
    }

    fn special(&self, input: &mut Input<'_>) {
        match input.u8() % 3 {
            0 => self.pm.press_power_button(),
            1 => self.pm.press_sleep_button(),
            _ => self.pm.raise_gpe(input.u8()),
        }
    }
}

fuzz_target!(|data: &[u8]| match data.split_first() {
    Some((kind, data)) if kind.is_multiple_of(4) => drive::<Target<false>>(data),
    Some((_, data)) => drive::<Target<true>>(data),
    None => {}
});
