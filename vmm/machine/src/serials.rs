//! Serial ports.

use crate::assembly::Assembly;
use crate::deterministic::Ports;
use crate::requests::{Request, Requests};
use crate::{MAX_SERIALS, MachineError, Quitter};
use chardev::{ChardevSpec, Endpoint, Gate, InputEvent, PortConnection, Surroundings, connect_serial};
use chipset_x86::Board;
use serial::{COM1, COM2, COM3, COM4, Serial};
use std::sync::Arc;

/// First port and ISA interrupt of each serial port.
pub(super) const PORTS: [(u16, u32); MAX_SERIALS] = [COM1, COM2, COM3, COM4];

/// Adds a serial port for each of `specs`; what is returned keeps them connected.
pub(super) fn add(
    assembly: &mut Assembly,
    board: &Arc<Board>,
    specs: &[ChardevSpec],
    requests: &Arc<Requests>,
) -> Result<Vec<PortConnection>, MachineError> {
    if specs.len() > MAX_SERIALS {
        return Err(MachineError::TooMany { what: "serial ports", count: specs.len(), most: MAX_SERIALS });
    }
    let mut connections = Vec::new();
    for (spec, (port, irq)) in specs.iter().zip(PORTS) {
        let endpoint = Endpoint::open(spec)?;
        announce(&endpoint, &format!("the serial port at {port:#x}"));
        let line = board.isa_line(irq);
        let (device, connection) =
            connect_serial(endpoint, around(assembly, requests), |backend| Serial::new(line, backend))?;
        assembly.map_ports(port, serial::PORT_COUNT, device.clone())?;
        assembly.add(device);
        connections.push(connection);
    }
    Ok(connections)
}

/// Tells people the name of a pseudo-terminal.
pub(super) fn announce(endpoint: &Endpoint, what: &str) {
    if let Some(name) = &endpoint.name {
        eprintln!("vireo: {what} is connected to {}", name.display());
    }
}

/// What ports are connected with: what the escape keys of a terminal do to the machine, and what has input wait.
pub(super) fn around(assembly: &Assembly, requests: &Arc<Requests>) -> Surroundings {
    let requests = requests.clone();
    let events = move |event| {
        if event == InputEvent::Quit {
            requests.push(Request::Quit(Quitter::Terminal));
        }
    };
    let gate = assembly.determinism.as_ref().map(|determinism| {
        let ports: Arc<dyn Gate> = Arc::new(Ports(determinism.outside.clone()));
        ports
    });
    Surroundings { events: Arc::new(events), gate }
}
