//! The neutral, versioned state of an x86 processor.

use crate::svm::SvmState;
use clock::Nanos;
use device::{SavedState, StateError, decode, encode};
use serde::{Deserialize, Serialize};

/// The saved-state kind of [`X86State`].
pub const X86_STATE_KIND: &str = "x86-vcpu";
/// The version of [`X86State`]'s format. Version 1 had no [`X86State::svm`].
pub const X86_STATE_VERSION: u32 = 2;

/// A segment register, LDTR or TR, with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Access rights as in a descriptor's bits 40 to 55 with the limit's four bits zero: type 0-3, S 4,
    /// DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15 (Intel SDM volume 3, 3.4.5).
    pub rights: u16,
    /// Whether the segment cannot be used: a null selector was loaded.
    pub unusable: bool,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct TableRegister {
    /// Linear address of the table.
    pub base: u64,
    /// Its last byte's offset.
    pub limit: u16,
}

/// x87, SSE, AVX and AVX-512 registers, without the packing of any XSAVE format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FpuState {
    /// FCW.
    pub control: u16,
    /// FSW, with TOP.
    pub status: u16,
    /// The abridged tag byte of FXSAVE: bit n is set if physical register n is not empty.
    pub tag: u8,
    /// FOP.
    pub opcode: u16,
    /// FIP (with FCS in bits 32 to 47 where the processor keeps it, as FXSAVE stores it).
    pub instruction_pointer: u64,
    /// FDP (with FDS likewise).
    pub data_pointer: u64,
    /// ST0 to ST7 in stack order, 80 bits each; MM0 to MM7 are their significands.
    pub st: [[u8; 10]; 8],
    /// MXCSR.
    pub mxcsr: u32,
    /// ZMM registers as eight quadwords each, the lowest first; YMM and XMM are their low parts. 16 or 32
    /// of them.
    pub vectors: Vec<[u64; 8]>,
    /// AVX-512 mask registers.
    pub opmask: [u64; 8],
    /// PKRU.
    pub pkru: u32,
}

impl Default for FpuState {
    /// As after power-on (Intel SDM volume 3, table 10-1).
    fn default() -> Self {
        Self {
            control: 0x40,
            status: 0,
            tag: 0xff,
            opcode: 0,
            instruction_pointer: 0,
            data_pointer: 0,
            st: [[0; 10]; 8],
            mxcsr: 0x1f80,
            vectors: vec![[0; 8]; 16],
            opmask: [0; 8],
            pkru: 0,
        }
    }
}

/// What a processor does when it is let run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum MpState {
    /// Executes instructions.
    #[default]
    Runnable,
    /// In HLT, until an interrupt.
    Halted,
    /// After INIT (and power-on, unless it is the bootstrap processor): waits for a SIPI.
    WaitForSipi,
}

/// An exception that was raised and not delivered yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct InjectedException {
    /// Its vector.
    pub vector: u8,
    /// Its error code, if it has one.
    pub error: Option<u32>,
}

/// Events on their way and what holds them off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct EventState {
    /// What the processor does.
    pub mp_state: MpState,
    /// Interrupts are held off for one instruction after STI.
    pub sti_shadow: bool,
    /// Interrupts and debug exceptions are held off for one instruction after a load of SS.
    pub mov_ss_shadow: bool,
    /// NMIs are held off until IRET.
    pub nmi_masked: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// An INIT waits.
    pub init_pending: bool,
    /// A SIPI waits, with its vector.
    pub sipi_pending: Option<u8>,
    /// An exception to deliver before the next instruction. A page fault's address is in CR2 already.
    pub exception: Option<InjectedException>,
    /// An external interrupt that was acknowledged at its controller, to deliver before the next
    /// instruction.
    pub interrupt: Option<u8>,
}

/// The local vector table of a local APIC (Intel SDM volume 3, 11.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LvtState {
    /// Corrected machine checks.
    pub cmci: u32,
    /// The timer.
    pub timer: u32,
    /// The thermal sensor.
    pub thermal: u32,
    /// Performance counters.
    pub performance: u32,
    /// The LINT0 input.
    pub lint0: u32,
    /// The LINT1 input.
    pub lint1: u32,
    /// APIC errors.
    pub error: u32,
}

impl Default for LvtState {
    /// As after reset: all masked.
    fn default() -> Self {
        const MASKED: u32 = 1 << 16;
        Self {
            cmci: MASKED,
            timer: MASKED,
            thermal: MASKED,
            performance: MASKED,
            lint0: MASKED,
            lint1: MASKED,
            error: MASKED,
        }
    }
}

