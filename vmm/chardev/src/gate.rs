//! What may stand between the ports of a machine and the world: where input is to come in at moments that the machine
//! chooses, and output is never to keep the guest waiting in a way that it could see.

use serial::{BufferedOutput, SerialBackend};
use std::sync::Arc;
use std::time::Duration;

/// How long at once room for output is waited for.
const WAIT: Duration = Duration::from_millis(50);

/// Input on its way to a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortInput {
    /// Characters.
    Bytes(Vec<u8>),
    /// A break condition.
    Break,
}

impl PortInput {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Bytes(bytes) if bytes.is_empty())
    }

    /// How much it is: characters, or 1.
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Break => 1,
        }
    }
}

/// Gives a port's guest what it takes of the input, and says how much that was.
pub type Receiver = Box<dyn Fn(&PortInput) -> usize + Send + Sync>;

/// Stands between all ports of a machine and the world.
pub trait Gate: Send + Sync {
    /// The next port is made: its guest gets input by `receive`.
    fn port(&self, receive: Receiver) -> Arc<dyn PortGate>;
}

/// Stands between one port and the world.
pub trait PortGate: Send + Sync {
    /// There is input. Waits until it may come in, and says how much of it was taken; `None` says that none is wanted
    /// any more.
    fn input(&self, input: &PortInput) -> Option<usize>;

    /// The guest sent these bytes.
    fn output(&self, bytes: &[u8]);

    /// Whether the VM is about to end, so that nobody is to be waited for.
    fn is_closing(&self) -> bool;
}

/// Output behind a gate: takes everything, and has the guest stand still while there is no room.
pub(crate) struct PatientOutput {
    pub(crate) output: Arc<BufferedOutput>,
    pub(crate) gate: Arc<dyn PortGate>,
}

impl SerialBackend for PatientOutput {
    fn write(&self, bytes: &[u8]) -> usize {
        self.gate.output(bytes);
        let mut rest = bytes;
        loop {
            let taken = SerialBackend::write(&*self.output, rest);
            rest = &rest[taken..];
            // At the VM's end what finds room is still written, but none is waited for.
            if rest.is_empty() || self.gate.is_closing() {
                return bytes.len();
            }
            self.output.drain(WAIT);
        }
    }

    fn input_room(&self) {
        SerialBackend::input_room(&*self.output);
    }
}
