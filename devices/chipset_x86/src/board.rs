//! The interrupt wiring of the board: from the devices' lines to the PIC and the I/O APIC.

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
/// ISA interrupts go to the PIC and the I/O APIC both, as on every PC: the guest masks one of them.
pub struct Board {
    pic: Arc<dyn IrqSink>,
    ioapic: Arc<dyn IrqSink>,
    wires: Vec<Wire>,
    displaced: Mutex<Displaced>,
}

impl Board {
    /// The wiring to these controllers.
    pub fn new(pic: Arc<dyn IrqSink>, ioapic: Arc<dyn IrqSink>) -> Arc<Self> {
        let wire = |gsi: u32| Wire {
            drivers: Mutex::new(0),
            pic_input: match gsi {
                TIMER_GSI => Some(0),
                1 | 3..16 => Some(gsi),
                _ => None,
            },
        };
        Arc::new(Self {
            pic,
            ioapic,
            wires: (0..IOAPIC_PINS).map(wire).collect(),
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

    fn drive(&self, gsi: u32, level: bool) {
        let Some(wire) = self.wires.get(gsi as usize) else { return };
        let mut drivers = wire.drivers.lock();
        let before = *drivers;
        *drivers = if level { before.saturating_add(1) } else { before.saturating_sub(1) };
        if (before == 0) != (*drivers == 0) {
            if let Some(input) = wire.pic_input {
                self.pic.set_level(input, level);
            }
            self.ioapic.set_level(gsi, level);
        }
    }
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
    fn isa_interrupts_reach_both_controllers_and_pci_only_one() {
        let (pic, ioapic) = (SignalLog::new(), SignalLog::new());
        let board = Board::new(pic.clone(), ioapic.clone());
        board.isa_line(4).set(true);
        board.isa_line(0).set(true);
        board.gsi_line(PCI_GSI_BASE).set(true);
        board.gsi_line(99).set(true);
        assert_eq!(pic.take(), [(4, true), (0, true)]);
        assert_eq!(ioapic.take(), [(4, true), (2, true), (16, true)]);
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
