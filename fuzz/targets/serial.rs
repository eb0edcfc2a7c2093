//! The 16550 serial port.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serial::{COM1, ModemInputs, PORT_COUNT, Serial, SerialBackend};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use vireo_fuzz::{Bench, Input, Rig, drive};

/// Takes as many bytes as it was told to.
#[derive(Default)]
struct Host {
    room: AtomicUsize,
}

impl SerialBackend for Host {
    fn write(&self, bytes: &[u8]) -> usize {
        assert!(!bytes.is_empty());
        let taken = bytes.len().min(self.room.load(Ordering::Relaxed));
        self.room.fetch_sub(taken, Ordering::Relaxed);
        taken
    }
}

struct Target {
    rig: Rig,
    host: Arc<Host>,
    serial: Arc<Serial>,
}

impl Bench for Target {
    fn new() -> Self {
        let mut rig = Rig::new();
        let host = Arc::new(Host::default());
        let serial = Serial::new(rig.outside.line(COM1.1), host.clone());
        rig.map_ports(COM1.0, PORT_COUNT, serial.clone());
        rig.add_device(serial.clone());
        Self { rig, host, serial }
    }

    fn rig(&self) -> &Rig {
        &self.rig
    }

    fn special(&self, input: &mut Input<'_>) {
        match input.u8() % 4 {
            0 => {
                let len = input.below(40) as usize;
                let bytes = input.bytes(len);
                let room = self.serial.input_room();
                assert_eq!(self.serial.receive(bytes), room.min(bytes.len()));
            }
            1 => drop(self.serial.receive_break()),
            2 => self.serial.set_modem_inputs(ModemInputs {
                clear_to_send: input.flag(),
                data_set_ready: input.flag(),
                ring: input.flag(),
                carrier_detect: input.flag(),
            }),
            _ => {
                self.host.room.store(input.below(40) as usize, Ordering::Relaxed);
                self.serial.transmit_ready();
            }
        }
    }
}

fuzz_target!(|data: &[u8]| drive::<Target>(data));
