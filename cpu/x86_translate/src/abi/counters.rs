//! What the translator did, for finding what to improve next.

use iced_x86::Mnemonic;
use std::collections::HashMap;

/// Counts of one vCPU.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Blocks translated.
    pub blocks: u64,
    /// Guest instructions in them.
    pub instructions: u64,
    /// Bytes of generated code, cold parts included.
    pub code_bytes: u64,
    /// Entries into generated code.
    pub entries: u64,
    /// Exits for a direct jump that was not linked.
    pub exits_link: u64,
    /// Exits for an indirect jump that was not in the table.
    pub exits_indirect: u64,
    /// Exits for another reason.
    pub exits_other: u64,
    /// TLB misses that were filled.
    pub fills: u64,
    /// Accesses that the interpreter made: MMIO, code pages, page crossings.
    pub slow_accesses: u64,
    /// Shared checks that failed.
    pub ungrouped: u64,
    /// Instructions that the run loop had the interpreter step through.
    pub steps: u64,
    /// Instructions that generated code had the interpreter execute, by mnemonic.
    pub interpreted: HashMap<Mnemonic, u64>,
}
