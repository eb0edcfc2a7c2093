//! The vireo command.
fn main() {}
