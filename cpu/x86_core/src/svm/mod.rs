//! Secure Virtual Machine, AMD's virtualization of the processor (AMD APM volume 2, chapter 15).
//!
//! A processor that executes VMRUN is in *guest mode* until a #VMEXIT: some instructions and events are
//! intercepted, physical addresses go through nested page tables, and the soft TLB's banks are others than the
//! host's. Everything hangs on [`Svm::guest`], which is looked at where an instruction is a system instruction or
//! an event is delivered: other instructions never ask.
//!
//! - [`control`](Control): what a VMCB's control area says of the guest that runs
//! - `vmcb`: the layout of that structure in memory
//! - `vmrun`, `vmexit`: the two world switches
//! - `intercepts`, `bitmaps`: which instructions are intercepted
//! - `events`: exceptions, interrupts, injected events
//! - `instructions`: SVM's own

mod bitmaps;
mod control;
mod events;
mod exit;
mod instructions;
mod intercepts;
mod msr;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod vmcb;
mod vmexit;
mod vmrun;

pub use control::{Control, VirtualInterrupts};
pub use events::InterruptAction;
pub use exit::{Exit, code};
pub(crate) use instructions::execute;
pub(crate) use intercepts::{PortAccess, check};

use crate::{Cpu, Segment, TableRegister};

/// What VMRUN puts aside of the host, for #VMEXIT to load (AMD APM volume 2, 15.5.1). A processor may keep it in
/// the page that VM_HSAVE_PA names, or, as here, within itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
#[allow(missing_docs)]
pub struct HostState {
    /// ES, CS, SS, DS.
    pub segments: [Segment; 4],
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub efer: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub rflags: u64,
    /// That of the instruction after VMRUN.
    pub rip: u64,
    pub rsp: u64,
    pub rax: u64,
    /// The page-directory pointers of 32-bit PAE paging.
    pub pdpte: [u64; 4],
    /// PAT, which guests with nested paging have one of their own of.
    pub pat: u64,
}

/// Whose translations the guest's banks of the soft TLB hold: they stay over a #VMEXIT for the next VMRUN of the
/// same guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
struct Cached {
    asid: u32,
    nested_paging: bool,
    ncr3: u64,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    host_cr4: u64,
    host_efer: u64,
}

/// What a processor has for SVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Svm {
    /// Whether a guest runs: between VMRUN and #VMEXIT.
    pub guest: bool,
    /// The global interrupt flag (AMD APM volume 2, 15.17).
    pub gif: bool,
    /// The VM_CR MSR.
    pub vm_cr: u64,
    /// The VM_HSAVE_PA MSR.
    pub hsave: u64,
    /// The physical address of the running guest's VMCB.
    pub vmcb: u64,
    /// What is said there of the guest; all zeros while none runs.
    pub control: Control,
    /// The host while a guest runs.
    pub host: HostState,
    /// The #VMEXIT that is due after [`Trap::Intercepted`](crate::Trap::Intercepted).
    pub(crate) exit: Exit,
    /// The event on its way to the guest's handler, as EXITINTINFO has it; 0 if there is none.
    pub(crate) delivering: u64,
    cached: Cached,
}

impl Svm {
    /// As after power-up and INIT.
    pub(crate) fn reset(&mut self, keep: bool) {
        let (vm_cr, hsave) = if keep { (self.vm_cr, self.hsave) } else { (0, 0) };
        *self = Self { gif: true, vm_cr, hsave, ..Self::default() };
    }

    /// CR4 of the world that does not run: the host's, or that which the guest was left with.
    pub(crate) fn other_cr4(&self) -> u64 {
        if self.guest { self.host.cr4 } else { self.cached.cr4 }
    }

    /// Whether the exit of that number is asked for (AMD APM volume 2, appendix C); false while no guest runs.
    #[inline]
    pub fn intercepts(&self, code: u64) -> bool {
        let word = self.control.intercepts.get((code / 32) as usize);
        word.is_some_and(|word| word >> (code % 32) & 1 != 0)
    }
}

impl Cpu {
    /// The world whose translations accesses go through: 0 for the host's, 1 for the guest's.
    #[inline]
    pub(crate) fn world(&self) -> usize {
        usize::from(self.svm.guest)
    }
}
