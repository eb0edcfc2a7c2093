//! The client's side of the handshake, over any [`Wire`].

use crate::proto::*;
use std::io;
use thiserror::Error;

/// A connection to a server while it shakes hands.
#[allow(async_fn_in_trait)] // futures stay on their thread
pub trait Wire {
    /// Fills `into`, or fails.
    async fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()>;
    /// Sends `bytes`.
    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Shakes hands for TLS; what follows is encrypted.
    async fn start_tls(&mut self) -> io::Result<()>;
}

/// What a client wants.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The export's name.
    pub export: String,
    /// TLS, or no session.
    pub tls: bool,
    /// The most that headers may be.
    pub mode: HeaderMode,
    /// Metadata contexts; a server need not have them.
    pub contexts: Vec<String>,
}

/// What the two sides agreed upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Size and flags.
    pub info: ExportInfo,
    /// Constraints, if the server told any.
    pub sizes: Option<BlockSizes>,
    /// The headers.
    pub mode: HeaderMode,
    /// Those of the wanted metadata contexts that the server has.
    pub contexts: Vec<MetaContextReply>,
}

/// An export in a server's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// The name.
    pub name: String,
    /// A description for people; empty if there is none.
    pub description: String,
    /// Size and flags, if the server tells them.
    pub info: Option<ExportInfo>,
    /// Constraints, if the server tells them.
    pub sizes: Option<BlockSizes>,
    /// The names of its metadata contexts.
    pub contexts: Vec<String>,
    /// The best headers that the server has.
    pub mode: HeaderMode,
}

/// Why there is no session.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// The connection failed.
    #[error("Failed to read data: {}", eof_text(.0))]
    Io(#[source] io::Error),
    /// The server breaks the protocol.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// The server does not want to.
    #[error("{}", refusal_text(*.option, *.reply))]
    Refused {
        /// What was asked of it.
        option: OptionCode,
        /// What it said.
        reply: ReplyType,
        /// Its words, if any.
        words: String,
    },
    /// TLS was wanted, and the server has none.
    #[error("Server don't support STARTTLS option")]
    NoTls,
    /// TLS did not come about.
    #[error("TLS handshake failed: {0}")]
    Tls(#[source] io::Error),
    /// An old server has one export, without name.
    #[error("Server does not support non-empty export names")]
    NoNames,
    /// An old server cannot list.
    #[error("Server does not support listing exports")]
    NoList,
}

impl HandshakeError {
    /// A line that helps people, if there is one.
    pub fn hint(&self) -> Option<String> {
        let Self::Refused { reply, words, .. } = self else { return None };
        let mut lines = Vec::new();
        if *reply == ReplyType::ErrTlsRequired {
            lines.push("Did you forget a valid tls-creds?".to_owned());
        }
        if !words.is_empty() {
            lines.push(format!("server reported: {words}"));
        }
        if lines.is_empty() { None } else { Some(lines.join("\n")) }
    }
}

fn eof_text(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return "Unexpected end-of-file before all data were read".to_owned();
    }
    error.to_string()
}

fn refusal_text(option: OptionCode, reply: ReplyType) -> String {
    let option = format!("option {} ({})", option.to_wire(), option_name(option));
    match reply {
        ReplyType::ErrUnsupported => format!("Server does not support {option}"),
        ReplyType::ErrPolicy => format!("Denied by server for {option}"),
        ReplyType::ErrInvalid => format!("Invalid parameters for {option}"),
        ReplyType::ErrPlatform => format!("Server lacks support for {option}"),
        ReplyType::ErrTlsRequired => format!("Server requires TLS for {option}"),
        ReplyType::ErrUnknown => "Requested export not available".to_owned(),
        ReplyType::ErrShutdown => format!("Server shutting down before {option}"),
        ReplyType::ErrBlockSizeRequired => format!("Server requires INFO_BLOCK_SIZE for {option}"),
        ReplyType::ErrTooBig => format!("Server finds {option} too big"),
        ReplyType::ErrExtHeaderRequired => format!("Server requires extended headers for {option}"),
        _ => format!("Unknown error code when asking for {option}"),
    }
}

