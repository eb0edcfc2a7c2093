//! Writing a recording.

use crate::format::{Event, MAGIC, Stamp, VERSION, frame, kind};
use std::io::{self, Write};

/// Writes a recording, each event at once.
#[derive(Debug)]
pub struct Writer<W> {
    sink: W,
}

impl<W: Write> Writer<W> {
    /// A recording with this header, of at most [`MAX_HEADER`](crate::MAX_HEADER) bytes.
    ///
    /// # Errors
    /// What `sink` says.
    pub fn new(mut sink: W, header: &[(String, String)]) -> io::Result<Self> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(frame(kind::HEADER, &serde_json::to_vec(header)?));
        sink.write_all(&bytes)?;
        sink.flush()?;
        Ok(Self { sink })
    }

    /// Adds an event, which must not be before the last.
    ///
    /// # Errors
    /// What the sink says.
    pub fn write(&mut self, stamp: Stamp, event: &Event) -> io::Result<()> {
        let (kind, bytes) = event.encode(stamp);
        self.sink.write_all(&frame(kind, &bytes))?;
        self.sink.flush()
    }
}
