//! The UART itself: registers, FIFOs, interrupt conditions. No host in here.

use crate::registers::*;
use crate::{ModemInputs, Serial};
use device::StateError;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// How many characters each FIFO holds.
pub const FIFO_LEN: usize = 16;

/// What an access asks of the host side.
#[derive(Debug, Default)]
pub(crate) struct Effects {
    /// The transmitter has bytes.
    pub(crate) transmit: bool,
    /// Data terminal ready and request to send have changed to these levels.
    pub(crate) modem_outputs: Option<(bool, bool)>,
    /// The break condition was switched.
    pub(crate) send_break: Option<bool>,
}

/// The guest-visible state.
#[derive(Debug, Clone)]
pub(crate) struct UartState {
    divisor: u16,
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    /// The levels of the modem's outputs, as the high half of the modem status register.
    modem_inputs: u8,
    /// The changes of the modem's outputs since the guest last looked.
    modem_deltas: u8,
    overrun: bool,
    /// The character at the receiver's head carries a break that the guest has not seen yet.
    break_unseen: bool,
    /// The transmitter became empty and the guest has not taken note.
    transmitter_interrupt: bool,
    /// Received characters with whether they are breaks.
    receiver: VecDeque<(u8, bool)>,
    transmitter: VecDeque<u8>,
}

/// [`UartState`] as it stands in a saved state.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SavedUart {
    divisor: u16,
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    modem_inputs: u8,
    modem_deltas: u8,
    overrun: bool,
    break_unseen: bool,
    transmitter_interrupt: bool,
    receiver: Vec<(u8, bool)>,
    transmitter: Vec<u8>,
}

impl UartState {
    pub(crate) fn new() -> Self {
        let mut state = Self {
            divisor: 12, // 9600 baud; the data sheet leaves it undefined
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0,
            modem_control: 0,
            scratch: 0,
            modem_inputs: 0,
            modem_deltas: 0,
            overrun: false,
            break_unseen: false,
            transmitter_interrupt: false,
            receiver: VecDeque::with_capacity(FIFO_LEN),
            transmitter: VecDeque::with_capacity(FIFO_LEN),
        };
        state.set_modem_inputs(ModemInputs::default());
        state.modem_deltas = 0;
        state
    }

    /// A master reset. The modem is outside and keeps its levels.
    pub(crate) fn reset(&mut self) {
        *self = Self { modem_inputs: self.modem_inputs, ..Self::new() };
    }

    fn fifos_enabled(&self) -> bool {
        self.fifo_control & FCR_ENABLE != 0
    }

    fn capacity(&self) -> usize {
        if self.fifos_enabled() { FIFO_LEN } else { 1 }
    }

    fn loopback(&self) -> bool {
        self.modem_control & MCR_LOOPBACK != 0
    }

    fn trigger_level(&self) -> usize {
        if self.fifos_enabled() { [1, 4, 8, 14][usize::from(self.fifo_control >> 6)] } else { 1 }
    }

    /// How many characters the receiver can take from outside.
    pub(crate) fn room(&self) -> usize {
        if self.loopback() { 0 } else { self.capacity().saturating_sub(self.receiver.len()) }
    }

