//! All block drivers, how images are named and opened, and what is done with whole images.

pub mod syntax;
