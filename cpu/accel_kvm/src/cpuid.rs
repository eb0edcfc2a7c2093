//! What the guest's CPUID says: the host's, in the machine's topology.

use crate::state::XsaveLayout;
use crate::vm::refused;
use accel::{AccelError, CpuSpec};
use kvm_bindings::{self as kb, CpuId};
use kvm_ioctls::Kvm;
use std::io;

/// Parts of the XSAVE area that guests can have: x87, SSE, AVX, AVX-512 and protection keys. Others (AMX)
/// are larger than what saved states hold.
const XCR0: u64 = 0x2e7;

/// The rate of the APIC timer's input clock in KVM.
const APIC_BUS_HERTZ: u64 = 1_000_000_000;

/// The models' names, with a line on each.
pub(crate) fn models() -> Vec<(String, String)> {
    vec![("max".into(), "everything that the host's processor and KVM offer".into())]
}

/// What all vCPUs of a VM say alike.
pub(crate) struct CpuTemplate {
    entries: Vec<kb::kvm_cpuid_entry2>,
    vcpus: u32,
    xsave: XsaveLayout,
}

/// The bits of APIC ids that number `vcpus` processors.
fn id_bits(vcpus: u32) -> u32 {
    u32::BITS - vcpus.saturating_sub(1).leading_zeros()
}

impl CpuTemplate {
    pub(crate) fn new(kvm: &Kvm, spec: &CpuSpec, vcpus: u32) -> Result<Self, AccelError> {
        if spec.name != "max" {
            return Err(AccelError::UnknownCpu {
                accelerator: crate::accelerator::NAME,
                name: spec.name.clone(),
                known: "max".into(),
            });
        }
        if let Some((name, _)) = spec.features.first() {
            return Err(AccelError::CpuFeature {
                name: name.clone(),
                cpu: spec.name.clone(),
                reason: "this accelerator cannot change features yet".into(),
            });
        }
        let supported = kvm
            .get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("KVM's list of CPUID leaves"))?;
        let mut template =
            Self { entries: supported.as_slice().to_vec(), vcpus, xsave: XsaveLayout::new(0, |_| 0) };
        let deadline = kvm.check_extension_raw(kb::KVM_CAP_TSC_DEADLINE_TIMER.into()) > 0;
        template.restrict(deadline);
        let parts = template.find(0xd, 0).map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax));
        let offset = |part| template.find(0xd, part).map_or(0, |leaf| leaf.ebx as usize);
        template.xsave = XsaveLayout::new(parts, offset);
        Ok(template)
    }

    pub(crate) fn xsave_layout(&self) -> &XsaveLayout {
        &self.xsave
    }

    fn find(&self, function: u32, index: u32) -> Option<&kb::kvm_cpuid_entry2> {
        self.entries.iter().find(|entry| entry.function == function && entry.index == index)
    }

    /// Takes away what is not to be had here, and what the topology says in its own words.
    fn restrict(&mut self, tsc_deadline: bool) {
        // Topology leaves are made anew; performance counters, AMX and nested virtualization have state that
        // is not saved.
        let gone = [0xa, 0xb, 0x1d, 0x1e, 0x1f, 0x8000_000a, 0x8000_0022, 0x8000_0026];
        self.entries.retain(|entry| !gone.contains(&entry.function));
        self.entries.retain(|entry| entry.function != 0xd || entry.index < 2 || XCR0 >> entry.index & 1 != 0);
        for entry in &mut self.entries {
            match (entry.function, entry.index) {
                (1, _) => {
                    entry.ecx &= !(1 << 5 | 1 << 15); // VMX, PDCM
                    entry.ecx |= 1 << 31 | u32::from(tsc_deadline) << 24; // a hypervisor
                }
                (7, 0) => entry.edx &= !(1 << 22 | 1 << 24 | 1 << 25), // AMX
                (7, 1) => entry.eax &= !(1 << 21),                     // AMX-FP16
                (0xd, 0) => {
                    entry.eax &= XCR0 as u32;
                    entry.edx = 0;
                }
                (0xd, 1) => {
                    entry.eax &= !(1 << 4); // XFD
                    entry.ecx = 0;
                    entry.edx = 0;
                }
                (0x4000_0000, _) => entry.eax = entry.eax.max(0x4000_0010),
                // Memory encryption and migration control are for guests of another kind.
                (0x4000_0001, _) => entry.eax &= !(1 << 16 | 1 << 17),
                (0x8000_0001, _) => entry.ecx &= !(1 << 2 | 1 << 23 | 1 << 24 | 1 << 28), // SVM, counters
                _ => {}
            }
        }
    }

    /// The leaves of vCPU `id`, whose time-stamp counter has the rate `tsc_hertz`.
    pub(crate) fn cpuid(&self, id: u32, tsc_hertz: u64) -> Result<CpuId, AccelError> {
        let mut entries = self.entries.clone();
        let amd = self.find(0, 0).is_some_and(|entry| entry.ebx == u32::from_le_bytes(*b"Auth"));
        for entry in &mut entries {
            self.place(entry, id, amd);
        }
        let bits = id_bits(self.vcpus);
        let topology = [[0, 1, 1 << 8, id], [bits, self.vcpus, 2 << 8 | 1, id], [0, 0, 2, id]];
        for (index, [eax, ebx, ecx, edx]) in (0..).zip(topology) {
            let flags = kb::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            entries.push(kb::kvm_cpuid_entry2 {
                function: 0xb,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
                padding: [0; 3],
            });
        }
        let kilohertz = |hertz: u64| u32::try_from(hertz / 1000).unwrap_or(u32::MAX);
        entries.push(kb::kvm_cpuid_entry2 {
            function: 0x4000_0010,
            eax: kilohertz(tsc_hertz),
            ebx: kilohertz(APIC_BUS_HERTZ),
            ..kb::kvm_cpuid_entry2::default()
        });
        CpuId::from_entries(&entries).map_err(|error| AccelError::Host {
            what: "a vCPU's CPUID",
            source: io::Error::other(format!("{} leaves: {error:?}", entries.len())),
        })
    }

    /// Says in a leaf who the vCPU is, and who its neighbours are: one socket of as many cores as vCPUs.
    fn place(&self, entry: &mut kb::kvm_cpuid_entry2, id: u32, amd: bool) {
        let others = self.vcpus - 1;
        let bits = id_bits(self.vcpus);
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ebx = entry.ebx & 0xff00 | (id & 0xff) << 24 | self.vcpus.min(255) << 16;
                entry.edx = entry.edx & !(1 << 28) | u32::from(others > 0) << 28;
            }
            // Intel's caches: how many share one, and how many cores there are.
            (4, _) if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { ((1u32 << bits) - 1).min(0xfff) } else { 0 };
                let cores = ((1u32 << bits) - 1).min(0x3f);
                entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
            }
            (0x8000_0001, _) if amd => entry.ecx = entry.ecx & !2 | u32::from(others > 0) << 1,
            (0x8000_0008, _) if amd => entry.ecx = bits << 12 | others.min(255),
            (0x8000_001d, _) if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { others.min(0xfff) } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
            _ => {}
        }
    }
}
