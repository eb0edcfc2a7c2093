//! Devices at I/O ports that a machine has only if asked for.

use crate::assembly::Assembly;
use crate::requests::Requests;
use crate::serials::announce;
use crate::{DeviceSpec, MachineError, MachineSpec};
use chardev::{Endpoint, PortConnection, connect_output};
use chipset_x86::{Board, DebugConsole, DebugExit, PcTestdev, PortRegion, PowerEvents, addresses};
use device::Device;
use std::sync::Arc;

/// Adds what `spec` asks for; what is returned keeps outputs connected. All other devices are to be there already, as
/// people choose the places of these.
pub(super) fn add(
    assembly: &mut Assembly,
    spec: &MachineSpec,
    requests: &Arc<Requests>,
    board: &Arc<Board>,
) -> Result<Vec<PortConnection>, MachineError> {
    let events: Arc<dyn PowerEvents> = requests.clone();
    let mut connections = Vec::new();
    for device in &spec.devices {
        let name = device.name();
        match device {
            DeviceSpec::DebugExit { port, count } => {
                let exit = DebugExit::with_ports(*port, *count, events.clone());
                place(assembly, name, exit.clone(), exit.port_regions())?;
            }
            DeviceSpec::DebugConsole { port, output } => {
                let endpoint = Endpoint::open(output)?;
                announce(&endpoint, "the debug console");
                let (send, connection) = connect_output(endpoint)?;
                let console = DebugConsole::new(*port, send);
                place(assembly, name, console.clone(), console.port_regions())?;
                connections.push(connection);
            }
            DeviceSpec::PcTestdev => {
                let testdev = PcTestdev::new(board);
                let memory = (addresses::PC_TESTDEV_ADDRESS, addresses::PC_TESTDEV_LEN);
                assembly
                    .map_memory(memory.0, memory.1, testdev.clone())
                    .map_err(|error| occupied(name, error))?;
                place(assembly, name, testdev.clone(), testdev.port_regions())?;
            }
        }
    }
    Ok(connections)
}

/// Puts a device at the ports that a person chose.
fn place(
    assembly: &mut Assembly,
    name: &'static str,
    device: Arc<dyn Device>,
    regions: Vec<PortRegion>,
) -> Result<(), MachineError> {
    assembly.add_at_ports(device, regions).map_err(|error| occupied(name, error))
}

fn occupied(device: &'static str, error: MachineError) -> MachineError {
    match error {
        MachineError::Wiring(reason) => MachineError::Occupied { device, reason },
        other => other,
    }
}
