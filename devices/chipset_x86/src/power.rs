//! What a guest asks of the machine as a whole, and the ports that ask for a reset.

use crate::ports::{PortRegion, PortSet, decode_checked, region, take_over};
use device::{Device, SavedState, StateError, encode};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The reset control register's port (Intel ICH9 data sheet, 13.7.5). It lies within the ports of PCI
/// configuration access, whose address register is reached only by 32-bit accesses to 0xCF8.
pub const RESET_CONTROL_PORT: u16 = 0xcf9;
/// The value that resets the machine when written to [`RESET_CONTROL_PORT`]: for ACPI's `RESET_VALUE`.
pub const RESET_CONTROL_VALUE: u8 = 0x06;
/// System control port A: fast reset and A20.
pub const FAST_RESET_PORT: u16 = 0x92;

/// Something that a guest asks of the machine as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PowerEvent {
    /// Reset the machine.
    Reset,
    /// Switch the machine off.
    PowerOff,
    /// Suspend to RAM (ACPI's S3): stop the processors where they are, and keep memory.
    Sleep,
    /// What ends such a sleep has come.
    Wake,
    /// The guest's program has ended, with this exit code (always odd).
    DebugExit(u8),
    /// The guest's kernel panicked, and will do nothing more.
    Panicked,
    /// The guest's kernel panicked and goes on in a crash kernel.
    CrashLoaded,
}

/// Who hears what guests ask of the machine. It is called by vCPU threads in the middle of an access, and
/// must not wait for the vCPUs there: it notes the request and wakes the thread that carries it out.
pub trait PowerEvents: Send + Sync {
    /// The guest asks for `event`.
    fn request(&self, event: PowerEvent);
}

/// The gate of address line 20, which several devices operate. It only remembers its position: address
/// wrap-around at 1 MiB is not emulated, and it is open after a reset, as firmware leaves it.
#[derive(Debug)]
pub struct A20Gate(AtomicBool);

impl A20Gate {
    /// An open gate: addresses are not masked.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(AtomicBool::new(true)))
    }

    /// Opens (`true`) or closes the gate.
    pub fn set(&self, open: bool) {
        self.0.store(open, Ordering::SeqCst);
    }

    /// Whether address line 20 passes.
    pub fn is_open(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// The reset control register at [`RESET_CONTROL_PORT`].
pub struct ResetControl {
    // Host glue.
    events: Arc<dyn PowerEvents>,
    // Guest-visible state.
    state: Mutex<ResetControlState>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct ResetControlState {
    value: u8,
}

impl ResetControl {
    /// The register's kind in saved states.
    pub const KIND: &'static str = "reset-control";
    const VERSION: u32 = 1;
    /// "Reset CPU": its rise resets the machine.
    const RESET_CPU: u8 = 0x04;
    /// "System reset" and "full reset" only choose the kind of reset.
    const KEPT: u8 = 0x0a;

    /// A register that asks `events` for resets.
    pub fn new(events: Arc<dyn PowerEvents>) -> Arc<Self> {
        Arc::new(Self { events, state: Mutex::default() })
    }

    /// The port to map, for a machine whose PCI configuration device leaves it out.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        vec![region(self, (RESET_CONTROL_PORT, 1))]
    }

    /// A guest's byte read, for a PCI configuration device that owns the port.
    pub fn read_byte(&self) -> u8 {
        self.state.lock().value
    }

    /// A guest's byte write, for a PCI configuration device that owns the port.
    pub fn write_byte(&self, value: u8) {
        self.state.lock().value = value & Self::KEPT;
        if value & Self::RESET_CPU != 0 {
            self.events.request(PowerEvent::Reset);
        }
    }
}

impl PortSet for ResetControl {
    fn read_ports(&self, _first: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(byte) = data.first_mut() {
            *byte = self.read_byte();
        }
    }

    fn write_ports(&self, _first: u16, data: &[u8]) {
        if let Some(&byte) = data.first() {
            self.write_byte(byte);
        }
    }
}

impl Device for ResetControl {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    fn reset(&self) {
        *self.state.lock() = ResetControlState::default();
    }

    fn save(&self) -> SavedState {
        encode(Self::KIND, Self::VERSION, &*self.state.lock())
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let sound = |state: &ResetControlState| state.value & !Self::KEPT == 0;
        let decoded = decode_checked(Self::KIND, Self::VERSION, state, sound);
        take_over(self, decoded, |state| *self.state.lock() = state)
    }
}

impl fmt::Debug for ResetControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResetControl").field("state", &self.state).finish_non_exhaustive()
    }
}

/// System control port A at [`FAST_RESET_PORT`]: bit 0 resets the machine, bit 1 is the A20 gate. It also
/// carries the gate's position in its saved state.
pub struct FastReset {
    // Host glue.
    events: Arc<dyn PowerEvents>,
    // Guest-visible state is the gate's.
    gate: Arc<A20Gate>,
}

impl FastReset {
    /// The port's kind in saved states.
    pub const KIND: &'static str = "fast-reset";
    const VERSION: u32 = 1;

    /// A port that asks `events` for resets and operates `gate`.
    pub fn new(events: Arc<dyn PowerEvents>, gate: Arc<A20Gate>) -> Arc<Self> {
        Arc::new(Self { events, gate })
    }

    /// The port to map.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        vec![region(self, (FAST_RESET_PORT, 1))]
    }
}

impl PortSet for FastReset {
    fn read_ports(&self, _first: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(byte) = data.first_mut() {
            *byte = u8::from(self.gate.is_open()) << 1;
        }
    }

    fn write_ports(&self, _first: u16, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        self.gate.set(value & 2 != 0);
        if value & 1 != 0 {
            self.events.request(PowerEvent::Reset);
        }
    }
}

impl Device for FastReset {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    fn reset(&self) {
        self.gate.set(true);
    }

    fn save(&self) -> SavedState {
        encode(Self::KIND, Self::VERSION, &self.gate.is_open())
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let decoded = decode_checked(Self::KIND, Self::VERSION, state, |_| true);
        take_over(self, decoded, |open| self.gate.set(open))
    }
}

impl fmt::Debug for FastReset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FastReset").field("gate", &self.gate).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_bench::EventLog;

    #[test]
    fn reset_control_resets_when_reset_cpu_is_written() {
        let events = EventLog::new();
        let reset = ResetControl::new(events.clone());
        reset.write_byte(0x02);
        assert_eq!(reset.read_byte(), 0x02);
        assert!(events.take().is_empty());
        reset.write_byte(0x06);
        assert_eq!(events.take(), [PowerEvent::Reset]);
        let copy = ResetControl::new(events.clone());
        copy.restore(&reset.save()).unwrap();
        assert_eq!(copy.read_byte(), reset.read_byte());
        assert!(copy.restore(&encode(ResetControl::KIND, 1, &0xffu8)).is_err());
    }

    #[test]
    fn port_92_resets_and_operates_a20() {
        let events = EventLog::new();
        let gate = A20Gate::new();
        let port = FastReset::new(events.clone(), gate.clone());
        let port_92 = &port.port_regions()[0].device;
        let mut data = [0];
        port_92.pio_read(0, &mut data);
        assert_eq!(data, [2]);
        port_92.pio_write(0, &[0]);
        assert!(!gate.is_open() && events.take().is_empty());
        let copy = FastReset::new(events.clone(), A20Gate::new());
        copy.restore(&port.save()).unwrap();
        assert!(!copy.gate.is_open());
        port_92.pio_write(0, &[3]);
        assert!(gate.is_open());
        assert_eq!(events.take(), [PowerEvent::Reset]);
    }
}
