//! The chipset's bridges, as far as they are configuration space only.

use crate::{FunctionState, Identity, PciDevice, PciFunction};
use device::{Device, SavedState, StateError, decode, encode};

/// Intel's vendor ID.
const INTEL: u16 = 0x8086;

macro_rules! config_only_device {
    ($name:ident, $kind:literal) => {
        impl Device for $name {
            fn kind(&self) -> &'static str {
                $kind
            }

            fn version(&self) -> u32 {
                1
            }

            fn reset(&self) {
                self.function.reset();
            }

            fn save(&self) -> SavedState {
                encode($kind, 1, &self.function.save())
            }

            fn restore(&self, state: &SavedState) -> Result<(), StateError> {
                let result = decode::<FunctionState>($kind, 1, state)
                    .and_then(|saved| self.function.restore($kind, &saved));
                if result.is_err() {
                    self.function.reset();
                }
                result
            }
        }

        impl PciDevice for $name {
            fn function(&self) -> &PciFunction {
                &self.function
            }
        }
    };
}

/// The host bridge, at 00:00.0: a Q35 MCH by its ID (Intel 3 Series Express Chipset Family datasheet,
/// 5.1), with the register that says where ECAM is.
#[derive(Debug)]
pub struct HostBridge {
    function: PciFunction,
}

impl HostBridge {
    /// A host bridge that says that the configuration spaces of bus 0 to `last_bus` are at `ecam_base`. The
    /// guest cannot move them. The register counts 64, 128 or 256 buses and says the least that suffices.
    pub fn new(ecam_base: u64, last_bus: u8) -> Self {
        let identity =
            Identity { vendor: INTEL, device: 0x29c0, revision: 2, class: 0x06_0000, ..Identity::default() };
        let mut builder = PciFunction::builder(&identity);
        let length: u64 = match last_bus {
            0..64 => 0b10,
            64..128 => 0b01,
            128.. => 0b00,
        };
        builder.space().set(0x60, &(ecam_base | length << 1 | 1).to_le_bytes());
        Self { function: builder.build() }
    }
}

config_only_device!(HostBridge, "pci-host-bridge");

/// The LPC bridge, at 00:1f.0: an ICH9 by its ID (Intel I/O Controller Hub 9 datasheet, chapter 13). Its
/// interrupt routing registers can be written but route nothing: lines go where the machine wires them.
#[derive(Debug)]
pub struct LpcBridge {
    function: PciFunction,
}

impl LpcBridge {
    /// The bridge; `pm_base` is the I/O port at which the machine's ACPI power management registers are.
    pub fn new(pm_base: u16) -> Self {
        let identity =
            Identity { vendor: INTEL, device: 0x2918, revision: 2, class: 0x06_0100, ..Identity::default() };
        let mut builder = PciFunction::builder(&identity);
        let space = builder.space();
        space.set(0x40, &(u32::from(pm_base & 0xff80) | 1).to_le_bytes());
        space.set(0x44, &[0x80]); // ACPI_CNTL: enabled, SCI on IRQ 9
        for routes in [0x60, 0x68] {
            space.set(routes, &[0x80; 4]); // PIRQx not routed to an ISA interrupt
            space.allow(routes, &[0x8f; 4]);
        }
        Self { function: builder.build() }
    }
}

config_only_device!(LpcBridge, "ich9-lpc-bridge");
