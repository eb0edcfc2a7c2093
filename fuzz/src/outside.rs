//! What is around a device: interrupt controllers, the machine, processors.

use chipset_x86::{PowerEvent, PowerEvents};
use irq::{IrqLine, IrqSink, MsiMessage, MsiTarget};
use lapic::{Event, VcpuSink};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Takes all that devices send.
#[derive(Debug, Default)]
pub struct Outside {
    levels: Mutex<BTreeMap<u32, bool>>,
    messages: Mutex<Vec<MsiMessage>>,
    events: Mutex<Vec<PowerEvent>>,
    processor: Mutex<Vec<Event>>,
}

impl Outside {
    /// A line of its own to input `pin`.
    pub fn line(self: &Arc<Self>, pin: u32) -> IrqLine {
        IrqLine::new(self.clone(), pin)
    }

    /// The level of input `pin`.
    pub fn level(&self, pin: u32) -> bool {
        self.levels.lock().get(&pin).copied().unwrap_or(false)
    }

    /// The messages since the last time.
    pub fn take_messages(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.messages.lock())
    }

    /// What the machine was asked for since the last time.
    pub fn take_events(&self) -> Vec<PowerEvent> {
        std::mem::take(&mut self.events.lock())
    }

    /// What the processors were told since the last time.
    pub fn take_processor_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.processor.lock())
    }
}

impl IrqSink for Outside {
    fn set_level(&self, pin: u32, level: bool) {
        let before = self.levels.lock().insert(pin, level);
        assert_ne!(before.unwrap_or(false), level, "line {pin} was told of a level that it has");
    }
}

impl MsiTarget for Outside {
    fn signal(&self, message: MsiMessage) {
        self.messages.lock().push(message);
    }
}

impl PowerEvents for Outside {
    fn request(&self, event: PowerEvent) {
        self.events.lock().push(event);
    }
}

impl VcpuSink for Outside {
    fn event(&self, event: Event) {
        self.processor.lock().push(event);
    }
}
