//! A network block device's client that says anything, against the server's handshake and its decoder of requests.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd::proto::*;
use nbd::server::handshake::{Exports, Next, OfferedExport, ServerHandshake, Session, TlsPolicy};

struct TwoExports;

impl Exports for TwoExports {
    fn all(&self) -> Vec<OfferedExport> {
        let export = |name: &str, contexts: &[&str]| OfferedExport {
            name: name.to_owned(),
            description: (!name.is_empty()).then(|| "words".to_owned()),
            info: ExportInfo { size: 1 << 30, flags: TransmissionFlags::SEND_FLUSH },
            sizes: BlockSizes::DEFAULT,
            contexts: contexts.iter().map(|name| (*name).to_owned()).collect(),
        };
        vec![export("", &[]), export("d", &[BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, "qemu:dirty-bitmap:b"])]
    }
}

/// A client's option: its code and length are a byte each, unless `raw`.
fn option(data: &mut &[u8], raw: bool) -> Option<(OptionCode, Vec<u8>)> {
    let (option, len) = if raw {
        let (header, rest) = data.split_first_chunk()?;
        *data = rest;
        let header = OptionHeader::decode(header).ok()?;
        (header.option, header.len as usize)
    } else {
        let (&[option, len], rest) = data.split_first_chunk()?;
        *data = rest;
        (OptionCode::from_wire(u32::from(option) % 13), usize::from(len))
    };
    let (payload, rest) = data.split_at_checked(len)?;
    *data = rest;
    Some((option, payload.to_vec()))
}

/// The handshake, up to the session and what follows it.
fn handshake<'a>(policy: TlsPolicy, raw: bool, mut data: &'a [u8]) -> Option<(Session, &'a [u8])> {
    let mut server = ServerHandshake::new(policy);
    let (&[choice], rest) = data.split_first_chunk()?;
    data = rest;
    server.client_flags([0, 0, 0, choice & 7]).ok()?;
    let mut encrypted = false;
    let mut out = Vec::new();
    loop {
        let (option, payload) = option(&mut data, raw)?;
        out.clear();
        match server.option(option, &payload, &TwoExports, &mut out) {
            Next::Option => assert!(!out.is_empty(), "no answer"),
            Next::StartTls => {
                assert!(policy == TlsPolicy::Required && !encrypted);
                encrypted = true;
            }
            Next::Close => return None,
            Next::Transmission(session) => {
                assert!(encrypted || policy == TlsPolicy::Off, "an export in the clear");
                assert!(session.contexts.is_empty() || session.mode != HeaderMode::Simple);
                return Some((session, data));
            }
        }
        // Replies are longer than what asks for them, but not by any factor.
        assert!(out.len() <= 4096 + 64 * payload.len(), "{} bytes", out.len());
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, data)) = data.split_first() else { return };
    let policy = if choice & 1 != 0 { TlsPolicy::Required } else { TlsPolicy::Off };
    let Some((session, mut data)) = handshake(policy, choice & 2 != 0, data) else { return };
    while let Some((header, rest)) = data.split_at_checked(Request::size(session.mode)) {
        let Ok(request) = Request::decode(header, session.mode) else { return };
        let Ok(payload) = request.payload(session.mode) else { return };
        assert!(payload <= MAX_PAYLOAD);
        let Some((_, rest)) = rest.split_at_checked(payload as usize) else { return };
        data = rest;
    }
});
