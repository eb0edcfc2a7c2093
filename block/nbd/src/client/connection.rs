//! A connection to a server in its transmission phase.

use super::handshake::Session;
use crate::proto::*;
use crate::transport::Transport;
use futures_util::future::{Either, select};
use futures_util::lock::Mutex as AsyncMutex;
use io_loop::{IoBuffer, IoVec};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum CallError {
    /// The connection is gone. Whether the request was executed is not known.
    Lost,
    /// The server failed it.
    Failed(ErrorCode, String),
}

/// A request that waits for its reply. It keeps the memory that the reply goes to.
#[derive(Debug)]
struct Waiting {
    request: Request,
    into: Option<IoVec>,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    coverage: ReadCoverage,
    error: Option<CallError>,
    status: Vec<StatusChunk>,
    done: Option<Result<Vec<StatusChunk>, CallError>>,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Pending {
    next: u64,
    waiting: HashMap<u64, Arc<Waiting>>,
    /// The connection is gone; nothing is added any more.
    closed: bool,
}

/// The beginning of a reply, as far as it has come: whoever reads may be dropped, and another reads on.
#[derive(Debug, Default)]
struct Incoming {
    header: [u8; ReplyHeader::EXTENDED_SIZE],
    got: usize,
}

/// A connection that any number of tasks use, on any threads. There is no task of its own: of those that wait for
/// replies, one reads for all.
#[derive(Debug)]
pub(super) struct Connection {
    transport: Transport,
    session: Session,
    sending: AsyncMutex<()>,
    receiving: AsyncMutex<Incoming>,
    pending: Mutex<Pending>,
    lost: AtomicBool,
}

/// Ends the connection unless it is told that all is well: the stream may be in the middle of a message.
struct Whole<'a>(&'a Connection, bool);

impl Drop for Whole<'_> {
    fn drop(&mut self) {
        if !self.1 {
            self.0.give_up();
        }
    }
}

impl Waiting {
    fn finish(&self, progress: &mut Progress, result: Result<Vec<StatusChunk>, CallError>) {
        progress.done = Some(result);
        if let Some(waker) = progress.waker.take() {
            waker.wake();
        }
    }

    fn is_done(&self) -> bool {
        self.progress.lock().done.is_some()
    }

