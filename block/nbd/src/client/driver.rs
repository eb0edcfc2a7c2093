//! The driver `nbd`.

use super::address::{Address, parse_filename};
use super::link::{Link, LinkOptions};
use crate::proto::*;
use crate::tls::ClientCredentials;
use block_graph::{
    BlockStatus, Driver, DriverKind, Errno, Error, Limits, OpenContext, OpenFlags, Options, RangeLock,
    Result, Truncate, WriteFlags, ZeroFlags, async_trait,
};
use io_loop::{IoBuffer, IoVec};
use parking_lot::RwLock;
use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Clients' TLS credentials by the names that the option `tls-creds` calls them.
#[derive(Debug, Default)]
pub struct TlsObjects {
    objects: RwLock<HashMap<String, ClientCredentials>>,
}

impl TlsObjects {
    /// Adds credentials; those that had the name are gone.
    pub fn add(&self, id: impl Into<String>, credentials: ClientCredentials) {
        self.objects.write().insert(id.into(), credentials);
    }

    fn get(&self, id: &str) -> Result<ClientCredentials> {
        let found = self.objects.read().get(id).cloned();
        found.ok_or_else(|| Error::invalid(format!("No TLS credentials with id '{id}'")))
    }
}

/// How nodes of the driver `nbd` come into being.
#[derive(Debug, Default)]
pub struct NbdKind {
    credentials: Arc<TlsObjects>,
}

impl NbdKind {
    /// The driver with these credentials to choose from.
    pub fn new(credentials: Arc<TlsObjects>) -> Self {
        Self { credentials }
    }

    fn link_options(&self, options: &mut Options) -> Result<LinkOptions> {
        let address = Address::take(options)?;
        let export = options.take_text("export").unwrap_or_default();
        if export.len() > MAX_STRING {
            return Err(Error::invalid("export name too long to send to server"));
        }
        let context = options.take_text("x-dirty-bitmap");
        if context.as_ref().is_some_and(|name| name.len() > MAX_STRING) {
            return Err(Error::invalid("x-dirty-bitmap query too long to send to server"));
        }
        let wants_tls = options.take_switch("tls")?.unwrap_or(false);
        let (id, host) = (options.take_text("tls-creds"), options.take_text("tls-hostname"));
        let tls = match id {
            None if wants_tls => return Err(Error::invalid("TLS needs the option 'tls-creds'")),
            None => None,
            Some(id) => {
                let host = host.or_else(|| match &address {
                    Address::Tcp { host, .. } => Some(host.clone()),
                    Address::Unix(_) => None,
                });
                let host = host.unwrap_or_else(|| "localhost".to_owned());
                Some((self.credentials.get(&id)?, host))
            }
        };
        let seconds = |options: &mut Options, name| -> Result<Duration> {
            // For ever is long enough, and does not overflow the clock.
            Ok(Duration::from_secs(options.take_number(name)?.unwrap_or(0).min(1 << 32)))
        };
        let reconnect_delay = seconds(options, "reconnect-delay")?;
        let open_timeout = seconds(options, "open-timeout")?;
        Ok(LinkOptions { address, export, tls, context, reconnect_delay, open_timeout })
    }
}

#[async_trait(?Send)]
impl DriverKind for NbdKind {
    fn name(&self) -> &'static str {
        "nbd"
    }

    fn protocol_prefixes(&self) -> &'static [&'static str] {
        &["nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix"]
    }

    fn is_protocol(&self) -> bool {
        true
    }

    fn parse_filename(&self, filename: &str) -> Result<Options> {
        parse_filename(filename)
    }

    async fn open(
        &self,
        _context: &OpenContext,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn Driver>> {
        // A file name in the place of the options that it stands for.
        if let Some(filename) = options.take_text("filename") {
            for name in ["host", "port", "path", "export"] {
                if options.has(name) {
                    return Err(Error::invalid(format!("Option '{name}' cannot be used with a file name")));
                }
            }
            if options.has_child("server") {
                return Err(Error::invalid("Option 'server' cannot be used with a file name"));
            }
            options.merge_defaults(parse_filename(&filename)?);
        }
        let tls = options.get("tls-creds").map(ToString::to_string);
        let link = Link::open(self.link_options(options)?).await?;
        let session = link.session();
        if flags.writable && session.info.flags.contains(TransmissionFlags::READ_ONLY) {
            link.close().await;
            return Err(Error::new(Errno::ACCESS, "request for write access denied"));
        }
        if let Some(context) = &link.options().context
            && session.contexts.is_empty()
        {
            let message = format!("requested x-dirty-bitmap {context} not found");
            link.close().await;
            return Err(Error::invalid(message));
        }
        Ok(Box::new(Nbd { link, tls, edges: RangeLock::default() }))
    }
}

