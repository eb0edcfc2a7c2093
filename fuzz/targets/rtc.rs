//! The real-time clock and its memory.
#![no_main]

use chipset_x86::addresses::RTC_PORTS;
use chipset_x86::{Rtc, RtcConfig};
use libfuzzer_sys::fuzz_target;
use vireo_fuzz::{Bench, Input, Rig, drive};

struct Target(Rig);

impl Bench for Target {
    fn new() -> Self {
        let mut rig = Rig::new();
        let config = RtcConfig { seconds: 1_700_000_000, memory_below_4g: 1 << 30, ..Default::default() };
        let rtc = Rtc::new(&config, &rig.timers, rig.outside.line(8));
        rig.add_ports(rtc.port_regions());
        rig.add_device(rtc);
        Self(rig)
    }

    fn rig(&self) -> &Rig {
        &self.0
    }

    fn special(&self, input: &mut Input<'_>) {
        // The clock's own registers are the first fourteen.
        let register = if input.flag() { input.u8() % 14 } else { 0x32 };
        self.0.ports.write(RTC_PORTS.0, &[register]);
        self.0.ports.write(RTC_PORTS.0 + 1, &[input.u8()]);
    }
}

fuzz_target!(|data: &[u8]| drive::<Target>(data));
