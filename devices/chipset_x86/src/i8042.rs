//! The i8042 keyboard controller with a PS/2 keyboard and mouse.
//!
//! Guests reset the machine through it, and probe it early. Bytes take no time on the devices' wires; each
//! byte still interrupts on its own, since drivers read one per interrupt.

mod keyboard;
mod mouse;

use crate::ports::{PortRegion, PortSet, decode_checked, region, take_over};
use crate::{A20Gate, PowerEvent, PowerEvents};
use device::{Device, SavedState, StateError, encode};
use irq::{IrqLine, OrderedLine};
use keyboard::Keyboard;
use mouse::Mouse;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

/// The port of data.
pub const I8042_DATA_PORT: u16 = 0x60;
/// The port of commands and status.
pub const I8042_COMMAND_PORT: u16 = 0x64;

const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;
const STATUS_AUX: u8 = 0x20;
const STATUS_TIMEOUT: u8 = 0x40;

const MODE_KEYBOARD_INTERRUPT: u8 = 0x01;
const MODE_AUX_INTERRUPT: u8 = 0x02;
const MODE_SYSTEM: u8 = 0x04;
const MODE_KEYBOARD_OFF: u8 = 0x10;
const MODE_AUX_OFF: u8 = 0x20;
const MODE_TRANSLATE: u8 = 0x40;

/// The controller's output port: bit 0 low resets the machine, bit 1 is A20.
const OUTPUT_RESET: u8 = 0x01;
const OUTPUT_A20: u8 = 0x02;

/// A device's answer to what it does not understand; the controller's own where no device answers.
const RESEND: u8 = 0xfe;
/// A device's answer to what it does.
const ACKNOWLEDGE: u8 = 0xfa;
/// The most bytes that a device holds until the guest reads them.
const QUEUE_LEN: usize = 64;

/// What is attached to the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct I8042Config {
    /// A keyboard.
    pub keyboard: bool,
    /// A mouse, on the auxiliary port.
    pub mouse: bool,
}

impl Default for I8042Config {
    fn default() -> Self {
        Self { keyboard: true, mouse: true }
    }
}

/// A byte in the output buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Output {
    byte: u8,
    aux: bool,
    timeout: bool,
}

/// The bytes that a device has for the controller.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Queue(VecDeque<u8>);

impl Queue {
    fn sound(&self) -> bool {
        self.0.len() <= QUEUE_LEN
    }