/// A node whose bytes are an export of a server.
#[derive(Debug)]
struct Nbd {
    link: Link,
    /// The name of the TLS credentials.
    tls: Option<String>,
    /// Held around what is read, changed and written because requests do not fit the server's minimum.
    edges: RangeLock,
}

impl Nbd {
    fn flags(&self) -> TransmissionFlags {
        self.link.session().info.flags
    }

    /// What offsets and lengths must be multiples of for the server. A server that does not say is an old one, unless
    /// its export has a length or a context that tells otherwise; old ones take whole sectors only.
    fn minimum(&self) -> u64 {
        let session = self.link.session();
        match session.sizes {
            Some(sizes) => sizes.minimum.into(),
            None if !session.info.size.is_multiple_of(512) || !session.contexts.is_empty() => 1,
            None => 512,
        }
    }

    fn maximum(&self) -> u64 {
        let told = self.link.session().sizes.map_or(MAX_PAYLOAD, |sizes| sizes.maximum.min(MAX_PAYLOAD));
        let minimum = self.minimum();
        (u64::from(told) / minimum * minimum).max(minimum)
    }

    /// The range that requests have which begin and end in the given one and fit the server.
    fn widened(&self, offset: u64, len: u64) -> (u64, u64) {
        let minimum = self.minimum();
        let start = offset / minimum * minimum;
        let end = (offset + len).next_multiple_of(minimum).min(self.len());
        (start, end - start)
    }

    fn request(&self, command: Command, offset: u64, len: u64, flags: CommandFlags) -> Request {
        Request { flags, command, cookie: 0, offset, len }
    }

    async fn read_range(&self, offset: u64, into: &IoVec) -> Result<()> {
        let request = self.request(Command::Read, offset, into.len() as u64, CommandFlags::empty());
        self.link.call(request, None, Some(into)).await.map(drop)
    }

    async fn write_range(&self, offset: u64, from: &IoVec, fua: bool) -> Result<()> {
        let mut flags = CommandFlags::empty();
        flags.set(CommandFlags::FUA, fua && self.flags().contains(TransmissionFlags::SEND_FUA));
        flags.set(CommandFlags::PAYLOAD_LEN, self.link.session().mode == HeaderMode::Extended);
        let request = self.request(Command::Write, offset, from.len() as u64, flags);
        self.link.call(request, Some(from), None).await?;
        self.flush_unless_through(fua).await
    }

    async fn flush_unless_through(&self, fua: bool) -> Result<()> {
        if fua && !self.flags().contains(TransmissionFlags::SEND_FUA) { self.flush().await } else { Ok(()) }
    }
}

