//! Where messages begin and end in what a client sends: a stream of JSON values with nothing, or white space, between.
//!
//! Strings may stand in single quotes too, as people type them; what comes out has double quotes. What is no JSON is
//! told as such, and the stream goes on at the next line.

/// The most bytes of a message. Commands are small; the largest are transactions over many disks.
pub(crate) const MAX_MESSAGE: usize = 4 << 20;
/// How deep values may be nested: less than what the JSON parser recurses to.
pub(crate) const MAX_DEPTH: usize = 100;

/// Something that a client sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// What looks like a JSON value: brackets that match in number, or a word, number or string.
    Value(String),
    /// What is none, and why.
    Broken(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between values.
    Between,
    /// In a value, outside of strings.
    Inside,
    /// In a string that this quote ends.
    String(u8),
    /// Behind a backslash in a string that this quote ends.
    Escape(u8),
    /// In a word or number that stands alone.
    Word,
    /// Until the line's end nothing counts.
    Skip,
}

/// Divides a stream of bytes into messages.
#[derive(Debug)]
pub(crate) struct Framer {
    state: State,
    depth: usize,
    message: Vec<u8>,
}

impl Default for Framer {
    fn default() -> Self {
        Self { state: State::Between, depth: 0, message: Vec::new() }
    }
}

impl Framer {
    /// Takes the bytes that came, and hands out each message that is whole.
    pub(crate) fn push(&mut self, bytes: &[u8], mut frame: impl FnMut(Frame)) {
        for byte in bytes {
            if let Some(found) = self.byte(*byte) {
                frame(found);
            }
        }
    }

    /// The bytes end: a word that nothing ended is whole.
    pub(crate) fn end(&mut self) -> Option<Frame> {
        match self.state {
            State::Word => self.take(),
            _ => None,
        }
    }

    fn byte(&mut self, byte: u8) -> Option<Frame> {
        if self.message.len() >= MAX_MESSAGE {
            return self.broken("JSON token size limit exceeded", byte);
        }
        match (self.state, byte) {
            (State::Skip, b'\n') => self.state = State::Between,
            (State::Skip, _) => {}
            (State::Between | State::Word, b' ' | b'\t' | b'\r' | b'\n') => {
                return if self.state == State::Word { self.take() } else { None };
            }
            (State::Between, b'}' | b']' | b',' | b':') => {
                return self.broken("JSON parse error, expecting value", byte);
            }
            (State::Word, b'{' | b'[' | b'}' | b']' | b',' | b':' | b'"' | b'\'') => {
                let word = self.take();
                // A broken stream is told of once.
                if !matches!(byte, b'{' | b'[') {
                    self.state = State::Skip;
                    return word;
                }
                let _ = self.byte(byte);
                return word;
            }
            (State::Between | State::Inside, b'{' | b'[') => {
                self.depth += 1;
                if self.depth > MAX_DEPTH {
                    return self.broken("JSON nesting depth limit exceeded", byte);
                }
                self.state = State::Inside;
                self.message.push(byte);
            }
            (State::Inside, b'}' | b']') => {
                self.depth -= 1;
                self.message.push(byte);
                if self.depth == 0 {
                    return self.take();
                }
            }
            (State::Between | State::Inside, b'"' | b'\'') => {
                self.state = State::String(byte);
                self.message.push(b'"');
            }
            (State::String(quote), _) if byte == quote => {
                self.message.push(b'"');
                self.state = State::Inside;
                if self.depth == 0 {
                    return self.take();
                }
            }
            (State::String(_), b'"') => self.message.extend(b"\\\""),
            (State::String(quote), b'\\') => self.state = State::Escape(quote),
            (State::Escape(quote), _) => {
                // JSON knows no escaped single quote.
                if byte != b'\'' {
                    self.message.push(b'\\');
                }
                self.message.push(byte);
                self.state = State::String(quote);
            }
            (State::Between, _) => {
                self.state = State::Word;
                self.message.push(byte);
            }
            (State::Inside | State::String(_) | State::Word, _) => self.message.push(byte),
        }
        None
    }

    fn take(&mut self) -> Option<Frame> {
        self.state = State::Between;
        self.depth = 0;
        let message = String::from_utf8(std::mem::take(&mut self.message));
        Some(
            message.map_or(Frame::Broken("JSON parse error, invalid UTF-8 sequence in string"), Frame::Value),
        )
    }

    fn broken(&mut self, why: &'static str, byte: u8) -> Option<Frame> {
        *self = Self { state: if byte == b'\n' { State::Between } else { State::Skip }, ..Self::default() };
        Some(Frame::Broken(why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(bytes: &[u8]) -> Vec<Frame> {
        let (mut framer, mut found) = (Framer::default(), Vec::new());
        // However the bytes are divided, the same comes out.
        for byte in bytes {
            framer.push(&[*byte], |frame| found.push(frame));
        }
        let (mut whole, mut at_once) = (Framer::default(), Vec::new());
        whole.push(bytes, |frame| at_once.push(frame));
        assert_eq!(found, at_once);
        found.extend(framer.end());
        found
    }

    fn value(text: &str) -> Frame {
        Frame::Value(text.to_owned())
    }

    #[test]
    fn values_need_nothing_between_them() {
        assert_eq!(
            frames(b"{\"a\":[{}]}{\"b\":\"}\\\"{\"}\r\n\t [1]"),
            [value("{\"a\":[{}]}"), value("{\"b\":\"}\\\"{\"}"), value("[1]")]
        );
        assert_eq!(frames(b"1 \"x y\" null"), [value("1"), value("\"x y\""), value("null")]);
        assert_eq!(frames(b"{\"a\""), []);
    }

    #[test]
    fn single_quotes_become_double_ones() {
        assert_eq!(frames(b"{'a':'x\"y\\'z'}"), [value("{\"a\":\"x\\\"y'z\"}")]);
        assert_eq!(frames(b"{\"a\":\"it's\"}"), [value("{\"a\":\"it's\"}")]);
    }

    #[test]
    fn what_is_no_json_ends_with_its_line() {
        let expecting = Frame::Broken("JSON parse error, expecting value");
        assert_eq!(frames(b"} {}\n{}"), [expecting.clone(), value("{}")]);
        assert_eq!(frames(b"nope}{\n[]"), [value("nope"), value("[]")]);
        assert_eq!(frames(b"nope{}"), [value("nope"), value("{}")]);
        assert_eq!(
            frames(b"{\"\xff\"}{}"),
            [Frame::Broken("JSON parse error, invalid UTF-8 sequence in string"), value("{}")]
        );
    }

    #[test]
    fn size_and_depth_have_limits() {
        let mut deep = vec![b'['; MAX_DEPTH];
        deep.extend(vec![b']'; MAX_DEPTH]);
        assert!(matches!(frames(&deep)[..], [Frame::Value(_)]));
        let mut deeper = vec![b'['; MAX_DEPTH + 1000];
        deeper.extend(b"\n{}");
        assert_eq!(frames(&deeper), [Frame::Broken("JSON nesting depth limit exceeded"), value("{}")]);

        let (mut framer, mut found) = (Framer::default(), Vec::new());
        framer.push(b"{\"a\":\"", |frame| found.push(frame));
        for _ in 0..3 * MAX_MESSAGE / 4096 {
            framer.push(&[b'x'; 4096], |frame| found.push(frame));
            assert!(framer.message.len() <= MAX_MESSAGE + 2);
        }
        framer.push(b"\n{}", |frame| found.push(frame));
        assert_eq!(found, [Frame::Broken("JSON token size limit exceeded"), value("{}")]);
    }
}
