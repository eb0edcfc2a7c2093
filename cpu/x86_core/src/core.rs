//! A processor's state together with what it executes against.

use crate::{Cpu, Platform};
use guest_memory::GuestMemory;

/// One processor at work.
pub struct Core<'a> {
    /// Its state.
    pub cpu: &'a mut Cpu,
    /// Guest memory.
    pub memory: &'a GuestMemory,
    /// Everything else.
    pub platform: &'a dyn Platform,
}
