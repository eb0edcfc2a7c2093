//! Why an instruction did not complete, and what follows one that did.

/// Exception vectors (Intel SDM volume 3, table 6-1).
pub mod vector {
    #![allow(missing_docs)]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// An exception to deliver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    /// Its vector.
    pub vector: u8,
    /// The error code, for those vectors that have one.
    pub error: Option<u32>,
    /// For page faults, the linear address that goes to CR2 when the exception is delivered.
    pub address: u64,
}

/// Why an instruction did not complete. The state is as before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trap {
    /// An exception to deliver. (Traps such as INT3 and INTO are no exceptions here: the instruction
    /// itself delivers them.)
    Exception(Exception),
    /// The processor shut down: a fault while delivering a double fault.
    TripleFault,
    /// The host of the guest that runs wants to know: [`Core::deliver_trap`](crate::Core::deliver_trap) makes the
    /// #VMEXIT (AMD APM volume 2, 15.6).
    Intercepted,
}

impl Trap {
    /// #UD.
    pub const UD: Self = Self::plain(vector::UD);
    /// #NM.
    pub const NM: Self = Self::plain(vector::NM);
    /// #DE.
    pub const DE: Self = Self::plain(vector::DE);

    /// An exception without an error code.
    pub const fn plain(vector: u8) -> Self {
        Self::Exception(Exception { vector, error: None, address: 0 })
    }

    /// An exception with an error code.
    pub const fn with_error(vector: u8, error: u32) -> Self {
        Self::Exception(Exception { vector, error: Some(error), address: 0 })
    }

    /// #GP.
    pub const fn gp(error: u32) -> Self {
        Self::with_error(vector::GP, error)
    }

    /// #PF at `address`.
    pub const fn pf(address: u64, error: u32) -> Self {
        Self::Exception(Exception { vector: vector::PF, error: Some(error), address })
    }
}

/// What follows an instruction that completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// On with the next instruction; whoever executes advances RIP past this one.
    Next,
    /// RIP has been set.
    Jump,
    /// A repeated string instruction paused between iterations: RIP stays, registers hold the progress.
    Again,
    /// RIP is past HLT and [`Cpu::halted`](crate::Cpu::halted) is set.
    Halt,
}

/// Page-fault error code bits (Intel SDM volume 3, figure 4-12).
pub mod page_fault {
    #![allow(missing_docs)]
    pub const PRESENT: u32 = 1;
    pub const WRITE: u32 = 2;
    pub const USER: u32 = 4;
    pub const RESERVED: u32 = 8;
    pub const FETCH: u32 = 16;
    pub const KEY: u32 = 32;
}
