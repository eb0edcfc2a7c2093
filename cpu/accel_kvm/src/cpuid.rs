//! What the guest's CPUID says: a model's features as far as the host has them, in the machine's topology.

use crate::error::{NAME, refused};
use crate::state::{self, XsaveLayout};
use accel::{AccelError, CpuSpec};
use kvm_bindings::{self as kb, CpuId};
use kvm_ioctls::Kvm;
use std::io;
use x86_cpuid::feature::{self, Feature};
use x86_cpuid::{APIC_BUS_HERTZ, CpuModel};

/// Parts of the XSAVE area that guests can have, with the feature that brings each: AVX, AVX-512 and
/// protection keys beside x87 and SSE. Others (AMX) are larger than what saved states hold.
const PARTS: [(u64, Feature); 3] =
    [(1 << 2, feature::AVX), (7 << 5, feature::AVX512F), (1 << 9, feature::PKU)];

/// The bits of leaf 1's EDX that AMD's processors have in leaf 0x80000001, too.
const REPEATED: u32 = 0x0183_f3ff;

/// KVM's signature leaf, and that of its features for guests.
const SIGNATURE: u32 = 0x4000_0000;
const PV_FEATURES: u32 = 0x4000_0001;
const TIMING: u32 = 0x4000_0010;

/// KVM's features for guests, by the names that people know from QEMU, and their bits.
const PV_NAMES: &[(&str, u32)] = &[
    ("kvmclock", 1 << 0 | 1 << 3 | 1 << 24),
    ("kvm_nopiodelay", 1 << 1),
    ("kvm_asyncpf", 1 << 4),
    ("kvm_steal_time", 1 << 5),
    ("kvm_pv_eoi", 1 << 6),
    ("kvm_pv_unhalt", 1 << 7),
    ("kvm_pv_tlb_flush", 1 << 9),
    ("kvm_asyncpf_vmexit", 1 << 10),
    ("kvm_pv_ipi", 1 << 11),
    ("kvm_poll_control", 1 << 12),
    ("kvm_pv_sched_yield", 1 << 13),
    ("kvm_asyncpf_int", 1 << 14),
];

/// All of them; the others are for guests with encrypted memory.
fn all_pv() -> u32 {
    PV_NAMES.iter().fold(0, |all, (_, bits)| all | bits)
}

/// The models' names, with a line on each. What of a model the host lacks it goes without.
pub(crate) fn models() -> Vec<(String, String)> {
    let mut models: Vec<_> = CpuModel::list(|_| true)
        .into_iter()
        .map(|model| (model.name.to_owned(), model.description.to_owned()))
        .collect();
    models[0].1 = "everything that the host's processor and KVM offer".into();
    models.insert(1, ("host".into(), "the same as max".into()));
    models
}

/// What all vCPUs of a VM say alike.
pub(crate) struct CpuTemplate {
    leaves: Leaves,
    /// The named model, unless it is the host itself.
    model: Option<CpuModel>,
    vcpus: u32,
    xsave: XsaveLayout,
    /// The revision of the host's microcode, if KVM says it.
    microcode: Option<u64>,
}

/// A set of CPUID leaves.
#[derive(Debug, Clone, Default)]
struct Leaves(Vec<kb::kvm_cpuid_entry2>);

impl Leaves {
    fn find(&self, function: u32, index: u32) -> Option<&kb::kvm_cpuid_entry2> {
        self.0.iter().find(|entry| entry.function == function && entry.index == index)
    }

    fn find_mut(&mut self, function: u32, index: u32) -> Option<&mut kb::kvm_cpuid_entry2> {
        self.0.iter_mut().find(|entry| entry.function == function && entry.index == index)
    }

