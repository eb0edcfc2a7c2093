//! The architectural state of one processor.

use crate::mmu::{Tlb, TlbEntry, WORLDS, Watches};
use crate::svm::Svm;
use std::ops::Range;
use std::sync::atomic::AtomicU32;

/// General registers by their encoding, as indices into [`Cpu::regs`].
pub mod reg {
    #![allow(missing_docs)]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// RFLAGS bits (Intel SDM volume 1, 3.4.3).
pub mod flags {
    #![allow(missing_docs)]
    pub const CF: u64 = 1 << 0;
    /// Always one.
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
    /// Every flag that exists and can change.
    pub const EXIST: u64 = ARITHMETIC | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
}

/// CR0 bits.
pub mod cr0 {
    #![allow(missing_docs)]
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
    /// Every bit that exists.
    pub const EXIST: u64 = 0xe005_003f;
}

/// CR4 bits.
pub mod cr4 {
    #![allow(missing_docs)]
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
    pub const PKS: u64 = 1 << 24;
}

/// EFER bits.
pub mod efer {
    #![allow(missing_docs)]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    pub const SVME: u64 = 1 << 12;
    pub const FFXSR: u64 = 1 << 14;
    pub const AUTOIBRS: u64 = 1 << 21;
}

/// Segment registers by their encoding, as indices into [`Cpu::segments`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
#[allow(missing_docs)]
pub enum Seg {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Segment {
    /// Linear address of offset 0.
    pub base: u64,
    /// Highest valid offset (granularity applied).
    pub limit: u32,
    /// Access rights as in a descriptor's bits 40..=55: type 0..=3, S 4, DPL 5..=6, P 7, AVL 12, L 13,
    /// D/B 14, G 15. Bit 16 set here: the segment is unusable (a null selector was loaded).
    pub attributes: u32,
    /// The visible part.
    pub selector: u16,
}

impl Segment {
    /// Attribute bit: unusable.
    pub const UNUSABLE: u32 = 1 << 16;
    /// Attribute bit: present.
    pub const PRESENT: u32 = 1 << 7;
    /// Attribute bit: 64-bit code.
    pub const LONG: u32 = 1 << 13;
    /// Attribute bit: default operand size 32 (code), 32-bit stack pointer (stack).
    pub const BIG: u32 = 1 << 14;

    /// The descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct TableRegister {
    /// Linear address of the table.
    pub base: u64,
    /// Its length less one.
    pub limit: u16,
}

/// A vector register with room for 512 bits; XMM is the low quarter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct VecReg(pub [u8; 64]);

impl Default for VecReg {
    fn default() -> Self {
        Self([0; 64])
    }
}

/// x87 and MMX state, as FXSAVE64 stores it (Intel SDM volume 1, 10.5.1); its XMM part is not used (see
/// [`Cpu::vectors`]) and its MXCSR field neither (see [`Cpu::mxcsr`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct X87Area(pub [u8; 512]);

impl Default for X87Area {
    fn default() -> Self {
        let mut area = [0; 512];
        area[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        Self(area)
    }
}

/// Model-specific registers that are plain storage with effects elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Msrs {
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub tsc_aux: u64,
    /// Guest TSC less [`Platform::tsc`](crate::Platform::tsc).
    pub tsc_offset: u64,
    pub tsc_adjust: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub debugctl: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [[u64; 2]; 8],
    pub mcg_status: u64,
    pub mcg_ctl: u64,
    /// CTL, STATUS, ADDR, MISC of each bank.
    pub mc_banks: [[u64; 4]; 10],
    pub xss: u64,
    /// Rights of supervisor pages by protection key.
    pub pkrs: u64,
    /// Where the last branch was and went to, and the same of the last one before an exception or interrupt (AMD APM
    /// volume 2, 13.1.1.6), as of when they were recorded.
    pub last_branch: [u64; 4],
}

impl Msrs {
    /// DEBUGCTL.LBR: branches are recorded. Code is interpreted as long as this is set.
    pub const LAST_BRANCH_RECORDS: u64 = 1;

    /// Whether branches are recorded.
    #[inline]
    pub fn records_branches(&self) -> bool {
        self.debugctl & Self::LAST_BRANCH_RECORDS != 0
    }

