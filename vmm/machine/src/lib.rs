//! Machine types: small functions, one per device family, that wire a VM.
//!
//! A [`MachineSpec`] is plain data; [`Vm::new`] builds the machine on an accelerator and [`Vm::run`] runs it
//! to its end.

mod assembly;
mod bios;
mod boot_source;
mod deterministic;
mod doorbells;
mod drives;
mod ending;
mod error;
mod firmware;
mod fw_cfg_device;
mod hardware;
mod isa_devices;
mod kernel;
mod layout;
mod microvm;
mod numa;
mod pc;
mod ram;
mod requests;
mod run_state;
mod serials;
mod spec;
mod virtio_devices;
mod vm;

pub use block_graph::CacheMode;
pub use deterministic::{Difference, TraceError};
pub use drives::StorageListener;
pub use ending::{Ending, Quitter};
pub use error::MachineError;
pub use numa::{NodeDistance, NodeSpec, NumaError, NumaSpec};
pub use run_state::{IoErrorReport, RunState, VmEvent, VmListener};
pub use spec::{
    BootSpec, DeterministicSpec, DeviceSpec, DriveSpec, HostSpec, KernelSpec, MAX_MEMORY, MAX_SERIALS,
    MAX_VCPUS, MIN_MEMORY, MachineKind, MachineSpec, References, TraceSpec,
};
pub use virtio_blk::{ErrorAction, ErrorPolicy};
pub use vm::{CpuUse, Pause, RunOptions, Vm, VmHandle};
