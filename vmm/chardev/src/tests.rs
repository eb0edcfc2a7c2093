use super::*;
use device::PioDevice;
use irq::IrqLine;
use serial::Serial;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A port on `spec`, and what keeps it connected.
fn port_on(spec: &str) -> (Arc<Serial>, PortConnection, Option<std::path::PathBuf>) {
    let endpoint = Endpoint::open(&spec.parse().unwrap()).unwrap();
    let name = endpoint.name.clone();
    let around = Surroundings { events: Arc::new(|_| {}), gate: None };
    let (port, connection) =
        connect_serial(endpoint, around, |backend| Serial::new(IrqLine::unconnected(), backend)).unwrap();
    (port, connection, name)
}

/// Reads the receive buffer until it has given `count` bytes.
fn read_from_guest(port: &Serial, count: usize) -> Vec<u8> {
    let end = Instant::now() + Duration::from_secs(20);
    let mut bytes = Vec::new();
    while bytes.len() < count {
        assert!(Instant::now() < end, "only {} of {count} bytes came", bytes.len());
        let mut status = [0];
        port.pio_read(5, &mut status);
        if status[0] & 1 == 0 {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        let mut byte = [0];
        port.pio_read(0, &mut byte);
        bytes.push(byte[0]);
    }
    bytes
}

#[test]
fn files_get_what_the_guest_sends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let (port, connection, _) = port_on(&format!("file={}", path.display()));
    for byte in b"hello" {
        port.pio_write(0, &[*byte]);
    }
    connection.drain(Duration::from_secs(20));
    assert_eq!(std::fs::read(&path).unwrap(), b"hello");
}

#[test]
fn sockets_carry_both_ways_for_one_client_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let (port, _connection, _) = port_on(&format!("unix={}", path.display()));
    for round in 0..2 {
        let mut client = UnixStream::connect(&path).unwrap();
        let sent: Vec<u8> = (0..200u8).map(|n| n.wrapping_add(round)).collect();
        client.write_all(&sent).unwrap();
        assert_eq!(read_from_guest(&port, sent.len()), sent);
        port.pio_write(0, b"x");
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }
    // A socket that was left behind is taken over, one that is in use is not.
    assert!(Endpoint::open(&format!("unix={}", path.display()).parse().unwrap()).is_err());
}

#[test]
fn only_sockets_that_were_left_behind_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (file, left, link) =
        (folder.path().join("file"), folder.path().join("left"), folder.path().join("link"));
    std::fs::write(&file, "a disk").unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    drop(bind_unix(&left).unwrap());
    assert!(left.exists());
    drop(bind_unix(&left).unwrap());
    for path in [&file, &link] {
        assert_eq!(bind_unix(path).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read(path).unwrap(), b"a disk");
    }
}

#[test]
fn pseudo_terminals_carry_both_ways() {
    let (port, _connection, name) = port_on("pty");
    let mut other = std::fs::File::options().read(true).write(true).open(name.unwrap()).unwrap();
    other.write_all(b"in\n").unwrap();
    assert_eq!(read_from_guest(&port, 3), b"in\n");
    port.pio_write(0, b"o");
    let mut byte = [0];
    other.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"o");
}

#[test]
fn what_cannot_be_opened_is_named() {
    let error = Endpoint::open(&"file=/nonexistent/x".parse().unwrap()).err().unwrap().to_string();
    assert!(error.contains("/nonexistent/x"), "{error}");
}
