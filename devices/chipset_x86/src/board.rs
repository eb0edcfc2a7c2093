//! The interrupt wiring of the board: from the devices' lines to the PIC and the I/O APIC.

use crate::hpet::HpetWiring;
use crate::ioapic::IOAPIC_PINS;
use irq::{IrqLine, IrqSink};
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;

/// The I/O APIC's input that ISA interrupt 0, the timer, is wired to. The ACPI tables have to say so in an
/// interrupt source override.
pub const TIMER_GSI: u32 = 2;
/// The first of the eight inputs for PCI's `INTx#`.
pub const PCI_GSI_BASE: u32 = 16;

/// The PIC's inputs that those eight are wired to as well, for guests that do not use the I/O APIC.
pub const PCI_PIC_IRQS: [u32; 8] = [10, 11, 10, 11, 10, 11, 10, 11];

/// The inputs that the HPET's timers can be routed to. They are also PCI's, which leaves the guest to choose
/// one that no PCI device uses.
pub const HPET_ROUTES: [u32; 4] = [20, 21, 22, 23];

/// The real-time clock's ISA interrupt.
const RTC_IRQ: u32 = 8;
/// Inputs of the board that are not global system interrupts: the devices that the HPET can displace.
const PIT_INPUT: u32 = 0x100;
const RTC_INPUT: u32 = 0x101;

/// One global system interrupt.
struct Wire {
    /// How many lines drive it high. Its lock orders what the controllers hear.
    drivers: Mutex<u32>,
    /// The PIC's input it also leads to.
    pic_input: Option<u32>,
}

#[derive(Debug, Default)]
struct Displaced {
    /// The HPET has taken the timer's and the real-time clock's interrupts.
    displaced: bool,
    pit_level: bool,
    rtc_level: bool,
}

/// The board. It is an [`IrqSink`] whose inputs are global system interrupts; any number of lines may drive
/// one of them, which is high while one of the lines is. (A line must be low before it is dropped.)
///
/// Interrupts go to the PIC and the I/O APIC both, as on every PC: the guest masks one of them.
pub struct Board {
    pic: Arc<dyn IrqSink>,
    ioapic: Arc<dyn IrqSink>,
    wires: Vec<Wire>,
    /// How many wires drive each of the PIC's inputs high.
    pic_drivers: [Mutex<u32>; 16],
    displaced: Mutex<Displaced>,
}

impl Board {
    /// The wiring to these controllers.
    pub fn new(pic: Arc<dyn IrqSink>, ioapic: Arc<dyn IrqSink>) -> Arc<Self> {
        let wire = |gsi: u32| Wire {
            drivers: Mutex::new(0),
            pic_input: match gsi {
                TIMER_GSI => Some(0),
                1 | 3..PCI_GSI_BASE => Some(gsi),
                PCI_GSI_BASE.. => PCI_PIC_IRQS.get((gsi - PCI_GSI_BASE) as usize).copied(),
                _ => None,
            },
        };
        Arc::new(Self {
            pic,
            ioapic,
            wires: (0..IOAPIC_PINS).map(wire).collect(),
            pic_drivers: Default::default(),
            displaced: Mutex::default(),
        })
    }

    /// A line of its own to global system interrupt `gsi`: an input of the I/O APIC, 0 to 23.
    pub fn gsi_line(self: &Arc<Self>, gsi: u32) -> IrqLine {
        IrqLine::new(self.clone(), gsi)
    }

    /// A line of its own to ISA interrupt `irq`, 0 to 15.
    pub fn isa_line(self: &Arc<Self>, irq: u32) -> IrqLine {
        self.gsi_line(isa_gsi(irq))
    }

    /// The line of the PIT's channel 0, which the HPET can displace.
    pub fn pit_line(self: &Arc<Self>) -> IrqLine {
        IrqLine::new(self.clone(), PIT_INPUT)
    }

    /// The line of the real-time clock, which the HPET can displace.
    pub fn rtc_line(self: &Arc<Self>) -> IrqLine {
        IrqLine::new(self.clone(), RTC_INPUT)
    }