    fn put(&mut self, function: u32, index: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) {
        let flags = if index.is_some() { kb::KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        let index = index.unwrap_or(0);
        self.0.retain(|entry| entry.function != function || entry.index != index);
        self.0.push(kb::kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] });
    }

    fn has(&self, feature: Feature) -> bool {
        let place = feature.place();
        self.find(place.leaf, place.sub)
            .is_some_and(|entry| word(entry, place.register) >> place.bit & 1 != 0)
    }

    fn set(&mut self, feature: Feature, on: bool) {
        let place = feature.place();
        if on && self.find(place.leaf, place.sub).is_none() {
            self.put(place.leaf, (place.leaf == 7 || place.leaf == 0xd).then_some(place.sub), [0; 4]);
        }
        if let Some(entry) = self.find_mut(place.leaf, place.sub) {
            let word = word_mut(entry, place.register);
            *word = *word & !(1 << place.bit) | u32::from(on) << place.bit;
        }
    }

    fn is_amd(&self) -> bool {
        self.find(0, 0).is_some_and(|entry| entry.ebx == u32::from_le_bytes(*b"Auth"))
    }
}

fn word(entry: &kb::kvm_cpuid_entry2, register: usize) -> u32 {
    [entry.eax, entry.ebx, entry.ecx, entry.edx][register & 3]
}

fn word_mut(entry: &mut kb::kvm_cpuid_entry2, register: usize) -> &mut u32 {
    match register {
        0 => &mut entry.eax,
        1 => &mut entry.ebx,
        2 => &mut entry.ecx,
        _ => &mut entry.edx,
    }
}

/// The bits of APIC ids that number `vcpus` processors.
fn id_bits(vcpus: u32) -> u32 {
    u32::BITS - vcpus.saturating_sub(1).leading_zeros()
}

impl CpuTemplate {
    /// What the processors of a VM say, by the host's KVM.
    pub(crate) fn new(kvm: &Kvm, spec: &CpuSpec, vcpus: u32) -> Result<Self, AccelError> {
        let supported = kvm
            .get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("KVM's list of CPUID leaves"))?;
        let mut host = Leaves(supported.as_slice().to_vec());
        // KVM does the deadline timer by itself, and says so elsewhere.
        host.set(feature::TSC_DEADLINE, kvm.check_extension_raw(kb::KVM_CAP_TSC_DEADLINE_TIMER.into()) > 0);
        let microcode = state::host_microcode(kvm);
        Ok(Self { microcode, ..Self::of(host, spec, vcpus)? })
    }

    /// What they say on a host that can do `host`.
    fn of(mut host: Leaves, spec: &CpuSpec, vcpus: u32) -> Result<Self, AccelError> {
        restrict(&mut host);
        let model = match spec.name.as_str() {
            "max" | "host" => None,
            name => {
                let found = CpuModel::named(name, |feature| host.has(feature));
                Some(
                    found
                        .map_err(|error| AccelError::Cpu { accelerator: NAME, reason: error.to_string() })?,
                )
            }
        };
        let mut leaves = match &model {
            None => host.clone(),
            Some(model) => named(model, &host),
        };
        let refused = |name: &str, reason| AccelError::CpuFeature {
            name: name.to_owned(),
            cpu: spec.name.clone(),
            reason,
        };
        for (name, on) in &spec.features {
            change(&mut leaves, &host, name, *on).map_err(|reason| refused(name, reason))?;
        }
        let asked: Vec<Feature> = Feature::all()
            .filter(|feature| {
                let named = |(name, _): &&(String, bool)| Feature::by_name(name).as_ref() == Ok(feature);
                spec.features.iter().rev().find(named).is_some_and(|(_, on)| *on)
            })
            .collect();
        let parts = settle(&mut leaves, &host, &asked).map_err(|(feature, needs)| {
            let [name, needs] = [feature, needs].map(|feature| feature.name().unwrap_or_default());
            refused(name, x86_cpuid::FeatureError::Needs(needs).to_string())
        })?;
        let offset = |part| host.find(0xd, part).map_or(0, |leaf| leaf.ebx as usize);
        let xsave = XsaveLayout::new(parts, offset);
        Ok(Self { leaves, model, vcpus, xsave, microcode: None })
    }

    /// What MSR 0x8b is to say, if it is known.
    pub(crate) fn microcode(&self) -> Option<u64> {
        self.model.as_ref().map(CpuModel::microcode).or(self.microcode)
    }

    pub(crate) fn xsave_layout(&self) -> &XsaveLayout {
        &self.xsave
    }

    /// The leaves of vCPU `id`, whose time-stamp counter has the rate `tsc_hertz`.
    pub(crate) fn cpuid(&self, id: u32, tsc_hertz: u64) -> Result<CpuId, AccelError> {
        let entries = self.leaves_of(id, tsc_hertz).0;
        CpuId::from_entries(&entries).map_err(|error| AccelError::Host {
            what: "a vCPU's CPUID",
            source: io::Error::other(format!("{} leaves: {error:?}", entries.len())),
        })
    }

    fn leaves_of(&self, id: u32, tsc_hertz: u64) -> Leaves {
        let mut leaves = self.leaves.clone();
        let amd = leaves.is_amd();
        if let Some(model) = &self.model {
            // The model's own words on topology. (Features are as the template has them.)
            let model = model.clone().with_vcpus(self.vcpus);
            for function in [0x8000_0008, 0x8000_001e] {
                if let Some(entry) = leaves.find_mut(function, 0) {
                    let [eax, ebx, ecx, _] = model.leaf(function, 0, id, tsc_hertz);
                    entry.ecx = ecx;
                    if function == 0x8000_001e {
                        (entry.eax, entry.ebx) = (eax, ebx);
                    }
                }
            }
        }
        for entry in &mut leaves.0 {
            place(entry, id, self.vcpus, amd);
        }
        let bits = id_bits(self.vcpus);
        let topology = [[0, 1, 1 << 8, id], [bits, self.vcpus, 2 << 8 | 1, id], [0, 0, 2, id]];
        for (index, words) in (0..).zip(topology) {
            leaves.put(0xb, Some(index), words);
        }
        if leaves.find(SIGNATURE, 0).is_some() {
            let kilohertz = |hertz: u64| u32::try_from(hertz / 1000).unwrap_or(u32::MAX);
            leaves.put(TIMING, None, [kilohertz(tsc_hertz), kilohertz(APIC_BUS_HERTZ), 0, 0]);
        }
        leaves
    }
}

