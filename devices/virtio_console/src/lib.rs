//! The virtio console (5.3): a terminal, and any number of further byte channels between host and guest,
//! such as a guest agent's.
//!
//! A device with one unnamed port is a plain console. With more ports, or a named one, it offers
//! `VIRTIO_CONSOLE_F_MULTIPORT`, and a driver that does not take that up has port 0 only.

mod control;
mod port;

pub use port::INPUT_CAPACITY;

use control::Control;
use device::{SavedState, StateError, decode, encode};
use parking_lot::Mutex;
use port::{Port, PortState};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio::{ActivateError, Activation, DeviceType, Interrupt, QueueThreads, VirtioDevice};

/// Feature bits of consoles (5.3.3).
pub mod feature {
    /// The size in the configuration space is valid.
    pub const SIZE: u64 = 1 << 0;
    /// There are several ports, and control queues.
    pub const MULTIPORT: u64 = 1 << 1;
    /// Characters can be written by the configuration space.
    pub const EMERG_WRITE: u64 = 1 << 2;
}

/// The most ports of a device.
pub const MAX_PORTS: usize = 31;

/// The longest name of a port in bytes.
pub const MAX_NAME: usize = 128;

const KIND: &str = "virtio-console";
const VERSION: u32 = 1;

const QUEUE_SIZE: u16 = 128;
/// Queue numbers (5.3.2).
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

/// Offset of the emergency write register in the configuration space.
const CONFIG_EMERGENCY: u64 = 8;

/// The host's end of a port.
///
/// No method may wait for the outside world, and none may call the device back.
pub trait ConsoleBackend: Send + Sync {
    /// Takes what it can of the guest's `bytes`, from the first on, and returns how many. If that is none,
    /// the guest's output waits until [`VirtioConsole::transmit_ready`] is called.
    fn write(&self, bytes: &[u8]) -> usize;

    /// There is room for input again, after [`VirtioConsole::receive`] had to refuse bytes.
    fn input_room(&self) {}

    /// A program in the guest opened or closed the port. Plain consoles are always open.
    fn guest_opened(&self, _open: bool) {}
}

/// The fixed configuration of one port.
#[derive(Clone)]
pub struct PortConfig {
    /// What the guest knows the port by, e.g. `org.qemu.guest_agent.0`; empty for a console.
    pub name: String,
    /// Whether the guest is to use it as a console.
    pub console: bool,
    /// The host's end.
    pub backend: Arc<dyn ConsoleBackend>,
}

impl PortConfig {
    /// A console.
    pub fn console(backend: Arc<dyn ConsoleBackend>) -> Self {
        Self { name: String::new(), console: true, backend }
    }

    /// A byte channel called `name`.
    pub fn channel(name: impl Into<String>, backend: Arc<dyn ConsoleBackend>) -> Self {
        Self { name: name.into(), console: false, backend }
    }
}

impl fmt::Debug for PortConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortConfig")
            .field("name", &self.name)
            .field("console", &self.console)
            .finish_non_exhaustive()
    }
}

