//! Ports that talk to the machine rather than to hardware: debug-exit, pvpanic, a debug console, POST codes.

use crate::ports::{PortRegion, PortSet, decode_checked, region, take_over};
use crate::{PowerEvent, PowerEvents};
use device::{Device, SavedState, StateError, encode};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Where test programs expect debug-exit unless told otherwise; 0xF4 is usual as well.
pub const DEBUG_EXIT_PORT: u16 = 0x501;
/// pvpanic's port.
pub const PVPANIC_PORT: u16 = 0x505;
/// Where kernels look for a debug console; firmware uses 0x402.
pub const DEBUG_CONSOLE_PORT: u16 = 0xe9;
/// The port of power-on self-test codes, which programs also write to as a short delay.
pub const POST_CODE_PORT: u16 = 0x80;

/// Ends the machine with an exit code of the guest's choice: a write of `value` asks for
/// [`PowerEvent::DebugExit`] with `value << 1 | 1`.
pub struct DebugExit {
    port: u16,
    count: u16,
    events: Arc<dyn PowerEvents>,
}

impl DebugExit {
    /// The device's kind in saved states.
    pub const KIND: &'static str = "debug-exit";
    /// How many ports it has unless told otherwise: for writes of up to 32 bits.
    pub const PORT_COUNT: u16 = 4;

    /// A device at the [`DebugExit::PORT_COUNT`] ports from `port` on.
    pub fn new(port: u16, events: Arc<dyn PowerEvents>) -> Arc<Self> {
        Self::with_ports(port, Self::PORT_COUNT, events)
    }

    /// A device at `count` ports from `port` on.
    pub fn with_ports(port: u16, count: u16, events: Arc<dyn PowerEvents>) -> Arc<Self> {
        Arc::new(Self { port, count, events })
    }

    /// The ports to map.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        vec![region(self, (self.port, self.count))]
    }
}

impl PortSet for DebugExit {
    fn read_ports(&self, _first: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_ports(&self, first: u16, data: &[u8]) {
        if first == self.port
            && let Some(&value) = data.first()
        {
            self.events.request(PowerEvent::DebugExit(value << 1 | 1));
        }
    }
}

/// Reports a guest kernel's panic (the "pvpanic" ISA device). Reading tells which events it understands.
pub struct Pvpanic {
    events: Arc<dyn PowerEvents>,
}

impl Pvpanic {
    /// The device's kind in saved states.
    pub const KIND: &'static str = "pvpanic";
    /// The guest panicked.
    pub const PANICKED: u8 = 0x01;
    /// The guest panicked and has a crash kernel to go on with.
    pub const CRASH_LOADED: u8 = 0x02;
    /// The guest has shut down and wants to be switched off.
    pub const SHUTDOWN: u8 = 0x04;

    /// A device that reports to `events`.
    pub fn new(events: Arc<dyn PowerEvents>) -> Arc<Self> {
        Arc::new(Self { events })
    }

    /// The port to map.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        vec![region(self, (PVPANIC_PORT, 1))]
    }
}

impl PortSet for Pvpanic {
    fn read_ports(&self, _first: u16, data: &mut [u8]) {
        data.fill(Self::PANICKED | Self::CRASH_LOADED | Self::SHUTDOWN);
    }

    fn write_ports(&self, _first: u16, data: &[u8]) {
        let value = data.first().copied().unwrap_or(0);
        let event = if value & Self::PANICKED != 0 {
            PowerEvent::Panicked
        } else if value & Self::CRASH_LOADED != 0 {
            PowerEvent::CrashLoaded
        } else if value & Self::SHUTDOWN != 0 {
            PowerEvent::PowerOff
        } else {
            return;
        };
        self.events.request(event);
    }
}

type Sink = Box<dyn Fn(&[u8]) + Send + Sync>;

/// A port that passes each byte written to it to the host, and says that it is there by reading as 0xE9.
pub struct DebugConsole {
    port: u16,
    sink: Sink,
}

impl DebugConsole {
    /// The device's kind in saved states.
    pub const KIND: &'static str = "debug-console";

    /// A console at `port`. `sink` is called by vCPU threads and must not wait.
    pub fn new(port: u16, sink: impl Fn(&[u8]) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { port, sink: Box::new(sink) })
    }

    /// The port to map.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        vec![region(self, (self.port, 1))]
    }
}