    /// Records a branch.
    pub fn record_branch(&mut self, from: u64, to: u64) {
        self.last_branch[..2].copy_from_slice(&[from, to]);
    }
}

/// How the processor decodes code now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeSize {
    /// Real mode, virtual-8086 mode, and protected-mode code segments with D clear.
    Bits16,
    /// Code segments with D set, in protected and compatibility mode.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl CodeSize {
    /// 16, 32 or 64, as a decoder takes it.
    pub fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

/// How much of the vector and mask registers is in use, see [`Cpu::vector_width`].
pub mod width {
    /// XMM registers alone.
    pub const XMM: u8 = 0;
    /// YMM registers.
    pub const YMM: u8 = 1;
    /// All 32 ZMM registers, and mask registers.
    pub const ZMM: u8 = 2;
}

/// Events that hold off interrupts for one instruction (Intel SDM volume 3, 6.8.3).
pub mod shadow {
    /// After STI.
    pub const STI: u8 = 1;
    /// After a load of SS.
    pub const MOV_SS: u8 = 2;
    /// NMIs are blocked until IRET.
    pub const NMI: u8 = 4;
}

/// How often mappings of code have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Generation {
    /// Incremented whenever a mapping that code may have been fetched through changes or goes (CR3, INVLPG,
    /// paging bits): caches keyed by virtual address compare it.
    pub all: u64,
    /// Incremented whenever a mapping that code may have been fetched through changes or goes and it may have
    /// been a global one in the upper half of the address space: loads of CR3 leave it alone.
    pub global: u64,
}

/// One processor's state. `repr(C)`: generated code addresses the fields by their offsets.
#[repr(C, align(64))]
pub struct Cpu {
    /// General registers, in encoding order.
    pub regs: [u64; 16],
    /// The instruction pointer, without the code segment's base.
    pub rip: u64,
    /// RFLAGS in full. [`Core::set_rflags`](crate::Core::set_rflags) must be used when a bit other than
    /// an arithmetic one or DF changes: TLB bank and trap state hang on them.
    pub rflags: u64,
    /// The bank of the soft TLB that accesses of the current privilege go through: what
    /// [`Tlb::bank`](crate::Tlb::bank) gives. Kept by [`Core::mode_changed`](crate::Core::mode_changed).
    pub tlb_bank: *const TlbEntry,
    /// Set by other threads to have the processor return to its run loop.
    pub exit_request: AtomicU32,
    /// MXCSR.
    pub mxcsr: u32,
    /// The current privilege level.
    pub cpl: u8,
    /// Interrupt shadows, see [`shadow`].
    pub interrupt_shadow: u8,
    /// Whether the processor waits in HLT for an interrupt.
    pub halted: bool,
    /// Whether locked accesses must be atomic for other processors: false only in VMs of one vCPU.
    pub lock_needed: bool,
    /// Whether this is 64-bit mode. This field and the next four are kept by
    /// [`Core::mode_changed`](crate::Core::mode_changed).
    pub long64: bool,
    /// Whether unaligned user accesses fault (CR0.AM and EFLAGS.AC at CPL 3).
    pub align_check: bool,
    /// Whether a debug register watches data.
    pub watched: bool,
    /// The bank of explicit data accesses.
    pub data_bank: u8,
    /// The same if offsets are linear addresses and no access needs a check but the TLB's, else a bank that
    /// does not exist.
    pub fast_bank: u8,
    /// Data breakpoints (bits 0..=3 of DR6) that accesses have met; whoever executes instructions raises
    /// #DB for them when the instruction is done, see
    /// [`Core::take_data_breakpoints`](crate::Core::take_data_breakpoints).
    pub breakpoints_met: u8,
    /// Segment registers, in encoding order.
    pub segments: [Segment; 6],
    /// The local descriptor table.
    pub ldtr: Segment,
    /// The task register.
    pub tr: Segment,
    /// The global descriptor table.
    pub gdtr: TableRegister,
    /// The interrupt descriptor table.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2, the page-fault address.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
    /// PKRU: rights of user pages by protection key. [`Core::set_pkru`](crate::Core::set_pkru) must be used when
    /// translations may be cached.
    pub pkru: u32,
    /// Debug registers; 4 and 5 are not used.
    pub dr: [u64; 8],
    /// The PAE page-directory pointers that were loaded with CR3 (only in 32-bit PAE paging).
    pub pdpte: [u64; 4],
    /// Model-specific registers.
    pub msrs: Msrs,
    /// Vector registers; without AVX-512 the first 16.
    pub vectors: [VecReg; 32],
    /// Mask registers of AVX-512, K0 to K7.
    pub opmask: [u64; 8],
    /// How much of the vector and mask registers may hold anything but zeros: one of [`width`]. It may say too much,
    /// never too little: whoever writes more than XMM registers raises it.
    pub vector_width: u8,
    /// x87 and MMX.
    pub x87: X87Area,
    /// The soft TLB.
    pub tlb: Tlb,
    /// Generations of mappings of code, of the host's world and the guest's.
    pub generations: [Generation; WORLDS],
    /// Secure Virtual Machine.
    pub svm: Svm,
    /// What a debugger on the host watches.
    pub(crate) watches: Option<Box<Watches>>,
    /// The processor's APIC id, which CPUID reports.
    pub apic_id: u32,
    /// What CPUID announces.
    pub model: std::sync::Arc<crate::cpuid::CpuModel>,
}

// SAFETY: `tlb_bank` points into the processor itself or to a static, and the host pointers in the TLB to
// guest memory that any thread may access; nothing is bound to the thread that made it.
unsafe impl Send for Cpu {}

impl Cpu {
    /// The generation of the mappings of code that are in force.
    pub fn generation(&self) -> Generation {
        self.generations[self.world()]
    }

