//! The transmission phase of one client.

use super::SessionError;
use super::export::Export;
use super::handshake::Session;
use crate::proto::*;
use crate::transport::Transport;
use block_graph::Error;
use futures_util::future::{Either, select};
use futures_util::lock::Mutex as AsyncMutex;
use futures_util::stream::{FuturesUnordered, StreamExt};
use io_loop::{IoBuffer, IoVec};
use std::io;
use std::pin::pin;
use std::sync::Arc;

/// The most requests of a client that are worked on at a time. Others wait in its socket.
const MOST_REQUESTS: usize = 64;
/// The most bytes of payload that these may have in sum, unless one alone has more.
const MOST_BYTES: u64 = 64 << 20;
/// The most extents in a reply to a request for block status.
const MOST_EXTENTS: usize = 1 << 17;
/// Reads below this length are answered with one chunk, without asking where there are holes.
const SPARSE_READ: u64 = 64 << 10;

pub(super) struct Connection {
    transport: Transport,
    session: Session,
    export: Arc<Export>,
    /// Held by who sends: replies are whole.
    sending: AsyncMutex<()>,
}

/// A request with its payload.
struct Job {
    request: Request,
    payload: Option<IoVec>,
}

impl Job {
    /// Bytes of memory that it takes while it is worked on.
    fn weight(&self) -> u64 {
        match self.request.command {
            Command::Read => self.request.len.min(MAX_PAYLOAD.into()),
            Command::Cache => self.request.len.min(1 << 20),
            _ => self.payload.as_ref().map_or(0, |payload| payload.len() as u64),
        }
    }
}

/// What a request is refused or fails with.
struct Failure {
    error: ErrorCode,
    message: String,
}

impl Failure {
    fn new(error: ErrorCode, message: impl Into<String>) -> Self {
        Self { error, message: message.into() }
    }

    fn of(error: &Error, doing: &str) -> Self {
        Self::new(ErrorCode::from_errno(error.errno().number()), format!("{doing}: {error}"))
    }
}

/// What a request succeeds with.
enum Answer {
    /// Nothing but that.
    Done,
    /// Bytes, and which parts of them are holes: offset from the request's, length, whether it is one.
    Data(IoVec, Vec<(u64, u64, bool)>),
    /// Extents.
    Status(Vec<StatusChunk>),
}

impl Connection {
    pub(super) fn new(transport: Transport, session: Session, export: Arc<Export>) -> Self {
        Self { transport, session, export, sending: AsyncMutex::new(()) }
    }

