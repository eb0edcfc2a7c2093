//! Every message survives the way over the wire, and no bytes make the decoders panic or take unbounded memory.

use nbd::proto::*;
use proptest::collection::vec;
use proptest::prelude::*;

fn text() -> impl Strategy<Value = String> {
    "[^\\x00]{0,40}"
}

fn mode() -> impl Strategy<Value = HeaderMode> {
    prop_oneof![Just(HeaderMode::Simple), Just(HeaderMode::Structured), Just(HeaderMode::Extended)]
}

proptest! {
    #[test]
    fn handshake_messages_round_trip(
        name in text(), description in text(), infos in vec(any::<u16>(), 0..9), queries in vec(text(), 0..9),
        size: u64, flags: u16, id: u32, min in 0_u32..=16, more in 0_u32..=8, max in 1_u32 << 24..,
    ) {
        let infos = infos.into_iter().map(InfoType::from_wire).collect();
        let go = GoRequest { name: name.clone(), infos };
        prop_assert_eq!(GoRequest::decode(&go.encode()), Ok(go));
        let contexts = MetaContextRequest { name: name.clone(), queries };
        prop_assert_eq!(MetaContextRequest::decode(&contexts.encode()), Ok(contexts));
        let server = ServerReply { name: name.clone(), description: description.clone() };
        prop_assert_eq!(ServerReply::decode(&server.encode()), Ok(server));
        let context = MetaContextReply { id, name: name.clone() };
        prop_assert_eq!(MetaContextReply::decode(&context.encode()), Ok(context));
        let flags = TransmissionFlags::from_bits_retain(flags);
        let sizes = BlockSizes { minimum: 1 << min, preferred: 1 << (min + more), maximum: max };
        for info in [
            InfoReply::Export(ExportInfo { size, flags }),
            InfoReply::Name(name),
            InfoReply::Description(description),
            InfoReply::BlockSize(sizes),
        ] {
            prop_assert_eq!(InfoReply::decode(&info.encode()), Ok(info));
        }
    }

    #[test]
    fn transmission_messages_round_trip(
        mode in mode(), flags: u16, command: u16, cookie: u64, offset: u64, len: u64, short: u32,
        error in 1_u32.., message in "[^\\p{Cc}]{0,60}", at in proptest::option::of(any::<u64>()),
        extents in vec((1_u64.., any::<u64>()), 1..50), wide: bool, context: u32,
    ) {
        let len = if mode == HeaderMode::Extended { len } else { short.into() };
        let flags = CommandFlags::from_bits_retain(flags);
        let request = Request { flags, command: Command::from_wire(command), cookie, offset, len };
        let mut bytes = Vec::new();
        request.encode(mode, &mut bytes);
        prop_assert_eq!(bytes.len(), Request::size(mode));
        prop_assert_eq!(Request::decode(&bytes, mode), Ok(request));
        if let Ok(payload) = request.payload(mode) {
            prop_assert!(payload <= MAX_PAYLOAD);
        }

        let reply = match mode {
            HeaderMode::Simple => ReplyHeader::Simple { error: ErrorCode::from_wire(error), cookie },
            _ => ReplyHeader::Chunk {
                flags: command,
                kind: ChunkType::from_wire(command),
                cookie,
                offset: (mode == HeaderMode::Extended).then_some(offset),
                len: short % (MAX_PAYLOAD + 9),
            },
        };
        bytes.clear();
        reply.encode(&mut bytes);
        prop_assert_eq!(ReplyHeader::size(*bytes.first_chunk().unwrap(), mode), Ok(bytes.len()));
        prop_assert_eq!(ReplyHeader::decode(&bytes), Ok(reply));

        let chunk = ErrorChunk { error: ErrorCode::from_wire(error), message, offset: at };
        bytes.clear();
        chunk.encode(&mut bytes);
        prop_assert_eq!(Chunk::decode(chunk.kind(), &bytes), Ok(Chunk::Error(chunk)));

        let mask = if wide { u64::MAX } else { u32::MAX.into() };
        let extents = extents.into_iter().map(|(len, status)| Extent { len: (len & mask).max(1), status: status & mask });
        let status = StatusChunk { context, extents: extents.collect() };
        bytes.clear();
        status.encode(wide, &mut bytes);
        let kind = if wide { ChunkType::BlockStatusExt } else { ChunkType::BlockStatus };
        prop_assert_eq!(StatusChunk::decode(kind, &bytes), Ok(status));
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(bytes in vec(any::<u8>(), 0..200), kind: u16, reply: u32, mode in mode()) {
        if let Ok(go) = GoRequest::decode(&bytes) {
            prop_assert_eq!(go.encode(), bytes.clone());
        }
        if let Ok(contexts) = MetaContextRequest::decode(&bytes) {
            prop_assert_eq!(contexts.encode(), bytes.clone());
        }
        if let Ok(Chunk::Hole { offset, len }) = Chunk::decode(ChunkType::from_wire(kind), &bytes) {
            prop_assert_eq!(&bytes[..8], &offset.to_be_bytes());
            prop_assert_eq!(&bytes[8..], &len.to_be_bytes());
        }
        if let Ok(OptionReply::Error(_, words)) = OptionReply::decode(ReplyType::from_wire(reply), &bytes) {
            prop_assert!(!words.contains(char::is_control));
        }
        for kind in [ChunkType::BlockStatus, ChunkType::BlockStatusExt] {
            if let Ok(status) = StatusChunk::decode(kind, &bytes) {
                let mut again = Vec::new();
                status.encode(kind == ChunkType::BlockStatusExt, &mut again);
                prop_assert_eq!(&again, &bytes);
            }
        }
        if let Ok(request) = Request::decode(&bytes, mode) {
            prop_assert_eq!(Request::size(mode), bytes.len());
            prop_assert!(request.payload(mode).unwrap_or(0) <= MAX_PAYLOAD);
        }
    }

    /// The coverage of a read against a plain map of bytes.
    #[test]
    fn reads_are_covered_once(offset in 0_u64..1000, len in 1_u64..64, chunks in vec((0_u64..1100, 0_u64..20), 0..40)) {
        let mut coverage = ReadCoverage::new(offset, len);
        let mut model = vec![false; len as usize];
        for (at, size) in chunks {
            let inside = size > 0 && at >= offset && at + size <= offset + len;
            let free = inside && (at..at + size).all(|byte| !model[(byte - offset) as usize]);
            prop_assert_eq!(coverage.add(at, size).ok(), free.then(|| at - offset));
            if free {
                (at..at + size).for_each(|byte| model[(byte - offset) as usize] = true);
            }
            prop_assert_eq!(coverage.finish().is_ok(), model.iter().all(|byte| *byte));
        }
    }
}

#[test]
fn lengths_are_bounded_before_memory_is_taken() {
    let mut option = Vec::new();
    write_option(OptionCode::Go, &[], &mut option);
    option[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    let header = OptionHeader::decode(option.as_slice().try_into().unwrap());
    assert!(matches!(header, Err(ProtocolError::TooLong { found: 0xffff_ffff, .. })), "{header:?}");

    let queries = [[0; 4], u32::MAX.to_be_bytes()].concat();
    assert!(matches!(MetaContextRequest::decode(&queries), Err(ProtocolError::TooLong { .. })));

    let write = Request {
        flags: CommandFlags::empty(),
        command: Command::Write,
        cookie: 0,
        offset: 0,
        len: u64::from(MAX_PAYLOAD) + 1,
    };
    assert!(matches!(write.payload(HeaderMode::Structured), Err(ProtocolError::TooLong { .. })));
    assert_eq!(Request { command: Command::Trim, ..write }.payload(HeaderMode::Structured), Ok(0));

    // A name with a NUL, and one that is no text.
    for name in [b"a\0b", b"a\xffb"] {
        let go = [&3_u32.to_be_bytes()[..], name, &[0, 0]].concat();
        assert_eq!(GoRequest::decode(&go), Err(ProtocolError::Text { field: "export name" }));
    }
}

/// What 32 bits cannot say is said of the beginning, and the extents behind it are left out.
#[test]
fn long_extents_are_cut() {
    let long = Extent { len: 5 << 32, status: STATE_HOLE | STATE_ZERO };
    let status = StatusChunk { context: 7, extents: vec![long, Extent { len: 1, status: 0 }] };
    let mut bytes = Vec::new();
    status.encode(false, &mut bytes);
    let cut = StatusChunk::decode(ChunkType::BlockStatus, &bytes).unwrap();
    assert_eq!(cut.extents, [Extent { len: 0xffff_0000, status: 3 }]);
}

#[test]
fn errors_map_as_the_specification_says() {
    let linux =
        [(13, ErrorCode::Perm), (30, ErrorCode::Perm), (27, ErrorCode::NoSpc), (122, ErrorCode::NoSpc)];
    for (errno, code) in linux {
        assert_eq!(ErrorCode::from_errno(errno), code);
    }
    assert_eq!(ErrorCode::from_errno(9), ErrorCode::Inval);
    assert_eq!(ErrorCode::from_wire(9999).errno(), 22);
    assert_eq!(ErrorCode::NoSpc.errno(), 28);
}
