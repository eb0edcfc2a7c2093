//! T1, the single-pass x86-64 translator.
//!
//! Guest instructions are not lowered through an intermediate representation: each is written out again
//! with the host's registers in place of the guest's, and the host address of its memory operand. Most
//! guest registers live in the host register of the same name, the arithmetic flags in EFLAGS, the vector
//! registers in themselves. GS points to the vCPU's block (`layout`), which holds what has no host register.
//!
//! Whatever is unusual is left to the interpreter, one instruction at a time; at every instruction boundary
//! the state is canonical.
//!
//! - `insn`: what is known of each instruction; `flags`: which flags are live where
//! - `plan`, `address`: memory accesses and which share a check
//! - `returns`: calls and returns by the host's own
//! - `rewrite`, `branch`, `fpu`, `system`, `syscall`, `string`, `translate`: the code of a block
//! - `stubs`, `runtime`: code that all blocks share, and what it calls
//! - `blocks`: all blocks of a VM, their links, and what happens when code is written to
//! - `vcpu`: the run loop

#![allow(unsafe_code)] // generated code is called, and shares its state with Rust
#![allow(clippy::vec_box)] // generated code points at kept instructions, which must not move

mod address;
mod blocks;
mod branch;
mod counters;
mod flags;
mod fpu;
mod insn;
mod layout;
mod plan;
mod returns;
mod rewrite;
mod runtime;
mod string;
mod stubs;
mod syscall;
mod system;
mod translate;
mod vcpu;

#[cfg(test)]
mod tests;

pub use blocks::{Options, Translator};
pub use counters::Counters;
pub use vcpu::{Exit, TranslatorVcpu};
