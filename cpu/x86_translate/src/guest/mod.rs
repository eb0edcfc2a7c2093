//! What is known of guest instructions, each by itself: how it is translated, its operands, its encoding, its
//! flags. Nothing here writes code.

pub(crate) mod class;
mod classify;
pub(crate) mod encoding;
pub(crate) mod flags;
pub(crate) mod fpu;
pub(crate) mod info;
pub(crate) mod mode;
pub(crate) mod operand;
