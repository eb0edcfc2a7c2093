//! The two sides of the handshake against each other, in memory.

use nbd::client::handshake::{self as client_handshake, HandshakeError, Session, Wire, Wish};
use nbd::proto::*;
use nbd::server::handshake::{Exports, Next, OfferedExport, ServerHandshake, TlsPolicy};
use std::future::Future;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

struct TwoExports;

impl Exports for TwoExports {
    fn all(&self) -> Vec<OfferedExport> {
        let flags = TransmissionFlags::SEND_FLUSH | TransmissionFlags::CAN_MULTI_CONN;
        let sizes = BlockSizes { minimum: 512, preferred: 65536, maximum: MAX_PAYLOAD };
        let disk = OfferedExport {
            name: "disk".to_owned(),
            description: Some("a disk".to_owned()),
            info: ExportInfo { size: 12345 * 512, flags },
            sizes,
            contexts: ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"]
                .map(str::to_owned)
                .to_vec(),
        };
        let (name, description, contexts) = (String::new(), None, Vec::new());
        let empty = OfferedExport { name, description, info: ExportInfo { size: 7, flags }, sizes, contexts };
        vec![disk, empty]
    }
}

/// A wire at whose other end a server handshake answers at once.
struct Loopback {
    server: ServerHandshake,
    /// Options that the server does not know.
    unknown: Vec<OptionCode>,
    said_flags: bool,
    to_server: Vec<u8>,
    to_client: Vec<u8>,
    session: Option<Next>,
    encrypted: bool,
}

impl Loopback {
    fn new(tls: TlsPolicy, unknown: &[OptionCode]) -> Self {
        let server = ServerHandshake::new(tls);
        let to_client = server.hello().encode().to_vec();
        let (to_server, session) = (Vec::new(), None);
        let unknown = unknown.to_vec();
        Self { server, unknown, said_flags: false, to_server, to_client, session, encrypted: false }
    }

    fn serve(&mut self) {
        if !self.said_flags && self.to_server.len() >= 4 {
            let flags: Vec<u8> = self.to_server.drain(..4).collect();
            self.server.client_flags(flags.try_into().unwrap()).unwrap();
            self.said_flags = true;
        }
        while let Some(bytes) = self.to_server.first_chunk() {
            let header = OptionHeader::decode(bytes).unwrap();
            let end = OptionHeader::SIZE + header.len as usize;
            let data: Vec<u8> = self.to_server.drain(..end).skip(OptionHeader::SIZE).collect();
            let option =
                if self.unknown.contains(&header.option) { OptionCode::Other(99) } else { header.option };
            let mut out = Vec::new();
            let next = self.server.option(option, &data, &TwoExports, &mut out);
            if option != header.option {
                out[8..12].copy_from_slice(&header.option.to_wire().to_be_bytes());
            }
            self.to_client.append(&mut out);
            self.session = Some(next);
        }
    }
}

impl Wire for Loopback {
    async fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        if self.to_client.len() < into.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        into.copy_from_slice(&self.to_client[..into.len()]);
        self.to_client.drain(..into.len());
        Ok(())
    }

    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to_server.extend_from_slice(bytes);
        self.serve();
        Ok(())
    }

    async fn start_tls(&mut self) -> io::Result<()> {
        assert_eq!(self.session, Some(Next::StartTls));
        self.encrypted = true;
        Ok(())
    }
}

/// Everything here is ready at once.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("a loopback never waits"),
    }
}

fn wish(export: &str, tls: bool) -> Wish {
    let contexts =
        vec![BASE_ALLOCATION.to_owned(), "qemu:dirty-bitmap:b0".to_owned(), "x:unknown".to_owned()];
    Wish { export: export.to_owned(), tls, mode: HeaderMode::Extended, contexts }
}

fn connect(wire: &mut Loopback, wish: &Wish) -> Result<Session, HandshakeError> {
    now(client_handshake::connect(wire, wish))
}

#[test]
fn both_sides_agree() {
    for (unknown, mode) in [
        (&[][..], HeaderMode::Extended),
        (&[OptionCode::ExtendedHeaders], HeaderMode::Structured),
        (&[OptionCode::ExtendedHeaders, OptionCode::StructuredReply], HeaderMode::Simple),
    ] {
        let mut wire = Loopback::new(TlsPolicy::Off, unknown);
        let session = connect(&mut wire, &wish("disk", false)).unwrap();
        assert_eq!(session.mode, mode);
        assert_eq!(session.info.size, 12345 * 512);
        assert_eq!(session.info.flags.contains(TransmissionFlags::SEND_DF), mode != HeaderMode::Simple);
        assert_eq!(session.sizes.unwrap().minimum, 512);
        let names: Vec<&str> = session.contexts.iter().map(|context| context.name.as_str()).collect();
        let expected = [BASE_ALLOCATION, "qemu:dirty-bitmap:b0"];
        assert_eq!(names, if mode == HeaderMode::Simple { &[][..] } else { &expected });
        let Some(Next::Transmission(server)) = wire.session else { panic!("{:?}", wire.session) };
        assert_eq!((server.export.as_str(), server.mode, server.contexts), ("disk", mode, session.contexts));
        assert!(wire.to_client.is_empty() && wire.to_server.is_empty());
    }
}