/// Takes away from what the host can do what is not to be had here, and what is said anew.
fn restrict(host: &mut Leaves) {
    // Topology leaves are made anew; performance counters, AMX and nested virtualization have state that is
    // not saved.
    let gone = [0xa, 0xb, 0x1d, 0x1e, 0x1f, 0x8000_000a, 0x8000_0022, 0x8000_0026];
    host.0.retain(|entry| !gone.contains(&entry.function));
    for entry in &mut host.0 {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ecx &= !(1 << 5 | 1 << 15); // VMX, PDCM
                entry.ecx |= 1 << 31; // a hypervisor
            }
            (7, 0) => entry.edx &= !(1 << 22 | 1 << 24 | 1 << 25), // AMX
            (7, 1) => entry.eax &= !(1 << 21),                     // AMX-FP16
            (0xd, 1) => {
                entry.eax &= 0xf; // without XFD
                (entry.ecx, entry.edx) = (0, 0);
            }
            (SIGNATURE, _) => entry.eax = entry.eax.max(TIMING),
            (PV_FEATURES, _) => entry.eax &= all_pv(),
            (0x8000_0001, _) => entry.ecx &= !(1 << 2 | 1 << 23 | 1 << 24 | 1 << 28), // SVM, counters
            _ => {}
        }
    }
}