/// A local APIC (Intel SDM volume 3, chapter 11).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// The IA32_APIC_BASE MSR: address, enable, x2APIC, BSP.
    pub apic_base: u64,
    /// The APIC id: 8 bits in xAPIC mode, 32 in x2APIC mode.
    pub id: u32,
    /// Logical destination, as the xAPIC register holds it (the id in bits 24 to 31). In x2APIC mode it
    /// follows from the id.
    pub ldr: u32,
    /// Destination format.
    pub dfr: u32,
    /// Task priority.
    pub tpr: u8,
    /// Spurious-interrupt vector register.
    pub svr: u32,
    /// In-service register, vector n at bit n % 32 of word n / 32.
    pub isr: [u32; 8],
    /// Trigger-mode register.
    pub tmr: [u32; 8],
    /// Interrupt-request register.
    pub irr: [u32; 8],
    /// Error status as the guest reads it.
    pub esr: u32,
    /// Errors gathered since the guest last wrote the error status register.
    pub esr_pending: u32,
    /// Interrupt command register, 64 bits as in x2APIC mode.
    pub icr: u64,
    /// The local vector table.
    pub lvt: LvtState,
    /// The timer's initial count.
    pub timer_initial: u32,
    /// The timer's divide configuration.
    pub timer_divide: u32,
    /// The moment of VM time from which the timer counts down the initial count, in one-shot and periodic
    /// mode; `None` if it does not count.
    pub timer_start: Option<Nanos>,
    /// IA32_TSC_DEADLINE: 0 if not armed.
    pub tsc_deadline: u64,
    /// Level of the LINT0 input.
    pub lint0_level: bool,
    /// An ExtINT message waits to be acknowledged at the 8259 pair.
    pub ext_int_latched: bool,
}

/// Everything a processor knows. Times are of the VM's clock; whoever saves a VM saves that clock too.
///
/// Registers that are no field of their own stand in [`X86State::msrs`] by their MSR number; a back end
/// writes all those that it knows, and an MSR that is missing is as after reset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct X86State {
    /// General registers in encoding order: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub regs: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Segment registers in encoding order: ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
    /// The EFER register.
    pub efer: u64,
    /// DR0 to DR3.
    pub debug_addresses: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// Page-directory pointers that were loaded with CR3, for 32-bit PAE paging.
    pub pdpte: [u64; 4],
    /// Other MSRs by number, ascending.
    pub msrs: Vec<(u32, u64)>,
    /// x87 and vector registers.
    pub fpu: FpuState,
    /// Events.
    pub events: EventState,
    /// The local APIC; CR8 is its task priority.
    pub lapic: LapicState,
    /// The time-stamp counter as the guest reads it, at the moment `tsc_time`.
    pub tsc: u64,
    /// The moment of VM time at which `tsc` was read.
    pub tsc_time: Nanos,
    /// Secure Virtual Machine, if it is not as after reset.
    pub svm: Option<Box<SvmState>>,
}

/// Indices into [`X86State::regs`] and [`X86State::segments`].
impl X86State {
    /// RAX in [`X86State::regs`].
    pub const RAX: usize = 0;
    /// RCX.
    pub const RCX: usize = 1;
    /// RDX.
    pub const RDX: usize = 2;
    /// RBX.
    pub const RBX: usize = 3;
    /// RSP.
    pub const RSP: usize = 4;
    /// RBP.
    pub const RBP: usize = 5;
    /// RSI.
    pub const RSI: usize = 6;
    /// RDI.
    pub const RDI: usize = 7;
    /// ES in [`X86State::segments`].
    pub const ES: usize = 0;
    /// CS.
    pub const CS: usize = 1;
    /// SS.
    pub const SS: usize = 2;
    /// DS.
    pub const DS: usize = 3;
    /// FS.
    pub const FS: usize = 4;
    /// GS.
    pub const GS: usize = 5;
}

impl X86State {
    /// The value of an MSR in [`X86State::msrs`].
    pub fn msr(&self, index: u32) -> Option<u64> {
        let at = self.msrs.binary_search_by_key(&index, |(index, _)| *index).ok()?;
        Some(self.msrs[at].1)
    }

    /// Sets an MSR in [`X86State::msrs`].
    pub fn set_msr(&mut self, index: u32, value: u64) {
        match self.msrs.binary_search_by_key(&index, |(index, _)| *index) {
            Ok(at) => self.msrs[at].1 = value,
            Err(at) => self.msrs.insert(at, (index, value)),
        }
    }

