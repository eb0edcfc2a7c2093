//! Serving an image.

use crate::arguments::{Arguments, Snapshot};
use crate::objects::Objects;
use crate::{Failure, background};
use block_graph::{AllowAll, CacheMode, DetectZeroes, Error, NodeRef, OpenContext, OpenFlags, Options};
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use io_loop::{Listener, Stream};
use nbd::proto::DEFAULT_PORT;
use nbd::server::{Ended, Export, ExportOptions, Server};
use std::io;
use std::net::{Shutdown, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;

/// Serves until the last client is gone, or a signal comes.
pub(crate) async fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let objects = Objects::new(arguments)?;
    let credentials = match &arguments.tls_creds {
        Some(id) => Some(objects.server(id)?),
        None => None,
    };
    let signals = signals().map_err(|error| Failure::from(format!("Cannot wait for signals: {error}")))?;
    let listener = listen(arguments)?;
    let context =
        OpenContext::new(Arc::new(blockdev::registry()), Arc::new(objects.secrets), Arc::new(AllowAll));
    let outcome = serve_image(arguments, &context, credentials, &listener, &signals).await;
    if let Some(path) = &arguments.socket {
        // Somebody may have removed it.
        let _ = std::fs::remove_file(path);
    }
    outcome.map(|()| ExitCode::SUCCESS)
}

async fn serve_image(
    arguments: &Arguments,
    context: &OpenContext,
    credentials: Option<nbd::ServerCredentials>,
    listener: &Listener,
    signals: &Stream,
) -> Result<(), Failure> {
    let opened = open(arguments, context).await?;
    let node = &opened.node;
    let writable = !arguments.read_only && !node.read_only();
    let options = ExportOptions {
        name: arguments.export_name.clone().unwrap_or_default(),
        description: arguments.description.clone(),
        writable,
        multi_conn: !writable || arguments.shared != 1,
        offset: arguments.offset,
        allocation_depth: arguments.allocation_depth,
        bitmaps: arguments.bitmaps.clone(),
    };
    let server = Server::new(credentials, arguments.handshake_limit);
    server.add(Export::new(node.clone(), options).await?);
    if let Some(path) = &arguments.pid_file {
        let failed =
            |error: io::Error| format!("cannot create PID file: Cannot open pid file '{path}': {error}");
        std::fs::write(path, format!("{}\n", std::process::id())).map_err(failed)?;
    }
    // No file system is kept busy by it.
    std::env::set_current_dir("/").map_err(|error| format!("Could not chdir to root directory: {error}"))?;
    if arguments.fork {
        background::detach()?;
    }
    accept(arguments, &server, listener, signals).await;
    node.close().await.map_err(|error| Failure::from(error).context("Failed to close the image"))
}

/// Says when a signal came that is to end the program.
fn signals() -> io::Result<Stream> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let (here, there) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, there.try_clone()?)?;
    }
    Stream::from_socket(here.into())
}

fn listen(arguments: &Arguments) -> Result<Listener, Failure> {
    if let Some(path) = &arguments.socket {
        if let Err(error) = std::fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(format!("Failed to unlink socket {path}: {}", Error::from(error)).into());
        }
        return Listener::bind_unix(path.as_ref())
            .map_err(|error| format!("Failed to bind socket to {path}: {}", Error::from(error)).into());
    }
    let host = arguments.bind.as_deref().unwrap_or("0.0.0.0");
    let port = arguments.port.clone().unwrap_or_else(|| DEFAULT_PORT.to_string());
    let number: u16 = port.parse().map_err(|_| format!("Invalid port number '{port}'"))?;
    let addresses = (host.trim_matches(['[', ']']), number).to_socket_addrs();
    let failed = |error: io::Error| format!("address resolution failed for {host}:{port}: {error}");
    let mut last = None;
    for address in addresses.map_err(failed)? {
        match Listener::bind_tcp(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = Some(error),
        }
    }
    let error = Error::from(last.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into()));
    Err(format!("Failed to find an available port: {error}").into())
}

/// An image, and the temporary file above it if there is one.
struct Opened {
    node: NodeRef,
    _temporary: Option<tempfile::TempDir>,
}

