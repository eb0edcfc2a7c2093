//! What the host's KVM offers.

use crate::KvmUnavailable;
use kvm_bindings as kb;
use kvm_ioctls::Kvm;
use serde::Serialize;
use std::fs::{self, File};
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::path::{Path, PathBuf};

/// KVM's device file.
pub const DEVICE: &str = "/dev/kvm";

/// The only API version there ever was since Linux 2.6.22 (`KVM_API_VERSION`).
const API_VERSION: i32 = 12;

/// What [`crate::KvmAccelerator`] cannot do without.
const NEEDED: &[(&str, u32)] = &[
    ("USER_MEMORY", kb::KVM_CAP_USER_MEMORY),
    ("SET_TSS_ADDR", kb::KVM_CAP_SET_TSS_ADDR),
    ("EXT_CPUID", kb::KVM_CAP_EXT_CPUID),
    ("MP_STATE", kb::KVM_CAP_MP_STATE),
    ("IRQ_ROUTING", kb::KVM_CAP_IRQ_ROUTING),
    ("IRQFD", kb::KVM_CAP_IRQFD),
    ("IOEVENTFD", kb::KVM_CAP_IOEVENTFD),
    ("ADJUST_CLOCK", kb::KVM_CAP_ADJUST_CLOCK),
    ("VCPU_EVENTS", kb::KVM_CAP_VCPU_EVENTS),
    ("DEBUGREGS", kb::KVM_CAP_DEBUGREGS),
    ("XSAVE", kb::KVM_CAP_XSAVE),
    ("GET_TSC_KHZ", kb::KVM_CAP_GET_TSC_KHZ),
    ("SIGNAL_MSI", kb::KVM_CAP_SIGNAL_MSI),
    ("SPLIT_IRQCHIP", kb::KVM_CAP_SPLIT_IRQCHIP),
    ("X2APIC_API", kb::KVM_CAP_X2APIC_API),
    ("IMMEDIATE_EXIT", kb::KVM_CAP_IMMEDIATE_EXIT),
];

/// What is used where it is there.
const USED: &[(&str, u32)] = &[
    ("XCRS", kb::KVM_CAP_XCRS),
    ("READONLY_MEM", kb::KVM_CAP_READONLY_MEM),
    ("TSC_DEADLINE_TIMER", kb::KVM_CAP_TSC_DEADLINE_TIMER),
    ("TSC_CONTROL", kb::KVM_CAP_TSC_CONTROL),
    ("COALESCED_MMIO", kb::KVM_CAP_COALESCED_MMIO),
    ("MANUAL_DIRTY_LOG_PROTECT2", kb::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
    ("DIRTY_LOG_RING", kb::KVM_CAP_DIRTY_LOG_RING),
    ("DIRTY_LOG_RING_ACQ_REL", kb::KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
    ("X86_USER_SPACE_MSR", kb::KVM_CAP_X86_USER_SPACE_MSR),
    ("X86_MSR_FILTER", kb::KVM_CAP_X86_MSR_FILTER),
    ("SREGS2", kb::KVM_CAP_SREGS2),
    ("SET_GUEST_DEBUG", kb::KVM_CAP_SET_GUEST_DEBUG),
    ("ASYNC_PF", kb::KVM_CAP_ASYNC_PF),
    ("ASYNC_PF_INT", kb::KVM_CAP_ASYNC_PF_INT),
];

/// What executes guests' privileged code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// Intel's VT-x.
    VtX,
    /// AMD-V, also called SVM.
    AmdV,
    /// Nothing in the processor.
    Software {
        /// The kernel module that stands in.
        module: String,
    },
}

/// A capability of the host's KVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Capability {
    /// Its name in the kernel's documentation, without `KVM_CAP_`.
    pub name: &'static str,
    /// What the kernel says of it: 0 is no, 1 yes, and some say more.
    pub value: i32,
    /// Whether there is no VM without it.
    pub needed: bool,
}

