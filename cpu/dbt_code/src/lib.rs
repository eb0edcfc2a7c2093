//! The host x86-64 emitter and the code cache.
//!
//! [`CodeCache`] is memory that is mapped twice: one mapping is written, the other executed, so that no page
//! is ever writable and executable at one address. Pieces of it are handed out as [`Emitter`]s, which write
//! machine code byte by byte at its final place; nothing is relocated afterwards.

#![allow(unsafe_code)] // the code cache is raw memory

mod cache;
mod emitter;
mod encode;

pub use cache::{CacheError, CodeCache};
pub use emitter::Emitter;
pub use encode::{Alu, Cond, Enc, Evex, Gpr, Map, Mem, Rm, Shift, Width};
