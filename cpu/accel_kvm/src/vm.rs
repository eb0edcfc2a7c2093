//! One VM.

use crate::cpuid::CpuTemplate;
use crate::dirty_ring;
use crate::doorbells::KvmDoorbells;
use crate::error::{host, refused};
use crate::ioctl;
use crate::kick::Kicker;
use crate::patches::Patches;
use crate::routes::{KvmIrqfd, LEVEL_PLACES, Routes};
use crate::slots::{DirtyLog, Slots};
use crate::time::VmTime;
use crate::vcpu::KvmVcpu;
use crate::vm_shared::VmShared;
use accel::{AccelError, AccelVm, Doorbells, EoiListener, Irqfd, Kick, Vcpu, VmSpec};
use clock::TimerService;
use guest_memory::GuestMemory;
use irq::MsiTarget;
use kvm_bindings as kb;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Four pages that processors without "unrestricted guest" need, in the hole below the local APICs.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;

/// One VM.
pub(crate) struct KvmVm {
    shared: Arc<VmShared>,
    memory: GuestMemory,
    vcpus: u32,
    /// The bootstrap processor, until it is asked for: it is what the counter's rate is asked of.
    first: Mutex<Option<VcpuFd>>,
    kickers: Mutex<BTreeMap<u32, Arc<Kicker>>>,
}

impl KvmVm {
    pub(crate) fn new(
        kvm: &Kvm,
        spec: &VmSpec,
        cpu: CpuTemplate,
        memory: &GuestMemory,
        timers: &Arc<TimerService>,
        dirty_rings: bool,
    ) -> Result<Self, AccelError> {
        let vm = Arc::new(create(kvm)?);
        let dirty_log = if dirty_rings { rings(kvm, &vm) } else { DirtyLog::Bitmaps };
        vm.set_identity_map_address(IDENTITY_MAP).map_err(refused("KVM's identity map"))?;
        vm.set_tss_address(TSS).map_err(refused("KVM's task state segment"))?;
        enable(&vm, "a split interrupt controller", kb::KVM_CAP_SPLIT_IRQCHIP, LEVEL_PLACES.into())?;
        let flags = kb::KVM_X2APIC_API_USE_32BIT_IDS | kb::KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(&vm, "32-bit APIC ids", kb::KVM_CAP_X2APIC_API, flags.into())?;
        if let Some(halt_poll) = spec.halt_poll {
            let nanos = u64::try_from(halt_poll.as_nanos()).unwrap_or(u64::MAX).min(u32::MAX.into());
            enable(&vm, "a limit of halt polling (Linux 5.10)", kb::KVM_CAP_HALT_POLL, nanos)?;
        }
        restrict_msrs(kvm, &vm)?;
        let most = u32::try_from(kvm.get_nr_memslots()).unwrap_or(u32::MAX);
        let mut slots = Slots::new(vm.clone(), memory.clone(), most, dirty_log);
        slots.update()?;
        let first = vm.create_vcpu(0).map_err(refused("a vCPU"))?;
        let khz = tsc_khz(kvm, &first, spec)?;
        let list = kvm.get_msr_index_list().map_err(refused("KVM's list of MSRs"))?;
        let shared = VmShared {
            set_tsc_khz: spec.cpu.tsc_hertz.map(|_| khz),
            enforce_pv: kvm.check_extension_raw(kb::KVM_CAP_ENFORCE_PV_FEATURE_CPUID.into()) > 0,
            time: VmTime::new(timers.clock().clone(), u64::from(khz) * 1000),
            cpu,
            msrs: crate::state::saved_msrs(list.as_slice()),
            has_sregs2: kvm.check_extension_raw(kb::KVM_CAP_SREGS2.into()) > 0,
            routes: Arc::new(Routes::new(vm.clone())),
            slots: Mutex::new(slots),
            ext_int: AtomicBool::new(false),
            acknowledging: Mutex::default(),
            patches: Patches::new(memory),
            blocks_interrupts: kvm.check_extension_raw(kb::KVM_CAP_SET_GUEST_DEBUG2.into())
                & kb::KVM_GUESTDBG_BLOCKIRQ as i32
                != 0,
            eoi_listener: RwLock::default(),
            vm,
        };
        Ok(Self {
            shared: Arc::new(shared),
            memory: memory.clone(),
            vcpus: spec.vcpus,
            first: Mutex::new(Some(first)),
            kickers: Mutex::default(),
        })
    }

    fn kick_all(&self) {
        for kicker in self.kickers.lock().values() {
            kicker.kick();
        }
    }
}

/// A VM of the kernel's. A signal can interrupt its making.
fn create(kvm: &Kvm) -> Result<VmFd, AccelError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            other => return other.map_err(refused("a VM")),
        }
    }
}

/// Has the kernel tell of written pages by rings, if it offers them. To be called before there are vCPUs.
fn rings(kvm: &Kvm, vm: &VmFd) -> DirtyLog {
    let Some((cap, bytes)) = dirty_ring::offered(kvm) else { return DirtyLog::Bitmaps };
    match enable(vm, "rings of written pages", cap, bytes) {
        Ok(()) => DirtyLog::Rings { bytes, rings: Vec::new() },
        Err(error) => {
            tracing::warn!("KVM offers rings of written pages, but has none; its bitmaps are used: {error}");
            DirtyLog::Bitmaps
        }
    }
}

