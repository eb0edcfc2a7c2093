//! The keyboard controller, its keyboard and its mouse.
#![no_main]

use chipset_x86::{A20Gate, I8042, I8042Config};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vireo_fuzz::{Bench, Input, Rig, drive};

struct Target<const KEYBOARD: bool> {
    rig: Rig,
    i8042: Arc<I8042>,
}

impl<const KEYBOARD: bool> Bench for Target<KEYBOARD> {
    fn new() -> Self {
        let mut rig = Rig::new();
        let config = I8042Config { keyboard: KEYBOARD, mouse: true };
        let lines = [I8042::KEYBOARD_IRQ, I8042::MOUSE_IRQ].map(|pin| rig.outside.line(pin));
        let [keyboard, mouse] = lines;
        let i8042 = I8042::new(config, keyboard, mouse, rig.outside.clone(), A20Gate::new());
        rig.add_ports(i8042.port_regions());
        rig.add_device(i8042.clone());
        Self { rig, i8042 }
    }

    fn rig(&self) -> &Rig {
        &self.rig
    }

    fn special(&self, input: &mut Input<'_>) {
        if input.flag() {
            self.i8042.key(input.u8(), input.flag(), input.flag());
        } else {
            let moves = [(); 3].map(|()| input.number() as i32);
            self.i8042.mouse(moves[0], moves[1], moves[2], input.u8());
        }
    }
}

fuzz_target!(|data: &[u8]| match data.split_first() {
    Some((kind, data)) if kind.is_multiple_of(4) => drive::<Target<false>>(data),
    Some((_, data)) => drive::<Target<true>>(data),
    None => {}
});