    async fn until_done(&self) {
        poll_fn(|context| {
            let mut progress = self.progress.lock();
            if progress.done.is_some() {
                return Poll::Ready(());
            }
            progress.waker = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl Connection {
    pub(super) fn new(transport: Transport, session: Session) -> Self {
        Self {
            transport,
            session,
            sending: AsyncMutex::new(()),
            receiving: AsyncMutex::default(),
            pending: Mutex::default(),
            lost: AtomicBool::new(false),
        }
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// Whether nothing can be asked any more.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Ends the connection; all that waits has no answer.
    fn give_up(&self) {
        self.lost.store(true, Ordering::Release);
        self.transport.shut_down();
        let mut pending = self.pending.lock();
        pending.closed = true;
        let waiting = std::mem::take(&mut pending.waiting);
        drop(pending);
        for waiting in waiting.into_values() {
            waiting.finish(&mut waiting.progress.lock(), Err(CallError::Lost));
        }
    }

    /// Says goodbye to the server, and ends.
    pub(super) async fn close(&self) {
        let request = Request {
            flags: CommandFlags::empty(),
            command: Command::Disconnect,
            cookie: 0,
            offset: 0,
            len: 0,
        };
        let mut bytes = Vec::new();
        request.encode(self.session.mode, &mut bytes);
        {
            let _whole = self.sending.lock().await;
            // The server may be gone.
            let _ = self.transport.write_all(&bytes).await;
            self.transport.say_goodbye().await;
        }
        self.give_up();
    }

    /// Sends a request (its cookie is chosen here) with the payload of writes, and waits for the reply: bytes that are
    /// read go to `into`, which is as long as the request says.
    pub(super) async fn call(
        &self,
        mut request: Request,
        payload: Option<&IoVec>,
        into: Option<&IoVec>,
    ) -> Result<Vec<StatusChunk>, CallError> {
        let waiting = {
            let mut pending = self.pending.lock();
            if pending.closed {
                return Err(CallError::Lost);
            }
            request.cookie = pending.next;
            pending.next += 1;
            let coverage = ReadCoverage::new(request.offset, request.len);
            let progress = Progress { coverage, error: None, status: Vec::new(), done: None, waker: None };
            let waiting = Arc::new(Waiting { request, into: into.cloned(), progress: Mutex::new(progress) });
            pending.waiting.insert(request.cookie, waiting.clone());
            waiting
        };
        self.send(&request, payload).await;
        loop {
            let lock = {
                let done = pin!(waiting.until_done());
                match select(done, pin!(self.receiving.lock())).await {
                    Either::Left(_) => None,
                    Either::Right((incoming, _)) => Some(incoming),
                }
            };
            if let Some(mut incoming) = lock {
                while !waiting.is_done() {
                    if self.receive(&mut incoming).await.is_err() {
                        self.give_up();
                    }
                }
            }
            if let Some(result) = waiting.progress.lock().done.take() {
                return result;
            }
        }
    }

    async fn send(&self, request: &Request, payload: Option<&IoVec>) {
        let mut header = Vec::with_capacity(Request::EXTENDED_SIZE);
        request.encode(self.session.mode, &mut header);
        let _in_order = self.sending.lock().await;
        let mut whole = Whole(self, false);
        let sent = match payload {
            None => self.transport.write_all(&header).await,
            Some(payload) => {
                let message = IoVec::chain([IoBuffer::from(&header[..]).into_io(), payload.clone()]);
                self.transport.write_all_vec(&message).await
            }
        };
        whole.1 = sent.is_ok();
    }

    /// Reads one reply or chunk, whosever it is.
    async fn receive(&self, incoming: &mut Incoming) -> io::Result<()> {
        let header = self.header(incoming).await?;
        let (ReplyHeader::Simple { cookie, .. } | ReplyHeader::Chunk { cookie, .. }) = header;
        let waiting = self.pending.lock().waiting.get(&cookie).cloned();
        let waiting = waiting.ok_or_else(|| broken("reply to no request"))?;
        let mut whole = Whole(self, false);
        let done = match header {
            ReplyHeader::Simple { error, .. } => {
                self.simple(&waiting, error).await?;
                true
            }
            ReplyHeader::Chunk { flags, kind, offset, len, .. } => {
                if offset.is_some_and(|offset| offset != waiting.request.offset) {
                    return Err(broken("reply with another offset than its request"));
                }
                self.chunk(&waiting, kind, len).await?;
                flags & REPLY_FLAG_DONE != 0
            }
        };
        if done {
            let mut progress = waiting.progress.lock();
            let result = match progress.error.take() {
                Some(error) => Err(error),
                None => {
                    match waiting.request.command {
                        Command::Read => progress.coverage.finish().map_err(protocol)?,
                        Command::BlockStatus if progress.status.is_empty() => {
                            return Err(broken("reply without block status"));
                        }
                        _ => {}
                    }
                    Ok(std::mem::take(&mut progress.status))
                }
            };
            self.pending.lock().waiting.remove(&cookie);
            waiting.finish(&mut progress, result);
        }
        whole.1 = true;
        Ok(())
    }

    /// The next header. Nothing is lost if this is dropped.
    async fn header(&self, incoming: &mut Incoming) -> io::Result<ReplyHeader> {
        loop {
            let size = match incoming.header[..incoming.got].first_chunk() {
                Some(start) => ReplyHeader::size(*start, self.session.mode).map_err(protocol)?,
                // As many bytes as every header has.
                None if self.session.mode == HeaderMode::Extended => ReplyHeader::EXTENDED_SIZE,
                None => ReplyHeader::SIMPLE_SIZE,
            };
            if incoming.got >= size {
                incoming.got = 0;
                return ReplyHeader::decode(&incoming.header[..size]).map_err(protocol);
            }
            match self.transport.read(&mut incoming.header[incoming.got..size]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => incoming.got += more,
            }
        }
    }

    async fn simple(&self, waiting: &Waiting, error: ErrorCode) -> io::Result<()> {
        if error != ErrorCode::Success {
            waiting.progress.lock().error = Some(CallError::Failed(error, String::new()));
            return Ok(());
        }
        match (waiting.request.command, &waiting.into) {
            (Command::Read, Some(into)) if self.session.mode == HeaderMode::Simple => {
                self.transport.read_exact_vec(into).await?;
                let Request { offset, len, .. } = waiting.request;
                waiting.progress.lock().coverage.add(offset, len).map(drop).map_err(protocol)
            }
            (Command::Read | Command::BlockStatus, _) => {
                Err(broken("reply without chunks to a request that needs them"))
            }
            _ => Ok(()),
        }
    }

    async fn chunk(&self, waiting: &Waiting, kind: ChunkType, len: u32) -> io::Result<()> {
        match (kind, waiting.request.command, &waiting.into) {
            (ChunkType::OffsetData, Command::Read, Some(into)) => {
                let size = len.checked_sub(8).ok_or_else(|| broken("chunk of data that is too short"))?;
                let mut offset = [0; 8];
                self.transport.read_exact(&mut offset).await?;
                let at = waiting.progress.lock().coverage.add(u64::from_be_bytes(offset), size.into());
                let at = at.map_err(protocol)? as usize;
                self.transport.read_exact_vec(&into.slice(at..at + size as usize)).await
            }
            (ChunkType::BlockStatus | ChunkType::BlockStatusExt, Command::BlockStatus, _)
                if (kind == ChunkType::BlockStatusExt) == (self.session.mode == HeaderMode::Extended)
                    && len <= StatusChunk::MAX_SIZE =>
            {
                let payload = self.payload(len).await?;
                let status = StatusChunk::decode(kind, &payload).map_err(protocol)?;
                let known = self.session.contexts.iter().any(|context| context.id == status.context);
                let mut progress = waiting.progress.lock();
                let again = progress.status.iter().any(|other| other.context == status.context);
                if !known || again {
                    return Err(broken("block status of a context that was not asked for"));
                }
                progress.status.push(status);
                Ok(())
            }
            _ if len <= Chunk::MAX_SIZE => {
                let payload = self.payload(len).await?;
                let chunk = Chunk::decode(kind, &payload).map_err(protocol)?;
                let mut progress = waiting.progress.lock();
                match (chunk, &waiting.into) {
                    (Chunk::None, _) => {}
                    (Chunk::Error(chunk), _) => {
                        // The first one counts.
                        progress.error.get_or_insert(CallError::Failed(chunk.error, chunk.message));
                    }
                    (Chunk::Hole { offset, len }, Some(into)) => {
                        let at = progress.coverage.add(offset, len.into()).map_err(protocol)?;
                        into.zero(at as usize, len as usize);
                    }
                    (Chunk::Hole { .. }, None) => return Err(broken("hole in a reply to no read")),
                }
                Ok(())
            }
            _ => Err(broken("chunk that does not belong to its request")),
        }
    }

    async fn payload(&self, len: u32) -> io::Result<Vec<u8>> {
        let mut payload = vec![0; len as usize];
        self.transport.read_exact(&mut payload).await?;
        Ok(payload)
    }
}

fn broken(message: &str) -> io::Error {
    protocol(ProtocolError::Unexpected { message: message.to_owned() })
}

fn protocol(error: ProtocolError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