    /// Takes the PIT and the real-time clock off their interrupts (`true`), for the HPET's "legacy
    /// replacement", or puts them back.
    pub fn set_legacy_replacement(&self, displaced: bool) {
        let mut state = self.displaced.lock();
        if std::mem::replace(&mut state.displaced, displaced) != displaced {
            if state.pit_level {
                self.drive(TIMER_GSI, !displaced);
            }
            if state.rtc_level {
                self.drive(RTC_IRQ, !displaced);
            }
        }
    }

    /// Wires an HPET up: its legacy interrupts, and the I/O APIC's inputs of [`HPET_ROUTES`].
    pub fn hpet_wiring(self: &Arc<Self>) -> HpetWiring {
        let board = self.clone();
        HpetWiring {
            legacy: [self.isa_line(0), self.isa_line(RTC_IRQ)],
            routes: HPET_ROUTES.map(|gsi| (gsi, self.gsi_line(gsi))).into(),
            set_legacy_replacement: Box::new(move |on| board.set_legacy_replacement(on)),
            messages: None,
        }
    }

    fn drive(&self, gsi: u32, level: bool) {
        let Some(wire) = self.wires.get(gsi as usize) else { return };
        let mut drivers = wire.drivers.lock();
        if count(&mut drivers, level) {
            if let Some(input) = wire.pic_input {
                let mut pic_drivers = self.pic_drivers[input as usize].lock();
                if count(&mut pic_drivers, level) {
                    self.pic.set_level(input, level);
                }
            }
            self.ioapic.set_level(gsi, level);
        }
    }
}

/// Counts a driver that has come to `level`; says whether that changes the level of what is driven.
fn count(drivers: &mut u32, level: bool) -> bool {
    let before = *drivers;
    *drivers = if level { before.saturating_add(1) } else { before.saturating_sub(1) };
    (before == 0) != (*drivers == 0)
}

/// The global system interrupt that ISA interrupt `irq` is wired to.
pub fn isa_gsi(irq: u32) -> u32 {
    if irq == 0 { TIMER_GSI } else { irq }
}

impl IrqSink for Board {
    fn set_level(&self, pin: u32, level: bool) {
        if pin != PIT_INPUT && pin != RTC_INPUT {
            return self.drive(pin, level);
        }
        let mut state = self.displaced.lock();
        let (remembered, gsi) = match pin {
            PIT_INPUT => (&mut state.pit_level, TIMER_GSI),
            _ => (&mut state.rtc_level, RTC_IRQ),
        };
        *remembered = level;
        if !state.displaced {
            self.drive(gsi, level);
        }
    }
}

impl fmt::Debug for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board").field("displaced", &self.displaced).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_bench::SignalLog;

    #[test]
    fn interrupts_reach_both_controllers() {
        let (pic, ioapic) = (SignalLog::new(), SignalLog::new());
        let board = Board::new(pic.clone(), ioapic.clone());
        board.isa_line(4).set(true);
        board.isa_line(0).set(true);
        board.gsi_line(PCI_GSI_BASE).set(true);
        board.gsi_line(99).set(true);
        board.gsi_line(PCI_GSI_BASE + 2).set(true);
        assert_eq!(pic.take(), [(4, true), (0, true), (10, true)]);
        assert_eq!(ioapic.take(), [(4, true), (2, true), (16, true), (18, true)]);
    }

    #[test]
    fn a_shared_interrupt_is_high_while_one_line_is() {
        let ioapic = SignalLog::new();
        let board = Board::new(SignalLog::new(), ioapic.clone());
        let (first, second) = (board.gsi_line(17), board.gsi_line(17));
        first.set(true);
        second.set(true);
        first.set(false);
        assert_eq!(ioapic.take(), [(17, true)]);
        second.set(false);
        assert_eq!(ioapic.take(), [(17, false)]);
    }

    #[test]
    fn the_hpet_displaces_timer_and_clock() {
        let pic = SignalLog::new();
        let board = Board::new(pic.clone(), SignalLog::new());
        let (pit, rtc) = (board.pit_line(), board.rtc_line());
        rtc.set(true);
        assert_eq!(pic.take(), [(8, true)]);
        board.set_legacy_replacement(true);
        assert_eq!(pic.take(), [(8, false)]);
        pit.pulse();
        assert!(pic.take().is_empty());
        board.isa_line(0).pulse();
        assert_eq!(pic.take(), [(0, true), (0, false)]);
        board.set_legacy_replacement(false);
        assert_eq!(pic.take(), [(8, true)]);
    }
}