    /// Says what is wrong with the state, if no x86 processor can be in it: the field and the reason. An
    /// accelerator may refuse more.
    ///
    /// # Errors
    /// The field and the reason.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let [protected, paging] = [0, 31].map(|bit| self.cr0 >> bit & 1 != 0);
        let [long_enabled, long] = [8, 10].map(|bit| self.efer >> bit & 1 != 0);
        // VMRUN alone can bring about paging in real mode.
        let virtualized = self.svm.as_ref().is_some_and(|svm| svm.guest.is_some());
        if paging && !protected && (!virtualized || long) || self.cr0 >> 32 != 0 {
            return Err(("cr0", format!("{:#x}", self.cr0)));
        }
        if long != (paging && long_enabled) {
            return Err(("efer", format!("{:#x} with CR0 {:#x}", self.efer, self.cr0)));
        }
        if long && self.cr4 >> 5 & 1 == 0 {
            return Err(("cr4", format!("{:#x} in long mode", self.cr4)));
        }
        if long && self.rflags >> 17 & 1 != 0 {
            return Err(("rflags", format!("{:#x} in long mode", self.rflags)));
        }
        if !matches!(self.fpu.vectors.len(), 16 | 32) {
            return Err(("fpu.vectors", format!("{} registers", self.fpu.vectors.len())));
        }
        if let Some(pat) = self.msr(0x277)
            && pat.to_le_bytes().iter().any(|kind| !matches!(kind, 0 | 1 | 4..=7))
        {
            return Err(("msrs", format!("a PAT of {pat:#x}")));
        }
        self.svm.as_ref().map_or(Ok(()), |svm| svm.check())
    }

    /// As it stands in a migration stream.
    pub fn to_saved(&self) -> SavedState {
        encode(X86_STATE_KIND, X86_STATE_VERSION, self)
    }

    /// What [`X86State::to_saved`] wrote.
    ///
    /// # Errors
    /// [`StateError`] if it is none.
    pub fn from_saved(saved: &SavedState) -> Result<Self, StateError> {
        let mut newest = saved.clone();
        if saved.version == 1 && saved.kind == X86_STATE_KIND {
            // What came at the end is missing, and absent.
            newest.version = X86_STATE_VERSION;
            newest.bytes.push(0);
        }
        let state: Self = decode(X86_STATE_KIND, X86_STATE_VERSION, &newest)?;
        let malformed = |reason: &str| StateError::malformed(X86_STATE_KIND, reason);
        if !matches!(state.fpu.vectors.len(), 16 | 32) {
            return Err(malformed("neither 16 nor 32 vector registers"));
        }
        if !state.msrs.is_sorted_by(|a, b| a.0 < b.0) {
            return Err(malformed("MSRs are not in ascending order"));
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> X86State {
        X86State {
            regs: std::array::from_fn(|n| n as u64),
            rip: 0xfff0,
            rflags: 2,
            segments: [Segment { selector: 8, limit: 0xffff, rights: 0x93, ..Default::default() }; 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: TableRegister { base: 1, limit: 2 },
            idtr: TableRegister::default(),
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            efer: 0,
            debug_addresses: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            pdpte: [0; 4],
            msrs: vec![(0x10, 5)],
            fpu: FpuState::default(),
            events: EventState { sipi_pending: Some(9), ..Default::default() },
            lapic: LapicState {
                apic_base: 0xfee0_0900,
                id: 0,
                ldr: 0,
                dfr: u32::MAX,
                tpr: 0,
                svr: 0xff,
                isr: [0; 8],
                tmr: [0; 8],
                irr: [0; 8],
                esr: 0,
                esr_pending: 0,
                icr: 0,
                lvt: LvtState::default(),
                timer_initial: 0,
                timer_divide: 0,
                timer_start: None,
                tsc_deadline: 0,
                lint0_level: false,
                ext_int_latched: false,
            },
            tsc: 77,
            tsc_time: 3,
            svm: None,
        }
    }

    #[test]
    fn states_survive_a_stream() {
        let state = sample();
        assert_eq!(X86State::from_saved(&state.to_saved()), Ok(state));
    }

    #[test]
    fn states_of_the_first_version_are_read() {
        let state = sample();
        let mut saved = state.to_saved();
        saved.version = 1;
        assert_eq!(saved.bytes.pop(), Some(0));
        assert_eq!(X86State::from_saved(&saved), Ok(state));
    }

    #[test]
    fn the_guest_that_a_guest_runs_survives_a_stream() {
        let mut state = sample();
        let mut guest = crate::SvmGuestState { vmcb: 0x5000, ..Default::default() };
        guest.host.cr0 = 0x8000_0011;
        guest.host.efer = 0x1500;
        guest.host.cr4 = 0x20;
        state.svm = Some(Box::new(SvmState { vm_cr: 1, hsave: 0x1000, gif: true, guest: Some(guest) }));
        assert_eq!(state.check(), Ok(()));
        assert_eq!(X86State::from_saved(&state.to_saved()), Ok(state.clone()));
        let guest = state.svm.as_mut().and_then(|svm| svm.guest.as_mut()).unwrap();
        guest.host.efer = 0x1100;
        assert!(state.check().is_err(), "long mode is enabled, paging on, and it is not active");
    }

    #[test]
    fn states_with_impossible_lists_are_refused() {
        let mut state = sample();
        state.fpu.vectors.pop();
        assert!(X86State::from_saved(&state.to_saved()).is_err());
        let mut state = sample();
        state.msrs = vec![(2, 0), (1, 0)];
        assert!(X86State::from_saved(&state.to_saved()).is_err());
        let mut saved = sample().to_saved();
        saved.version += 1;
        assert!(X86State::from_saved(&saved).is_err());
    }

    #[test]
    fn msrs_stay_in_order() {
        let mut state = sample();
        state.set_msr(0x1b, 1);
        state.set_msr(0x8, 2);
        state.set_msr(0x10, 3);
        assert_eq!(state.msrs, [(0x8, 2), (0x10, 3), (0x1b, 1)]);
        assert_eq!((state.msr(0x1b), state.msr(0x1c)), (Some(1), None));
    }
}
