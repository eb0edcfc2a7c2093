//! The translator and the interpreter side by side.
//!
//! A [`Lockstep`] vCPU is two processors: T1's, which runs on the VM's memory and talks to its devices, and
//! T0's, which runs on a copy of that memory and is told what T1's was told. In each round T1 runs one block;
//! then T0 executes instruction by instruction until its state is T1's. What is compared:
//!
//! - all architectural state, after every block and after every interrupt or exception that the run loop
//!   delivers;
//! - what was asked of the outside (MMIO, ports, the time-stamp counter, the local APIC's registers, random
//!   numbers): the same in the same order, with the same data written;
//! - memory: what T0 stored, after every block; all of each page that it stored to, every few thousand blocks;
//!   and all memory, every few million blocks and at the end.
//!
//! The first difference ends the run with a [`Mismatch`], which says what ran and what differs.
//!
//! Some differences are none, and are made up for in the one place named here:
//!
//! - *Accessed and dirty bits* of page tables (`memory`). The two processors' TLBs hold different entries, as
//!   T0 fetches 15 bytes at a time and T1's blocks look translations up early, so that one may set a bit
//!   before the other. Each processor's marks are given to the other after the block. In pages that ever had
//!   a mark, entries that differ in these bits alone count as equal. A block that makes a translation used and
//!   reads its entry, without any flush between, may be reported falsely.
//! - *Devices' writes* (`memory`). Those that devices make while T1 talks to them are replayed to T0 at that
//!   point. Those of devices' own threads reach T0 between blocks; a block that reads such data while it
//!   comes in differs, and is not compared: T0 is set to T1's state, and the summary counts it.
//! - *Paused string instructions* (`engine`). A repetition pauses after an amount of work that depends on how
//!   memory is reached; T0 is made to pause where T1 did.
//! - *The APIC's base* (`replay`). What CPUID says depends on it, and the translator looks that up when it
//!   translates: reads of it may be only one processor's.
//! - *Undefined flags*: none are left out. T1 runs with exact flags, and T0 gives the host's for undefined
//!   ones too. The translator's leaving out of dead flags is not covered, nor are links between blocks.
//!
//! A loop whose iterations change nothing but memory could bring T0 to T1's state an iteration early; it
//! would be seen as a difference in memory.

mod engine;
mod memory;
mod replay;
mod report;
mod state;

#[cfg(test)]
mod tests;

pub use engine::{Lockstep, Stop, Summary};
pub use report::Mismatch;
pub use state::differences;
