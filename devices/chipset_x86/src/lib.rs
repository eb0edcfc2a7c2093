//! The PC's chipset: PIC, PIT, I/O APIC, HPET, RTC, i8042, power management, debug-exit and pvpanic.
//!
//! Each device is made by its `new`, reached by the guest through the I/O ports that its `port_regions`
//! lists (the I/O APIC and the HPET: through memory), and saved and restored through [`device::Device`].
//! [`Board`] is the interrupt wiring between the devices' lines, the PIC and the I/O APIC. What the guest
//! asks of the machine as a whole (reset, power off) goes out through [`PowerEvents`].
//!
//! All counters are computed from VM time when they are looked at. Timers only make interrupts happen in
//! time: a late timer thread delays an interrupt, and never changes what a counter reads.

mod backlog;
mod board;
mod debug_ports;
mod device_timer;
mod hpet;
mod i8042;
mod ioapic;
mod pc_testdev;
mod pic;
mod pit;
mod pm;
mod ports;
mod power;
mod rtc;
mod sleep;
#[cfg(test)]
mod test_bench;

pub use board::{Board, isa_gsi};
pub use debug_ports::{DebugConsole, DebugExit, PostCode, Pvpanic};
pub use hpet::{Hpet, HpetWiring};
pub use i8042::{I8042, I8042Config};
pub use ioapic::IoApic;
pub use pc_testdev::PcTestdev;
pub use pic::Pic;
pub use pit::Pit;
pub use pm::{Pm, PmConfig, WakeState};
pub use ports::PortRegion;
pub use power::{A20Gate, FastReset, PowerEvent, PowerEvents, ResetControl};
pub use rtc::{Rtc, RtcConfig};
pub use sleep::SleepControl;

pub mod addresses {
    //! Where a PC's guest expects the devices of this crate.

    pub use crate::board::{HPET_ROUTES, PCI_GSI_BASE, PCI_PIC_IRQS, TIMER_GSI};
    pub use crate::debug_ports::{DEBUG_CONSOLE_PORT, DEBUG_EXIT_PORT, POST_CODE_PORT, PVPANIC_PORT};
    pub use crate::hpet::{HPET_ADDRESS, HPET_BLOCK_ID, HPET_HZ, HPET_LEN};
    pub use crate::i8042::{I8042_COMMAND_PORT, I8042_DATA_PORT};
    pub use crate::ioapic::{IOAPIC_ADDRESS, IOAPIC_LEN, IOAPIC_PINS};
    pub use crate::pc_testdev::{PC_TESTDEV_ADDRESS, PC_TESTDEV_LEN};
    pub use crate::pic::{ELCR_PORTS, PIC_MASTER_PORTS, PIC_SLAVE_PORTS};
    pub use crate::pit::{PIT_HZ, PIT_PORTS, SYSTEM_CONTROL_B_PORT};
    pub use crate::pm::{
        ACPI_DISABLE, ACPI_ENABLE, GPE0_LEN, GPE0_OFFSET, PM_PORT_BASE, PM_PORT_COUNT, PM_TIMER_HZ,
        PM_TIMER_OFFSET, PM1_CONTROL_OFFSET, PM1_EVENT_OFFSET, SCI_GSI, SLEEP_TYPE_S0, SLEEP_TYPE_S3,
        SLEEP_TYPE_S5, SMI_COMMAND_PORT,
    };
    pub use crate::power::{FAST_RESET_PORT, RESET_CONTROL_PORT, RESET_CONTROL_VALUE};
    pub use crate::rtc::{CMOS_CENTURY, RTC_PORTS};
    pub use crate::sleep::{SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};
}
