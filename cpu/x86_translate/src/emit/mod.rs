//! The code of single instructions, by families, and the code that all blocks share.

mod access;
mod bits;
mod call;
pub(crate) mod count;
pub(crate) mod flags;
pub(crate) mod fpu;
mod frames;
pub(crate) mod interpret;
mod jump;
pub(crate) mod rewrite;
pub(crate) mod shared;
mod stack;
mod string;
mod syscall;
mod system;
mod vectors;
