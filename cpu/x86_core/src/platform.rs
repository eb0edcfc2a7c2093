//! What a processor asks of its surroundings.

/// The world outside one processor. Implemented by the accelerator, and by tests.
pub trait Platform {
    /// A load from guest physical addresses that are no RAM (1, 2, 4 or 8 bytes, within one page).
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// A store to guest physical addresses that are no RAM.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
    /// `IN` (1, 2 or 4 bytes).
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// `OUT`.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// The time-stamp counter before the guest's offset; runs at [`Platform::tsc_hertz`].
    fn tsc(&self) -> u64;
    /// What [`Platform::tsc`] is more than the time-stamp counter of the host, if that is a constant while the
    /// processor runs: generated code reads the counter itself then.
    fn host_tsc_offset(&self) -> Option<u64> {
        None
    }
    /// The rate of [`Platform::tsc`].
    fn tsc_hertz(&self) -> u64;
    /// The task priority, CR8: bits 4..=7 of the APIC's TPR.
    fn cr8(&self) -> u8;
    /// Sets CR8.
    fn set_cr8(&self, priority: u8);
    /// Reads a local APIC MSR: APIC_BASE (0x1b), TSC_DEADLINE (0x6e0), x2APIC (0x800..=0x8ff). `None` is
    /// #GP.
    fn apic_msr(&self, msr: u32) -> Option<u64>;
    /// PAUSE: the processor waits for another, in a loop.
    fn pause(&self) {}
    /// Writes one. `None` is #GP.
    fn set_apic_msr(&self, msr: u32, value: u64) -> Option<()>;
    /// 64 random bits for RDRAND and RDSEED, if there are some.
    fn random(&self) -> Option<u64> {
        crate::system::host_random()
    }
    /// So many instructions were executed before the one that is executed now, where instructions are counted: to be
    /// told before anything here is asked in the middle of it.
    fn at_instruction(&self, _count: u64) {}
    /// A page walk set accessed or dirty bits in the paging-structure entry of `len` bytes at `gpa`.
    fn entry_marked(&self, _gpa: u64, _len: u64) {}
}
