//! A client's way to its server: connections, one after another.

use super::address::Address;
use super::connection::{CallError, Connection};
use super::handshake::{self, HandshakeError, ListedExport, Session, Wire, Wish};
use crate::proto::*;
use crate::tls::ClientCredentials;
use crate::transport::Transport;
use block_graph::{Errno, Error, Result};
use futures_util::lock::Mutex as AsyncMutex;
use io_loop::{IoVec, Stream};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most requests in flight: more only wait in the server.
const MOST_REQUESTS: usize = 64;
/// How long after a connection that did not come about the next is tried, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// How a server's export is reached.
#[derive(Clone, Debug)]
pub struct LinkOptions {
    /// Where the server is.
    pub address: Address,
    /// The export.
    pub export: String,
    /// For TLS: credentials, and the name that the server's certificate must have.
    pub tls: Option<(ClientCredentials, String)>,
    /// A metadata context to look at in the place of [`BASE_ALLOCATION`].
    pub context: Option<String>,
    /// How long requests wait for a lost connection to come again.
    pub reconnect_delay: Duration,
    /// How long a first connection is tried for.
    pub open_timeout: Duration,
}

impl LinkOptions {
    /// The metadata context that is looked at.
    pub(super) fn context(&self) -> &str {
        self.context.as_deref().unwrap_or(BASE_ALLOCATION)
    }
}

/// A connection that shakes hands.
struct Shaking<'a> {
    stream: Stream,
    transport: Transport,
    tls: Option<&'a (ClientCredentials, String)>,
}

impl Wire for Shaking<'_> {
    async fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        self.transport.read_exact(into).await
    }

    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.transport.write_all(bytes).await
    }

    async fn start_tls(&mut self) -> io::Result<()> {
        let (credentials, host) = self.tls.ok_or(io::ErrorKind::Unsupported)?;
        self.transport = Transport::Tls(Box::new(credentials.connect(self.stream.clone(), host).await?));
        Ok(())
    }
}

fn as_error(error: HandshakeError) -> Error {
    let errno = match &error {
        HandshakeError::Io(error) | HandshakeError::Tls(error) => {
            error.raw_os_error().map_or(Errno::IO, Errno::new)
        }
        HandshakeError::Refused { reply: ReplyType::ErrUnknown, .. } => Errno::NOT_FOUND,
        _ => Errno::INVALID,
    };
    let hint = error.hint();
    let error = Error::of(errno, error);
    match hint {
        Some(hint) => hint.lines().fold(error, Error::hint),
        None => error,
    }
}

async fn dial(options: &LinkOptions) -> Result<Connection> {
    let stream = options.address.connect().await?;
    let transport = Transport::Plain(stream.clone());
    let mut wire = Shaking { stream, transport, tls: options.tls.as_ref() };
    let contexts = vec![options.context().to_owned()];
    let (export, mode) = (options.export.clone(), HeaderMode::Extended);
    let wish = Wish { export, tls: options.tls.is_some(), mode, contexts };
    let session = handshake::connect(&mut wire, &wish).await.map_err(as_error)?;
    Ok(Connection::new(wire.transport, session))
}

/// The exports of a server, with what it tells about them.
///
/// # Errors
/// The host's, or the server's.
pub async fn dial_list(
    address: &Address,
    tls: Option<&(ClientCredentials, String)>,
) -> Result<Vec<ListedExport>> {
    let stream = address.connect().await?;
    let transport = Transport::Plain(stream.clone());
    let mut wire = Shaking { stream, transport, tls };
    let list = handshake::list(&mut wire, tls.is_some()).await.map_err(as_error);
    wire.transport.say_goodbye().await;
    list
}

#[derive(Debug)]
struct State {
    connection: Option<Arc<Connection>>,
    /// When the last connection was found to be lost.
    lost: Option<Instant>,
    /// When the next may be tried.
    next: Instant,
    pause: Duration,
}

/// A link that outlives its connections.
#[derive(Debug)]
pub(super) struct Link {
    options: LinkOptions,
    /// What the first connection agreed upon: later ones must agree upon the same.
    first: Session,
    state: AsyncMutex<State>,
    slots: Slots,
}

impl Link {
    /// Connects, trying as long as the options say.
    pub(super) async fn open(options: LinkOptions) -> Result<Self> {
        let until = Instant::now() + options.open_timeout;
        let mut pause = RETRY.0;
        let connection = loop {
            match dial(&options).await {
                Ok(connection) => break connection,
                Err(error) if Instant::now() + pause >= until => return Err(error),
                Err(_) => io_loop::sleep(pause).await,
            }
            pause = (pause * 2).min(RETRY.1);
        };
        let first = connection.session().clone();
        let state = State {
            connection: Some(Arc::new(connection)),
            lost: None,
            next: Instant::now(),
            pause: RETRY.0,
        };
        Ok(Self { options, first, state: AsyncMutex::new(state), slots: Slots::new(MOST_REQUESTS) })
    }