    /// Adds `bytes`, or none of them if they do not all fit; says whether they did.
    fn push(&mut self, bytes: &[u8]) -> bool {
        let fits = self.0.len() + bytes.len() <= QUEUE_LEN;
        if fits {
            self.0.extend(bytes);
        }
        fits
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct I8042State {
    mode: u8,
    /// The controller's other 31 bytes of memory.
    memory: [u8; 31],
    output: Option<Output>,
    /// The controller's own answers, which go before the devices'.
    answers: VecDeque<Output>,
    /// The command that the next byte of data belongs to.
    command: Option<u8>,
    /// The last write was a command.
    after_command: bool,
    keyboard: Keyboard,
    mouse: Mouse,
    /// The translation has seen a break prefix.
    break_prefix: bool,
}

/// What an access asks of the rest of the machine.
#[derive(Default)]
struct Effects {
    reset: bool,
    a20: Option<bool>,
}

impl I8042State {
    fn new() -> Self {
        Self {
            mode: MODE_KEYBOARD_INTERRUPT | MODE_AUX_INTERRUPT | MODE_SYSTEM | MODE_TRANSLATE,
            memory: [0; 31],
            output: None,
            answers: VecDeque::new(),
            command: None,
            after_command: false,
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
            break_prefix: false,
        }
    }

    fn sound(&self) -> bool {
        self.answers.len() <= QUEUE_LEN && self.keyboard.sound() && self.mouse.sound()
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED;
        if let Some(output) = self.output {
            status |= STATUS_OUTPUT_FULL;
            status |= if output.aux { STATUS_AUX } else { 0 };
            status |= if output.timeout { STATUS_TIMEOUT } else { 0 };
        }
        if self.mode & MODE_SYSTEM != 0 {
            status |= STATUS_SYSTEM;
        }
        if self.after_command {
            status |= STATUS_COMMAND;
        }
        status
    }

    /// The levels of the keyboard's and the mouse's interrupt.
    fn interrupts(&self) -> (bool, bool) {
        let enabled = |bit: u8| self.mode & bit != 0;
        match self.output {
            None => (false, false),
            Some(output) if output.aux => (false, enabled(MODE_AUX_INTERRUPT)),
            Some(_) => (enabled(MODE_KEYBOARD_INTERRUPT), false),
        }
    }

    /// Fills the output buffer if it is empty and something waits for it.
    fn load_output(&mut self) {
        if self.output.is_some() {
            return;
        }
        self.output = self.answers.pop_front();
        while self.output.is_none() && self.mode & MODE_KEYBOARD_OFF == 0 {
            let Some(byte) = self.keyboard.queue.0.pop_front() else { break };
            self.output = self.translate(byte).map(|byte| Output { byte, aux: false, timeout: false });
        }
        if self.output.is_none() && self.mode & MODE_AUX_OFF == 0 {
            let byte = self.mouse.queue.0.pop_front();
            self.output = byte.map(|byte| Output { byte, aux: true, timeout: false });
        }
    }

    /// Turns the keyboard's scan code set 2 into set 1, if the guest wants it so.
    fn translate(&mut self, byte: u8) -> Option<u8> {
        if self.mode & MODE_TRANSLATE == 0 {
            return Some(byte);
        }
        if byte == 0xf0 {
            self.break_prefix = true;
            return None;
        }
        let released = if std::mem::take(&mut self.break_prefix) { 0x80 } else { 0 };
        Some(keyboard::set_2_to_1(byte) | released)
    }

    fn answer(&mut self, byte: u8, aux: bool, timeout: bool) {
        if self.answers.len() < QUEUE_LEN {
            self.answers.push_back(Output { byte, aux, timeout });
        }
    }

    fn read_data(&mut self, last: &mut u8) {
        if let Some(output) = self.output.take() {
            *last = output.byte;
        }
    }

    fn write_command(&mut self, command: u8, a20: bool) -> Effects {
        let mut effects = Effects::default();
        self.after_command = true;
        self.command = None;
        match command {
            0x20 => self.answer(self.mode, false, false),
            0x21..=0x3f => self.answer(self.memory[usize::from(command - 0x21)], false, false),
            0x60..=0x7f | 0xd1..=0xd4 => self.command = Some(command),
            0xa7 => self.mode |= MODE_AUX_OFF,
            0xa8 => self.mode &= !MODE_AUX_OFF,
            0xa9 | 0xab => self.answer(0x00, false, false), // the port's test passed
            0xaa => {
                self.output = None;
                self.answers.clear();
                self.mode |= MODE_SYSTEM;
                self.answer(0x55, false, false); // the controller's test passed
            }
            0xad => self.mode |= MODE_KEYBOARD_OFF,
            0xae => self.mode &= !MODE_KEYBOARD_OFF,
            0xc0 => self.answer(0x80, false, false), // keyboard not locked
            0xd0 => {
                let a20 = if a20 { OUTPUT_A20 } else { 0 };
                let full = match self.output {
                    None => 0,
                    Some(output) => {
                        if output.aux {
                            0x20
                        } else {
                            0x10
                        }
                    }
                };
                self.answer(0xcc & !0x30 | OUTPUT_RESET | a20 | full, false, false);
            }
            0xdd => effects.a20 = Some(false),
            0xdf => effects.a20 = Some(true),
            // Pulses the output port's lines whose bit is 0.
            0xf0..=0xff => effects.reset = command & OUTPUT_RESET == 0,
            _ => {}
        }
        effects
    }

    fn write_data(&mut self, config: &I8042Config, value: u8) -> Effects {
        let mut effects = Effects::default();
        self.after_command = false;
        match self.command.take() {
            Some(0x60) => self.mode = value & 0x7f,
            Some(command @ 0x61..=0x7f) => self.memory[usize::from(command - 0x61)] = value,
            Some(0xd1) => {
                effects.reset = value & OUTPUT_RESET == 0;
                effects.a20 = Some(value & OUTPUT_A20 != 0);
            }
            Some(0xd2) => self.answer(value, false, false),
            Some(0xd3) => self.answer(value, true, false),
            Some(0xd4) if config.mouse => self.mouse.write(value),
            Some(0xd4) => self.answer(RESEND, true, true),
            _ => {
                self.mode &= !MODE_KEYBOARD_OFF;
                if config.keyboard {
                    self.keyboard.write(value);
                } else {
                    self.answer(RESEND, false, true);
                }
            }
        }
        effects
    }
}

struct Shared {
    // Guest-visible state.
    state: I8042State,
    /// What the data port read last, and reads while there is nothing new. Not worth saving.
    last_data: u8,
}

/// The keyboard controller.
pub struct I8042 {
    // Fixed configuration.
    config: I8042Config,
    // Host glue.
    keyboard_line: OrderedLine,
    mouse_line: OrderedLine,
    events: Arc<dyn PowerEvents>,
    a20: Arc<A20Gate>,
    shared: Mutex<Shared>,
}

impl I8042 {
    /// The controller's kind in saved states.
    pub const KIND: &'static str = "i8042";
    const VERSION: u32 = 1;
    /// The keyboard's ISA interrupt.
    pub const KEYBOARD_IRQ: u32 = 1;
    /// The mouse's ISA interrupt.
    pub const MOUSE_IRQ: u32 = 12;

    /// A controller that interrupts by these lines, asks `events` for resets and operates `a20`.
    pub fn new(
        config: I8042Config,
        keyboard_line: IrqLine,
        mouse_line: IrqLine,
        events: Arc<dyn PowerEvents>,
        a20: Arc<A20Gate>,
    ) -> Arc<Self> {
        Arc::new(Self {
            config,
            keyboard_line: OrderedLine::new(keyboard_line),
            mouse_line: OrderedLine::new(mouse_line),
            events,
            a20,
            shared: Mutex::new(Shared { state: I8042State::new(), last_data: 0 }),
        })
    }

    /// The ports to map.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        [I8042_DATA_PORT, I8042_COMMAND_PORT].map(|port| region(self, (port, 1))).into()
    }

    /// A key goes down or up. `code` is its scan code in set 1 without prefix (1 to 0x7f), `extended` says
    /// that it has the prefix 0xE0. It says whether the keyboard takes note of it.
    pub fn key(&self, code: u8, extended: bool, pressed: bool) -> bool {
        let taken = self.config.keyboard && self.shared.lock().state.keyboard.key(code, extended, pressed);
        self.refresh();
        taken
    }

    /// The mouse moves by `dx` to the right, `dy` up and its wheel by `wheel` towards the user; `buttons`
    /// are those that are down (bit 0 left, 1 right, 2 middle). It says whether the mouse takes note of it.
    pub fn mouse(&self, dx: i32, dy: i32, wheel: i32, buttons: u8) -> bool {
        let taken = self.config.mouse && self.shared.lock().state.mouse.moved(dx, dy, wheel, buttons);
        self.refresh();
        taken
    }

    /// Drives the lines as they are without the next byte, then with it: each byte makes an edge.
    fn refresh(&self) {
        self.update_lines();
        self.shared.lock().state.load_output();
        self.update_lines();
    }

    fn update_lines(&self) {
        self.keyboard_line.update(|| self.shared.lock().state.interrupts().0);
        self.mouse_line.update(|| self.shared.lock().state.interrupts().1);
    }

    fn apply(&self, effects: &Effects) {
        if let Some(open) = effects.a20 {
            self.a20.set(open);
        }
        self.refresh();
        if effects.reset {
            self.events.request(PowerEvent::Reset);
        }
    }
}

impl PortSet for I8042 {
    fn read_ports(&self, first: u16, data: &mut [u8]) {
        data.fill(0xff);
        let Some(byte) = data.first_mut() else { return };
        if first == I8042_COMMAND_PORT {
            *byte = self.shared.lock().state.status();
            return;
        }
        {
            let mut shared = self.shared.lock();
            let Shared { state, last_data } = &mut *shared;
            state.read_data(last_data);
            *byte = *last_data;
        }
        self.refresh();
    }

    fn write_ports(&self, first: u16, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let effects = {
            let state = &mut self.shared.lock().state;
            if first == I8042_COMMAND_PORT {
                state.write_command(value, self.a20.is_open())
            } else {
                state.write_data(&self.config, value)
            }
        };
        self.apply(&effects);
    }
}

impl Device for I8042 {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    fn reset(&self) {
        *self.shared.lock() = Shared { state: I8042State::new(), last_data: 0 };
        self.refresh();
    }

    fn save(&self) -> SavedState {
        let shared = self.shared.lock();
        encode(Self::KIND, Self::VERSION, &(&shared.state, shared.last_data))
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let sound = |(state, _): &(I8042State, u8)| state.sound();
        let decoded = decode_checked(Self::KIND, Self::VERSION, state, sound);
        take_over(self, decoded, |(state, last_data)| *self.shared.lock() = Shared { state, last_data })?;
        self.refresh();
        Ok(())
    }
}

impl fmt::Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("I8042").field("config", &self.config).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
