//! T0, the x86 interpreter: executes any instruction, one at a time.
//!
//! The oracle that the translator is tested against, its slow path, and what executes code the first time.
//! Integer, string and near control-flow instructions are executed here; vector and x87 instructions by
//! `x86_fpu`, system instructions by [`x86_core::system`]. [`step`] does what a processor does between two
//! instruction boundaries, [`execute`] just the instruction.

mod alu;
mod bcd;
mod bits;
mod bmi;
mod control;
mod data;
mod decode;
mod dispatch;
mod exchange;
mod features;
mod flags;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(not(feature = "fuzzing"), allow(unreachable_pub))]
mod fuzz;
mod misc;
mod multiply;
mod operand;
mod shift;
mod stack;
mod step;
mod string;
#[cfg(test)]
mod tests;

pub use decode::{DECODER_OPTIONS, widen};
pub use dispatch::{Handler, handler};
pub use features::has;
#[cfg(feature = "fuzzing")]
pub use fuzz::fuzz_bytes;
pub use step::{execute, step};