fn option_name(option: OptionCode) -> &'static str {
    match option {
        OptionCode::ExportName => "export name",
        OptionCode::Abort => "abort",
        OptionCode::List => "list",
        OptionCode::StartTls => "starttls",
        OptionCode::Info => "info",
        OptionCode::Go => "go",
        OptionCode::StructuredReply => "structured reply",
        OptionCode::ListMetaContext => "list meta context",
        OptionCode::SetMetaContext => "set meta context",
        OptionCode::ExtendedHeaders => "extended headers",
        OptionCode::Other(_) => "<unknown>",
    }
}

/// The most exports that a list may have.
const MAX_EXPORTS: usize = 10_000;
/// The most replies with information about an export.
const MAX_INFOS: usize = 64;

/// Shakes hands up to the transmission phase.
pub async fn connect<W: Wire>(wire: &mut W, wish: &Wish) -> Result<Session, HandshakeError> {
    let mut client = match Client::greet(wire).await? {
        Greeting::Old(info) if wish.export.is_empty() && !wish.tls => {
            let mode = HeaderMode::Simple;
            return Ok(Session { info, sizes: None, mode, contexts: Vec::new() });
        }
        Greeting::Old(_) if wish.tls => return Err(HandshakeError::NoTls),
        Greeting::Old(_) => return Err(HandshakeError::NoNames),
        Greeting::New(client) => client,
    };
    if wish.tls {
        client.start_tls().await?;
    }
    let mode = client.headers(wish.mode).await?;
    let contexts = match mode {
        HeaderMode::Simple => Vec::new(),
        _ if wish.contexts.is_empty() => Vec::new(),
        _ => client.select_contexts(&wish.export, &wish.contexts).await?,
    };
    let (info, sizes) = match client.info(OptionCode::Go, &wish.export).await? {
        Ok((info, sizes, _)) => (info, sizes),
        Err((ReplyType::ErrUnsupported, _)) if mode != HeaderMode::Extended => {
            (client.export_name(&wish.export).await?, None)
        }
        Err((reply, words)) => {
            let refused = HandshakeError::Refused { option: OptionCode::Go, reply, words };
            // The transmission phase was not entered: the server is told that there will be none.
            client.abort().await;
            return Err(refused);
        }
    };
    Ok(Session { info, sizes, mode, contexts })
}

/// Asks for the list of exports and what the server tells about them, and ends the session.
pub async fn list<W: Wire>(wire: &mut W, tls: bool) -> Result<Vec<ListedExport>, HandshakeError> {
    let mut client = match Client::greet(wire).await? {
        Greeting::Old(_) if tls => return Err(HandshakeError::NoTls),
        Greeting::Old(info) => {
            let (name, description) = (String::new(), String::new());
            let (contexts, mode) = (Vec::new(), HeaderMode::Simple);
            return Ok(vec![ListedExport {
                name,
                description,
                info: Some(info),
                sizes: None,
                contexts,
                mode,
            }]);
        }
        Greeting::New(client) => client,
    };
    if tls {
        client.start_tls().await?;
    }
    if !client.fixed {
        return Err(HandshakeError::NoList);
    }
    let mode = client.headers(HeaderMode::Extended).await?;
    let mut exports = client.list().await?;
    for export in &mut exports {
        export.mode = mode;
        // Servers that do not tell more list names, which is something.
        let Ok((info, sizes, description)) = client.info(OptionCode::Info, &export.name).await? else {
            continue;
        };
        (export.info, export.sizes) = (Some(info), sizes);
        if let Some(description) = description {
            export.description = description;
        }
        if mode != HeaderMode::Simple {
            export.contexts = client.list_contexts(&export.name).await?;
        }
    }
    client.abort().await;
    Ok(exports)
}

enum Greeting<'a, W: Wire> {
    Old(ExportInfo),
    New(Client<'a, W>),
}

struct Client<'a, W: Wire> {
    wire: &'a mut W,
    fixed: bool,
    zeroes: bool,
}

type Info = (ExportInfo, Option<BlockSizes>, Option<String>);

