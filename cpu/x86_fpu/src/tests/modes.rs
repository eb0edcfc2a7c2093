//! Legacy modes.
