//! Reading a recording, which is untrusted.

use crate::format::{Event, MAGIC, MAX_EVENT, MAX_HEADER, Stamp, VERSION, kind};
use std::io::{self, Read};

/// Why something is no recording. Offsets are in bytes from the beginning of the file.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// The file cannot be read.
    #[error("it cannot be read at byte {offset}: {source}")]
    Read {
        /// Where.
        offset: u64,
        /// The host's error.
        source: io::Error,
    },
    /// It begins otherwise.
    #[error("it does not begin as recordings do, with VIREOREC")]
    NoRecording,
    /// Its format is not known.
    #[error("its format has version {found}; this program knows {VERSION}")]
    Version {
        /// The version.
        found: u32,
    },
    /// The header is not all there.
    #[error("it ends within its header, at byte {offset}")]
    NoHeader {
        /// Where it ends.
        offset: u64,
    },
    /// Something is wrong with a frame.
    #[error("it is damaged: {what} at byte {offset}")]
    Damaged {
        /// Where the frame begins.
        offset: u64,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Reads a recording.
#[derive(Debug)]
pub struct Reader<R> {
    source: R,
    /// Where the next frame begins.
    offset: u64,
    header: Vec<(String, String)>,
    last: Stamp,
    ended: bool,
}

/// What came of reading a number of bytes.
enum Filled {
    All,
    /// The file ended before.
    Cut,
}

impl<R: Read> Reader<R> {
    /// Reads the beginning of a recording from `source`.
    ///
    /// # Errors
    /// [`RecordingError`].
    pub fn new(source: R) -> Result<Self, RecordingError> {
        let mut reader = Self { source, offset: 0, header: Vec::new(), last: Stamp::default(), ended: false };
        let mut beginning = [0; 12];
        if matches!(reader.fill(&mut beginning, 0)?, Filled::Cut) || beginning[..8] != MAGIC {
            return Err(RecordingError::NoRecording);
        }
        let found = beginning[8..].iter().rev().fold(0, |all, byte| all << 8 | u32::from(*byte));
        if found != VERSION {
            return Err(RecordingError::Version { found });
        }
        reader.offset = 12;
        let Some((kind, bytes)) = reader.frame(MAX_HEADER)? else {
            return Err(RecordingError::NoHeader { offset: reader.offset });
        };
        let damaged = |what| RecordingError::Damaged { offset: 12, what };
        if kind != kind::HEADER {
            return Err(damaged("no header"));
        }
        reader.header = serde_json::from_slice(&bytes).map_err(|_| damaged("a header that is none"))?;
        Ok(reader)
    }

    /// The header.
    pub fn header(&self) -> &[(String, String)] {
        &self.header
    }

    /// Whether the last event was the end; if there are no more and it was not, the recording was cut off.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// The next event. `None`: there are no more that are whole.
    ///
    /// # Errors
    /// [`RecordingError`].
    pub fn next_event(&mut self) -> Result<Option<(Stamp, Event)>, RecordingError> {
        let offset = self.offset;
        let damaged = |what| RecordingError::Damaged { offset, what };
        let Some((kind, bytes)) = self.frame(MAX_EVENT)? else { return Ok(None) };
        if self.ended {
            return Err(damaged("an event after the end"));
        }
        let (stamp, event) = Event::decode(kind, &bytes).map_err(damaged)?;
        if stamp.count < self.last.count || stamp.time < self.last.time {
            return Err(damaged("an event before the last one"));
        }
        self.last = stamp;
        self.ended = matches!(event, Event::End(..));
        Ok(Some((stamp, event)))
    }

    /// Reads the next frame, of at most `most` bytes, and checks its sum.
    fn frame(&mut self, most: usize) -> Result<Option<(u8, Vec<u8>)>, RecordingError> {
        let offset = self.offset;
        let damaged = |what| RecordingError::Damaged { offset, what };
        let mut beginning = [0; 5];
        if matches!(self.fill(&mut beginning, 0)?, Filled::Cut) {
            return Ok(None);
        }
        let [kind, len @ ..] = beginning;
        let len = u32::from_le_bytes(len) as usize;
        if len > most {
            return Err(damaged("a frame that is too long"));
        }
        let mut bytes = vec![0; len + 4];
        if matches!(self.fill(&mut bytes, 5)?, Filled::Cut) {
            return Ok(None);
        }
        let mut sum = crc32fast::Hasher::new();
        sum.update(&beginning);
        sum.update(&bytes[..len]);
        if bytes[len..] != sum.finalize().to_le_bytes() {
            return Err(damaged("a frame with a wrong sum"));
        }
        bytes.truncate(len);
        self.offset += 9 + len as u64;
        Ok(Some((kind, bytes)))
    }

    /// Fills `buffer` from `ahead` bytes after the beginning of the frame.
    fn fill(&mut self, buffer: &mut [u8], ahead: u64) -> Result<Filled, RecordingError> {
        let mut done = 0;
        while done < buffer.len() {
            match self.source.read(&mut buffer[done..]) {
                Ok(0) => return Ok(Filled::Cut),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(RecordingError::Read { offset: self.offset + ahead + done as u64, source });
                }
            }
        }
        Ok(Filled::All)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Digests, MAX_INPUT, Reason, Writer};
    use proptest::prelude::*;

    fn header() -> Vec<(String, String)> {
        vec![("memory".into(), "1G".into()), ("kernel".into(), "\u{e9}\"".into())]
    }

    fn stamp(count: u64) -> Stamp {
        Stamp { count, time: 2 * count }
    }

    fn example() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &header()).unwrap();
        let digests = Digests { registers: 1, output: u64::MAX };
        writer.write(stamp(5), &Event::Input { port: 3, bytes: b"ls\n".to_vec() }).unwrap();
        writer.write(stamp(5), &Event::Break { port: 0 }).unwrap();
        writer.write(stamp(7), &Event::Check(digests)).unwrap();
        writer.write(stamp(u64::MAX / 2), &Event::End(digests, Reason(77))).unwrap();
        bytes
    }

    fn read(bytes: &[u8]) -> Result<(Vec<(Stamp, Event)>, bool), RecordingError> {
        let mut reader = Reader::new(bytes)?;
        assert!(reader.header().len() <= MAX_HEADER);
        let mut events = Vec::new();
        while let Some(event) = reader.next_event()? {
            events.push(event);
        }
        Ok((events, reader.has_ended()))
    }

    #[test]
    fn what_was_written_is_read() {
        let bytes = example();
        assert_eq!(Reader::new(&bytes[..]).unwrap().header(), header());
        let (events, ended) = read(&bytes).unwrap();
        assert!(ended);
        assert_eq!(events.len(), 4);
        assert_eq!(events[0], (stamp(5), Event::Input { port: 3, bytes: b"ls\n".to_vec() }));
        let digests = Digests { registers: 1, output: u64::MAX };
        assert_eq!(events[3], (stamp(u64::MAX / 2), Event::End(digests, Reason(77))));
    }

    #[test]
    fn a_recording_that_is_cut_off_goes_as_far_as_it_is_whole() {
        let bytes = example();
        let mut most = 0;
        for len in 0..bytes.len() {
            match read(&bytes[..len]) {
                Ok((events, ended)) => {
                    assert!(!ended && events.len() >= most && events.len() < 4);
                    most = events.len();
                }
                Err(RecordingError::NoRecording) => assert!(len < 12),
                Err(RecordingError::NoHeader { offset }) => assert!(most == 0 && offset == 12),
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(most, 3);
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let bytes = example();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            match read(&damaged) {
                // A length that is now beyond the end of the file.
                Ok((_, ended)) => assert!(!ended, "bit {bit}"),
                Err(error) => assert!(error.to_string().starts_with("it"), "{error}"),
            }
        }
        let mut more = bytes.clone();
        more.extend(crate::format::frame(2, &[0; 18]));
        let error = read(&more).unwrap_err();
        assert!(
            matches!(error, RecordingError::Damaged { offset, .. } if offset == bytes.len() as u64),
            "{error}"
        );
    }

    #[test]
    fn events_that_are_none_are_refused() {
        let write = |kind: u8, holds: &[u8]| {
            let mut bytes = Vec::new();
            Writer::new(&mut bytes, &[]).unwrap();
            bytes.extend(crate::format::frame(kind, holds));
            read(&bytes).map(|_| ()).unwrap_err().to_string()
        };
        assert!(write(1, &[0; 18]).contains("without characters"));
        assert!(write(1, &vec![0; 18 + MAX_INPUT + 1]).contains("too long"));
        assert!(write(2, &[0; 17]).contains("too short"));
        assert!(write(3, &[0; 33]).contains("too long"));
        assert!(write(9, &[0; 40]).contains("unknown kind"));
        assert!(write(0, &[0; 40]).contains("unknown kind"));
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &[]).unwrap();
        writer.write(stamp(5), &Event::Break { port: 0 }).unwrap();
        writer.write(stamp(4), &Event::Break { port: 0 }).unwrap();
        assert!(read(&bytes).unwrap_err().to_string().contains("before the last one"));
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), begins: bool) {
            if begins {
                let beginning: Vec<u8> = MAGIC.iter().copied().chain(VERSION.to_le_bytes()).collect();
                bytes.splice(0..0, beginning);
            }
            let _ = read(&bytes);
        }
    }
}
