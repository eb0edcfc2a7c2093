//! The x86 processor core: architectural state, soft MMU, segmentation, exceptions, MSRs and CPUID.
//!
//! Everything the interpreter and the translator share. [`Cpu`] is the state of one processor, laid out so
//! that generated code can address it; [`Core`] is that state together with what it executes against, and
//! carries the operations: memory accesses with all their checks, control transfers through gates,
//! exception delivery, system registers.
//!
//! At every guest instruction boundary the state in [`Cpu`] is canonical: an instruction either completes,
//! or leaves the state as it was and returns a [`Trap`].

#![allow(unsafe_code)] // guest memory is reached through raw host pointers that the soft TLB holds

mod address;
mod core;
pub mod cpuid;
mod exceptions;
mod mmu;
mod mode;
mod platform;
mod reset;
mod scalar;
mod segments;
mod state;
pub mod svm;
pub mod system;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod transfers;
mod trap;

pub use crate::core::Core;
pub use address::{effective_address, memory_offset, segment_index};
pub use mmu::{
    BANKS, FETCH_ENTRIES, FetchEntry, Fill, INVALID_TAG, TLB_ENTRIES, Tlb, TlbEntry, WORLDS, Watch,
};
pub use platform::Platform;
pub use scalar::Scalar;
pub use state::*;
pub use trap::{Exception, Flow, Trap, page_fault, vector};
