//! The I/O APIC.
#![no_main]

use chipset_x86::IoApic;
use chipset_x86::addresses::{IOAPIC_ADDRESS, IOAPIC_LEN};
use irq::IrqSink;
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vireo_fuzz::{Bench, Input, Rig, drive};

struct Target {
    rig: Rig,
    ioapic: Arc<IoApic>,
}

impl Bench for Target {
    fn new() -> Self {
        let mut rig = Rig::new();
        let ioapic = IoApic::new(rig.outside.clone());
        rig.map_memory(IOAPIC_ADDRESS, IOAPIC_LEN, ioapic.clone());
        rig.add_window(IOAPIC_ADDRESS, 1);
        rig.add_window(IOAPIC_ADDRESS + 0x10, 1);
        rig.add_device(ioapic.clone());
        Self { rig, ioapic }
    }

    fn rig(&self) -> &Rig {
        &self.rig
    }

    fn special(&self, input: &mut Input<'_>) {
        match input.u8() % 4 {
            0 => self.ioapic.end_of_interrupt(input.u8()),
            1 => {
                // A redirection entry.
                let register = 0x10 + u32::from(input.u8() % 0x30);
                self.rig.memory.write(IOAPIC_ADDRESS, &register.to_le_bytes());
                self.rig.memory.write(IOAPIC_ADDRESS + 0x10, &input.u32().to_le_bytes());
            }
            _ => self.ioapic.set_level(u32::from(input.u8() % 26), input.flag()),
        }
        for message in self.rig.outside.take_messages() {
            assert_eq!(message.address >> 20, 0xfee, "{message:x?} is no interrupt");
            assert!(message.data & 0x8000 == 0 || self.ioapic.is_level_vector(message.data as u8));
        }
    }
}

fuzz_target!(|data: &[u8]| drive::<Target>(data));
