//! A network block device's server that says anything, against the client's handshake and its decoders of replies.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd::client::handshake::{self as client_handshake, Wire, Wish};
use nbd::proto::*;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

/// What the server says. Unless `raw`, it knows the magic numbers and the option that was asked last, and the script has
/// the rest: it would take a fuzzer long to find them.
struct Script<'a> {
    bytes: &'a [u8],
    raw: bool,
    greeted: u32,
    asked: [u8; 4],
}

impl<'a> Script<'a> {
    fn new(bytes: &'a [u8], raw: bool) -> Self {
        Self { bytes, raw, greeted: 0, asked: [0; 4] }
    }

    fn take(&mut self, len: usize) -> io::Result<&'a [u8]> {
        let (head, rest) = self.bytes.split_at_checked(len).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.bytes = rest;
        Ok(head)
    }

    /// A reply to the option that was asked last: its type and length are a byte each.
    fn reply_header(&mut self) -> io::Result<Vec<u8>> {
        const TYPES: [u32; 8] =
            [1, 2, 3, 4, 3, REPLY_ERROR_BIT + 1, REPLY_ERROR_BIT + 5, REPLY_ERROR_BIT + 9];
        let &[kind, len] = self.take(2)? else { unreachable!("two bytes were asked for") };
        let mut header = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        header.extend_from_slice(&self.asked);
        header.extend_from_slice(&TYPES[usize::from(kind) % TYPES.len()].to_be_bytes());
        header.extend_from_slice(&u32::from(len).to_be_bytes());
        Ok(header)
    }
}

impl Wire for Script<'_> {
    async fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        if self.raw {
            into.copy_from_slice(self.take(into.len())?);
        } else if into.len() == 8 && self.greeted < 2 {
            let magic = if self.greeted == 0 { INIT_MAGIC } else { OPTION_MAGIC };
            into.copy_from_slice(&magic.to_be_bytes());
            self.greeted += 1;
        } else if into.len() == OptionReplyHeader::SIZE && self.asked != [0; 4] {
            into.copy_from_slice(&self.reply_header()?);
        } else {
            into.copy_from_slice(self.take(into.len())?);
        }
        Ok(())
    }

    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(option) = bytes.get(8..12) {
            self.asked.copy_from_slice(option);
        }
        Ok(())
    }

    async fn start_tls(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("a script never waits"),
    }
}

/// The replies of the transmission phase, as the driver walks through them: of each chunk, a byte is the type, and two
/// are the length.
fn replies(mut data: &[u8], mode: HeaderMode) -> Result<(), ProtocolError> {
    let mut coverage = ReadCoverage::new(4096, 1 << 20);
    while let Some((&[kind, high, low], rest)) = data.split_first_chunk() {
        let kind = u16::from(kind & 15) | if kind & 128 != 0 { CHUNK_ERROR_BIT } else { 0 };
        let offset = (mode == HeaderMode::Extended).then_some(4096);
        let len = u16::from_be_bytes([high, low]).into();
        let said = ReplyHeader::Chunk { flags: 0, kind: ChunkType::from_wire(kind), cookie: 1, offset, len };
        let mut header = Vec::new();
        said.encode(&mut header);
        if mode != HeaderMode::Simple {
            let start = header.first_chunk().expect("headers have a magic number");
            assert_eq!(ReplyHeader::size(*start, mode), Ok(header.len()));
        }
        assert_eq!(ReplyHeader::decode(&header), Ok(said));
        let Some((payload, rest)) = rest.split_at_checked(len as usize) else { return Ok(()) };
        data = rest;
        match ChunkType::from_wire(kind) {
            ChunkType::OffsetData => {
                let mut reader = Reader::new(payload, "data");
                let offset = reader.u64()?;
                let at = coverage.add(offset, reader.left() as u64)?;
                assert!(at + reader.left() as u64 <= 1 << 20, "outside of the buffer");
            }
            kind @ (ChunkType::BlockStatus | ChunkType::BlockStatusExt) => {
                let status = StatusChunk::decode(kind, payload)?;
                assert!(!status.extents.is_empty() && status.extents.iter().all(|extent| extent.len > 0));
            }
            other => {
                if let Chunk::Hole { offset, len } = Chunk::decode(other, payload)? {
                    let at = coverage.add(offset, len.into())?;
                    assert!(at + u64::from(len) <= 1 << 20, "outside of the buffer");
                }
            }
        }
    }
    coverage.finish()
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, data)) = data.split_first() else { return };
    let mode = match choice & 3 {
        0 => HeaderMode::Simple,
        1 => HeaderMode::Structured,
        _ => HeaderMode::Extended,
    };
    let (tls, raw) = (choice & 4 != 0, choice & 64 != 0);
    match choice >> 3 & 3 {
        0 => {
            let _ = now(client_handshake::list(&mut Script::new(data, raw), tls));
        }
        1 => {
            let _ = replies(data, mode);
        }
        _ => {
            let export = if choice & 32 != 0 { "disk".to_owned() } else { String::new() };
            let contexts = vec![BASE_ALLOCATION.to_owned(), "qemu:dirty-bitmap:b".to_owned()];
            let wish = Wish { export, tls, mode, contexts };
            if let Ok(session) = now(client_handshake::connect(&mut Script::new(data, raw), &wish)) {
                assert!(session.contexts.iter().all(|context| wish.contexts.contains(&context.name)));
                assert!(session.sizes.is_none_or(|sizes| sizes.minimum.is_power_of_two()));
            }
        }
    }
});
