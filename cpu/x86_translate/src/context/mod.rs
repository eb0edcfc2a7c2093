//! What the translation of a block works on: its decoded instructions, guest addresses, the parts of the code
//! that are written at the end, and the state of the translation with them all.

pub(crate) mod address;
pub(crate) mod cold;
pub(crate) mod input;
pub(crate) mod insn;
pub(crate) mod link;
pub(crate) mod translation;