/// Why a console cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConsoleError {
    /// Too few or too many ports.
    #[error("a virtio console has 1 to {MAX_PORTS} ports, not {0}")]
    Ports(usize),
    /// A name is too long.
    #[error("the port name {0:?} is longer than {MAX_NAME} bytes")]
    Name(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct ConsoleState {
    size: (u16, u16),
    ports: Vec<PortState>,
    control: Vec<Vec<u8>>,
}

/// A virtio console.
pub struct VirtioConsole {
    queue_sizes: Vec<u16>,
    ports: Arc<[Arc<Port>]>,
    control: Arc<Control>,
    threads: Arc<QueueThreads>,
    active: Mutex<Option<(Arc<dyn Interrupt>, u64)>>,
}

impl VirtioConsole {
    /// A console with these ports; the first should be a console.
    ///
    /// # Errors
    /// [`ConsoleError`].
    pub fn new(ports: Vec<PortConfig>) -> Result<Self, ConsoleError> {
        if ports.is_empty() || ports.len() > MAX_PORTS {
            return Err(ConsoleError::Ports(ports.len()));
        }
        if let Some(port) = ports.iter().find(|port| port.name.len() > MAX_NAME) {
            return Err(ConsoleError::Name(port.name.clone()));
        }
        let plain = ports.len() == 1 && ports[0].name.is_empty();
        let queues = if plain { 2 } else { 2 + 2 * ports.len() };
        let ports: Arc<[_]> = ports.into_iter().map(|config| Arc::new(Port::new(config))).collect();
        Ok(Self {
            queue_sizes: vec![QUEUE_SIZE; queues],
            control: Arc::new(Control::new(ports.clone())),
            ports,
            threads: Arc::new(QueueThreads::new()),
            active: Mutex::new(None),
        })
    }

    fn multiport(&self) -> bool {
        self.queue_sizes.len() > 2
    }

    /// The thread that serves queue `queue`, by the number it was started with.
    fn thread_of(queue: u16) -> u16 {
        match queue {
            CONTROL_RECEIVE | CONTROL_TRANSMIT => CONTROL_TRANSMIT,
            _ => queue & !1,
        }
    }

    /// The number of the first queue of `port` (5.3.2).
    fn first_queue(port: usize) -> u16 {
        if port == 0 { 0 } else { 2 + 2 * port as u16 }
    }

    /// Input from the host for `port`: takes as much of `bytes` as there is room for and returns how many.
    /// If that is not all, the backend's [`ConsoleBackend::input_room`] is called when there is room again.
    /// Without a driver, and on a channel that the guest did not open, there is none.
    pub fn receive(&self, port: usize, bytes: &[u8]) -> usize {
        let Some(target) = self.ports.get(port) else { return 0 };
        let taken = target.receive(bytes);
        if taken > 0 {
            self.threads.notify(Self::first_queue(port));
        }
        taken
    }

    /// To be called when a backend that refused bytes can take some again.
    pub fn transmit_ready(&self, port: usize) {
        self.threads.notify(Self::first_queue(port));
    }

    /// Tells the guest the size of its terminal, in characters.
    pub fn resize(&self, columns: u16, rows: u16) {
        self.control.set_size(columns, rows);
        let active = self.active.lock().clone();
        match active {
            Some((_, features)) if features & feature::MULTIPORT != 0 => {
                self.control.send_sizes();
                self.threads.notify(CONTROL_TRANSMIT);
            }
            Some((interrupt, _)) => interrupt.config_changed(),
            None => {}
        }
    }

    /// Tells the guest whether somebody is at the host's end of `port`. At first there is.
    pub fn set_connected(&self, port: usize, connected: bool) {
        let Some(target) = self.ports.get(port) else { return };
        if target.set_connected(connected) {
            self.control.send_connected(port);
            self.threads.notify(CONTROL_TRANSMIT);
        }
    }
}

impl VirtioDevice for VirtioConsole {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        let multiport = if self.multiport() { feature::MULTIPORT } else { 0 };
        feature::SIZE | feature::EMERG_WRITE | multiport
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.control.size();
        let mut registers = [0; 12];
        registers[..2].copy_from_slice(&columns.to_le_bytes());
        registers[2..4].copy_from_slice(&rows.to_le_bytes());
        registers[4..8].copy_from_slice(&(self.ports.len() as u32).to_le_bytes());
        virtio::read_registers(&registers, offset, data);
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        if offset == CONFIG_EMERGENCY
            && let Some(character) = data.first()
        {
            // A dying guest's word: what the backend does not take at once is lost.
            self.ports[0].write_now(*character);
        }
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { features, queues, interrupt, .. } = activation;
        let multiport = features & feature::MULTIPORT != 0;
        *self.active.lock() = Some((interrupt.clone(), features));
        for (index, port) in self.ports.iter().enumerate() {
            if index > 0 && !multiport {
                break;
            }
            port.activate(multiport);
            let first = Self::first_queue(index);
            let (receive, transmit) =
                (queues[usize::from(first)].clone(), queues[usize::from(first) + 1].clone());
            let port = port.clone();
            let name = format!("virtio-con p{index}");
            self.threads
                .spawn(first, &name, interrupt.clone(), move |stop| port.serve(&receive, &transmit, stop))?;
        }
        if multiport {
            let receive = queues[usize::from(CONTROL_RECEIVE)].clone();
            let transmit = queues[usize::from(CONTROL_TRANSMIT)].clone();
            let control = self.control.clone();
            self.threads.spawn(CONTROL_TRANSMIT, "virtio-con ctl", interrupt, move |stop| {
                control.serve(&receive, &transmit, stop)
            })?;
        }
        Ok(())
    }

    fn notify(&self, queue: u16) {
        self.threads.notify(Self::thread_of(queue));
    }

    fn doorbell(&self, queue: u16) -> Option<Arc<OwnedFd>> {
        self.threads.doorbell(Self::thread_of(queue))
    }

    fn reset(&self) {
        self.threads.clear();
        *self.active.lock() = None;
        self.control.reset();
        for port in self.ports.iter() {
            port.reset();
        }
    }

    fn start(&self) {
        self.threads.start();
    }

    fn stop(&self) {
        self.threads.stop();
    }

    fn save(&self) -> SavedState {
        let state = ConsoleState {
            size: self.control.size(),
            ports: self.ports.iter().map(|port| port.save()).collect(),
            control: self.control.save(),
        };
        encode(KIND, VERSION, &state)
    }

    fn restore(&self, state: &SavedState) -> Result<(), StateError> {
        let ConsoleState { size, ports, control } = decode(KIND, VERSION, state)?;
        let fits = ports.len() == self.ports.len()
            && ports.iter().all(PortState::is_valid)
            && Control::is_valid(&control);
        if !fits {
            return Err(StateError::malformed(KIND, "its ports or messages are not this device's"));
        }
        for (port, saved) in self.ports.iter().zip(ports) {
            port.restore(saved);
        }
        self.control.set_size(size.0, size.1);
        self.control.restore(control);
        Ok(())
    }
}

impl fmt::Debug for VirtioConsole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioConsole").field("ports", &self.ports.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
