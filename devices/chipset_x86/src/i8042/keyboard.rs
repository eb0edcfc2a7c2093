//! A PS/2 keyboard (IBM Personal System/2 technical reference, keyboards).

use super::{ACKNOWLEDGE, Queue, RESEND};
use serde::{Deserialize, Serialize};

/// What the i8042 makes of each code of scan code set 2 when it translates to set 1.
const SET_1_OF_SET_2: [u8; 0x80] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59, //
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b, //
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d, //
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f, //
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61, //
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76, //
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f, //
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];

/// Two codes of set 2 lie above 0x7f; everything else there (answers, prefixes) passes as it is.
pub(super) fn set_2_to_1(byte: u8) -> u8 {
    match byte {
        0x83 => 0x41,
        0x84 => 0x54,
        _ => SET_1_OF_SET_2.get(usize::from(byte)).copied().unwrap_or(byte),
    }
}

/// The code of set 2 for the key that has `code` in set 1.
fn set_1_to_2(code: u8) -> Option<u8> {
    if code == 0x41 {
        return Some(0x83); // F7; 0x02 of set 2 is no key
    }
    let found = SET_1_OF_SET_2.iter().position(|set_1| *set_1 == code)?;
    u8::try_from(found).ok()
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Keyboard {
    pub(super) queue: Queue,
    /// Keys are reported.
    scanning: bool,
    /// 1 or 2.
    scan_code_set: u8,
    leds: u8,
    /// The command that the next byte belongs to.
    command: Option<u8>,
    last_sent: u8,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self {
            queue: Queue::default(),
            scanning: true,
            scan_code_set: 2,
            leds: 0,
            command: None,
            last_sent: 0,
        }
    }
}

impl Keyboard {
    pub(super) fn sound(&self) -> bool {
        self.queue.sound() && matches!(self.scan_code_set, 1 | 2)
    }

    /// A key goes down or up; says whether it is reported.
    pub(super) fn key(&mut self, code: u8, extended: bool, pressed: bool) -> bool {
        let Some(set_2) = set_1_to_2(code).filter(|_| self.scanning && code != 0 && code < 0x80) else {
            return false;
        };
        let mut bytes = Vec::with_capacity(3);
        if extended {
            bytes.push(0xe0);
        }
        if self.scan_code_set == 1 {
            bytes.push(code | if pressed { 0 } else { 0x80 });
        } else {
            if !pressed {
                bytes.push(0xf0);
            }
            bytes.push(set_2);
        }
        self.queue.push(&bytes)
    }

    /// The controller sends `byte`.
    pub(super) fn write(&mut self, byte: u8) {
        if let Some(command) = self.command.take()
            && self.write_parameter(command, byte)
        {
            return;
        }
        match byte {
            0xee => self.reply(&[0xee]),
            0xed | 0xf0 | 0xf3 | 0xfb..=0xfd => {
                self.command = Some(byte);
                self.reply(&[ACKNOWLEDGE]);
            }
            0xf2 => self.reply(&[ACKNOWLEDGE, 0xab, 0x83]),
            0xf4 => {
                self.queue.0.clear();
                self.scanning = true;
                self.reply(&[ACKNOWLEDGE]);
            }
            0xf5 | 0xf6 => {
                let scanning = byte == 0xf6;
                *self = Self { scanning, leds: self.leds, ..Self::default() };
                self.reply(&[ACKNOWLEDGE]);
            }
            0xf7..=0xfa => self.reply(&[ACKNOWLEDGE]),
            0xfe => self.reply(&[self.last_sent]),
            0xff => {
                *self = Self::default();
                self.reply(&[ACKNOWLEDGE, 0xaa]); // and the self-test passed
            }
            _ => self.reply(&[RESEND]),
        }
    }

    /// The second byte of `command`. It says whether `byte` was that, and not a new command.
    fn write_parameter(&mut self, command: u8, byte: u8) -> bool {
        match (command, byte) {
            // Per-key settings apply to set 3 only, and end with the next command.
            (0xfb..=0xfd, 0x01..=0x84) => self.command = Some(command),
            (0xed, 0x00..=0x07) => self.leds = byte,
            (0xf3, 0x00..=0x7f) => {} // keys repeat at the host's rate
            (0xf0, 0x00) => {
                self.reply(&[ACKNOWLEDGE, self.scan_code_set]);
                return true;
            }
            (0xf0, 0x01 | 0x02) => self.scan_code_set = byte,
            (_, 0xed..) => return false,
            _ => {
                self.reply(&[RESEND]);
                return true;
            }
        }
        self.reply(&[ACKNOWLEDGE]);
        true
    }

    fn reply(&mut self, bytes: &[u8]) {
        if self.queue.push(bytes)
            && let Some(&last) = bytes.last()
        {
            self.last_sent = last;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_survives_the_translation() {
        // The codes of a 105-key keyboard.
        for code in (0x01..=0x53).chain([0x56, 0x57, 0x58]) {
            let set_2 = set_1_to_2(code).unwrap_or_else(|| panic!("no code for {code:#x}"));
            assert_eq!(set_2_to_1(set_2), code);
        }
        assert_eq!(set_1_to_2(0x1e), Some(0x1c)); // A
        assert_eq!(set_1_to_2(0x01), Some(0x76)); // escape
    }
}
