//! The sleep registers of a machine without fixed ACPI hardware (ACPI 6.5, 4.8.3.7).

use crate::pm::SLEEP_TYPE_S5;
use crate::ports::{PortRegion, PortSet, decode_checked, region, take_over};
use crate::{PowerEvent, PowerEvents};
use device::{Device, SavedState, StateError, encode};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// The port of the sleep control register. Any would do; guests hear of it through ACPI.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// The port of the sleep status register.
pub const SLEEP_STATUS_PORT: u16 = SLEEP_CONTROL_PORT + 1;

/// The control register: which state to enter.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
/// The control register: enter it. Reads as zero.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The sleep control register, and behind it the sleep status register. The only state that can be entered
/// is soft off, from which nothing wakes: the status is always zero.
pub struct SleepControl {
    // Host glue.
    events: Arc<dyn PowerEvents>,
    // Guest-visible state.
    state: Mutex<SleepState>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct SleepState {
    control: u8,
}

impl SleepControl {
    /// The registers' kind in saved states.
    pub const KIND: &'static str = "sleep-control";
    const VERSION: u32 = 1;

    /// Registers that ask `events` to switch the machine off.
    pub fn new(events: Arc<dyn PowerEvents>) -> Arc<Self> {
        Arc::new(Self { events, state: Mutex::default() })
    }

    /// The ports to map.
    pub fn port_regions(self: &Arc<Self>) -> Vec<PortRegion> {
        vec![region(self, (SLEEP_CONTROL_PORT, 2))]
    }
}

impl PortSet for SleepControl {
    fn read_ports(&self, first: u16, data: &mut [u8]) {
        data.fill(0);
        if first == SLEEP_CONTROL_PORT
            && let Some(byte) = data.first_mut()
        {
            *byte = self.state.lock().control;
        }
    }

    fn write_ports(&self, first: u16, data: &[u8]) {
        let Some(&value) = data.first().filter(|_| first == SLEEP_CONTROL_PORT) else { return };
        self.state.lock().control = value & SLEEP_TYPE_MASK << SLEEP_TYPE_SHIFT;
        if value & SLEEP_ENABLE != 0 && value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == SLEEP_TYPE_S5 {
            self.events.request(PowerEvent::PowerOff);
        }
    }
}

impl Device for SleepControl {
    fn kind(&self) -> &'static str {
        Self::KIND
    }

    fn version(&self) -> u32 {
        Self::VERSION
    }

    fn reset(&self) {
        *self.state.lock() = SleepState::default();
    }

    fn save(&self) -> SavedState {
        let SleepState { control } = *self.state.lock();
        encode(Self::KIND, Self::VERSION, &SleepState { control })
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let sound = |state: &SleepState| state.control & !(SLEEP_TYPE_MASK << SLEEP_TYPE_SHIFT) == 0;
        let decoded = decode_checked(Self::KIND, Self::VERSION, state, sound);
        take_over(self, decoded, |state| *self.state.lock() = state)
    }
}

impl fmt::Debug for SleepControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SleepControl").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use device::encode;

    #[derive(Default)]
    struct Log(Mutex<Vec<PowerEvent>>);

    impl PowerEvents for Log {
        fn request(&self, event: PowerEvent) {
            self.0.lock().push(event);
        }
    }

    #[test]
    fn only_soft_off_with_the_enable_bit_switches_off() {
        let log = Arc::new(Log::default());
        let sleep = SleepControl::new(log.clone());
        let off = SLEEP_TYPE_S5 << 2;
        for value in [0, off, 0x20, 0x20 | 3 << 2] {
            sleep.write_ports(SLEEP_CONTROL_PORT, &[value]);
        }
        sleep.write_ports(SLEEP_CONTROL_PORT + 1, &[off | 0x20]);
        assert!(log.0.lock().is_empty());
        sleep.write_ports(SLEEP_CONTROL_PORT, &[off | 0x20]);
        assert_eq!(*log.0.lock(), [PowerEvent::PowerOff]);
        let mut data = [0xff; 2];
        sleep.read_ports(SLEEP_CONTROL_PORT, &mut data);
        assert_eq!(data, [off, 0]);
    }

    #[test]
    fn state_is_saved_and_checked() {
        let sleep = SleepControl::new(Arc::new(Log::default()));
        sleep.write_ports(SLEEP_CONTROL_PORT, &[0x0c]);
        let state = sleep.save();
        sleep.reset();
        sleep.restore(&state).unwrap();
        assert_eq!(sleep.state.lock().control, 0x0c);
        let bad = encode(SleepControl::KIND, SleepControl::VERSION, &SleepState { control: 0xff });
        assert!(sleep.restore(&bad).is_err());
        assert_eq!(sleep.state.lock().control, 0);
    }
}