/// What the host's KVM offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostReport {
    /// The device file that was asked.
    pub device: PathBuf,
    /// Why there is nothing to be had, if that is so. What follows is then empty as far as it was not
    /// found out.
    pub problem: Option<KvmUnavailable>,
    /// What executes guests' privileged code.
    pub engine: Engine,
    /// Whether guests may have virtualization extensions of their own, where the kernel says.
    pub nested: Option<bool>,
    /// The API's version.
    pub api_version: Option<i32>,
    /// The capabilities that matter here.
    pub capabilities: Vec<Capability>,
    /// The most vCPUs of a VM.
    pub max_vcpus: u32,
    /// The number of vCPUs that the kernel's developers recommend not to exceed.
    pub recommended_vcpus: u32,
    /// The highest vCPU number plus one.
    pub max_vcpu_ids: u32,
    /// The most memory slots of a VM.
    pub memory_slots: u32,
}

impl HostReport {
    /// Asks the host.
    pub fn probe() -> Self {
        Self::probe_at(Path::new(DEVICE), Path::new("/"))
    }

    /// The same with another device file and other roots of `/proc` and `/sys`.
    fn probe_at(device: &Path, root: &Path) -> Self {
        let engine = Engine::find(root);
        let mut report = Self {
            device: device.to_owned(),
            problem: None,
            nested: engine.nested(root),
            engine,
            api_version: None,
            capabilities: Vec::new(),
            max_vcpus: 0,
            recommended_vcpus: 0,
            max_vcpu_ids: 0,
            memory_slots: 0,
        };
        report.problem = report.ask().err();
        report
    }

    fn ask(&mut self) -> Result<(), KvmUnavailable> {
        let kvm = open(&self.device)?;
        self.api_version = Some(kvm.get_api_version());
        let list = |list: &[(&'static str, u32)], needed| {
            let ask = |(name, number): &(&'static str, u32)| Capability {
                name,
                value: kvm.check_extension_raw((*number).into()).max(0),
                needed,
            };
            list.iter().map(ask).collect::<Vec<_>>()
        };
        self.capabilities = list(NEEDED, true);
        self.capabilities.extend(list(USED, false));
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        self.max_vcpus = count(kvm.get_max_vcpus());
        self.recommended_vcpus = count(kvm.get_nr_vcpus());
        self.max_vcpu_ids = count(kvm.get_max_vcpu_id());
        self.memory_slots = count(kvm.get_nr_memslots());
        check(&kvm)
    }

    /// Whether VMs can be made at all.
    ///
    /// # Errors
    /// [`KvmUnavailable`] says why not.
    pub fn usable(&self) -> Result<(), KvmUnavailable> {
        self.problem.clone().map_or(Ok(()), Err)
    }

    /// Whether an operating system's kernel as distributed can be expected to run: VMs can be made, and the
    /// processor executes privileged code. A software KVM runs small guests only.
    ///
    /// # Errors
    /// [`KvmUnavailable`] says why not.
    pub fn runs_stock_kernels(&self) -> Result<(), KvmUnavailable> {
        self.usable()?;
        match &self.engine {
            Engine::Software { module } => Err(KvmUnavailable::Software { module: module.clone() }),
            Engine::VtX | Engine::AmdV => Ok(()),
        }
    }
}

/// Opens the device and checks that it is KVM's.
pub(crate) fn open(device: &Path) -> Result<Kvm, KvmUnavailable> {
    let path = || device.to_owned();
    let file = File::options().read(true).write(true).open(device).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => KvmUnavailable::NoDevice { path: path() },
        io::ErrorKind::PermissionDenied => KvmUnavailable::NoPermission { path: path() },
        // The device file is there, and no module behind it.
        _ if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
            KvmUnavailable::NoDevice { path: path() }
        }
        _ => KvmUnavailable::Open { path: path(), reason: error.to_string() },
    })?;
    // SAFETY: the descriptor is a file that was just opened, and is owned by nobody else from here on.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    if kvm.get_api_version() < 0 {
        return Err(KvmUnavailable::NotKvm { path: path() });
    }
    Ok(kvm)
}

/// Whether this KVM has all that is needed.
pub(crate) fn check(kvm: &Kvm) -> Result<(), KvmUnavailable> {
    let found = kvm.get_api_version();
    if found != API_VERSION {
        return Err(KvmUnavailable::ApiVersion { found, expected: API_VERSION });
    }
    match NEEDED.iter().find(|(_, number)| kvm.check_extension_raw((*number).into()) <= 0) {
        Some((name, _)) => Err(KvmUnavailable::MissingCapability { name }),
        None => Ok(()),
    }
}

