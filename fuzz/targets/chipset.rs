//! The whole chipset, wired as a machine wires it.
#![no_main]

use chipset_x86::addresses::{HPET_ADDRESS, HPET_LEN, IOAPIC_ADDRESS, IOAPIC_LEN, SCI_GSI};
use chipset_x86::{
    A20Gate, Board, FastReset, Hpet, I8042, I8042Config, IoApic, Pic, Pit, Pm, PmConfig, Rtc, RtcConfig,
};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vireo_fuzz::{Bench, Input, Rig, drive};

struct Target {
    rig: Rig,
    pic: Arc<Pic>,
    ioapic: Arc<IoApic>,
    pm: Arc<Pm>,
    i8042: Arc<I8042>,
    pci_lines: Vec<irq::IrqLine>,
}

impl Bench for Target {
    fn new() -> Self {
        let mut rig = Rig::new();
        let pic = Pic::new(rig.outside.line(0));
        let ioapic = IoApic::new(rig.outside.clone());
        let board = Board::new(pic.clone(), ioapic.clone());
        let gate = A20Gate::new();
        let pit = Pit::new(&rig.timers, board.pit_line());
        let config = RtcConfig { seconds: 1_700_000_000, ..Default::default() };
        let rtc = Rtc::new(&config, &rig.timers, board.rtc_line());
        let hpet = Hpet::new(&rig.timers, board.hpet_wiring());
        let sci = board.gsi_line(SCI_GSI);
        let pm = Pm::new(PmConfig::default(), &rig.timers, sci, rig.outside.clone());
        let lines = [I8042::KEYBOARD_IRQ, I8042::MOUSE_IRQ].map(|irq| board.isa_line(irq));
        let [keyboard, mouse] = lines;
        let events = rig.outside.clone();
        let i8042 = I8042::new(I8042Config::default(), keyboard, mouse, events.clone(), gate.clone());
        let fast_reset = FastReset::new(events, gate);
        rig.add_ports(pic.port_regions());
        rig.add_ports(pit.port_regions());
        rig.add_ports(rtc.port_regions());
        rig.add_ports(pm.port_regions());
        rig.add_ports(i8042.port_regions());
        rig.add_ports(fast_reset.port_regions());
        rig.map_memory(IOAPIC_ADDRESS, IOAPIC_LEN, ioapic.clone());
        rig.map_memory(HPET_ADDRESS, HPET_LEN, hpet.clone());
        rig.add_window(IOAPIC_ADDRESS, 1);
        rig.add_window(IOAPIC_ADDRESS + 0x10, 1);
        rig.add_window(HPET_ADDRESS + 0x100, 0x60);
        rig.add_device(pic.clone());
        rig.add_device(ioapic.clone());
        rig.add_device(pit);
        rig.add_device(rtc);
        rig.add_device(hpet);
        rig.add_device(pm.clone());
        rig.add_device(i8042.clone());
        rig.add_device(fast_reset);
        let pci_lines = (16..24).map(|gsi| board.gsi_line(gsi)).collect();
        Self { rig, pic, ioapic, pm, i8042, pci_lines }
    }

    fn rig(&self) -> &Rig {
        &self.rig
    }

    fn special(&self, input: &mut Input<'_>) {
        match input.u8() % 6 {
            0 => drop(self.pic.acknowledge()),
            1 => self.ioapic.end_of_interrupt(input.u8()),
            2 => drop(self.i8042.key(input.u8(), input.flag(), input.flag())),
            3 => self.pm.press_power_button(),
            _ => self.pci_lines[usize::from(input.u8() % 8)].set(input.flag()),
        }
    }

    fn check(&self) {
        assert_eq!(self.rig.outside.level(0), self.pic.is_pending(), "INTR follows the state");
    }

    fn take_over(&self, old: &Self) {
        for (line, before) in self.pci_lines.iter().zip(&old.pci_lines) {
            line.set(before.level());
        }
    }
}

fuzz_target!(|data: &[u8]| drive::<Target>(data));
