//! The part of the neutral state that belongs to Secure Virtual Machine: a guest that runs guests of its own (AMD APM
//! volume 2, chapter 15).

use crate::{Segment, TableRegister};
use serde::{Deserialize, Serialize};

/// What a processor has for SVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SvmState {
    /// The VM_CR MSR.
    pub vm_cr: u64,
    /// The VM_HSAVE_PA MSR.
    pub hsave: u64,
    /// The global interrupt flag.
    pub gif: bool,
    /// The guest that runs, between VMRUN and #VMEXIT: all registers elsewhere in the state are then its.
    pub guest: Option<SvmGuestState>,
}

impl Default for SvmState {
    /// As after reset.
    fn default() -> Self {
        Self { vm_cr: 0, hsave: 0, gif: true, guest: None }
    }
}

/// What VMRUN took from the VMCB's control area and put aside.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SvmGuestState {
    /// Physical address of the VMCB.
    pub vmcb: u64,
    /// The intercept bits from the beginning of the VMCB on, in dwords.
    pub intercepts: [u32; 6],
    /// The pause filter's count, and how many PAUSEs it lets pass still.
    pub pause_filter: u16,
    /// See `pause_filter`.
    pub pauses_left: u16,
    /// The pause filter's threshold.
    pub pause_threshold: u16,
    /// Physical address of the I/O permissions map.
    pub iopm: u64,
    /// Physical address of the MSR permissions map.
    pub msrpm: u64,
    /// What the time-stamp counter of the guest is more than its host's.
    pub tsc_offset: u64,
    /// The address space identifier.
    pub asid: u32,
    /// The virtual interrupt: the VMCB's quadword at offset 0x60.
    pub interrupts: u64,
    /// Whether physical addresses go through nested page tables, and their root.
    pub nested_paging: bool,
    /// See `nested_paging`.
    pub ncr3: u64,
    /// The guest's host.
    pub host: SvmHostState,
}

/// The state of a host while its guest runs, which #VMEXIT loads (AMD APM volume 2, 15.5.1).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SvmHostState {
    /// ES, CS, SS, DS.
    pub segments: [Segment; 4],
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub efer: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub rflags: u64,
    pub rip: u64,
    pub rsp: u64,
    pub rax: u64,
    /// Page-directory pointers of 32-bit PAE paging.
    pub pdpte: [u64; 4],
    pub pat: u64,
}

impl SvmState {
    /// Says what is wrong with it, if no processor can be in that state: the field and the reason.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let Some(guest) = &self.guest else { return Ok(()) };
        if guest.vmcb & 0xfff != 0 {
            return Err(("svm.vmcb", format!("{:#x}", guest.vmcb)));
        }
        let host = &guest.host;
        let [protected, paging] = [0, 31].map(|bit| host.cr0 >> bit & 1 != 0);
        let [long_enabled, enabled, long] = [8, 12, 10].map(|bit| host.efer >> bit & 1 != 0);
        if !protected || host.cr0 >> 32 != 0 {
            return Err(("svm.host.cr0", format!("{:#x}", host.cr0)));
        }
        if !enabled || long != (paging && long_enabled) {
            return Err(("svm.host.efer", format!("{:#x} with CR0 {:#x}", host.efer, host.cr0)));
        }
        if long && host.cr4 >> 5 & 1 == 0 {
            return Err(("svm.host.cr4", format!("{:#x} in long mode", host.cr4)));
        }
        Ok(())
    }
}
