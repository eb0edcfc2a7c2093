//! Lint, bench and other chores of the project.
fn main() {}
