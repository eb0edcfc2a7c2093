//! What the control area of a VMCB says of the guest that runs.

/// The parts of the control area that count while the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Control {
    /// The intercept bits, by exit code.
    pub intercepts: [u32; 6],
    /// PAUSEs that are let pass before one is intercepted, and how many are left of these.
    pub pause_filter: u16,
    #[allow(missing_docs)]
    pub pauses_left: u16,
    /// Ticks between two PAUSEs after which counting begins anew; 0 if it does not.
    pub pause_threshold: u16,
    /// The time-stamp counter at the last PAUSE.
    pub last_pause: u64,
    /// Physical address of the I/O permissions map.
    pub iopm: u64,
    /// Physical address of the MSR permissions map.
    pub msrpm: u64,
    /// What the guest's time-stamp counter is more than the host's.
    pub tsc_offset: u64,
    /// Address space identifier.
    pub asid: u32,
    /// The word of the virtual interrupt.
    pub interrupts: VirtualInterrupts,
    /// Whether physical addresses go through nested page tables.
    pub nested_paging: bool,
    /// Their root.
    pub ncr3: u64,
}

/// The VMCB's word at offset 0x60: the virtual interrupt and what belongs to it (AMD APM volume 2, 15.21).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct VirtualInterrupts(pub u64);

impl VirtualInterrupts {
    const TPR: u64 = 0xff;
    const IRQ: u64 = 1 << 8;
    const GIF: u64 = 1 << 9;
    const IGNORE_TPR: u64 = 1 << 20;
    const MASKING: u64 = 1 << 24;
    const GIF_ENABLE: u64 = 1 << 25;

    /// V_INTR_MASKING: the guest's IF and CR8 concern virtual interrupts alone.
    #[inline]
    pub fn masking(self) -> bool {
        self.0 & Self::MASKING != 0
    }

    /// V_TPR, as the guest's CR8.
    pub fn tpr(self) -> u8 {
        self.0 as u8 & 0xf
    }

    /// Sets V_TPR.
    pub(crate) fn set_tpr(&mut self, tpr: u8) {
        self.0 = self.0 & !Self::TPR | u64::from(tpr & 0xf);
    }

    /// V_INTR_VECTOR.
    pub fn vector(self) -> u8 {
        (self.0 >> 32) as u8
    }

    /// Whether there is a virtual interrupt that the guest's priority and its own global interrupt flag let pass.
    #[inline]
    pub fn waits(self) -> bool {
        let priority = (self.0 >> 16) as u8 & 0xf;
        self.0 & Self::IRQ != 0
            && (self.0 & Self::IGNORE_TPR != 0 || priority > self.tpr())
            && (!self.has_gif() || self.0 & Self::GIF != 0)
    }

    /// Takes the virtual interrupt.
    pub(crate) fn acknowledge(&mut self) {
        self.0 &= !Self::IRQ;
    }

    /// Whether the guest has a global interrupt flag of its own.
    pub(crate) fn has_gif(self) -> bool {
        self.0 & Self::GIF_ENABLE != 0
    }

    /// Sets that.
    pub(crate) fn set_gif(&mut self, on: bool) {
        self.0 = self.0 & !Self::GIF | if on { Self::GIF } else { 0 };
    }
}
