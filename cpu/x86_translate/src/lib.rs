//! T1, the single-pass x86-64 translator.
//!
//! Guest instructions are not lowered through an intermediate representation: each is written out again
//! with the host's registers in place of the guest's, and the host address of its memory operand. Most
//! guest registers live in the host register of the same name, the arithmetic flags in EFLAGS, the vector
//! registers in themselves. GS points to the vCPU's block (`layout`), which holds what has no host register.
//!
//! Code of 32 and of 16 bits becomes 64-bit code, too. Its addresses are computed in 32 bits and cut, so that they
//! wrap as the guest's do, and the sum is what is checked and accessed. Segments that are flat are part of what a
//! block is translated for; for others the limit is looked at and the base added with each access.
//!
//! Whatever is unusual is left to the interpreter, one instruction at a time; at every instruction boundary
//! the state is canonical.
//!
//! The modules are layers; each uses only those before it:
//! - `guest`: what is known of each instruction; which flags it needs and makes
//! - `abi`: what generated code and Rust agree on: the vCPU's block, what is called with what
//! - `runtime`: the functions that generated code calls
//! - `context`: the state of a translation, and what it works on
//! - `emit`: the code of instructions, by families, and the code that all blocks share
//! - `block`: the translation of one block: decoding, which accesses share a check, the code of it all
//! - `translator`: all blocks of a VM, their links, and what happens when code is written to
//! - `vcpu`: the run loop

#![allow(unsafe_code)] // generated code is called, and shares its state with Rust
#![allow(clippy::vec_box)] // generated code points at kept instructions, which must not move

mod abi;
mod block;
mod context;
mod emit;
mod guest;
mod runtime;
mod translator;
mod vcpu;

#[cfg(test)]
mod tests;

pub use abi::counters::Counters;
pub use translator::{Options, Translator};
pub use vcpu::{Exit, TranslatorVcpu};
