//! Reset control, port 92h, debug-exit, pvpanic, the debug console and POST codes.
#![no_main]

use chipset_x86::addresses::{DEBUG_CONSOLE_PORT, DEBUG_EXIT_PORT};
use chipset_x86::{A20Gate, DebugConsole, DebugExit, FastReset, PostCode, PowerEvent, Pvpanic, ResetControl};
use libfuzzer_sys::fuzz_target;
use vireo_fuzz::{Bench, Rig, drive};

struct Target(Rig);

impl Bench for Target {
    fn new() -> Self {
        let mut rig = Rig::new();
        let outside = rig.outside.clone();
        let reset = ResetControl::new(outside.clone());
        let fast_reset = FastReset::new(outside.clone(), A20Gate::new());
        let exit = DebugExit::new(DEBUG_EXIT_PORT, outside.clone());
        let pvpanic = Pvpanic::new(outside);
        let console = DebugConsole::new(DEBUG_CONSOLE_PORT, |bytes| assert!(!bytes.is_empty()));
        let post = PostCode::new();
        rig.add_ports(reset.port_regions());
        rig.add_ports(fast_reset.port_regions());
        rig.add_ports(exit.port_regions());
        rig.add_ports(pvpanic.port_regions());
        rig.add_ports(console.port_regions());
        rig.add_ports(post.port_regions());
        rig.add_device(reset);
        rig.add_device(fast_reset);
        rig.add_device(exit);
        rig.add_device(pvpanic);
        rig.add_device(console);
        rig.add_device(post);
        Self(rig)
    }

    fn rig(&self) -> &Rig {
        &self.0
    }

    fn check(&self) {
        for event in self.0.outside.take_events() {
            assert!(!matches!(event, PowerEvent::DebugExit(code) if code & 1 == 0));
        }
    }
}

fuzz_target!(|data: &[u8]| drive::<Target>(data));