    pub(super) fn options(&self) -> &LinkOptions {
        &self.options
    }

    pub(super) fn session(&self) -> &Session {
        &self.first
    }

    /// The server's export is what it was, or requests would do harm.
    fn is_same(&self, now: &Session) -> bool {
        let wanted = self.first.info.flags;
        let gone_read_only = now.info.flags.contains(TransmissionFlags::READ_ONLY)
            && !wanted.contains(TransmissionFlags::READ_ONLY);
        let minimum = |session: &Session| session.sizes.map_or(1, |sizes| sizes.minimum);
        let maximum = |session: &Session| session.sizes.map_or(MAX_PAYLOAD, |sizes| sizes.maximum);
        now.info.size == self.first.info.size
            && !gone_read_only
            && minimum(now) <= minimum(&self.first)
            && maximum(now) >= maximum(&self.first).min(MAX_PAYLOAD)
            && (self.first.mode != HeaderMode::Extended || now.mode == HeaderMode::Extended)
            && (wanted - now.info.flags - TransmissionFlags::CAN_MULTI_CONN - TransmissionFlags::READ_ONLY)
                .is_empty()
    }

    /// A connection that is not known to be lost. Waits for one as long as the options say; later each request that
    /// comes has it tried again, but not too often.
    async fn connection(&self) -> Result<Arc<Connection>> {
        loop {
            let mut state = self.state.lock().await;
            if let Some(connection) = state.connection.as_ref().filter(|connection| !connection.is_lost()) {
                return Ok(connection.clone());
            }
            state.connection = None;
            let now = Instant::now();
            let lost = *state.lost.get_or_insert(now);
            let waits = now < lost + self.options.reconnect_delay;
            if state.next <= now {
                match dial(&self.options).await {
                    Ok(connection) if self.is_same(connection.session()) => {
                        let connection = Arc::new(connection);
                        state.connection = Some(connection.clone());
                        (state.lost, state.pause) = (None, RETRY.0);
                        return Ok(connection);
                    }
                    Ok(connection) => connection.close().await,
                    Err(error) => tracing::debug!("reconnecting to {}: {error}", self.options.address),
                }
                state.next = Instant::now() + state.pause;
                state.pause = (state.pause * 2).min(RETRY.1);
            }
            if !waits {
                return Err(Error::errno_only(Errno::IO));
            }
            let next = state.next;
            drop(state);
            io_loop::sleep(next.saturating_duration_since(Instant::now())).await;
        }
    }

    /// Has the server execute a request. If the connection is lost and comes again in time, it is sent again.
    pub(super) async fn call(
        &self,
        request: Request,
        payload: Option<&IoVec>,
        into: Option<&IoVec>,
    ) -> Result<(Vec<StatusChunk>, Arc<Connection>)> {
        let _slot = self.slots.take().await;
        loop {
            let connection = self.connection().await?;
            match connection.call(request, payload, into).await {
                Ok(status) => return Ok((status, connection)),
                Err(CallError::Lost) if self.options.reconnect_delay.is_zero() => {
                    return Err(Error::errno_only(Errno::IO));
                }
                Err(CallError::Lost) => {}
                Err(CallError::Failed(code, message)) => {
                    let errno = Errno::new(code.errno());
                    let message = if message.is_empty() { errno.to_string() } else { message };
                    return Err(Error::new(errno, message));
                }
            }
        }
    }

    /// Says goodbye.
    pub(super) async fn close(&self) {
        if let Some(connection) = self.state.lock().await.connection.take() {
            connection.close().await;
        }
    }
}

/// So many may be taken at a time.
#[derive(Debug)]
struct Slots {
    state: parking_lot::Mutex<(usize, Vec<std::task::Waker>)>,
}

/// One that is taken, until it is dropped.
struct Slot<'a>(&'a Slots);

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.0 += 1;
        let waiting = std::mem::take(&mut state.1);
        drop(state);
        waiting.into_iter().for_each(std::task::Waker::wake);
    }
}

impl Slots {
    fn new(count: usize) -> Self {
        Self { state: parking_lot::Mutex::new((count, Vec::new())) }
    }

    async fn take(&self) -> Slot<'_> {
        std::future::poll_fn(|context| {
            let mut state = self.state.lock();
            if state.0 > 0 {
                state.0 -= 1;
                return std::task::Poll::Ready(Slot(self));
            }
            state.1.push(context.waker().clone());
            std::task::Poll::Pending
        })
        .await
    }
}
