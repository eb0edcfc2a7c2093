//! Linux's KVM as an accelerator: the only crate that knows of it.
//!
//! The local APICs are KVM's, the 8259 pair and the I/O APIC the machine's (a "split" irqchip): what the I/O
//! APIC sends arrives as messages, and the 8259s' interrupts are injected when the processor has a window for
//! them. A vCPU runs on the thread that calls its `run`; others reach it by a signal and a flag that makes
//! the kernel return ([`kick`]). Guest time follows the VM's clock: while no vCPU runs, the time-stamp
//! counters, kvmclock and the APIC timers stand still ([`time`]).
//!
//! Pages that a guest writes are learned of from rings, one for each vCPU, where the kernel offers them and they can be
//! relied on ([`dirty_ring`]), else from bitmaps. Memory that processors only read is a read-only slot: stores to it come out as
//! those to a device do.
//!
//! What KVM has beside and is not used: coalesced I/O, which gathers stores that need no answer at once: those of our
//! devices are doorbells, which are events, and PCI's address register at 0xcf8 has the reset register in its range,
//! where a store must not wait.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(unsafe_code)] // memory slots, the page shared with the kernel, signals, ioctls that have no wrapper

mod accelerator;
mod cpuid;
mod debug;
mod dirty_ring;
mod doorbells;
mod error;
mod exit;
mod host;
mod ioctl;
mod kick;
mod patches;
mod routes;
mod run;
mod slots;
mod state;
mod time;
mod vcpu;
mod vm;
mod vm_shared;

pub use accelerator::KvmAccelerator;
pub use error::KvmUnavailable;
pub use host::{Capability, DEVICE, Engine, HostReport};