/// Whether a module serves the device that does without the processor's extensions.
pub(crate) fn is_software(root: &Path) -> bool {
    let loaded = |name: &str| root.join("sys/module").join(name).is_dir();
    loaded("kvm_pvm") && !loaded("kvm_intel") && !loaded("kvm_amd")
}

impl Engine {
    /// By the processor's flags, and by the kernel's modules.
    fn find(root: &Path) -> Self {
        let text = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
        let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let has = |wanted: &str| flags.split_whitespace().any(|flag| flag == wanted);
        // What the processor has is of no use if another module serves the device.
        let other = is_software(root);
        match () {
            () if has("vmx") && !other => Self::VtX,
            () if has("svm") && !other => Self::AmdV,
            () if other => Self::Software { module: "kvm_pvm".into() },
            () => Self::Software { module: "of an unknown kind".into() },
        }
    }

    fn nested(&self, root: &Path) -> Option<bool> {
        let module = match self {
            Self::VtX => "kvm_intel",
            Self::AmdV => "kvm_amd",
            Self::Software { .. } => return None,
        };
        let text = fs::read_to_string(root.join("sys/module").join(module).join("parameters/nested")).ok()?;
        Some(matches!(text.trim(), "1" | "Y" | "y"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(flags: &str, modules: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc")).unwrap();
        fs::write(root.path().join("proc/cpuinfo"), format!("processor\t: 0\nflags\t\t: fpu {flags}\n"))
            .unwrap();
        for module in modules {
            let parameters = root.path().join("sys/module").join(module).join("parameters");
            fs::create_dir_all(&parameters).unwrap();
            fs::write(parameters.join("nested"), "Y\n").unwrap();
        }
        root
    }

    #[test]
    fn the_engine_is_found_by_flags_and_modules() {
        let find = |flags, modules: &[&str]| Engine::find(root(flags, modules).path());
        assert_eq!(find("vmx", &["kvm", "kvm_intel"]), Engine::VtX);
        assert_eq!(find("svm", &["kvm", "kvm_amd"]), Engine::AmdV);
        // Built in without parameters, there is no folder.
        assert_eq!(find("svm", &[]), Engine::AmdV);
        assert_eq!(find("svm", &["kvm_pvm"]), Engine::Software { module: "kvm_pvm".into() });
        assert_eq!(find("svmx", &["kvm_pvm"]), Engine::Software { module: "kvm_pvm".into() });
        assert!(matches!(find("", &["kvm"]), Engine::Software { .. }));
        assert_eq!(Engine::AmdV.nested(root("svm", &["kvm_amd"]).path()), Some(true));
        assert_eq!(Engine::VtX.nested(root("vmx", &[]).path()), None);
    }

    #[test]
    fn an_absent_or_foreign_device_is_told_apart() {
        let root = root("svm", &["kvm_amd"]);
        let absent = root.path().join("dev-kvm");
        let report = HostReport::probe_at(&absent, root.path());
        assert_eq!(report.usable(), Err(KvmUnavailable::NoDevice { path: absent.clone() }));
        assert_eq!(report.runs_stock_kernels(), report.usable());
        fs::write(&absent, "").unwrap();
        let report = HostReport::probe_at(&absent, root.path());
        assert_eq!(report.usable(), Err(KvmUnavailable::NotKvm { path: absent }));
        let folder = root.path().join("proc");
        let report = HostReport::probe_at(&folder, root.path());
        assert!(matches!(report.usable(), Err(KvmUnavailable::Open { .. })), "{report:?}");
    }

    #[test]
    fn a_usable_kvm_in_software_runs_no_stock_kernel() {
        let mut report = HostReport::probe_at(Path::new("/nonexistent"), Path::new("/nonexistent"));
        report.problem = None;
        report.engine = Engine::Software { module: "kvm_pvm".into() };
        assert_eq!(report.usable(), Ok(()));
        let error = report.runs_stock_kernels().unwrap_err();
        assert_eq!(error, KvmUnavailable::Software { module: "kvm_pvm".into() });
        assert!(error.to_string().contains("stock kernel"));
        report.engine = Engine::AmdV;
        assert_eq!(report.runs_stock_kernels(), Ok(()));
    }
}