/// The leaves of a named model, with those of its features that the host has.
fn named(model: &CpuModel, host: &Leaves) -> Leaves {
    let mut leaves = Leaves::default();
    for &(function, subleaves) in CpuModel::LEAVES {
        if (SIGNATURE..=TIMING).contains(&function) || function == 0xb {
            continue;
        }
        for sub in 0..subleaves {
            let index = (subleaves > 1).then_some(sub);
            leaves.put(function, index, model.leaf(function, sub, 0, 0));
        }
    }
    // What of the words that hold features the host lacks.
    for (function, sub, register) in feature::words() {
        let mut can = host.find(function, sub).map_or(0, |entry| word(entry, register));
        if (function, register) == (0x8000_0001, 3) {
            // Intel's do not repeat leaf 1 here, as AMD's models do.
            can |= host.find(1, 0).map_or(0, |entry| entry.edx) & REPEATED;
        }
        if let Some(entry) = leaves.find_mut(function, sub) {
            *word_mut(entry, register) &= can;
        }
    }
    // Whoever made the host's processor made the guest's: what the two do otherwise is not in any feature.
    for function in [0, 0x8000_0000] {
        if let (Some(entry), Some(host)) = (leaves.find_mut(function, 0), host.find(function, 0)) {
            (entry.ebx, entry.ecx, entry.edx) = (host.ebx, host.ecx, host.edx);
        }
    }
    if host.is_amd() {
        let repeated = leaves.find(1, 0).map_or(0, |entry| entry.edx) & REPEATED;
        if let Some(entry) = leaves.find_mut(0x8000_0001, 0) {
            entry.edx |= repeated;
        }
    }
    // Physical addresses are the host's where those are shorter.
    if let (Some(entry), Some(host)) = (leaves.find_mut(0x8000_0008, 0), host.find(0x8000_0008, 0)) {
        entry.eax = entry.eax & !0xff | (entry.eax & 0xff).min(host.eax & 0xff);
    }
    for function in [SIGNATURE, PV_FEATURES] {
        leaves.0.extend(host.find(function, 0).copied());
    }
    leaves
}

/// Switches a feature on or off; says why not.
fn change(leaves: &mut Leaves, host: &Leaves, name: &str, on: bool) -> Result<(), String> {
    let pv = name.to_ascii_lowercase().replace(['-', '.'], "_");
    if pv == "kvm" {
        leaves.0.retain(|entry| !(SIGNATURE..=PV_FEATURES).contains(&entry.function));
        if on {
            leaves.0.extend([SIGNATURE, PV_FEATURES].iter().filter_map(|function| host.find(*function, 0)));
        }
        return Ok(());
    }
    if let Some((_, bits)) = PV_NAMES.iter().find(|(known, _)| *known == pv) {
        let can = host.find(PV_FEATURES, 0).map_or(0, |entry| entry.eax & bits);
        if on && can == 0 {
            return Err("the host's KVM does not offer it".into());
        }
        return match leaves.find_mut(PV_FEATURES, 0) {
            Some(entry) => {
                entry.eax = entry.eax & !bits | if on { can } else { 0 };
                Ok(())
            }
            None if on => Err("it comes after -kvm, which takes all of them away".into()),
            None => Ok(()),
        };
    }
    let feature = Feature::by_name(name).map_err(|error| error.to_string())?;
    if on && !host.has(feature) {
        return Err("the host's processor or KVM does not have it".into());
    }
    if !on && feature.is_needed() {
        return Err(x86_cpuid::FeatureError::Needed.to_string());
    }
    leaves.set(feature, on);
    Ok(())
}

