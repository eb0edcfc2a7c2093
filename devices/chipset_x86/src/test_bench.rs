//! What this crate's tests have around a device.

use crate::{PortRegion, PowerEvent, PowerEvents};
use clock::{TimerService, VmClock};
use device::PioDevice;
use irq::{IrqLine, IrqSink, MsiMessage, MsiTarget};
use parking_lot::Mutex;
use std::sync::Arc;

/// Notes what guests ask for.
#[derive(Default)]
pub(crate) struct EventLog(Mutex<Vec<PowerEvent>>);

impl EventLog {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn take(&self) -> Vec<PowerEvent> {
        std::mem::take(&mut self.0.lock())
    }
}

impl PowerEvents for EventLog {
    fn request(&self, event: PowerEvent) {
        self.0.lock().push(event);
    }
}

/// Notes the changes of lines, and messages.
#[derive(Default)]
pub(crate) struct SignalLog {
    changes: Mutex<Vec<(u32, bool)>>,
    messages: Mutex<Vec<MsiMessage>>,
}

impl SignalLog {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn line(self: &Arc<Self>, pin: u32) -> IrqLine {
        IrqLine::new(self.clone(), pin)
    }

    pub(crate) fn take(&self) -> Vec<(u32, bool)> {
        std::mem::take(&mut self.changes.lock())
    }

    /// How many times a line rose.
    pub(crate) fn take_rises(&self) -> usize {
        self.take().iter().filter(|(_, level)| *level).count()
    }

    pub(crate) fn take_messages(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.messages.lock())
    }
}

impl IrqSink for SignalLog {
    fn set_level(&self, pin: u32, level: bool) {
        self.changes.lock().push((pin, level));
    }
}

impl MsiTarget for SignalLog {
    fn signal(&self, message: MsiMessage) {
        self.messages.lock().push(message);
    }
}

/// A clock that stands still until a test sets it, with its timer service.
pub(crate) struct Time {
    pub(crate) clock: VmClock,
    pub(crate) timers: Arc<TimerService>,
}

impl Time {
    pub(crate) fn new() -> Self {
        let clock = VmClock::new();
        Self { timers: TimerService::new(clock.clone()).expect("a thread"), clock }
    }

    pub(crate) fn pass(&self, nanos: u64) {
        self.clock.set(self.clock.now() + nanos);
    }
}

/// A guest's view of port regions.
pub(crate) struct Ports(Vec<PortRegion>);

impl Ports {
    pub(crate) fn new(regions: Vec<PortRegion>) -> Self {
        Self(regions)
    }

    fn find(&self, port: u16) -> Option<(&Arc<dyn PioDevice>, u16)> {
        let region =
            self.0.iter().find(|region| port >= region.first && port - region.first < region.count)?;
        Some((&region.device, port - region.first))
    }

    pub(crate) fn read_into(&self, port: u16, data: &mut [u8]) {
        if let Some((device, offset)) = self.find(port) {
            device.pio_read(offset, data);
        }
    }

    pub(crate) fn write_from(&self, port: u16, data: &[u8]) {
        if let Some((device, offset)) = self.find(port) {
            device.pio_write(offset, data);
        }
    }

    pub(crate) fn read(&self, port: u16) -> u8 {
        let mut data = [0xff];
        self.read_into(port, &mut data);
        data[0]
    }

    pub(crate) fn read_wide(&self, port: u16, len: usize) -> u32 {
        let mut data = [0; 4];
        self.read_into(port, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&self, port: u16, value: u8) {
        self.write_from(port, &[value]);
    }

    pub(crate) fn write_wide(&self, port: u16, len: usize, value: u32) {
        self.write_from(port, &value.to_le_bytes()[..len]);
    }
}
