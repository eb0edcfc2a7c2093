//! The accelerator that needs nothing of the host: guest instructions are interpreted or translated.
//!
//! Each vCPU runs on the thread that calls its `run`. Other threads reach it by posting requests, which
//! set the processor's exit flag and wake it from a halt; the run loop ([`run`]) looks at requests, then at
//! NMIs and interrupts, then executes instructions until something asks for its attention again.

#![allow(unsafe_code)] // a vCPU's exit flag and TLB are reached from other threads while it runs

mod accelerator;
mod counted;
mod debug;
mod engine;
mod events;
mod halt_poll;
mod platform;
mod run;
mod shared;
mod state;
mod tsc;
mod vcpu;
mod vm;
mod vm_shared;

pub use accelerator::{DbtAccelerator, MAX_VCPUS};
