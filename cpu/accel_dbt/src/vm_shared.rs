//! What the vCPUs of a VM share.

use crate::counted::Counted;
use crate::shared::VcpuShared;
use crate::tsc::TscSource;
use accel::Tier;
use clock::VmClock;
use guest_memory::GuestMemory;
use lapic::ApicBus;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use x86_core::cpuid::CpuModel;
use x86_translate::Translator;

/// What the vCPUs of a VM have in common.
pub(crate) struct VmShared {
    pub(crate) memory: GuestMemory,
    pub(crate) clock: VmClock,
    pub(crate) tsc: TscSource,
    pub(crate) apics: Arc<ApicBus>,
    pub(crate) model: Arc<CpuModel>,
    pub(crate) vcpus: u32,
    pub(crate) tier: Tier,
    /// If instructions are counted.
    pub(crate) counted: Option<Counted>,
    /// See [`accel::VmSpec::halt_poll`].
    pub(crate) halt_poll: Option<Duration>,
    /// What translates, unless the interpreter does all.
    pub(crate) translator: Option<Arc<Translator>>,
    /// Debuggers' breakpoints, by vCPU.
    pub(crate) breakpoints: Mutex<BTreeMap<u32, Vec<u64>>>,
    /// The vCPUs that were made.
    pub(crate) made: Mutex<Vec<Arc<VcpuShared>>>,
}
