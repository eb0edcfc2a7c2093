//! Server and client over real sockets: against each other, and against other people's.

mod disk;

use block_graph::{
    AllowAll, DirtyBitmap, Granularity, NodeRef, OpenContext, OpenFlags, Options, Registry, Result, Secrets,
    WriteFlags, ZeroFlags,
};
use disk::memory_node;
use io_loop::{IoBuffer, IoVec, Listener, block_on};
use nbd::client::{NbdKind, TlsObjects};
use nbd::server::{Export, ExportOptions, Server};
use nbd::{ClientCredentials, ServerCredentials};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A server on a thread of its own, until it is dropped.
struct Running {
    stop: Arc<AtomicBool>,
    socket: PathBuf,
    thread: Option<std::thread::JoinHandle<()>>,
    /// Clients that got as far as to the transmission phase.
    served: Arc<AtomicUsize>,
}

impl Running {
    fn start(socket: &Path, server: Arc<Server>) -> Self {
        let listener = Listener::bind_unix(socket).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let served = Arc::new(AtomicUsize::new(0));
        let (stopped, count) = (stop.clone(), served.clone());
        let thread = std::thread::spawn(move || {
            block_on(async {
                let mut clients = Vec::new();
                loop {
                    let stream = listener.accept().await.unwrap();
                    if stopped.load(Ordering::SeqCst) {
                        break;
                    }
                    let (server, count) = (server.clone(), count.clone());
                    let socket = stream.clone();
                    let task = io_loop::spawn(async move {
                        let ended = server.serve(stream).await;
                        count.fetch_add(ended.negotiated.into(), Ordering::SeqCst);
                    });
                    clients.push((socket, task));
                }
                for (socket, task) in clients {
                    socket.shutdown(std::net::Shutdown::Both).unwrap();
                    task.await;
                }
            });
        });
        Self { stop, socket: socket.to_owned(), thread: Some(thread), served }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // The listener wakes up to see it.
        let _ = std::os::unix::net::UnixStream::connect(&self.socket);
        self.thread.take().unwrap().join().unwrap();
        std::fs::remove_file(&self.socket).unwrap();
    }
}

fn exported(node: &NodeRef, options: ExportOptions) -> Arc<Server> {
    let server = Server::new(None, Duration::from_secs(10));
    assert!(server.add(block_on(Export::new(node.clone(), options)).unwrap()));
    Arc::new(server)
}

fn context(credentials: Arc<TlsObjects>) -> OpenContext {
    let mut registry = Registry::new();
    registry.add(NbdKind::new(credentials));
    OpenContext::new(Arc::new(registry), Arc::new(Secrets::default()), Arc::new(AllowAll))
}

async fn open(options: &[(&str, &str)], flags: OpenFlags) -> Result<NodeRef> {
    let mut all: Options = options.iter().copied().collect();
    all.set("driver", "nbd");
    context(Arc::default()).open(all, flags).await
}

fn io(bytes: &[u8]) -> IoVec {
    IoBuffer::from(bytes).into_io()
}

async fn read(node: &NodeRef, offset: u64, len: usize) -> Vec<u8> {
    let buffer = IoBuffer::zeroed(len).into_io();
    node.read(offset, &buffer).await.unwrap();
    buffer.to_vec()
}

