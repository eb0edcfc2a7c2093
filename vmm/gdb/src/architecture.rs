//! x86 as the protocol's crate wants it. What registers there are is a session's matter: they are bytes here.

use gdbstub::arch::{Arch, RegId, Registers};
use std::num::NonZeroUsize;

/// x86 processors.
#[derive(Debug)]
pub enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = RegisterBytes;
    type BreakpointKind = usize;
    type RegId = RegisterNumber;
}

/// All registers in gdb's order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegisterBytes(pub(crate) Vec<u8>);

impl Registers for RegisterBytes {
    type ProgramCounter = u64;

    // Only the implicit adjustment of it would ask, which is not used.
    fn pc(&self) -> u64 {
        0
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.0.iter().for_each(|byte| write_byte(Some(*byte)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.0 = bytes.to_vec();
        Ok(())
    }
}

/// A register's number in gdb's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegisterNumber(pub(crate) usize);

impl RegId for RegisterNumber {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        Some((Self(id), None))
    }

    fn to_raw_id(&self) -> Option<usize> {
        Some(self.0)
    }
}
