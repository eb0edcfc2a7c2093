//! The server's side of the handshake: options in, replies out. No I/O.

use crate::proto::*;

/// What a server tells of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferedExport {
    /// The name.
    pub name: String,
    /// A description for people.
    pub description: Option<String>,
    /// Size, and flags but [`TransmissionFlags::SEND_DF`], which hangs on the headers.
    pub info: ExportInfo,
    /// Constraints for clients that ask for them. Others are served without.
    pub sizes: BlockSizes,
    /// The names of its metadata contexts.
    pub contexts: Vec<String>,
}

/// The exports of a server.
pub trait Exports {
    /// All exports, in the order in which they are listed.
    fn all(&self) -> Vec<OfferedExport>;

    /// The export `name`; the empty name is the default export.
    fn find(&self, name: &str) -> Option<OfferedExport> {
        self.all().into_iter().find(|export| export.name == name)
    }
}

/// Whether a server speaks TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsPolicy {
    /// It does not.
    Off,
    /// It does, and nothing goes without.
    Required,
}

/// What comes after an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another option.
    Option,
    /// A TLS handshake; then another option.
    StartTls,
    /// The end of the session.
    Close,
    /// The transmission phase.
    Transmission(Session),
}

/// What the two sides agreed upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The export's name.
    pub export: String,
    /// The headers.
    pub mode: HeaderMode,
    /// The selected metadata contexts.
    pub contexts: Vec<MetaContextReply>,
}

/// The state of one client's handshake.
#[derive(Debug)]
pub struct ServerHandshake {
    tls: TlsPolicy,
    encrypted: bool,
    flags: ClientFlags,
    mode: HeaderMode,
    /// The contexts that were selected last, and the export that they are of.
    contexts: Option<(String, Vec<MetaContextReply>)>,
}

/// A reply that says what is wrong.
struct Refusal(ReplyType, String);

impl From<ProtocolError> for Refusal {
    fn from(error: ProtocolError) -> Self {
        Self(ReplyType::ErrInvalid, error.to_string())
    }
}

impl ServerHandshake {
    /// The beginning of a handshake.
    pub fn new(tls: TlsPolicy) -> Self {
        let flags = ClientFlags::empty();
        Self { tls, encrypted: false, flags, mode: HeaderMode::Simple, contexts: None }
    }

    /// What the server says first.
    pub fn hello(&self) -> Hello {
        Hello { flags: HandshakeFlags::all() }
    }

    /// Takes the client's answer to [`ServerHandshake::hello`]. An error ends the connection.
    pub fn client_flags(&mut self, bytes: [u8; 4]) -> Result<(), ProtocolError> {
        let bits = u32::from_be_bytes(bytes);
        let field = "client flags";
        self.flags =
            ClientFlags::from_bits(bits).ok_or(ProtocolError::Value { field, found: bits.into() })?;
        Ok(())
    }