#[test]
fn requests_reach_the_node_and_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let (node, disk) = memory_node(1 << 20, 1);
    let options = ExportOptions { name: "d".into(), writable: true, ..ExportOptions::default() };
    let running = Running::start(&socket, exported(&node, options));
    block_on(async {
        let path = socket.to_str().unwrap();
        let client = open(&[("path", path), ("export", "d")], OpenFlags::WRITE).await.unwrap();
        assert_eq!(client.len(), 1 << 20);
        client.write(1000, &io(&[7; 100_000]), WriteFlags::empty()).await.unwrap();
        assert_eq!(read(&client, 990, 30).await, [[0; 10].as_slice(), &[7; 20]].concat());
        assert_eq!(disk.flushes(), 0);
        client.write(5, &io(b"x"), WriteFlags::FUA).await.unwrap();
        assert_eq!(disk.flushes(), 1);
        client.flush().await.unwrap();
        assert_eq!(disk.flushes(), 2);
        client.write_zeroes(65536, 65536, ZeroFlags::MAY_UNMAP).await.unwrap();
        client.discard(0, 4096).await.unwrap();
        assert_eq!(disk.log(), ["zero 65536+65536 MAY_UNMAP", "discard 0+4096"]);
        // Holes travel as such, and are zeroes at the other end.
        assert_eq!(read(&client, 0, 1 << 20).await, disk.bytes());
        let status = client.block_status(65536, 1 << 19, true).await.unwrap();
        assert_eq!((status.len, status.data, status.zero), (1 << 19, false, true));
        assert!(client.block_status(4096, 100, true).await.unwrap().data);
        // What the node refuses, the client hears.
        disk.fail_writes(28);
        let error = client.write(0, &io(b"y"), WriteFlags::empty()).await.unwrap_err();
        assert_eq!(error.errno().number(), 28, "{error}");
        assert_eq!(client.filename().unwrap(), format!("nbd+unix:///d?socket={path}"));
        client.close().await.unwrap();
    });
    drop(running);
}

#[test]
fn exports_are_found_by_name_and_kept_from_writers() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let (node, _) = memory_node(8192, 1);
    let options = ExportOptions { name: "d".into(), offset: 4096, ..ExportOptions::default() };
    let _running = Running::start(&socket, exported(&node, options));
    let path = socket.to_str().unwrap();
    block_on(async {
        let error = open(&[("path", path)], OpenFlags::READ).await.unwrap_err();
        assert_eq!(error.to_string(), "Requested export not available");
        assert_eq!(error.hints(), ["server reported: export '' not present"]);
        let error = open(&[("path", path), ("export", "d")], OpenFlags::WRITE).await.unwrap_err();
        assert_eq!(error.to_string(), "request for write access denied");
        let client = open(&[("path", path), ("export", "d")], OpenFlags::READ).await.unwrap();
        assert_eq!(client.len(), 4096);
        node.write(4096, &io(b"here"), WriteFlags::empty()).await.unwrap();
        assert_eq!(read(&client, 0, 4).await, b"here");
        let error = open(&[("path", "/nonexistent/s")], OpenFlags::READ).await.unwrap_err();
        assert_eq!(error.to_string(), "Failed to connect to '/nonexistent/s': No such file or directory");
    });
}

/// A server whose requests must be whole blocks is served by reading, changing and writing them.
#[test]
fn requests_that_do_not_fit_the_server_are_made_to() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let (node, disk) = memory_node(1 << 16, 4096);
    let _running = Running::start(
        &socket,
        exported(&node, ExportOptions { writable: true, ..ExportOptions::default() }),
    );
    block_on(async {
        let client = open(&[("path", socket.to_str().unwrap())], OpenFlags::WRITE).await.unwrap();
        assert_eq!(client.driver().limits().request_alignment, 4096);
        let writes =
            (0..200_u64).map(|at| {
                let client = client.clone();
                async move {
                    client.write(at * 300, &io(&[at as u8 + 1; 300]), WriteFlags::empty()).await.unwrap()
                }
            });
        futures_util::future::join_all(writes).await;
        let expected: Vec<u8> = (0..200).flat_map(|at| [at as u8 + 1; 300]).collect();
        assert_eq!(read(&client, 0, 60_000).await, expected);
        assert!(disk.bytes().starts_with(&expected));
        assert_eq!(disk.misaligned(), 0);
    });
}

