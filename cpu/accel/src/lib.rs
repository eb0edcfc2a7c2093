//! The accelerator traits and the neutral CPU state.
