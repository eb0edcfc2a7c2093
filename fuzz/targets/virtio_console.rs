//! The virtio console, plain and with several ports.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use vireo_fuzz::{Driven, Input, drive_virtio};
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
    Some((0, data)) => drive_virtio::<Target<1>>(data),
    Some((_, data)) => drive_virtio::<Target<3>>(data),
    None => {}
});
