//! The local APIC (Intel SDM volume 3, chapter 11): xAPIC and x2APIC, its timer, and the bus between the
//! local APICs that carries inter-processor and message-signalled interrupts.
//!
//! [`ApicBus`] holds one [`Lapic`] per vCPU. Interrupts come in from any thread; a vCPU learns of what
//! concerns it through its [`VcpuSink`], and asks [`Lapic::pending`] (one atomic load) what waits. A LAPIC
//! guards its registers with a short lock of its own; no lock is held while a sink or the EOI listener is
//! called.

mod bus;
mod lapic;
mod message;
mod registers;
mod timer;
mod vectors;

pub use bus::{ApicBus, ApicConfig};
pub use lapic::{GeneralProtection, Lapic, Pending, RestoreError};
pub use message::{DeliveryMode, Destination, Message};

/// The rate of the timer before its divider: one tick per nanosecond.
pub const BUS_HERTZ: u64 = 1_000_000_000;
/// Where the registers are after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
/// Bytes of registers.
pub const MMIO_LEN: u64 = 0x1000;
/// The IA32_APIC_BASE MSR.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// The IA32_TSC_DEADLINE MSR.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The first x2APIC MSR.
pub const MSR_X2APIC: u32 = 0x800;
/// The last x2APIC MSR.
pub const MSR_X2APIC_LAST: u32 = 0x8ff;

/// What a vCPU hears from its local APIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// [`Lapic::pending`] has more to say than before.
    Interrupt,
    /// A system management interrupt. No processor here has a system management mode; hypervisors may intercept it.
    Smi,
    /// A non-maskable interrupt.
    Nmi,
    /// INIT: the processor resets and waits for a SIPI. It then calls [`Lapic::init`].
    Init,
    /// A start-up IPI: a processor that waits for one begins at `vector << 12`.
    Sipi(u8),
}

/// A vCPU as its local APIC sees it. Called from any thread, without locks held.
pub trait VcpuSink: Send + Sync {
    /// Something for the vCPU to look at, be it running or halted.
    fn event(&self, event: Event);
}

#[cfg(test)]
mod tests;