#[test]
fn servers_without_go_are_asked_by_name() {
    for zeroes in [false, true] {
        let mut wire = Loopback::new(TlsPolicy::Off, &[OptionCode::Go, OptionCode::ExtendedHeaders]);
        if zeroes {
            wire.to_client[17] = HandshakeFlags::FIXED_NEWSTYLE.bits() as u8;
        }
        let session = connect(&mut wire, &wish("", false)).unwrap();
        assert_eq!((session.info.size, session.sizes), (7, None));
        assert!(matches!(wire.session, Some(Next::Transmission(_))));
        assert!(wire.to_client.is_empty());
    }
}

#[test]
fn unknown_exports_are_refused_with_words() {
    let error = connect(&mut Loopback::new(TlsPolicy::Off, &[]), &wish("none", false)).unwrap_err();
    assert_eq!(error.to_string(), "Requested export not available");
    assert_eq!(error.hint().unwrap(), "server reported: export 'none' not present");
}

#[test]
fn nothing_goes_before_tls_where_it_is_required() {
    let mut wire = Loopback::new(TlsPolicy::Required, &[]);
    let error = connect(&mut wire, &wish("disk", false)).unwrap_err();
    assert_eq!(error.to_string(), "Server requires TLS for option 7 (go)");
    assert!(error.hint().unwrap().starts_with("Did you forget a valid tls-creds?"));
    assert!(!wire.encrypted);

    // Even the option that has no refusal.
    let mut server = ServerHandshake::new(TlsPolicy::Required);
    server.client_flags(ClientFlags::all().bits().to_be_bytes()).unwrap();
    let mut out = Vec::new();
    assert_eq!(server.option(OptionCode::ExportName, b"disk", &TwoExports, &mut out), Next::Close);
    assert!(out.is_empty());

    let mut wire = Loopback::new(TlsPolicy::Required, &[]);
    let session = connect(&mut wire, &wish("disk", true)).unwrap();
    assert!(wire.encrypted);
    assert_eq!(session.mode, HeaderMode::Extended);
}

#[test]
fn tls_that_the_server_lacks_ends_the_session() {
    let error = connect(&mut Loopback::new(TlsPolicy::Off, &[]), &wish("disk", true)).unwrap_err();
    assert_eq!(error.to_string(), "Denied by server for option 5 (starttls)");
    let mut old = Loopback::new(TlsPolicy::Off, &[OptionCode::StartTls]);
    let error = connect(&mut old, &wish("disk", true)).unwrap_err();
    assert_eq!(error.to_string(), "Server don't support STARTTLS option");
}

/// What was agreed upon in the clear is forgotten when TLS begins.
#[test]
fn tls_forgets_what_was_agreed_before() {
    let mut server = ServerHandshake::new(TlsPolicy::Required);
    server.client_flags(ClientFlags::all().bits().to_be_bytes()).unwrap();
    let mut out = Vec::new();
    assert_eq!(server.option(OptionCode::StructuredReply, &[], &TwoExports, &mut out), Next::Option);
    assert_eq!(server.option(OptionCode::StartTls, &[], &TwoExports, &mut out), Next::StartTls);
    let Next::Transmission(session) = server.option(OptionCode::ExportName, b"disk", &TwoExports, &mut out)
    else {
        panic!("the export is there")
    };
    assert_eq!(session.mode, HeaderMode::Simple);
    // A second time is nonsense, and does not end the session.
    out.clear();
    assert_eq!(server.option(OptionCode::StartTls, &[], &TwoExports, &mut out), Next::Option);
    let reply = OptionReplyHeader::decode(out.first_chunk().unwrap()).unwrap();
    assert_eq!(reply.reply, ReplyType::ErrInvalid);
}

#[test]
fn lists_tell_everything() {
    let exports = now(client_handshake::list(&mut Loopback::new(TlsPolicy::Off, &[]), false)).unwrap();
    assert_eq!(exports.len(), 2);
    assert_eq!((exports[0].name.as_str(), exports[0].description.as_str()), ("disk", "a disk"));
    assert_eq!(exports[0].contexts.len(), 3);
    assert_eq!(exports[0].sizes.unwrap().preferred, 65536);
    assert_eq!(exports[1].info.unwrap().size, 7);
}

#[test]
fn oldstyle_servers_are_understood() {
    let mut wire = Loopback::new(TlsPolicy::Off, &[]);
    wire.to_client =
        [INIT_MAGIC.to_be_bytes(), OLDSTYLE_MAGIC.to_be_bytes(), 4096_u64.to_be_bytes()].concat();
    wire.to_client.extend_from_slice(&[0, 0, 0, 5]);
    wire.to_client.resize(wire.to_client.len() + HANDSHAKE_ZEROES, 0);
    let bytes = wire.to_client.clone();
    let session = connect(&mut wire, &wish("", false)).unwrap();
    assert_eq!((session.info.size, session.mode), (4096, HeaderMode::Simple));
    assert_eq!(session.info.flags, TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH);
    wire.to_client = bytes;
    let error = connect(&mut wire, &wish("disk", false)).unwrap_err();
    assert_eq!(error.to_string(), "Server does not support non-empty export names");
}

#[test]
fn unknown_client_flags_end_the_connection() {
    let mut server = ServerHandshake::new(TlsPolicy::Off);
    assert!(server.client_flags([0, 0, 0, 4]).is_err());
}