/// Takes away what depends on features that are not there, and has the XSAVE leaves match. Gives the parts of
/// the XSAVE area that are left; or one of the features asked for, and what it lacks.
fn settle(leaves: &mut Leaves, host: &Leaves, asked: &[Feature]) -> Result<u64, (Feature, Feature)> {
    for dropped in x86_cpuid::unsupported(|feature| leaves.has(feature), asked)? {
        leaves.set(dropped, false);
    }
    let features = leaves.find(0xd, 1).map(|entry| entry.eax);
    leaves.0.retain(|entry| entry.function != 0xd);
    if !leaves.has(feature::XSAVE) {
        return Ok(3);
    }
    let can = host.find(0xd, 0).map_or(3, |entry| u64::from(entry.eax));
    let parts = PARTS.iter().filter(|(_, feature)| leaves.has(*feature)).fold(3, |all, (part, _)| all | part);
    let parts = parts & can;
    for entry in host.0.iter().filter(|entry| entry.function == 0xd) {
        let mut entry = *entry;
        match entry.index {
            0 => (entry.eax, entry.edx) = (parts as u32, 0),
            1 => entry.eax = features.unwrap_or_default(),
            part if part < 64 && parts >> part & 1 != 0 => {}
            _ => continue,
        }
        leaves.0.push(entry);
    }
    if let Some(entry) = leaves.find_mut(0, 0) {
        entry.eax = entry.eax.max(0xd);
    }
    Ok(parts)
}