impl<'a, W: Wire> Client<'a, W> {
    async fn greet(wire: &'a mut W) -> Result<Greeting<'a, W>, HandshakeError> {
        let init = read_u64(wire).await?;
        if init != INIT_MAGIC {
            return Err(ProtocolError::Magic { message: "server's greeting", found: init }.into());
        }
        match read_u64(wire).await? {
            OLDSTYLE_MAGIC => {
                let mut bytes = [0; 8 + 4 + HANDSHAKE_ZEROES];
                read(wire, &mut bytes).await?;
                let mut reader = Reader::new(&bytes, "server's greeting");
                let (size, flags) = (reader.u64()?, reader.u32()?);
                // The upper half is of the handshake, in which there is nothing to choose.
                let flags = TransmissionFlags::from_bits_retain(flags as u16);
                Ok(Greeting::Old(ExportInfo { size, flags }))
            }
            OPTION_MAGIC => {
                let mut bytes = [0; 2];
                read(wire, &mut bytes).await?;
                let server = HandshakeFlags::from_bits_truncate(u16::from_be_bytes(bytes));
                let flags = ClientFlags::from_bits_truncate(server.bits().into());
                write(wire, &flags.bits().to_be_bytes()).await?;
                let fixed = flags.contains(ClientFlags::FIXED_NEWSTYLE);
                Ok(Greeting::New(Self { wire, fixed, zeroes: !flags.contains(ClientFlags::NO_ZEROES) }))
            }
            found => Err(ProtocolError::Magic { message: "server's greeting", found }.into()),
        }
    }

    async fn send(&mut self, option: OptionCode, data: &[u8]) -> Result<(), HandshakeError> {
        let mut out = Vec::with_capacity(OptionHeader::SIZE + data.len());
        write_option(option, data, &mut out);
        write(self.wire, &out).await
    }

    /// The next reply, which must be one to `option`.
    async fn reply(&mut self, option: OptionCode) -> Result<OptionReply, HandshakeError> {
        let mut bytes = [0; OptionReplyHeader::SIZE];
        read(self.wire, &mut bytes).await?;
        let header = OptionReplyHeader::decode(&bytes)?;
        if header.option != option {
            return Err(unexpected(format!("reply to option {}", header.option.to_wire())));
        }
        let mut data = vec![0; header.len as usize];
        read(self.wire, &mut data).await?;
        Ok(OptionReply::decode(header.reply, &data)?)
    }

    /// Asks for something that is acknowledged or refused.
    async fn ask(&mut self, option: OptionCode) -> Result<Result<(), (ReplyType, String)>, HandshakeError> {
        self.send(option, &[]).await?;
        match self.reply(option).await? {
            OptionReply::Ack => Ok(Ok(())),
            OptionReply::Error(reply, words) => Ok(Err((reply, words))),
            other => Err(unexpected(format!("{other:?}"))),
        }
    }

    async fn start_tls(&mut self) -> Result<(), HandshakeError> {
        if !self.fixed {
            return Err(HandshakeError::NoTls);
        }
        match self.ask(OptionCode::StartTls).await? {
            Ok(()) => self.wire.start_tls().await.map_err(HandshakeError::Tls),
            Err((reply, words)) => {
                self.abort().await;
                if reply == ReplyType::ErrUnsupported {
                    return Err(HandshakeError::NoTls);
                }
                Err(HandshakeError::Refused { option: OptionCode::StartTls, reply, words })
            }
        }
    }

    /// Asks for the best headers up to `most`. A server that requires TLS says so at the export.
    async fn headers(&mut self, most: HeaderMode) -> Result<HeaderMode, HandshakeError> {
        if !self.fixed || most == HeaderMode::Simple {
            return Ok(HeaderMode::Simple);
        }
        if most == HeaderMode::Extended && self.ask(OptionCode::ExtendedHeaders).await?.is_ok() {
            return Ok(HeaderMode::Extended);
        }
        match self.ask(OptionCode::StructuredReply).await? {
            Ok(()) => Ok(HeaderMode::Structured),
            Err(_) => Ok(HeaderMode::Simple),
        }
    }

    async fn select_contexts(
        &mut self,
        export: &str,
        queries: &[String],
    ) -> Result<Vec<MetaContextReply>, HandshakeError> {
        let mut contexts = self.contexts(OptionCode::SetMetaContext, export, queries).await?;
        contexts.retain(|context| queries.contains(&context.name));
        for (at, context) in contexts.iter().enumerate() {
            let same = |other: &MetaContextReply| other.id == context.id || other.name == context.name;
            if contexts[..at].iter().any(same) {
                return Err(unexpected(format!("second metadata context {} '{}'", context.id, context.name)));
            }
        }
        Ok(contexts)
    }

    async fn list_contexts(&mut self, export: &str) -> Result<Vec<String>, HandshakeError> {
        let contexts = self.contexts(OptionCode::ListMetaContext, export, &[]).await?;
        Ok(contexts.into_iter().map(|context| context.name).collect())
    }

    /// Servers that have no contexts, or not of this export, refuse: there are none then.
    async fn contexts(
        &mut self,
        option: OptionCode,
        export: &str,
        queries: &[String],
    ) -> Result<Vec<MetaContextReply>, HandshakeError> {
        let request = MetaContextRequest { name: export.to_owned(), queries: queries.to_vec() };
        self.send(option, &request.encode()).await?;
        let mut contexts = Vec::new();
        loop {
            match self.reply(option).await? {
                OptionReply::MetaContext(context) if contexts.len() < MAX_QUERIES as usize => {
                    contexts.push(context);
                }
                OptionReply::Ack => return Ok(contexts),
                OptionReply::Error(..) => return Ok(Vec::new()),
                other => return Err(unexpected(format!("{other:?}"))),
            }
        }
    }

    /// `OPT_INFO` or `OPT_GO`.
    async fn info(
        &mut self,
        option: OptionCode,
        export: &str,
    ) -> Result<Result<Info, (ReplyType, String)>, HandshakeError> {
        if !self.fixed {
            return Ok(Err((ReplyType::ErrUnsupported, String::new())));
        }
        let mut infos = vec![InfoType::BlockSize];
        if option == OptionCode::Info {
            infos.insert(0, InfoType::Description);
        }
        let request = GoRequest { name: export.to_owned(), infos };
        self.send(option, &request.encode()).await?;
        let (mut told, mut sizes, mut description) = (None, None, None);
        for _ in 0..MAX_INFOS {
            match self.reply(option).await? {
                OptionReply::Info(InfoReply::Export(info)) => told = Some(info),
                OptionReply::Info(InfoReply::BlockSize(told)) => sizes = Some(told),
                OptionReply::Info(InfoReply::Description(told)) => description = Some(told),
                OptionReply::Info(_) => {}
                OptionReply::Error(reply, words) => return Ok(Err((reply, words))),
                OptionReply::Ack => {
                    let info = told.ok_or_else(|| unexpected("export without size".to_owned()))?;
                    return Ok(Ok((info, sizes, description)));
                }
                other => return Err(unexpected(format!("{other:?}"))),
            }
        }
        Err(unexpected("flood of information about an export".to_owned()))
    }

    async fn export_name(&mut self, export: &str) -> Result<ExportInfo, HandshakeError> {
        self.send(OptionCode::ExportName, export.as_bytes()).await?;
        let mut bytes = [0; ExportInfo::SIZE];
        read(self.wire, &mut bytes).await?;
        if self.zeroes {
            read(self.wire, &mut [0; HANDSHAKE_ZEROES]).await?;
        }
        Ok(ExportInfo::decode(&bytes)?)
    }

    async fn list(&mut self) -> Result<Vec<ListedExport>, HandshakeError> {
        let option = OptionCode::List;
        self.send(option, &[]).await?;
        let mut exports = Vec::new();
        loop {
            match self.reply(option).await? {
                OptionReply::Server(ServerReply { name, description }) if exports.len() < MAX_EXPORTS => {
                    let (info, sizes, contexts, mode) = (None, None, Vec::new(), HeaderMode::Simple);
                    exports.push(ListedExport { name, description, info, sizes, contexts, mode });
                }
                OptionReply::Ack => return Ok(exports),
                OptionReply::Error(reply, words) => {
                    self.abort().await;
                    return Err(HandshakeError::Refused { option, reply, words });
                }
                other => return Err(unexpected(format!("{other:?}"))),
            }
        }
    }

    /// Says goodbye. Whether the server hears it matters to nobody, and its answer is not waited for.
    async fn abort(&mut self) {
        let _ = self.send(OptionCode::Abort, &[]).await;
    }
}

fn unexpected(message: String) -> HandshakeError {
    ProtocolError::Unexpected { message }.into()
}

async fn read<W: Wire>(wire: &mut W, into: &mut [u8]) -> Result<(), HandshakeError> {
    wire.read_exact(into).await.map_err(HandshakeError::Io)
}

async fn read_u64<W: Wire>(wire: &mut W) -> Result<u64, HandshakeError> {
    let mut bytes = [0; 8];
    read(wire, &mut bytes).await?;
    Ok(u64::from_be_bytes(bytes))
}

async fn write<W: Wire>(wire: &mut W, bytes: &[u8]) -> Result<(), HandshakeError> {
    wire.write_all(bytes).await.map_err(HandshakeError::Io)
}
