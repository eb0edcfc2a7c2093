//! The accelerator itself.

use crate::cpuid::CpuTemplate;
use crate::dirty_ring;
use crate::error::NAME;
use crate::host::{self, DEVICE};
use crate::vm::KvmVm;
use crate::{KvmUnavailable, cpuid};
use accel::{AccelError, AccelVm, Accelerator, CpuSpec, CpuidLeaf, VmSpec};
use clock::TimerService;
use guest_memory::GuestMemory;
use kvm_ioctls::Kvm;
use std::path::Path;
use std::sync::Arc;

/// Linux's KVM on this host.
#[derive(Clone)]
pub struct KvmAccelerator {
    kvm: Arc<Kvm>,
    dirty_rings: bool,
}

impl KvmAccelerator {
    /// Opens `/dev/kvm`. That VMs can be made does not mean that they can run a stock kernel: see
    /// [`crate::HostReport::runs_stock_kernels`].
    ///
    /// # Errors
    /// [`KvmUnavailable`] if there is no KVM, it may not be used, or it lacks something.
    pub fn open() -> Result<Self, KvmUnavailable> {
        let kvm = host::open(Path::new(DEVICE))?;
        host::check(&kvm)?;
        // A KVM in software overfills its rings, and what does not fit is lost.
        let dirty_rings = dirty_ring::offered(&kvm).is_some() && !host::is_software(Path::new("/"));
        Ok(Self { kvm: Arc::new(kvm), dirty_rings })
    }

    /// The same, with the kernel noting the pages that guests write in rings, one for each vCPU, if it offers them and
    /// this says so, else in bitmaps. Rings are the default where they can be relied on.
    #[must_use]
    pub fn with_dirty_rings(self, rings: bool) -> Self {
        Self { dirty_rings: rings, ..self }
    }

    /// The most vCPUs of a VM.
    pub fn max_vcpus(&self) -> u32 {
        u32::try_from(self.kvm.get_max_vcpus()).unwrap_or(u32::MAX)
    }
}

impl std::fmt::Debug for KvmAccelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmAccelerator").finish_non_exhaustive()
    }
}

impl Accelerator for KvmAccelerator {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_models(&self) -> Vec<(String, String)> {
        cpuid::models()
    }

    fn cpuid(&self, cpu: &CpuSpec) -> Result<Vec<CpuidLeaf>, AccelError> {
        let hertz = cpu.tsc_hertz.unwrap_or(0);
        let cpuid = CpuTemplate::new(&self.kvm, cpu, 1)?.cpuid(0, hertz)?;
        let mut leaves: Vec<_> = cpuid
            .as_slice()
            .iter()
            .map(|entry| CpuidLeaf {
                leaf: entry.function,
                sub: entry.index,
                registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
            })
            .filter(|leaf| leaf.registers != [0; 4])
            .collect();
        leaves.sort();
        Ok(leaves)
    }

    fn create_vm(
        &self,
        spec: &VmSpec,
        memory: &GuestMemory,
        timers: &Arc<TimerService>,
    ) -> Result<Arc<dyn AccelVm>, AccelError> {
        if timers.clock().counter().is_some() {
            let reason = "the host's processor stops at no exact number of them";
            return Err(AccelError::Counted { accelerator: NAME, reason });
        }
        let most = self.max_vcpus();
        if !(1..=most).contains(&spec.vcpus) {
            return Err(AccelError::VcpuCount { accelerator: NAME, vcpus: spec.vcpus, most });
        }
        let cpu = CpuTemplate::new(&self.kvm, &spec.cpu, spec.vcpus_per_socket())?;
        Ok(Arc::new(KvmVm::new(&self.kvm, spec, cpu, memory, timers, self.dirty_rings)?))
    }
}