    pub(crate) fn receive(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.room());
        self.receiver.extend(bytes[..count].iter().map(|&byte| (byte, false)));
        count
    }

    pub(crate) fn receive_break(&mut self) -> bool {
        let room = self.room() > 0;
        if room {
            self.push_received(0, true);
        }
        room
    }

    fn push_received(&mut self, byte: u8, is_break: bool) {
        if self.receiver.len() >= self.capacity() {
            // Without FIFOs the new character takes the old one's place; with them it is lost.
            self.overrun = true;
            if self.fifos_enabled() {
                return;
            }
            self.receiver.clear();
        }
        if self.receiver.is_empty() {
            self.break_unseen = is_break;
        }
        self.receiver.push_back((byte, is_break));
    }

    pub(crate) fn set_modem_inputs(&mut self, inputs: ModemInputs) {
        let level = |on: bool, bit: u8| if on { bit } else { 0 };
        let levels = level(inputs.clear_to_send, MSR_CTS)
            | level(inputs.data_set_ready, MSR_DSR)
            | level(inputs.ring, MSR_RING)
            | level(inputs.carrier_detect, MSR_DCD);
        self.change_modem_status(|state| state.modem_inputs = levels);
    }

    /// The high half of the modem status register: the modem's outputs or, in loopback, our own.
    fn modem_levels(&self) -> u8 {
        if !self.loopback() {
            return self.modem_inputs;
        }
        let wires = [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RING), (MCR_OUT2, MSR_DCD)];
        wires.iter().filter(|(from, _)| self.modem_control & from != 0).fold(0, |levels, (_, to)| levels | to)
    }

    /// Does `change` and notes which of the modem status levels it changed.
    fn change_modem_status(&mut self, change: impl FnOnce(&mut Self)) {
        let before = self.modem_levels();
        change(self);
        let after = self.modem_levels();
        let changed = before ^ after;
        for (level, delta) in [(MSR_CTS, MSR_DELTA_CTS), (MSR_DSR, MSR_DELTA_DSR), (MSR_DCD, MSR_DELTA_DCD)] {
            if changed & level != 0 {
                self.modem_deltas |= delta;
            }
        }
        if before & !after & MSR_RING != 0 {
            self.modem_deltas |= MSR_TRAILING_RING;
        }
    }

    /// Copies the transmitter's bytes out; returns how many there are.
    pub(crate) fn transmitter_bytes(&self, bytes: &mut [u8; FIFO_LEN]) -> usize {
        for (to, from) in bytes.iter_mut().zip(&self.transmitter) {
            *to = *from;
        }
        self.transmitter.len().min(FIFO_LEN)
    }

    /// The first `count` bytes of the transmitter are gone.
    pub(crate) fn sent(&mut self, count: usize) {
        let count = count.min(self.transmitter.len());
        self.transmitter.drain(..count);
        if count > 0 && self.transmitter.is_empty() {
            self.transmitter_interrupt = true;
        }
    }

    /// The pending interrupt of the highest priority, as the low half of the IIR.
    fn interrupt(&self) -> u8 {
        let enabled = |bit: u8| self.interrupt_enable & bit != 0;
        if enabled(IER_LINE_STATUS) && (self.overrun || self.break_unseen) {
            IIR_LINE_STATUS
        } else if enabled(IER_RECEIVED) && self.receiver.len() >= self.trigger_level() {
            IIR_RECEIVED
        } else if enabled(IER_RECEIVED) && !self.receiver.is_empty() {
            IIR_TIMEOUT
        } else if enabled(IER_TRANSMITTER_EMPTY) && self.transmitter_interrupt {
            IIR_TRANSMITTER_EMPTY
        } else if enabled(IER_MODEM_STATUS) && self.modem_deltas != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    /// The level of the interrupt line: a PC lets the UART's interrupt through with OUT2, which loopback
    /// disconnects.
    pub(crate) fn interrupt_output(&self) -> bool {
        self.modem_control & (MCR_OUT2 | MCR_LOOPBACK) == MCR_OUT2 && self.interrupt() != IIR_NONE
    }

    fn dlab(&self) -> bool {
        self.line_control & LCR_DLAB != 0
    }

    /// The value of `register`, and effects if the read had any.
    pub(crate) fn read(&mut self, register: u16) -> (u8, Option<Effects>) {
        let effects = Some(Effects::default());
        match register {
            DATA if self.dlab() => (self.divisor as u8, None),
            DATA => {
                let (byte, _) = self.receiver.pop_front().unwrap_or((0, false));
                self.break_unseen = self.receiver.front().is_some_and(|(_, is_break)| *is_break);
                (byte, effects)
            }
            IER if self.dlab() => ((self.divisor >> 8) as u8, None),
            IER => (self.interrupt_enable, None),
            IIR_FCR => {
                let interrupt = self.interrupt();
                if interrupt == IIR_TRANSMITTER_EMPTY {
                    self.transmitter_interrupt = false;
                }
                (interrupt | if self.fifos_enabled() { IIR_FIFOS } else { 0 }, effects)
            }
            LCR => (self.line_control, None),
            MCR => (self.modem_control, None),
            LSR => {
                let status = self.line_status();
                self.overrun = false;
                self.break_unseen = false;
                (status, effects)
            }
            MSR => {
                let status = self.modem_levels() | self.modem_deltas;
                self.modem_deltas = 0;
                (status, effects)
            }
            SCR => (self.scratch, None),
            _ => (0xff, None),
        }
    }

    fn line_status(&self) -> u8 {
        let mut status = 0;
        if !self.receiver.is_empty() {
            status |= LSR_DATA_READY;
        }
        if self.overrun {
            status |= LSR_OVERRUN;
        }
        if self.break_unseen {
            status |= LSR_BREAK;
        }
        if self.transmitter.is_empty() {
            status |= LSR_TRANSMITTER_EMPTY | LSR_IDLE;
        }
        if self.fifos_enabled() && self.receiver.iter().any(|(_, is_break)| *is_break) {
            status |= LSR_FIFO_ERROR;
        }
        status
    }

    pub(crate) fn write(&mut self, register: u16, value: u8) -> Effects {
        let mut effects = Effects::default();
        match register {
            DATA if self.dlab() => self.divisor = self.divisor & 0xff00 | u16::from(value),
            DATA => effects.transmit = self.write_transmitter(value),
            IER if self.dlab() => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            IER => {
                let newly = value & !self.interrupt_enable;
                self.interrupt_enable = value & IER_MASK;
                if newly & IER_TRANSMITTER_EMPTY != 0 && self.transmitter.is_empty() {
                    self.transmitter_interrupt = true;
                }
            }
            IIR_FCR => self.write_fifo_control(value),
            LCR => {
                let changed = self.line_control ^ value;
                self.line_control = value;
                if changed & LCR_BREAK != 0 {
                    let on = value & LCR_BREAK != 0;
                    if !self.loopback() {
                        effects.send_break = Some(on);
                    } else if on {
                        self.push_received(0, true);
                    }
                }
            }
            MCR => {
                let before = self.modem_outputs();
                self.change_modem_status(|state| state.modem_control = value & MCR_MASK);
                let after = self.modem_outputs();
                effects.modem_outputs = (before != after).then_some(after);
                // What the transmitter still holds goes out when the wire is connected again.
                effects.transmit = !self.transmitter.is_empty();
            }
            SCR => self.scratch = value,
            _ => {} // LSR and MSR: factory tests only
        }
        effects
    }

    /// Data terminal ready and request to send as the modem sees them.
    fn modem_outputs(&self) -> (bool, bool) {
        let on = |bit| !self.loopback() && self.modem_control & bit != 0;
        (on(MCR_DTR), on(MCR_RTS))
    }

    /// Takes a character to send; says whether the host side is to fetch it.
    fn write_transmitter(&mut self, value: u8) -> bool {
        self.transmitter_interrupt = false;
        if self.loopback() {
            self.push_received(value, false);
            self.transmitter_interrupt = self.transmitter.is_empty();
            return false;
        }
        if self.transmitter.len() >= self.capacity() {
            // The guest did not wait for an empty transmitter; a full FIFO takes no more, and a lone
            // holding register is overwritten.
            if self.fifos_enabled() {
                return true;
            }
            self.transmitter.clear();
        }
        self.transmitter.push_back(value);
        true
    }

    fn write_fifo_control(&mut self, value: u8) {
        let switched = (value ^ self.fifo_control) & FCR_ENABLE != 0;
        if value & FCR_CLEAR_RECEIVER != 0 || switched {
            self.receiver.clear();
            self.break_unseen = false;
        }
        if value & FCR_CLEAR_TRANSMITTER != 0 || switched {
            if !self.transmitter.is_empty() {
                self.transmitter_interrupt = true;
            }
            self.transmitter.clear();
        }
        // The other bits take effect only together with the enable bit.
        self.fifo_control = if value & FCR_ENABLE != 0 { value & FCR_KEPT } else { 0 };
    }

    pub(crate) fn to_saved(&self) -> SavedUart {
        let Self {
            divisor,
            interrupt_enable,
            fifo_control,
            line_control,
            modem_control,
            scratch,
            modem_inputs,
            modem_deltas,
            overrun,
            break_unseen,
            transmitter_interrupt,
            receiver,
            transmitter,
        } = self.clone();
        SavedUart {
            divisor,
            interrupt_enable,
            fifo_control,
            line_control,
            modem_control,
            scratch,
            modem_inputs,
            modem_deltas,
            overrun,
            break_unseen,
            transmitter_interrupt,
            receiver: receiver.into(),
            transmitter: transmitter.into(),
        }
    }

    pub(crate) fn from_saved(saved: SavedUart) -> Result<Self, StateError> {
        let SavedUart {
            divisor,
            interrupt_enable,
            fifo_control,
            line_control,
            modem_control,
            scratch,
            modem_inputs,
            modem_deltas,
            overrun,
            break_unseen,
            transmitter_interrupt,
            receiver,
            transmitter,
        } = saved;
        let state = Self {
            divisor,
            interrupt_enable,
            fifo_control,
            line_control,
            modem_control,
            scratch,
            modem_inputs,
            modem_deltas,
            overrun,
            break_unseen,
            transmitter_interrupt,
            receiver: receiver.into(),
            transmitter: transmitter.into(),
        };
        let capacity = state.capacity();
        let sound = interrupt_enable & !IER_MASK == 0
            && fifo_control & !FCR_KEPT == 0
            && (fifo_control == 0 || state.fifos_enabled())
            && modem_control & !MCR_MASK == 0
            && modem_inputs & MSR_DELTAS == 0
            && modem_deltas & !MSR_DELTAS == 0
            && state.receiver.len() <= capacity
            && state.transmitter.len() <= capacity
            && (!break_unseen || state.receiver.front().is_some_and(|(_, is_break)| *is_break));
        if sound { Ok(state) } else { Err(StateError::malformed(Serial::KIND, "impossible register values")) }
    }
}
