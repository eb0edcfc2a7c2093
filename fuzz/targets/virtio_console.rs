//! The virtio console, plain and with several ports.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use vireo_fuzz::{Driven, Input, Request, drive_virtio};
use virtio::VirtioDevice;
use virtio_console::{ConsoleBackend, PortConfig, VirtioConsole};

/// Takes as many bytes as it was told to.
#[derive(Default)]
struct Host {
    room: AtomicUsize,
}

impl ConsoleBackend for Host {
    fn write(&self, bytes: &[u8]) -> usize {
        assert!(!bytes.is_empty());
        let taken = bytes.len().min(self.room.load(Ordering::Relaxed));
        self.room.fetch_sub(taken, Ordering::Relaxed);
        taken
    }
}

struct Target<const PORTS: usize> {
    host: Arc<Host>,
    device: Arc<VirtioConsole>,
}

impl<const PORTS: usize> Driven for Target<PORTS> {
    fn new() -> Self {
        let host = Arc::new(Host::default());
        let mut ports = vec![PortConfig::console(host.clone())];
        for number in 1..PORTS {
            ports.push(PortConfig::channel(format!("channel.{number}"), host.clone()));
        }
        Self { host, device: Arc::new(VirtioConsole::new(ports).expect("the ports are possible")) }
    }

    fn device(&self) -> Arc<dyn VirtioDevice> {
        self.device.clone()
    }

    fn request(&self, queue: u16, input: &mut Input<'_>) -> Request {
        if queue == 3 && !input.one_in(8) {
            // A control message: port, event, value.
            let mut readable = u32::from(input.u8() % 4).to_le_bytes().to_vec();
            readable.extend(u16::from(input.u8() % 9).to_le_bytes());
            readable.extend(u16::from(input.u8() % 3).to_le_bytes());
            return Request { readable, writable: 0 };
        }
        let odd = input.one_in(8);
        let len = input.below(0x1800) as usize;
        if queue.is_multiple_of(2) != odd {
            Request { readable: Vec::new(), writable: len }
        } else {
            Request { readable: vec![b'x'; len], writable: 0 }
        }
    }

    fn host(&self, input: &mut Input<'_>) {
        let port = usize::from(input.u8() % 4);
        match input.u8() % 5 {
            0 => {
                let len = input.below(0x100) as usize;
                let bytes = input.bytes(len);
                assert!(self.device.receive(port, bytes) <= bytes.len());
            }
            1 => drop(self.device.receive(port, &[b'x'; 0x9000])),
            2 => {
                self.host.room.store(input.u16().into(), Ordering::Relaxed);
                self.device.transmit_ready(port);
            }
            3 => self.device.resize(input.u8().into(), input.u8().into()),
            _ => self.device.set_connected(port, input.flag()),
        }
    }
}

fuzz_target!(|data: &[u8]| match data.split_first() {
    Some((kind, data)) if kind.is_multiple_of(4) => drive_virtio::<Target<1>>(data),
    Some((_, data)) => drive_virtio::<Target<3>>(data),
    None => {}
});
