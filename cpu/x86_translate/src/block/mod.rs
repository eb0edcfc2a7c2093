//! The translation of one block: its instructions are decoded and planned for, and then the code of each is
//! written.

mod cold;
pub(crate) mod decode;
mod sharing;
pub(crate) mod translate;
