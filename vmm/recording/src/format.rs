//! What is in a recording, and how it is written.

/// The version of the format.
pub const VERSION: u32 = 1;
/// What a recording begins with.
pub(crate) const MAGIC: [u8; 8] = *b"VIREOREC";
/// The most bytes of a header.
pub const MAX_HEADER: usize = 256 << 10;
/// The most characters of one input.
pub const MAX_INPUT: usize = 64 << 10;
/// The most bytes in a frame of an event: stamp, port, characters.
pub(crate) const MAX_EVENT: usize = 16 + 2 + MAX_INPUT;

/// Kinds of frames.
pub(crate) mod kind {
    pub(crate) const HEADER: u8 = 0;
    pub(crate) const INPUT: u8 = 1;
    pub(crate) const BREAK: u8 = 2;
    pub(crate) const CHECK: u8 = 3;
    pub(crate) const END: u8 = 4;
}

/// When something happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Stamp {
    /// How many instructions were executed before.
    pub count: u64,
    /// The VM's time in nanoseconds.
    pub time: u64,
}

/// What a VM was at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Digests {
    /// A number made of the processor's registers.
    pub registers: u64,
    /// A number made of everything that ports have sent.
    pub output: u64,
}

/// Why a VM ended: numbers that belong to whoever records. 0 is that somebody outside ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Reason(pub u16);

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A port took these characters, at least 1 and at most [`MAX_INPUT`].
    Input {
        /// Which port.
        port: u16,
        /// The characters.
        bytes: Vec<u8>,
    },
    /// A port took a break condition.
    Break {
        /// Which port.
        port: u16,
    },
    /// The VM was looked at, and an idle processor's time went on to this moment.
    Check(Digests),
    /// The VM ended.
    End(Digests, Reason),
}

impl Event {
    /// The kind of the frame, and what it holds.
    pub(crate) fn encode(&self, stamp: Stamp) -> (u8, Vec<u8>) {
        let mut bytes = Vec::with_capacity(34);
        bytes.extend(stamp.count.to_le_bytes());
        bytes.extend(stamp.time.to_le_bytes());
        let digests = |bytes: &mut Vec<u8>, digests: &Digests| {
            bytes.extend(digests.registers.to_le_bytes());
            bytes.extend(digests.output.to_le_bytes());
        };
        let kind = match self {
            Self::Input { port, bytes: input } => {
                bytes.extend(port.to_le_bytes());
                bytes.extend(input);
                kind::INPUT
            }
            Self::Break { port } => {
                bytes.extend(port.to_le_bytes());
                kind::BREAK
            }
            Self::Check(found) => {
                digests(&mut bytes, found);
                kind::CHECK
            }
            Self::End(found, reason) => {
                digests(&mut bytes, found);
                bytes.extend(reason.0.to_le_bytes());
                kind::END
            }
        };
        (kind, bytes)
    }

    /// Reads an event; says what is wrong with it.
    pub(crate) fn decode(kind: u8, bytes: &[u8]) -> Result<(Stamp, Self), &'static str> {
        let mut rest = bytes;
        let stamp = Stamp { count: take(&mut rest)?, time: take(&mut rest)? };
        let event = match kind {
            kind::INPUT => {
                let port = take_port(&mut rest)?;
                let bytes = std::mem::take(&mut rest).to_vec();
                if bytes.is_empty() {
                    return Err("an input without characters");
                }
                Self::Input { port, bytes }
            }
            kind::BREAK => Self::Break { port: take_port(&mut rest)? },
            kind::CHECK => Self::Check(Digests { registers: take(&mut rest)?, output: take(&mut rest)? }),
            kind::END => {
                let digests = Digests { registers: take(&mut rest)?, output: take(&mut rest)? };
                Self::End(digests, Reason(take_port(&mut rest)?))
            }
            _ => return Err("an event of an unknown kind"),
        };
        if rest.is_empty() { Ok((stamp, event)) } else { Err("an event that is too long") }
    }
}

const SHORT: &str = "an event that is too short";

fn take(bytes: &mut &[u8]) -> Result<u64, &'static str> {
    let (first, rest) = bytes.split_first_chunk().ok_or(SHORT)?;
    *bytes = rest;
    Ok(u64::from_le_bytes(*first))
}

fn take_port(bytes: &mut &[u8]) -> Result<u16, &'static str> {
    let (first, rest) = bytes.split_first_chunk().ok_or(SHORT)?;
    *bytes = rest;
    Ok(u16::from_le_bytes(*first))
}

/// A whole frame.
pub(crate) fn frame(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(bytes.len() + 9);
    frame.push(kind);
    frame.extend((bytes.len() as u32).to_le_bytes());
    frame.extend(bytes);
    let sum = crc32fast::hash(&frame);
    frame.extend(sum.to_le_bytes());
    frame
}