    /// Takes the option `option` with its data, appends the replies to `out` (which are to be sent whatever is next),
    /// and says what is next.
    pub fn option(
        &mut self,
        option: OptionCode,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Next {
        if option == OptionCode::ExportName {
            return self.export_name(data, exports, out);
        }
        if !self.flags.contains(ClientFlags::FIXED_NEWSTYLE) {
            return Next::Close;
        }
        match self.answer(option, data, exports, out) {
            Ok(next) => {
                write_option_reply(option, ReplyType::Ack, &[], out);
                next
            }
            Err(Refusal(reply, words)) => {
                let end = words.floor_char_boundary(MAX_STRING);
                write_option_reply(option, reply, &words.as_bytes()[..end], out);
                Next::Option
            }
        }
    }

    fn answer(
        &mut self,
        option: OptionCode,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<Next, Refusal> {
        if option == OptionCode::Abort {
            return Ok(Next::Close);
        }
        if self.tls == TlsPolicy::Required && !self.encrypted && option != OptionCode::StartTls {
            let words = format!("Option {:#x} not permitted before TLS", option.to_wire());
            return Err(Refusal(ReplyType::ErrTlsRequired, words));
        }
        match option {
            OptionCode::StartTls => {
                no_data(data)?;
                self.start_tls()
            }
            OptionCode::List => {
                no_data(data)?;
                for export in exports.all() {
                    let OfferedExport { name, description, .. } = export;
                    let reply = ServerReply { name, description: description.unwrap_or_default() };
                    write_option_reply(option, ReplyType::Server, &reply.encode(), out);
                }
                Ok(Next::Option)
            }
            OptionCode::Info | OptionCode::Go => self.go(option, data, exports, out),
            OptionCode::StructuredReply => {
                no_data(data)?;
                if self.mode == HeaderMode::Extended {
                    let words = "extended headers already negotiated".to_owned();
                    return Err(Refusal(ReplyType::ErrExtHeaderRequired, words));
                }
                self.mode = HeaderMode::Structured;
                Ok(Next::Option)
            }
            OptionCode::ExtendedHeaders => {
                no_data(data)?;
                self.mode = HeaderMode::Extended;
                Ok(Next::Option)
            }
            OptionCode::ListMetaContext | OptionCode::SetMetaContext => {
                self.meta_contexts(option, data, exports, out)
            }
            other => {
                let words = format!("Unsupported option {}", other.to_wire());
                Err(Refusal(ReplyType::ErrUnsupported, words))
            }
        }
    }

    fn start_tls(&mut self) -> Result<Next, Refusal> {
        if self.encrypted {
            return Err(Refusal(ReplyType::ErrInvalid, "TLS already enabled".to_owned()));
        }
        if self.tls == TlsPolicy::Off {
            return Err(Refusal(ReplyType::ErrPolicy, "TLS not configured".to_owned()));
        }
        // Nothing that was agreed upon in the clear stays.
        self.encrypted = true;
        self.mode = HeaderMode::Simple;
        self.contexts = None;
        Ok(Next::StartTls)
    }

    /// `OPT_EXPORT_NAME` has no reply that could say what is wrong.
    fn export_name(&mut self, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Next {
        let in_the_clear = self.tls == TlsPolicy::Required && !self.encrypted;
        let name = Reader::new(data, "export name").rest_text("export name");
        let export = name.ok().and_then(|name| exports.find(name));
        let Some(export) = export.filter(|_| !in_the_clear && self.mode != HeaderMode::Extended) else {
            return Next::Close;
        };
        out.extend_from_slice(&self.export_info(&export).encode());
        if !self.flags.contains(ClientFlags::NO_ZEROES) {
            out.resize(out.len() + HANDSHAKE_ZEROES, 0);
        }
        self.transmission(export.name)
    }

    fn export_info(&self, export: &OfferedExport) -> ExportInfo {
        let mut info = export.info;
        info.flags.set(TransmissionFlags::HAS_FLAGS, true);
        info.flags.set(TransmissionFlags::SEND_DF, self.mode != HeaderMode::Simple);
        let selected = self.contexts.as_ref().is_some_and(|(name, _)| *name == export.name);
        info.flags
            .set(TransmissionFlags::BLOCK_STATUS_PAYLOAD, self.mode == HeaderMode::Extended && selected);
        info
    }

    fn transmission(&mut self, export: String) -> Next {
        let contexts = self.contexts.take().filter(|(name, _)| *name == export);
        let contexts = contexts.map(|(_, contexts)| contexts).unwrap_or_default();
        Next::Transmission(Session { export, mode: self.mode, contexts })
    }

    fn go(
        &mut self,
        option: OptionCode,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<Next, Refusal> {
        let request = GoRequest::decode(data)?;
        let export = find(exports, &request.name)?;
        let mut tell = |info: InfoReply| {
            write_option_reply(option, ReplyType::Info, &info.encode(), out);
        };
        if request.infos.contains(&InfoType::Name) {
            tell(InfoReply::Name(export.name.clone()));
        }
        if let Some(description) = &export.description {
            tell(InfoReply::Description(description.clone()));
        }
        // A client that does not ask for the sizes cannot be trusted to keep to a minimum.
        let mut sizes = export.sizes;
        if !request.infos.contains(&InfoType::BlockSize) {
            sizes.minimum = 1;
        }
        tell(InfoReply::BlockSize(sizes));
        tell(InfoReply::Export(self.export_info(&export)));
        Ok(match option {
            OptionCode::Go => self.transmission(export.name),
            _ => Next::Option,
        })
    }

    fn meta_contexts(
        &mut self,
        option: OptionCode,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<Next, Refusal> {
        let select = option == OptionCode::SetMetaContext;
        if select {
            self.contexts = None;
        }
        if self.mode == HeaderMode::Simple {
            let words = "request option requires structured replies".to_owned();
            return Err(Refusal(ReplyType::ErrInvalid, words));
        }
        let request = MetaContextRequest::decode(data)?;
        let export = find(exports, &request.name)?;
        let all = !select && request.queries.is_empty();
        let wanted = |context: &str| {
            all || request.queries.iter().any(|query| {
                query == context
                    || (!select && matches!(query.as_str(), "base:" | "qemu:" | QEMU_DIRTY_BITMAP))
                        && context.starts_with(query.as_str())
            })
        };
        let mut contexts = Vec::new();
        for (id, name) in (1..).zip(&export.contexts) {
            if wanted(name) {
                // The number means something only where the context is selected.
                let id = if select { id } else { 0 };
                contexts.push(MetaContextReply { id, name: name.clone() });
            }
        }
        for context in &contexts {
            write_option_reply(option, ReplyType::MetaContext, &context.encode(), out);
        }
        if select {
            self.contexts = Some((export.name, contexts));
        }
        Ok(Next::Option)
    }
}

fn find(exports: &dyn Exports, name: &str) -> Result<OfferedExport, Refusal> {
    let unknown = || Refusal(ReplyType::ErrUnknown, format!("export '{name}' not present"));
    exports.find(name).ok_or_else(unknown)
}

fn no_data(data: &[u8]) -> Result<(), Refusal> {
    match data.len() {
        0 => Ok(()),
        extra => Err(ProtocolError::Extra { message: "option", extra }.into()),
    }
}
