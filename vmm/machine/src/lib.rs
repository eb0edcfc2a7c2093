//! Machine types: small functions, one per device family, that wire a VM.
//!
//! A [`MachineSpec`] is plain data; [`Vm::new`] builds the machine on an accelerator and [`Vm::run`] runs it
//! to its end.

mod doorbells;
mod error;
mod kernel;
mod numa;
mod pc;
mod ram;
mod requests;
mod spec;
mod vm;

pub use error::MachineError;
pub use numa::{NodeDistance, NodeSpec, NumaError, NumaSpec};
pub use spec::{
    DriveSpec, HostSpec, KernelSpec, MAX_MEMORY, MAX_SERIALS, MAX_VCPUS, MIN_MEMORY, MachineSpec,
};
pub use vm::{CpuUse, Ending, Vm, VmHandle};