impl PortSet for DebugConsole {
    fn read_ports(&self, _first: u16, data: &mut [u8]) {
        data.fill(0xe9);
    }

    fn write_ports(&self, _first: u16, data: &[u8]) {
        (self.sink)(data);
    }
}

/// A device without guest-visible state still takes part in saving: its presence is checked.
macro_rules! stateless {
    ($device:ty) => {
        impl Device for $device {
            fn kind(&self) -> &'static str {
                Self::KIND
            }
            fn version(&self) -> u32 {
                1
            }
            fn reset(&self) {}
            fn save(&self) -> SavedState {
                encode(Self::KIND, 1, &())
            }
            fn restore(&self, state: &SavedState) -> Result<(), StateError> {
                decode_checked(Self::KIND, 1, state, |()| true)
            }
        }

        impl fmt::Debug for $device {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($device)).finish_non_exhaustive()
            }
        }
    };
}

stateless!(DebugExit);
stateless!(Pvpanic);
stateless!(DebugConsole);

/// The register of power-on self-test codes: remembers the last one.
#[derive(Debug, Default)]
pub struct PostCode {
    // Guest-visible state.
    last: AtomicU8,
}

impl PostCode {
    /// The register's kind in saved states.
    pub const KIND: &'static str = "post-code";
    const VERSION: u32 = 1;

    /// A register that reads 0.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The port to map.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        vec![region(self, (POST_CODE_PORT, 1))]
    }

    /// The last code that the guest wrote.
    pub fn last(&self) -> u8 {
        self.last.load(Ordering::Relaxed)
    }
}

impl PortSet for PostCode {
    fn read_ports(&self, _first: u16, data: &mut [u8]) {
        data.fill(self.last());
    }

    fn write_ports(&self, _first: u16, data: &[u8]) {
        if let Some(&value) = data.first() {
            self.last.store(value, Ordering::Relaxed);
        }
    }
}

impl Device for PostCode {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    fn reset(&self) {
        self.last.store(0, Ordering::Relaxed);
    }

    fn save(&self) -> SavedState {
        encode(Self::KIND, Self::VERSION, &self.last())
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let decoded = decode_checked(Self::KIND, Self::VERSION, state, |_| true);
        take_over(self, decoded, |last| self.last.store(last, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_bench::{EventLog, Ports};
    use parking_lot::Mutex;

    #[test]
    fn debug_exit_and_pvpanic_report() {
        let events = EventLog::new();
        let exit = DebugExit::new(0xf4, events.clone());
        let panic = Pvpanic::new(events.clone());
        let mut regions = exit.port_regions();
        regions.extend(panic.port_regions());
        let ports = Ports::new(regions);
        ports.write_wide(0xf4, 4, 0x10);
        ports.write(0xf4, 0xff);
        ports.write(0xf5, 1);
        assert_eq!(events.take(), [PowerEvent::DebugExit(0x21), PowerEvent::DebugExit(0xff)]);
        assert_eq!(ports.read(PVPANIC_PORT), 7);
        for value in [0, 1, 2, 4, 3] {
            ports.write(PVPANIC_PORT, value);
        }
        assert_eq!(
            events.take(),
            [PowerEvent::Panicked, PowerEvent::CrashLoaded, PowerEvent::PowerOff, PowerEvent::Panicked]
        );
        assert!(exit.restore(&exit.save()).is_ok() && exit.restore(&panic.save()).is_err());
    }

    #[test]
    fn the_debug_console_passes_bytes_on_and_post_codes_stay() {
        let output = Arc::new(Mutex::new(Vec::new()));
        let sink = output.clone();
        let console =
            DebugConsole::new(DEBUG_CONSOLE_PORT, move |bytes| sink.lock().extend_from_slice(bytes));
        let post = PostCode::new();
        let mut regions = console.port_regions();
        regions.extend(post.port_regions());
        let ports = Ports::new(regions);
        assert_eq!(ports.read(0xe9), 0xe9);
        ports.write(0xe9, b'h');
        ports.write(0xe9, b'i');
        assert_eq!(*output.lock(), b"hi");
        ports.write(0x80, 0x42);
        let copy = PostCode::new();
        copy.restore(&post.save()).unwrap();
        assert_eq!((ports.read(0x80), copy.last()), (0x42, 0x42));
    }
}
