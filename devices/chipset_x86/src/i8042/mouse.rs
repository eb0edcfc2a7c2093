//! A PS/2 mouse with a wheel (IBM Personal System/2 technical reference, auxiliary device; Microsoft's
//! "IntelliMouse" extension).

use super::{ACKNOWLEDGE, Queue, RESEND};
use serde::{Deserialize, Serialize};

/// Reports wait in the queue only until this many bytes are there; motion adds up from then on.
const REPORT_QUEUE_LEN: usize = 16;
/// The most motion that is remembered until it is reported.
const MAX_MOTION: i16 = 1024;
/// The sample rates that, set in a row, switch the wheel on.
const WHEEL_KNOCK: [u8; 3] = [200, 100, 80];
/// The mouse's answer to what is wrong twice.
const ERROR: u8 = 0xfc;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Mouse {
    pub(super) queue: Queue,
    /// Reports are sent without being asked for, if `enabled`; else this is remote mode.
    stream: bool,
    enabled: bool,
    wrap: bool,
    scaling_2_to_1: bool,
    resolution: u8,
    sample_rate: u8,
    /// The last three sample rates that were set.
    rates: [u8; 3],
    wheel: bool,
    buttons: u8,
    /// Motion that was not reported yet: right, up, wheel.
    motion: [i16; 3],
    /// The command that the next byte belongs to.
    command: Option<u8>,
    last_sent: u8,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            queue: Queue::default(),
            stream: true,
            enabled: false,
            wrap: false,
            scaling_2_to_1: false,
            resolution: 2,
            sample_rate: 100,
            rates: [0; 3],
            wheel: false,
            buttons: 0,
            motion: [0; 3],
            command: None,
            last_sent: 0,
        }
    }
}

impl Mouse {
    pub(super) fn sound(&self) -> bool {
        let motion_is_bounded = self.motion.iter().all(|axis| (-MAX_MOTION..=MAX_MOTION).contains(axis));
        self.queue.sound() && self.buttons < 8 && motion_is_bounded
    }

    /// The mouse was moved or its buttons pressed; says whether that is reported.
    pub(super) fn moved(&mut self, dx: i32, dy: i32, wheel: i32, buttons: u8) -> bool {
        for (sum, change) in self.motion.iter_mut().zip([dx, dy, wheel]) {
            let total = i32::from(*sum).saturating_add(change);
            *sum = total.clamp((-MAX_MOTION).into(), MAX_MOTION.into()) as i16;
        }
        self.buttons = buttons & 7;
        if !self.enabled || !self.stream || self.wrap {
            return false;
        }
        if self.queue.0.len() <= REPORT_QUEUE_LEN {
            self.report();
        }
        true
    }

    /// Queues a report of what has happened since the last.
    fn report(&mut self) {
        let [x, y, wheel] = [(0, 255), (1, 255), (2, 7)].map(|(axis, most): (usize, i16)| {
            let part = self.motion[axis].clamp(-most, most);
            self.motion[axis] -= part;
            part
        });
        let sign = |value: i16, bit: u8| if value < 0 { bit } else { 0 };
        let first = 0x08 | self.buttons | sign(x, 0x10) | sign(y, 0x20);
        let bytes = [first, x as u8, y as u8, wheel as u8];
        self.reply(if self.wheel { &bytes } else { &bytes[..3] });
    }

    /// The controller sends `byte`.
    pub(super) fn write(&mut self, byte: u8) {
        if self.wrap && !matches!(byte, 0xec | 0xff) {
            return self.reply(&[byte]);
        }
        if let Some(command) = self.command.take() {
            return self.write_parameter(command, byte);
        }
        match byte {
            0xe6 => self.scaling_2_to_1 = false,
            0xe7 => self.scaling_2_to_1 = true,
            0xe8 | 0xf3 => self.command = Some(byte),
            0xe9 => return self.reply_status(),
            0xea => self.stream = true,
            0xeb => {
                self.reply(&[ACKNOWLEDGE]);
                return self.report();
            }
            0xec => self.wrap = false,
            0xee => self.wrap = true,
            0xf0 => self.stream = false,
            0xf2 => return self.reply(&[ACKNOWLEDGE, if self.wheel { 3 } else { 0 }]),
            0xf4 => self.enabled = true,
            0xf5 => self.enabled = false,
            0xf6 => {
                let Self { wheel, buttons, .. } = *self;
                *self = Self { wheel, buttons, ..Self::default() };
            }
            0xfe => return self.reply(&[self.last_sent]),
            0xff => {
                *self = Self { buttons: self.buttons, ..Self::default() };
                return self.reply(&[ACKNOWLEDGE, 0xaa, 0x00]); // the self-test passed; a mouse
            }
            _ => return self.reply(&[RESEND]),
        }
        self.reply(&[ACKNOWLEDGE]);
    }

    fn write_parameter(&mut self, command: u8, byte: u8) {
        match (command, byte) {
            (0xe8, 0..=3) => self.resolution = byte,
            (0xf3, 10..=200) => {
                self.sample_rate = byte;
                self.rates = [self.rates[1], self.rates[2], byte];
                if self.rates == WHEEL_KNOCK {
                    self.wheel = true;
                }
            }
            _ => return self.reply(&[ERROR]),
        }
        self.reply(&[ACKNOWLEDGE]);
    }

    fn reply_status(&mut self) {
        let flag = |on: bool, bit: u8| if on { bit } else { 0 };
        // Here left, middle and right are bits 2, 1 and 0.
        let down = |button: u8| self.buttons >> button & 1;
        let buttons = down(0) << 2 | down(2) << 1 | down(1);
        let status =
            flag(!self.stream, 0x40) | flag(self.enabled, 0x20) | flag(self.scaling_2_to_1, 0x10) | buttons;
        self.reply(&[ACKNOWLEDGE, status, self.resolution, self.sample_rate]);
    }

    fn reply(&mut self, bytes: &[u8]) {
        if self.queue.push(bytes)
            && let Some(&last) = bytes.last()
        {
            self.last_sent = last;
        }
    }
}