/// Says in a leaf who the vCPU is, and who its neighbours are: one socket of as many cores as vCPUs.
fn place(entry: &mut kb::kvm_cpuid_entry2, id: u32, vcpus: u32, amd: bool) {
    let others = vcpus - 1;
    let bits = id_bits(vcpus);
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx = entry.ebx & 0xff00 | (id & 0xff) << 24 | vcpus.min(255) << 16;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// An AMD host with all features that have names.
    fn host() -> Leaves {
        let mut leaves = named(&CpuModel::by_name("max").unwrap(), &everything());
        for name in ["xsave", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "pku", "xsaves", "sse4a"] {
            leaves.set(Feature::by_name(name).unwrap(), true);
        }
        leaves.set(feature::LA57, false);
        leaves.put(0xd, Some(0), [0x2_02e7, 0, 0, 0]);
        leaves.put(0xd, Some(1), [0x1f, 0, 0, 0]);
        for (part, offset) in [(2, 576), (5, 832), (6, 896), (7, 1408), (9, 2432), (17, 2816)] {
            leaves.put(0xd, Some(part), [64, offset, 0, 0]);
        }
        leaves.put(SIGNATURE, None, [PV_FEATURES, 0x4b4d_564b, 0, 0]);
        leaves.put(PV_FEATURES, None, [u32::MAX, 0, 0, 0]);
        leaves
    }

    /// A host whose feature words are all ones.
    fn everything() -> Leaves {
        let mut leaves = Leaves::default();
        for function in [0, 1, 6, 7, 0x8000_0001, 0x8000_0007, 0x8000_0008, 0x8000_0021] {
            leaves.put(function, None, [u32::MAX; 4]);
        }
        for function in [0, 0x8000_0000] {
            leaves.put(function, None, CpuModel::by_name("max").unwrap().leaf(function, 0, 0, 0));
        }
        leaves
    }

    fn template(spec: &str, vcpus: u32) -> Result<CpuTemplate, AccelError> {
        CpuTemplate::of(host(), &spec.parse().unwrap(), vcpus)
    }

    #[test]
    fn max_is_the_host_without_what_cannot_be_saved() {
        let template = template("max", 1).unwrap();
        assert!(template.leaves.has(feature::AVX512BW) && template.leaves.has(feature::HYPERVISOR));
        assert_eq!(template.leaves.find(0xd, 0).unwrap().eax, 0x2e7);
        assert!(template.leaves.find(0xd, 17).is_none() && template.leaves.find(0xd, 9).is_some());
        assert_eq!(template.leaves.find(0xd, 1).unwrap().eax, 0xf);
        assert_eq!(template.xsave.parts, 0x2e7);
        assert_eq!(template.leaves.find(PV_FEATURES, 0).unwrap().eax, all_pv());
    }

    #[test]
    fn what_depends_on_a_feature_goes_with_it() {
        let leaves = template("max,-avx", 1).unwrap();
        for gone in [feature::AVX2, feature::FMA, feature::AVX512F, feature::AVX512BW] {
            assert!(!leaves.leaves.has(gone), "{gone:?}");
        }
        assert_eq!(leaves.xsave.parts, 0x203);
        let leaves = template("max,-xsave", 1).unwrap();
        assert_eq!(leaves.xsave.parts, 3);
        assert!(leaves.leaves.find(0xd, 0).is_none() && !leaves.leaves.has(feature::PKU));
    }

    #[test]
    fn named_models_have_their_features_as_far_as_the_host_does() {
        let v2 = template("x86-64-v2", 1).unwrap();
        assert!(
            v2.leaves.has(feature::SSE42) && !v2.leaves.has(feature::AVX) && !v2.leaves.has(feature::BMI1)
        );
        assert_eq!(v2.xsave.parts, 3);
        let mut poor = host();
        poor.set(feature::SSE42, false);
        let v2 = CpuTemplate::of(poor.clone(), &"x86-64-v2".parse().unwrap(), 1).unwrap();
        assert!(!v2.leaves.has(feature::SSE42) && v2.leaves.has(feature::SSE41));
        let error = CpuTemplate::of(poor, &"x86-64-v2,+sse4_2".parse().unwrap(), 1).err().unwrap();
        assert!(error.to_string().contains("sse4_2"), "{error}");
        let bare = template("x86-64-v2,+avx", 1).err().unwrap().to_string();
        assert!(bare.contains("it needs xsave"), "{bare}");
        let haswell = template("Haswell", 1).unwrap();
        assert!(haswell.leaves.has(feature::AVX2) && haswell.leaves.is_amd(), "as the host");
        assert_eq!(haswell.leaves.find(1, 0).unwrap().eax, 0x306c1);
        assert_eq!(haswell.leaves.find(0xd, 1).unwrap().eax, 1, "XSAVEOPT alone");
        let with_avx = template("x86-64-v2,+xsave,+avx", 1).unwrap();
        assert_eq!((with_avx.xsave.parts, with_avx.leaves.find(0xd, 0).unwrap().eax), (7, 7));
    }

    #[test]
    fn what_cannot_be_changed_says_why() {
        let reason = |spec: &str| template(spec, 1).err().unwrap().to_string();
        assert!(reason("EPYC-Rom").contains("did you mean EPYC-Rome?"), "{}", reason("EPYC-Rom"));
        assert!(reason("max,+mmx512").contains("no such feature"));
        assert!(reason("max,-sse2").contains("every 64-bit processor has it"));
        assert!(reason("max,+la57").contains("does not have it"));
        assert!(reason("max,-kvm,+kvmclock").contains("-kvm"));
    }

    #[test]
    fn kvm_s_own_features_go_by_their_names() {
        let pv = |spec: &str| {
            let template = template(spec, 1).unwrap();
            template.leaves.find(PV_FEATURES, 0).map(|entry| entry.eax)
        };
        assert_eq!(pv("max,-kvmclock"), Some(all_pv() & !0x0100_0009));
        assert_eq!(pv("max,-kvm-pv-eoi,+kvm_pv_eoi"), Some(all_pv()));
        assert_eq!(pv("qemu64,-kvm"), None);
        assert!(template("max,-kvm", 1).unwrap().leaves_of(0, 1_000_000).find(TIMING, 0).is_none());
    }

    #[test]
    fn each_vcpu_knows_its_place() {
        for spec in ["max", "x86-64-v2"] {
            let leaves = template(spec, 6).unwrap().leaves_of(5, 2_000_000_000);
            let one = leaves.find(1, 0).unwrap();
            assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff, one.edx >> 28 & 1), (5, 6, 1));
            let cores = leaves.find(0xb, 1).unwrap();
            assert_eq!((cores.eax, cores.ebx, cores.edx), (3, 6, 5));
            assert_eq!(leaves.find(0x8000_0008, 0).unwrap().ecx, 3 << 12 | 5);
            assert_eq!(leaves.find(TIMING, 0).unwrap().eax, 2_000_000);
            let places: Vec<_> = leaves.0.iter().map(|entry| (entry.function, entry.index)).collect();
            let mut unique = places.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), places.len(), "{spec}");
        }
    }
}