#[async_trait(?Send)]
impl Driver for Nbd {
    fn format_name(&self) -> &'static str {
        "nbd"
    }

    fn len(&self) -> u64 {
        self.link.session().info.size
    }

    fn limits(&self) -> Limits {
        let maximum = self.maximum();
        let minimum = self.minimum();
        // Effects without payload are not bounded by it, but by the 32 bits of compact requests.
        let effect = if self.link.session().mode == HeaderMode::Extended {
            0
        } else {
            u64::from(i32::MAX as u32) / minimum * minimum
        };
        Limits {
            request_alignment: minimum as u32,
            max_transfer: maximum,
            optimal_transfer: self.link.session().sizes.map_or(0, |sizes| sizes.preferred.into()),
            write_zeroes_alignment: minimum,
            max_write_zeroes: if effect == 0 { 0 } else { maximum },
            discard_alignment: minimum,
            max_discard: effect,
            ..Limits::default()
        }
    }

    fn writable(&self) -> bool {
        !self.flags().contains(TransmissionFlags::READ_ONLY)
    }

    async fn read(&self, offset: u64, into: &IoVec) -> Result<()> {
        let (start, len) = self.widened(offset, into.len() as u64);
        if (start, len) == (offset, into.len() as u64) {
            return self.read_range(offset, into).await;
        }
        let wide = IoBuffer::scratch(len as usize).into_io();
        self.read_range(start, &wide).await?;
        let at = (offset - start) as usize;
        into.copy_from_vec(0, &wide.slice(at..at + into.len()));
        Ok(())
    }

    async fn write(&self, offset: u64, from: &IoVec, flags: WriteFlags) -> Result<()> {
        if flags.contains(WriteFlags::COMPRESSED) {
            return Err(Error::errno_only(Errno::NOT_SUPPORTED));
        }
        let fua = flags.contains(WriteFlags::FUA);
        let (start, len) = self.widened(offset, from.len() as u64);
        if (start, len) == (offset, from.len() as u64) {
            return self.write_range(offset, from, fua).await;
        }
        let _alone = self.edges.lock(start..start + len).await;
        let wide = IoBuffer::scratch(len as usize).into_io();
        self.read_range(start, &wide).await?;
        wide.copy_from_vec((offset - start) as usize, from);
        self.write_range(start, &wide, fua).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let fast = flags.contains(ZeroFlags::NO_FALLBACK);
        let server = self.flags();
        if !server.contains(TransmissionFlags::SEND_WRITE_ZEROES)
            || (fast && !server.contains(TransmissionFlags::SEND_FAST_ZERO))
            || self.widened(offset, len) != (offset, len)
        {
            return Err(Error::errno_only(Errno::NOT_SUPPORTED));
        }
        let fua = flags.contains(ZeroFlags::FUA);
        let mut command = CommandFlags::empty();
        command.set(CommandFlags::NO_HOLE, !flags.contains(ZeroFlags::MAY_UNMAP));
        command.set(CommandFlags::FAST_ZERO, fast);
        command.set(CommandFlags::FUA, fua && server.contains(TransmissionFlags::SEND_FUA));
        self.link.call(self.request(Command::WriteZeroes, offset, len, command), None, None).await?;
        self.flush_unless_through(fua).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        if !self.flags().contains(TransmissionFlags::SEND_TRIM) {
            return Err(Error::errno_only(Errno::NOT_SUPPORTED));
        }
        // What does not fill the server's minimum stays.
        let minimum = self.minimum();
        let start = offset.next_multiple_of(minimum);
        let end = if offset + len == self.len() { offset + len } else { (offset + len) / minimum * minimum };
        if start >= end {
            return Ok(());
        }
        let request = self.request(Command::Trim, start, end - start, CommandFlags::empty());
        self.link.call(request, None, None).await.map(drop)
    }

    async fn flush(&self) -> Result<()> {
        if !self.flags().contains(TransmissionFlags::SEND_FLUSH) {
            return Ok(());
        }
        let request = self.request(Command::Flush, 0, 0, CommandFlags::empty());
        self.link.call(request, None, None).await.map(drop)
    }

    async fn block_status(&self, offset: u64, len: u64, _precise: bool) -> Result<BlockStatus> {
        let (start, mut wide) = self.widened(offset, len);
        if self.link.session().contexts.is_empty() {
            return Ok(BlockStatus::data(len));
        }
        if self.link.session().mode != HeaderMode::Extended {
            let minimum = self.minimum();
            wide = wide.min(u64::from(u32::MAX) / minimum * minimum);
        }
        let request = self.request(Command::BlockStatus, start, wide, CommandFlags::REQ_ONE);
        let (chunks, _) = self.link.call(request, None, None).await?;
        // There was one context to select, and there is a chunk for it.
        let extents = chunks.into_iter().next().map(|chunk| chunk.extents).unwrap_or_default();
        let extent = extents.first().ok_or_else(|| Error::errno_only(Errno::IO))?;
        // Servers that do not keep to the minimum, or to one extent, are understood as far as they are right.
        let told = extent.len.min(wide).saturating_sub(offset - start).min(len);
        if told == 0 {
            return Ok(BlockStatus::data(len.min(self.minimum())));
        }
        let data = extent.status & STATE_HOLE == 0;
        let zero = extent.status & STATE_ZERO != 0;
        Ok(BlockStatus { len: told, data, zero, allocated: true, ..BlockStatus::default() })
    }

    async fn truncate(&self, len: u64, how: Truncate) -> Result<()> {
        if len == self.len() || (!how.exact && len < self.len()) {
            return Ok(());
        }
        if how.exact {
            return Err(Error::unsupported("Cannot resize NBD nodes"));
        }
        Err(Error::invalid("Cannot grow NBD nodes"))
    }

    async fn close(&self) -> Result<()> {
        self.link.close().await;
        Ok(())
    }

    fn filename(&self) -> Option<String> {
        let LinkOptions { address, export, context, .. } = self.link.options();
        (self.tls.is_none() && context.is_none()).then(|| address.filename(export))
    }

    fn open_options(&self) -> Options {
        let LinkOptions { address, export, context, reconnect_delay, open_timeout, tls } =
            self.link.options();
        let mut options = address.options();
        if !export.is_empty() {
            options.set("export", export.clone());
        }
        if let (Some(id), Some((_, host))) = (&self.tls, tls) {
            options.set("tls-creds", id.clone());
            options.set("tls-hostname", host.clone());
        }
        if let Some(context) = context {
            options.set("x-dirty-bitmap", context.clone());
        }
        for (name, time) in [("reconnect-delay", reconnect_delay), ("open-timeout", open_timeout)] {
            if !time.is_zero() {
                options.set(name, i64::try_from(time.as_secs()).unwrap_or(i64::MAX));
            }
        }
        options
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