#[test]
fn many_requests_from_several_threads_share_a_connection() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let (node, disk) = memory_node(4 << 20, 1);
    let running = Running::start(
        &socket,
        exported(&node, ExportOptions { writable: true, ..ExportOptions::default() }),
    );
    let client = block_on(open(&[("path", socket.to_str().unwrap())], OpenFlags::WRITE)).unwrap();
    let threads: Vec<_> = (0..4_u64)
        .map(|thread| {
            let client = client.clone();
            std::thread::spawn(move || {
                block_on(async {
                    let all = (0..256_u64).map(|n| {
                        let client = client.clone();
                        async move {
                            let offset = (thread * 256 + n) * 4096;
                            let bytes = [(offset / 4096) as u8 | 1; 4096];
                            client.write(offset, &io(&bytes), WriteFlags::empty()).await.unwrap();
                            assert_eq!(read(&client, offset, 4096).await, bytes);
                        }
                    });
                    futures_util::future::join_all(all).await;
                });
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(disk.bytes(), block_on(read(&client, 0, 4 << 20)));
    block_on(client.close()).unwrap();
    // One connection was enough.
    let begin = Instant::now();
    while running.served.load(Ordering::SeqCst) == 0 && begin.elapsed() < Duration::from_secs(10) {
        std::thread::yield_now();
    }
    assert_eq!(running.served.load(Ordering::SeqCst), 1);
}

/// A request that is given up does not hurt the others.
#[test]
fn requests_can_be_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let (node, disk) = memory_node(1 << 20, 1);
    let _running = Running::start(&socket, exported(&node, ExportOptions::default()));
    block_on(async {
        let client = open(&[("path", socket.to_str().unwrap())], OpenFlags::READ).await.unwrap();
        disk.delay(Duration::from_millis(100));
        for _ in 0..3 {
            let slow = read(&client, 0, 4096);
            assert!(io_loop::timeout(Duration::from_millis(10), slow).await.is_none());
        }
        disk.delay(Duration::ZERO);
        assert_eq!(read(&client, 0, 4096).await, [0; 4096]);
    });
}

#[test]
fn requests_are_sent_again_when_the_server_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let (node, disk) = memory_node(1 << 16, 1);
    let server = exported(&node, ExportOptions { writable: true, ..ExportOptions::default() });
    let running = Running::start(&socket, server.clone());
    let path = socket.to_str().unwrap();
    let client = block_on(open(&[("path", path), ("reconnect-delay", "20")], OpenFlags::WRITE)).unwrap();
    let impatient = block_on(open(&[("path", path)], OpenFlags::WRITE)).unwrap();
    drop(running);
    let again = std::thread::spawn({
        let (socket, server) = (socket.clone(), server.clone());
        move || {
            std::thread::sleep(Duration::from_millis(400));
            Running::start(&socket, server)
        }
    });
    block_on(async {
        let error = impatient.write(0, &io(b"n"), WriteFlags::empty()).await.unwrap_err();
        assert_eq!(error.errno().number(), 5);
        client.write(0, &io(b"yes"), WriteFlags::empty()).await.unwrap();
    });
    assert!(disk.bytes().starts_with(b"yes"));
    drop(again.join().unwrap());
    // A first connection is waited for, too, and not for ever.
    let begin = Instant::now();
    block_on(open(&[("path", path), ("open-timeout", "1")], OpenFlags::READ)).unwrap_err();
    assert!(begin.elapsed() >= Duration::from_millis(500));
}

#[test]
fn slow_handshakes_end() {
    use std::io::Read;
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let server = Arc::new(Server::new(None, Duration::from_millis(100)));
    let _running = Running::start(&socket, server);
    let mut client = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut all = Vec::new();
    // The greeting, and then the end.
    assert_eq!(client.read_to_end(&mut all).unwrap(), 18);
}

#[derive(Clone, Debug)]
enum Step {
    Read(u64, usize),
    Write(u64, usize, u8),
    Zero(u64, u64, bool),
}

fn step(size: u64) -> impl Strategy<Value = Step> {
    let range = (0..size, 1..size / 3).prop_map(move |(at, len)| (at, len.min(size - at)));
    (range, any::<u8>(), 0..3).prop_map(|((at, len), byte, kind)| match kind {
        0 => Step::Read(at, len as usize),
        1 => Step::Write(at, len as usize, byte),
        _ => Step::Zero(at, len, byte & 1 != 0),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any sequence of requests against a plain array of bytes, for servers of several minimal blocks.
    #[test]
    fn a_disk_over_the_network_is_a_disk(
        steps in proptest::collection::vec(step(300_001), 1..30), minimum in prop_oneof![Just(1), Just(512), Just(4096)],
    ) {
        let size = 300_001_u64.next_multiple_of(minimum);
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let (node, disk) = memory_node(size as usize, minimum as u32);
        let options = ExportOptions { writable: true, ..ExportOptions::default() };
        let running = Running::start(&socket, exported(&node, options));
        let mut model = vec![0; size as usize];
        block_on(async {
            let client = open(&[("path", socket.to_str().unwrap())], OpenFlags::WRITE).await.unwrap();
            for step in steps {
                match step {
                    Step::Read(at, len) => {
                        assert_eq!(read(&client, at, len).await, model[at as usize..at as usize + len]);
                    }
                    Step::Write(at, len, byte) => {
                        client.write(at, &io(&vec![byte; len]), WriteFlags::empty()).await.unwrap();
                        model[at as usize..at as usize + len].fill(byte);
                    }
                    Step::Zero(at, len, unmap) => {
                        let flags = if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                        client.write_zeroes(at, len, flags).await.unwrap();
                        model[at as usize..(at + len) as usize].fill(0);
                    }
                }
            }
            client.close().await.unwrap();
        });
        drop(running);
        prop_assert_eq!(disk.bytes(), model);
        prop_assert_eq!(disk.misaligned(), 0);
    }
}

#[test]
fn dirty_bitmaps_are_seen() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let (node, _) = memory_node(1 << 20, 1);
    let bitmap = Arc::new(DirtyBitmap::new(Some("b0"), 1 << 20, Granularity::from_bytes(65536).unwrap()));
    bitmap.set(131_072, 65536);
    node.add_bitmap(bitmap);
    let bitmaps = vec!["b0".to_owned()];
    let none = ExportOptions { bitmaps: vec!["b1".into()], ..ExportOptions::default() };
    let error = block_on(Export::new(node.clone(), none)).unwrap_err();
    assert_eq!(error.to_string(), "Bitmap 'b1' is not found");
    let _running =
        Running::start(&socket, exported(&node, ExportOptions { bitmaps, ..ExportOptions::default() }));
    block_on(async {
        let path = socket.to_str().unwrap();
        let name = [("path", path), ("x-dirty-bitmap", "qemu:dirty-bitmap:b0")];
        let client = open(&name, OpenFlags::READ).await.unwrap();
        let mut found = Vec::new();
        let mut at = 0;
        while at < 1 << 20 {
            let status = client.block_status(at, (1 << 20) - at, true).await.unwrap();
            found.push((at, status.len, status.data));
            at += status.len;
        }
        assert_eq!(found, [(0, 131_072, true), (131_072, 65536, false), (196_608, 851_968, true)]);
        let error = open(&[("path", path), ("x-dirty-bitmap", "qemu:dirty-bitmap:x")], OpenFlags::READ).await;
        assert!(error.unwrap_err().to_string().contains("not found"));
    });
}

/// Certificates made by openssl, in the files that QEMU wants; `None`, said aloud, if there is no openssl.
fn certificates(folder: &Path) -> Option<()> {
    let run = |arguments: &[&str]| {
        let output = Command::new("openssl").args(arguments).current_dir(folder).output().ok()?;
        assert!(
            output.status.success(),
            "openssl {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Some(())
    };
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let made =
        run(&[
            &[
                "req",
                "-x509",
                "-days",
                "2",
                "-keyout",
                "ca-key.pem",
                "-out",
                "ca-cert.pem",
                "-subj",
                "/CN=ca",
            ][..],
            &key,
        ]
        .concat());
    if made.is_none() {
        eprintln!("SKIPPED: openssl is not installed; TLS is not tested");
        return None;
    }
    for (name, usage) in [("server", "serverAuth"), ("client", "clientAuth")] {
        let (file, request) = (format!("{name}-key.pem"), format!("{name}.csr"));
        run(&[&["req", "-keyout", &file, "-out", &request, "-subj", "/CN=localhost"][..], &key].concat())?;
        let extensions = format!(
            "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage={usage}\nkeyUsage=digitalSignature\nbasicConstraints=CA:FALSE\n"
        );
        std::fs::write(folder.join("ext"), extensions).unwrap();
        let certificate = format!("{name}-cert.pem");
        run(&[
            "x509",
            "-req",
            "-days",
            "2",
            "-in",
            &request,
            "-CA",
            "ca-cert.pem",
            "-CAkey",
            "ca-key.pem",
            "-CAcreateserial",
            "-out",
            &certificate,
            "-extfile",
            "ext",
        ])?;
    }
    Some(())
}

#[test]
fn tls_verifies_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let Some(()) = certificates(folder.path()) else { return };
    let strangers = tempfile::tempdir().unwrap();
    certificates(strangers.path()).unwrap();
    let socket = folder.path().join("s");
    let (node, disk) = memory_node(1 << 20, 1);
    let server = Server::new(
        Some(ServerCredentials::from_directory(folder.path(), true).unwrap()),
        Duration::from_secs(10),
    );
    let options = ExportOptions { writable: true, ..ExportOptions::default() };
    assert!(server.add(block_on(Export::new(node, options)).unwrap()));
    let _running = Running::start(&socket, Arc::new(server));
    let objects = Arc::new(TlsObjects::default());
    objects.add("good", ClientCredentials::from_directory(folder.path(), true).unwrap());
    objects.add("stranger", ClientCredentials::from_directory(strangers.path(), true).unwrap());
    objects.add("careless", ClientCredentials::from_directory(strangers.path(), false).unwrap());
    let connect = async |id: Option<&str>, host: &str| {
        let mut options: Options =
            [("driver", "nbd"), ("path", socket.to_str().unwrap())].into_iter().collect();
        if let Some(id) = id {
            options.set("tls-creds", id);
            options.set("tls-hostname", host);
        }
        context(objects.clone()).open(options, OpenFlags::WRITE).await
    };
    block_on(async {
        let client = connect(Some("good"), "localhost").await.unwrap();
        let bytes: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 7) as u8).collect();
        // Several at a time, larger than a record.
        let writes = bytes.chunks(300_000).enumerate().map(|(n, chunk)| {
            let (client, chunk) = (client.clone(), io(chunk));
            async move { client.write(n as u64 * 300_000, &chunk, WriteFlags::empty()).await.unwrap() }
        });
        futures_util::future::join_all(writes).await;
        assert_eq!(disk.bytes(), bytes);
        let reads = (0..4).map(|n| read(&client, n * 262_144, 262_144));
        assert_eq!(futures_util::future::join_all(reads).await.concat(), bytes);
        client.close().await.unwrap();

        let error = connect(None, "").await.unwrap_err();
        assert_eq!(error.to_string(), "Server requires TLS for option 7 (go)");
        let error = connect(Some("good"), "other.example").await.unwrap_err();
        assert!(error.to_string().starts_with("TLS handshake failed"), "{error}");
        let error = connect(Some("stranger"), "localhost").await.unwrap_err();
        assert!(error.to_string().starts_with("TLS handshake failed"), "{error}");
        // Even who trusts everybody is not trusted.
        connect(Some("careless"), "localhost").await.unwrap_err();
        let error = connect(Some("nobody"), "localhost").await.unwrap_err();
        assert_eq!(error.to_string(), "No TLS credentials with id 'nobody'");
    });
}