    pub(super) async fn serve(self) -> Result<(), SessionError> {
        let mut jobs = FuturesUnordered::new();
        let mut weight = 0;
        let mut result = Ok(());
        'requests: loop {
            while jobs.len() >= MOST_REQUESTS || (weight >= MOST_BYTES && !jobs.is_empty()) {
                match jobs.next().await {
                    Some(Ok(done)) => weight -= done,
                    Some(Err(error)) => {
                        result = Err(error);
                        break 'requests;
                    }
                    None => {}
                }
            }
            let mut next = pin!(self.next());
            let job = loop {
                if jobs.is_empty() {
                    break next.as_mut().await;
                }
                match select(next.as_mut(), jobs.next()).await {
                    Either::Left((job, _)) => break job,
                    Either::Right((Some(Ok(done)), _)) => weight -= done,
                    Either::Right((Some(Err(error)), _)) => break Err(error),
                    Either::Right((None, _)) => {}
                }
            };
            match job {
                Ok(Some(job)) => {
                    weight += job.weight();
                    jobs.push(self.work(job));
                }
                Ok(None) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        // What was asked for is done, even if nobody hears of it any more.
        while let Some(done) = jobs.next().await {
            result = result.and(done.map(drop));
        }
        drop(jobs);
        self.transport.say_goodbye().await;
        result
    }

    /// The next request; `None` is the client's goodbye.
    async fn next(&self) -> Result<Option<Job>, SessionError> {
        let mode = self.session.mode;
        let mut header = [0; Request::EXTENDED_SIZE];
        let header = &mut header[..Request::size(mode)];
        if !self.transport.read_exact_or_end(header).await? {
            return Ok(None);
        }
        let request = Request::decode(header, mode)?;
        if request.command == Command::Disconnect {
            return Ok(None);
        }
        let len = request.payload(mode)? as usize;
        let payload = if len > 0 {
            let payload = IoBuffer::scratch(len).into_io();
            self.transport.read_exact_vec(&payload).await?;
            Some(payload)
        } else {
            None
        };
        Ok(Some(Job { request, payload }))
    }

    /// Does what is asked for, and answers; returns the job's weight.
    async fn work(&self, job: Job) -> Result<u64, SessionError> {
        let outcome = match self.refusal(&job) {
            None => self.execute(&job).await,
            Some(refusal) => Err(refusal),
        };
        let message = self.reply(&job.request, outcome);
        let _whole = self.sending.lock().await;
        let sent = self.transport.write_all_vec(&message).await;
        if sent.is_err() {
            // The reader is to notice, which waits for the client.
            self.transport.shut_down();
        }
        sent?;
        Ok(job.weight())
    }

    /// Why the request is not even tried.
    fn refusal(&self, job: &Job) -> Option<Failure> {
        let Request { flags, command, offset, len, .. } = job.request;
        let mode = self.session.mode;
        let writes = matches!(command, Command::Write | Command::WriteZeroes | Command::Trim);
        if writes && !self.export.writable() {
            return Some(Failure::new(ErrorCode::Perm, "Export is read-only"));
        }
        let mut allowed = CommandFlags::FUA;
        allowed |= match command {
            Command::Read if mode != HeaderMode::Simple => CommandFlags::DF,
            Command::WriteZeroes => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
            Command::BlockStatus if mode == HeaderMode::Extended => {
                CommandFlags::REQ_ONE | CommandFlags::PAYLOAD_LEN
            }
            Command::BlockStatus => CommandFlags::REQ_ONE,
            Command::Write if mode == HeaderMode::Extended => CommandFlags::PAYLOAD_LEN,
            _ => CommandFlags::empty(),
        };
        if !allowed.contains(flags) {
            let message = format!("unsupported flags for command (got {:#x})", flags.bits());
            return Some(Failure::new(ErrorCode::Inval, message));
        }
        if matches!(command, Command::Read | Command::Cache) && len > MAX_PAYLOAD.into() {
            let message = format!("len ({len}) is larger than max len ({MAX_PAYLOAD})");
            return Some(Failure::new(ErrorCode::Inval, message));
        }
        // The length of a status request with a payload is the payload's.
        let ranged = command != Command::Flush && job.payload.is_none() || command == Command::Write;
        let size = self.export.len();
        if ranged && offset.checked_add(len).is_none_or(|end| end > size) {
            let full = matches!(command, Command::Write | Command::WriteZeroes);
            let error = if full { ErrorCode::NoSpc } else { ErrorCode::Inval };
            let message = format!("operation past EOF; From: {offset}, Len: {len}, Size: {size}");
            return Some(Failure::new(error, message));
        }
        None
    }

    async fn execute(&self, job: &Job) -> Result<Answer, Failure> {
        let Request { flags, command, offset, len, .. } = job.request;
        let export = &self.export;
        let fua = flags.contains(CommandFlags::FUA);
        match command {
            Command::Read => return self.read(&job.request).await,
            Command::BlockStatus => return self.block_status(job).await,
            Command::Write => {
                if let Some(payload) = &job.payload {
                    let written = export.write(offset, payload, fua).await;
                    written.map_err(|error| Failure::of(&error, "writing to file failed"))?;
                }
            }
            Command::WriteZeroes => {
                let unmap = !flags.contains(CommandFlags::NO_HOLE);
                let fast = flags.contains(CommandFlags::FAST_ZERO);
                let written = export.write_zeroes(offset, len, unmap, fast, fua).await;
                written.map_err(|error| Failure::of(&error, "writing to file failed"))?;
            }
            Command::Trim => {
                let mut trimmed = export.discard(offset, len).await;
                if fua {
                    trimmed = match trimmed {
                        Ok(()) => export.flush().await,
                        failed => failed,
                    };
                }
                trimmed.map_err(|error| Failure::of(&error, "discard failed"))?;
            }
            Command::Flush => {
                export.flush().await.map_err(|error| Failure::of(&error, "flush failed"))?;
            }
            Command::Cache => {
                let cached = export.cache(offset, len).await;
                cached.map_err(|error| Failure::of(&error, "caching data failed"))?;
            }
            Command::Disconnect | Command::Other(_) => {
                let message = format!("invalid request type ({}) received", command.to_wire());
                return Err(Failure::new(ErrorCode::Inval, message));
            }
        }
        Ok(Answer::Done)
    }

    async fn read(&self, request: &Request) -> Result<Answer, Failure> {
        let Request { flags, offset, len, .. } = *request;
        if flags.contains(CommandFlags::FUA) && self.export.writable() {
            let flushed = self.export.flush().await;
            flushed.map_err(|error| Failure::of(&error, "flush failed"))?;
        }
        let data = IoBuffer::scratch(len as usize).into_io();
        let whole = self.session.mode == HeaderMode::Simple || flags.contains(CommandFlags::DF);
        let mut parts = Vec::new();
        if whole || len < SPARSE_READ {
            parts.push((0, len, false));
        } else {
            parts = self.parts(offset, len).await;
        }
        for (at, part, hole) in &parts {
            if !hole {
                let piece = data.slice(*at as usize..(at + part) as usize);
                let read = self.export.read(offset + at, &piece).await;
                read.map_err(|error| Failure::of(&error, "reading from file failed"))?;
            }
        }
        Ok(Answer::Data(data, parts))
    }

    /// Where a read finds zeroes without reading: its whole length in parts. Not to know is no failure.
    async fn parts(&self, offset: u64, len: u64) -> Vec<(u64, u64, bool)> {
        let most = (len / 4096) as usize;
        let mut parts: Vec<(u64, u64, bool)> = Vec::new();
        let mut done = 0;
        for extent in self.export.extents(BASE_ALLOCATION, offset, len, most).await.unwrap_or_default() {
            let hole = extent.status & STATE_ZERO != 0;
            match parts.last_mut() {
                Some(last) if last.2 == hole => last.1 += extent.len,
                _ => parts.push((done, extent.len, hole)),
            }
            done += extent.len;
        }
        if done < len {
            parts.push((done, len - done, false));
        }
        parts
    }

    async fn block_status(&self, job: &Job) -> Result<Answer, Failure> {
        let Request { flags, offset, mut len, .. } = job.request;
        let mut contexts: Vec<&MetaContextReply> = self.session.contexts.iter().collect();
        if let Some(payload) = &job.payload {
            let invalid = || Failure::new(ErrorCode::Inval, "invalid payload of block status");
            let bytes = if payload.len() <= 4096 { payload.to_vec() } else { Vec::new() };
            let mut reader = Reader::new(&bytes, "payload of block status");
            len = reader.u64().map_err(|_| invalid())?;
            let mut wanted = Vec::new();
            while reader.left() > 0 {
                let id = reader.u32().map_err(|_| invalid())?;
                if wanted.contains(&id) || !contexts.iter().any(|context| context.id == id) {
                    return Err(invalid());
                }
                wanted.push(id);
            }
            contexts.retain(|context| wanted.contains(&context.id));
            if offset.checked_add(len).is_none_or(|end| end > self.export.len()) {
                return Err(Failure::new(ErrorCode::Inval, "operation past EOF"));
            }
        }
        if contexts.is_empty() {
            return Err(Failure::new(ErrorCode::Inval, "CMD_BLOCK_STATUS not negotiated"));
        }
        if len == 0 {
            return Err(Failure::new(ErrorCode::Inval, "need non-zero length"));
        }
        let most = if flags.contains(CommandFlags::REQ_ONE) { 1 } else { MOST_EXTENTS };
        // What 32 bits cannot say need not be looked at either.
        let len = if self.session.mode == HeaderMode::Extended { len } else { len.min(0xffff_0000) };
        let mut chunks = Vec::new();
        for context in contexts {
            let extents = self.export.extents(&context.name, offset, len, most).await;
            let extents = extents.map_err(|error| Failure::of(&error, "can't get block status"))?;
            chunks.push(StatusChunk { context: context.id, extents });
        }
        Ok(Answer::Status(chunks))
    }

    fn reply(&self, request: &Request, outcome: Result<Answer, Failure>) -> IoVec {
        let mode = self.session.mode;
        let offset = (mode == HeaderMode::Extended).then_some(request.offset);
        let cookie = request.cookie;
        let chunk =
            |flags, kind, len: usize| ReplyHeader::Chunk { flags, kind, cookie, offset, len: len as u32 };
        let mut out = Vec::new();
        match outcome {
            Err(Failure { error, .. }) if mode == HeaderMode::Simple => {
                ReplyHeader::Simple { error, cookie }.encode(&mut out);
            }
            Err(Failure { error, message }) => {
                let failure = ErrorChunk { error, message, offset: None };
                let mut payload = Vec::new();
                failure.encode(&mut payload);
                chunk(REPLY_FLAG_DONE, failure.kind(), payload.len()).encode(&mut out);
                out.extend_from_slice(&payload);
            }
            Ok(Answer::Data(data, _)) if mode == HeaderMode::Simple => {
                ReplyHeader::Simple { error: ErrorCode::Success, cookie }.encode(&mut out);
                return IoVec::chain([IoBuffer::from(&out[..]).into_io(), data]);
            }
            Ok(Answer::Data(data, parts)) if !data.is_empty() => {
                return data_chunks(request, &data, &parts, offset);
            }
            Ok(Answer::Status(chunks)) => {
                let wide = mode == HeaderMode::Extended;
                let kind = if wide { ChunkType::BlockStatusExt } else { ChunkType::BlockStatus };
                for (left, status) in (0..chunks.len()).rev().zip(&chunks) {
                    let mut payload = Vec::new();
                    status.encode(wide, &mut payload);
                    let flags = if left == 0 { REPLY_FLAG_DONE } else { 0 };
                    chunk(flags, kind, payload.len()).encode(&mut out);
                    out.extend_from_slice(&payload);
                }
            }
            Ok(_) if mode == HeaderMode::Simple => {
                ReplyHeader::Simple { error: ErrorCode::Success, cookie }.encode(&mut out);
            }
            Ok(_) => chunk(REPLY_FLAG_DONE, ChunkType::None, 0).encode(&mut out),
        }
        IoBuffer::from(&out[..]).into_io()
    }
}

/// The reply to a read in chunks of data and holes.
fn data_chunks(request: &Request, data: &IoVec, parts: &[(u64, u64, bool)], offset: Option<u64>) -> IoVec {
    let mut headers = Vec::new();
    let mut ends = Vec::new();
    for (left, (at, len, hole)) in (0..parts.len()).rev().zip(parts) {
        let flags = if left == 0 { REPLY_FLAG_DONE } else { 0 };
        let (kind, size) =
            if *hole { (ChunkType::OffsetHole, 12) } else { (ChunkType::OffsetData, 8 + *len as u32) };
        ReplyHeader::Chunk { flags, kind, cookie: request.cookie, offset, len: size }.encode(&mut headers);
        headers.extend_from_slice(&(request.offset + at).to_be_bytes());
        if *hole {
            headers.extend_from_slice(&(*len as u32).to_be_bytes());
        }
        ends.push(headers.len());
    }
    let headers = IoBuffer::from(&headers[..]).into_io();
    let mut start = 0;
    let mut pieces = Vec::new();
    for (end, (at, len, hole)) in ends.into_iter().zip(parts) {
        pieces.push(headers.slice(start..end));
        start = end;
        if !hole {
            pieces.push(data.slice(*at as usize..(at + len) as usize));
        }
    }
    IoVec::chain(pieces)
}

impl From<SessionError> for io::Error {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Io(error) | SessionError::Tls(error) => error,
            other => Self::other(other),
        }
    }
}