async fn open(arguments: &Arguments, context: &OpenContext) -> Result<Opened, Failure> {
    let file = arguments.file.as_deref().unwrap_or_default();
    let failed = |error: Error| Failure::from(error).context(&format!("Failed to blk_new_open '{file}'"));
    let mut flags = if arguments.read_only { OpenFlags::READ } else { OpenFlags::WRITE };
    flags.resize = false;
    flags.unmap = arguments.unmaps();
    flags.detect_zeroes = arguments.detect_zeroes;
    if let Some(mode) = &arguments.cache {
        let known = CacheMode::from_name(mode);
        flags =
            flags.with_cache(known.ok_or_else(|| Error::invalid(format!("Invalid cache mode '{mode}'")))?);
    }
    let mut below = flags;
    if arguments.temporary {
        below.writable = false;
        below.detect_zeroes = DetectZeroes::Off;
    }
    let mut options = Options::new();
    if let Some(mode) = &arguments.aio {
        options.set("file.aio", mode.clone());
    }
    let mut node = if arguments.image_opts {
        options.merge_defaults(blockdev::list_options::open_options(file, Some("file")));
        context.open(options, below).await.map_err(failed)?
    } else {
        if let Some(format) = &arguments.format {
            options.set("driver", format.clone());
        }
        context.open_filename(file, options, below).await.map_err(failed)?
    };
    if arguments.format.is_none()
        && !arguments.image_opts
        && !node.read_only()
        && node.driver().format_name() == "raw"
    {
        blockdev::warn_of_probed_raw(file);
    }
    let mut temporary = None;
    if arguments.temporary {
        let (folder, above) = overlay(context, node, flags).await.map_err(failed)?;
        (node, temporary) = (above, Some(folder));
    }
    if let Some(snapshot) = &arguments.snapshot {
        let loaded = load(&node, snapshot).await;
        loaded.map_err(|error| Failure::from(error).context("Failed to load snapshot"))?;
    }
    Ok(Opened { node, _temporary: temporary })
}

async fn load(node: &NodeRef, snapshot: &Snapshot) -> Result<(), Error> {
    let image = node.driver().image();
    let image = image.ok_or_else(|| Error::unsupported("Device has no internal snapshots"))?;
    match snapshot {
        Snapshot::Both { id, name } => image.snapshot_load(id.as_deref(), name.as_deref()).await,
        Snapshot::IdOrName(text) => {
            if image.snapshots().iter().any(|known| known.id == *text) {
                image.snapshot_load(Some(text), None).await
            } else {
                image.snapshot_load(None, Some(text)).await
            }
        }
    }
}

/// A temporary qcow2 image that is written in the place of `base`, which is as it was afterwards.
async fn overlay(
    context: &OpenContext,
    base: NodeRef,
    flags: OpenFlags,
) -> Result<(tempfile::TempDir, NodeRef), Error> {
    let folder = tempfile::Builder::new().prefix("vireo-nbd").tempdir_in("/var/tmp")?;
    let path: PathBuf = folder.path().join("overlay.qcow2");
    let path = path.to_string_lossy().into_owned();
    let mut create = Options::with("size", i64::try_from(base.len()).unwrap_or(i64::MAX));
    let kind = context.registry.get("qcow2")?;
    kind.create(context, &path, &mut create).await?;
    let mut options = Options::with("driver", "qcow2");
    options.set("file.driver", "file");
    options.set("file.filename", path);
    options.set("backing", base);
    let node = context.open(options, OpenFlags { writable: true, ..flags }).await?;
    Ok((folder, node))
}

/// What a server waits for.
enum Event {
    /// It is to end.
    Signal,
    /// A client, or why there is none.
    Came(io::Result<Stream>),
    /// A client is gone.
    Left(u64, Ended),
}

/// Accepts clients as long as there is reason to, and serves them.
async fn accept(arguments: &Arguments, server: &Server, listener: &Listener, signals: &Stream) {
    let mut clients = FuturesUnordered::new();
    let mut sockets: Vec<(u64, Stream)> = Vec::new();
    let mut next_id = 0;
    let mut byte = [0];
    let mut signal = pin!(signals.read(&mut byte));
    loop {
        let accepts = arguments.shared == 0 || sockets.len() < arguments.shared;
        let event = {
            let came = async { if accepts { listener.accept().await } else { std::future::pending().await } };
            let left = async {
                match clients.next().await {
                    Some(left) => left,
                    None => std::future::pending().await,
                }
            };
            match select(signal.as_mut(), select(pin!(came), pin!(left))).await {
                Either::Left(_) => Event::Signal,
                Either::Right((Either::Left((came, _)), _)) => Event::Came(came),
                Either::Right((Either::Right(((id, ended), _)), _)) => Event::Left(id, ended),
            }
        };
        match event {
            Event::Signal => break,
            Event::Came(Ok(stream)) => {
                let id = next_id;
                next_id += 1;
                sockets.push((id, stream.clone()));
                clients.push(async move { (id, server.serve(stream).await) });
            }
            Event::Came(Err(error)) => {
                eprintln!("Failed to accept a client: {error}");
                // Such as too many open files: some will be closed.
                io_loop::sleep(std::time::Duration::from_millis(100)).await;
            }
            Event::Left(id, Ended { negotiated, result }) => {
                sockets.retain(|(known, _)| *known != id);
                if let Err(error) = result
                    && arguments.verbose
                {
                    eprintln!("client: {error}");
                }
                if negotiated && sockets.is_empty() && !arguments.persistent {
                    break;
                }
            }
        }
    }
    // What clients have asked for is done; they are told nothing more.
    for (_, socket) in &sockets {
        // Who is gone already is gone.
        let _ = socket.shutdown(Shutdown::Read);
    }
    while clients.next().await.is_some() {}
}