    /// A processor as it is after power-up.
    pub fn new(model: std::sync::Arc<crate::cpuid::CpuModel>, apic_id: u32) -> Box<Self> {
        let mut cpu = Box::<Self>::new_uninit();
        let at = cpu.as_mut_ptr();
        // SAFETY: all fields but the model and parts of the TLB are valid with all bits zero (integers, booleans, raw
        // pointers, arrays of such), and those are written without dropping what was there.
        let mut cpu = unsafe {
            at.write_bytes(0, 1);
            (&raw mut (*at).model).write(model);
            Tlb::write_parts(&raw mut (*at).tlb);
            cpu.assume_init()
        };
        cpu.apic_id = apic_id;
        cpu.tlb.reset();
        cpu.power_up();
        cpu
    }

    /// Components of the extended state that are not in their initial state, as XGETBV tells with ECX = 1 and the
    /// XSAVE instructions go by: XINUSE (Intel SDM volume 1, 13.6). As on AMD's processors, registers that only 64-bit
    /// code has count in any mode.
    pub fn components_in_use(&self) -> u64 {
        let x87 = self.x87.0[..2] != [0x7f, 3] || !zero(&self.x87.0[2..24]) || !zero(&self.x87.0[32..160]);
        self.vectors_in_use() | u64::from(x87) | u64::from(self.pkru != 0) << 9
    }

    /// The same of vector and mask registers.
    fn vectors_in_use(&self) -> u64 {
        let any = |registers: Range<usize>, bytes: Range<usize>| {
            self.vectors[registers].iter().any(|vector| !zero(&vector.0[bytes.clone()]))
        };
        let (low, width) = (0..16, self.vector_width);
        let parts = [
            (1, any(low.clone(), 0..16)),
            (2, width >= width::YMM && any(low.clone(), 16..32)),
            (5, width >= width::ZMM && self.opmask != [0; 8]),
            (6, width >= width::ZMM && any(low, 32..64)),
            (7, width >= width::ZMM && any(16..32, 0..64)),
        ];
        parts.into_iter().fold(0, |set, (bit, used)| set | u64::from(used) << bit)
    }

    /// Sets [`Cpu::vector_width`] to the least that is true.
    pub fn find_vector_width(&mut self) {
        self.vector_width = width::ZMM;
        let used = self.vectors_in_use();
        self.vector_width = if used >> 5 != 0 {
            width::ZMM
        } else if used & 1 << 2 != 0 {
            width::YMM
        } else {
            width::XMM
        };
    }
}

fn zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}
