//! The escape keys of an interactive terminal: Ctrl-A and a letter.

use crate::InputEvent;

/// What the escape keys do, for people.
pub const HELP: &str = "\
Ctrl-A H    this help
Ctrl-A X    end the program, and the guest with it
Ctrl-A B    send a break (the kernel's magic SysRq)
Ctrl-A T    switch time stamps on each line of output on or off
Ctrl-A A    send a Ctrl-A
";

const CTRL_A: u8 = 1;

/// Finds escape keys in what a person types.
#[derive(Debug, Default)]
pub struct EscapeKeys {
    after_escape: bool,
}

impl EscapeKeys {
    /// Splits `typed` into events, in order.
    pub fn split(&mut self, typed: &[u8]) -> Vec<InputEvent> {
        let mut events = Vec::new();
        let mut bytes = Vec::new();
        for &byte in typed {
            if !self.after_escape {
                if byte == CTRL_A {
                    self.after_escape = true;
                } else {
                    bytes.push(byte);
                }
                continue;
            }
            self.after_escape = false;
            let event = match byte.to_ascii_lowercase() {
                b'x' => InputEvent::Quit,
                b'b' => InputEvent::Break,
                b'h' | b'?' => InputEvent::Help,
                b't' => InputEvent::ToggleTimestamps,
                CTRL_A | b'a' => {
                    bytes.push(CTRL_A);
                    continue;
                }
                _ => continue,
            };
            if !bytes.is_empty() {
                events.push(InputEvent::Bytes(std::mem::take(&mut bytes)));
            }
            events.push(event);
        }
        if !bytes.is_empty() {
            events.push(InputEvent::Bytes(bytes));
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_across_pieces() {
        let mut keys = EscapeKeys::default();
        assert_eq!(keys.split(b"ab\x01"), [InputEvent::Bytes(b"ab".to_vec())]);
        assert_eq!(keys.split(b"b"), [InputEvent::Break]);
        assert_eq!(
            keys.split(b"1\x01\x012\x01h3\x01q\x01X"),
            [
                InputEvent::Bytes(b"1\x012".to_vec()),
                InputEvent::Help,
                InputEvent::Bytes(b"3".to_vec()),
                InputEvent::Quit
            ]
        );
    }
}
