//! What the vCPUs of a VM have in common.

use crate::cpuid::CpuTemplate;
use crate::patches::Patches;
use crate::routes::Routes;
use crate::slots::Slots;
use crate::time::VmTime;
use accel::EoiListener;
use irq::MsiMessage;
use kvm_ioctls::VmFd;
use parking_lot::{Mutex, RwLock};
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What the vCPUs of a VM have in common.
pub(crate) struct VmShared {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) time: VmTime,
    pub(crate) cpu: CpuTemplate,
    /// The MSRs that this host's KVM saves.
    pub(crate) msrs: Vec<u32>,
    pub(crate) has_sregs2: bool,
    /// The rate of the time-stamp counters in kHz, if it is not the host's.
    pub(crate) set_tsc_khz: Option<u32>,
    /// Whether the kernel can deny guests those of its features that CPUID does not announce.
    pub(crate) enforce_pv: bool,
    pub(crate) routes: Arc<Routes>,
    pub(crate) slots: Mutex<Slots>,
    /// The level of the 8259 pair's output.
    pub(crate) ext_int: AtomicBool,
    /// Held by who acknowledges the 8259 pair's interrupt.
    pub(crate) acknowledging: Mutex<()>,
    /// INT3 for breakpoints of debuggers.
    pub(crate) patches: Patches,
    /// Whether the kernel can hold interrupts back while a vCPU single-steps.
    pub(crate) blocks_interrupts: bool,
    pub(crate) eoi_listener: RwLock<Option<EoiListener>>,
}

impl VmShared {
    /// A level-triggered interrupt is in the local APIC of vCPU `id`, from a restored state: its end is to be
    /// reported.
    pub(crate) fn expect_eoi(&self, id: u32, vector: u8) -> io::Result<()> {
        let address = 0xfee0_0000 | u64::from(id & 0xff) << 12;
        self.routes.watch(MsiMessage { address, data: 1 << 15 | u32::from(vector) })
    }

    /// A level-triggered interrupt was ended.
    pub(crate) fn end_of_interrupt(&self, vector: u8) {
        let listener = self.eoi_listener.read().clone();
        if let Some(listener) = listener {
            listener(vector);
        }
    }
}