/// MSRs that KVM knows, and guests here have no business with: nested virtualization's, whose state is not
/// saved.
const DENIED_MSRS: [RangeInclusive<u32>; 2] = [0x480..=0x491, 0xc001_0114..=0xc001_0117];

/// Has accesses of MSRs that are denied, or that nobody has, come here, to be noted; they fault in the guest.
fn restrict_msrs(kvm: &Kvm, vm: &VmFd) -> Result<(), AccelError> {
    let has = |cap: u32| kvm.check_extension_raw(cap.into()) > 0;
    if has(kb::KVM_CAP_X86_USER_SPACE_MSR) && has(kb::KVM_CAP_X86_MSR_FILTER) {
        let reasons = kb::KVM_MSR_EXIT_REASON_FILTER | kb::KVM_MSR_EXIT_REASON_UNKNOWN;
        enable(vm, "exits of MSR accesses", kb::KVM_CAP_X86_USER_SPACE_MSR, reasons.into())?;
        ioctl::deny_msrs(vm, &DENIED_MSRS).map_err(host("a filter of MSRs"))?;
    }
    Ok(())
}

/// Differences of rates below this, in parts per million, are within what clocks of guests put up with.
const TSC_TOLERANCE_PPM: u64 = 250;

/// The rate of the counters of a VM in kHz; `first` is its first vCPU.
fn tsc_khz(kvm: &Kvm, first: &VcpuFd, spec: &VmSpec) -> Result<u32, AccelError> {
    let ask = || ioctl::tsc_khz(first).map_err(host("the rate of the time-stamp counter"));
    let host = ask()?;
    let Some(wanted) = spec.cpu.tsc_hertz else { return Ok(host) };
    let refused = |reason: String| AccelError::CpuFeature {
        name: "tsc-frequency".into(),
        cpu: spec.cpu.name.clone(),
        reason,
    };
    let wanted = u32::try_from(wanted / 1000).map_err(|_| refused(format!("{wanted} Hz are too many")))?;
    let tolerated = u64::from(host) * TSC_TOLERANCE_PPM / 1_000_000;
    if u64::from(wanted.abs_diff(host)) > tolerated
        && kvm.check_extension_raw(kb::KVM_CAP_TSC_CONTROL.into()) <= 0
    {
        return Err(refused(format!("the host's is {host} kHz, and its processor cannot scale it")));
    }
    ioctl::set_tsc_khz(first, wanted).map_err(|error| refused(format!("{wanted} kHz: {error}")))?;
    ask()
}

fn enable(vm: &VmFd, what: &'static str, cap: u32, argument: u64) -> Result<(), AccelError> {
    let mut request = kb::kvm_enable_cap { cap, ..kb::kvm_enable_cap::default() };
    request.args[0] = argument;
    vm.enable_cap(&request).map_err(refused(what))
}

impl AccelVm for KvmVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, AccelError> {
        if id >= self.vcpus {
            return Err(AccelError::VcpuId { id, reason: "the VM was made for fewer" });
        }
        let mut kickers = self.kickers.lock();
        if kickers.contains_key(&id) {
            return Err(AccelError::VcpuId { id, reason: "it exists already" });
        }
        let first = if id == 0 { self.first.lock().take() } else { None };
        let fd = match first {
            Some(fd) => fd,
            None => self.shared.vm.create_vcpu(id.into()).map_err(refused("a vCPU"))?,
        };
        self.shared.slots.lock().add_vcpu(&fd)?;
        let kicker = Arc::new(Kicker::default());
        let vcpu = KvmVcpu::new(id, fd, self.shared.clone(), kicker.clone())?;
        kickers.insert(id, kicker);
        Ok(Box::new(vcpu))
    }

    fn msi_target(&self) -> Arc<dyn MsiTarget> {
        self.shared.routes.clone()
    }

    fn set_ext_int(&self, level: bool) {
        let before = self.shared.ext_int.swap(level, Ordering::SeqCst);
        if level && !before {
            self.kick_all();
        }
    }

    fn set_eoi_listener(&self, listener: EoiListener) {
        *self.shared.eoi_listener.write() = Some(listener);
    }

    fn memory_changed(&self, _range: Range<u64>) {
        if let Err(error) = self.shared.slots.lock().update() {
            tracing::error!("the guest does not see its memory as it is now: {error}");
        }
    }

    fn set_dirty_log(&self, on: bool) {
        // First ours, then the kernel's: what is written in between is in one of them.
        if on {
            self.memory.set_dirty_log(true);
        }
        if let Err(error) = self.shared.slots.lock().set_dirty_log(on) {
            tracing::error!("KVM logs no written pages: {error}");
        }
        if !on {
            self.memory.set_dirty_log(false);
        }
    }

    fn take_dirty(&self, page: &mut dyn FnMut(u64)) {
        let hears_late = self.shared.slots.lock().hears_late();
        if hears_late {
            // Processors that log pages by themselves tell the kernel of them when they leave the guest.
            let kickers: Vec<_> = self.kickers.lock().values().cloned().collect();
            Kicker::bring_out(&kickers);
        }
        if let Err(error) = self.shared.slots.lock().collect_dirty() {
            tracing::error!("{error}");
        }
        self.memory.take_dirty(page);
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        Some(Arc::new(KvmDoorbells(self.shared.vm.clone())))
    }

    fn irqfd(&self) -> Option<Arc<dyn Irqfd>> {
        Some(Arc::new(KvmIrqfd(self.shared.routes.clone())))
    }

    fn tsc_hertz(&self) -> u64 {
        self.shared.time.hertz()
    }
}