/// The output of a program; `None`, said aloud, if it is not installed.
fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let Ok(output) = Command::new(program).args(arguments).stdin(Stdio::null()).output() else {
        eprintln!("SKIPPED: {program} is not installed");
        return None;
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{errors}");
    Some(text)
}

#[test]
fn other_clients_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let (node, disk) = memory_node(8 << 20, 1);
    let options = ExportOptions {
        writable: true,
        description: Some("some words".into()),
        allocation_depth: true,
        ..ExportOptions::default()
    };
    let _running = Running::start(&socket, exported(&node, options));
    let url = format!("nbd+unix:///?socket={}", socket.display());
    let commands = [
        "write -P 0x11 0 1M",
        "write -P 0x22 3000 5000",
        "write -z 2M 1M",
        "discard 4M 64k",
        "read -P 0x11 9000 4096",
        "read -P 0x22 3000 5000",
        "read -P 0 1M 7M",
        "flush",
        "aio_write -P 0x33 5M 64k",
        "aio_write -P 0x44 6M 64k",
        "aio_flush",
        "read -P 0x33 5M 64k",
    ];
    let arguments = commands.iter().flat_map(|command| ["-c", command]).collect::<Vec<_>>();
    if let Some(text) = run("qemu-io", &[&["-f", "raw"], &arguments[..], &[url.as_str()]].concat()) {
        assert!(!text.contains("verification failed") && !text.contains("error"), "{text}");
        let bytes = disk.bytes();
        assert!(bytes[3000..8000].iter().all(|byte| *byte == 0x22) && bytes[6 << 20] == 0x44);
        let map = run("qemu-img", &["map", "-f", "raw", "--output=json", &url]).unwrap();
        let json = map.replace(char::is_whitespace, "");
        assert!(json.contains(r#""start":1048576,"length":4194304"#), "{map}");
        let info =
            run("qemu-img", &["info", "--image-opts", &format!("driver=nbd,path={}", socket.display())]);
        assert!(info.unwrap().contains("virtual size: 8 MiB"));
        let list = run("qemu-nbd", &["-L", "-k", socket.to_str().unwrap()]).unwrap();
        for words in
            ["exports available: 1", "description: some words", "qemu:allocation-depth", "multi", "fast-zero"]
        {
            assert!(list.contains(words), "{list}");
        }
    }
    if let Some(text) = run("nbdinfo", &["--json", &url]) {
        assert!(text.contains(r#""export-size": 8388608"#) && text.contains("base:allocation"), "{text}");
        let map = run("nbdinfo", &["--map", &url]).unwrap();
        assert!(map.contains("hole,zero"), "{map}");
        let copy = folder.path().join("copy");
        std::fs::write(&copy, b"").unwrap();
        run("nbdcopy", &[&url, copy.to_str().unwrap()]).unwrap();
        assert!(std::fs::read(&copy).unwrap() == disk.bytes());
        let mut bytes = disk.bytes();
        bytes.reverse();
        std::fs::write(&copy, &bytes).unwrap();
        run("nbdcopy", &["--flush", copy.to_str().unwrap(), &url]).unwrap();
        assert!(disk.bytes() == bytes);
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The same requests to a server of somebody else.
fn use_server(program: &str, arguments: &[&str], socket: &Path, file: &Path) {
    let Ok(child) = Command::new(program).args(arguments).spawn() else {
        eprintln!("SKIPPED: {program} is not installed");
        return;
    };
    let _server = Killed(child);
    let begin = Instant::now();
    while !socket.exists() && begin.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    block_on(async {
        let options = [("path", socket.to_str().unwrap()), ("open-timeout", "10")];
        let client = open(&options, OpenFlags::WRITE).await.unwrap();
        assert_eq!(client.len(), 4 << 20);
        client.write(12345, &io(&[9; 100_000]), WriteFlags::empty()).await.unwrap();
        client.write(2 << 20, &io(&[8; 1 << 20]), WriteFlags::FUA).await.unwrap();
        client.write_zeroes(2_500_000, 100_000, ZeroFlags::MAY_UNMAP).await.unwrap();
        client.discard(0, 4096).await.unwrap();
        client.flush().await.unwrap();
        let all = read(&client, 0, 4 << 20).await;
        assert!(all == std::fs::read(file).unwrap());
        assert!(all[2 << 20..2_500_000].iter().all(|byte| *byte == 8));
        let mut at = 0;
        let mut holes = 0;
        while at < 4 << 20 {
            let status = client.block_status(at, (4 << 20) - at, true).await.unwrap();
            if status.zero {
                holes += status.len;
                assert!(all[at as usize..(at + status.len) as usize].iter().all(|byte| *byte == 0));
            }
            at += status.len;
        }
        assert!(holes > 1 << 20, "{holes} bytes of holes");
        client.close().await.unwrap();
    });
}

#[test]
fn other_servers_are_used() {
    let folder = tempfile::tempdir().unwrap();
    let (file, socket) = (folder.path().join("f"), folder.path().join("q"));
    let make = || std::fs::File::create(&file).unwrap().set_len(4 << 20).unwrap();
    make();
    let (path, image) = (socket.to_str().unwrap(), file.to_str().unwrap());
    use_server("qemu-nbd", &["-t", "-k", path, "-f", "raw", "--discard=unmap", image], &socket, &file);
    make();
    let socket = folder.path().join("k");
    use_server("nbdkit", &["-f", "-U", socket.to_str().unwrap(), "file", image], &socket, &file);
}
