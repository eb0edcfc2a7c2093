//! What the host has beside KVM: found in `/proc`, `/sys` and `/dev`, changing nothing.

use super::check::{Area, Check};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// A host, whose root folder may be another one for tests.
pub(crate) struct Host {
    root: PathBuf,
}

impl Host {
    pub(crate) fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The text of a file of the kernel's, without white space around it.
    fn text(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.path(path)).ok().map(|text| text.trim().to_owned())
    }

    fn names(&self, path: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.path(path))
            .map(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()))
            .map(Iterator::collect)
            .unwrap_or_default();
        names.sort();
        names
    }

    /// A value of `/proc/meminfo` or another list of `name: value`.
    fn field(&self, path: &str, name: &str) -> Option<String> {
        let text = self.text(path)?;
        text.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim().to_owned())
        })
    }

    /// Everything, area by area.
    pub(crate) fn check(&self, checks: &mut Vec<Check>) {
        let mut area = Area { name: "processor", checks };
        self.processor(&mut area);
        area.name = "memory";
        self.memory(&mut area);
        self.numa(&mut area);
        area.name = "storage";
        self.storage(&mut area);
        area.name = "network";
        self.network(&mut area);
        area.name = "passthrough";
        self.passthrough(&mut area);
        area.name = "isolation";
        self.isolation(&mut area);
    }

    fn processor(&self, area: &mut Area<'_>) {
        let model = self.field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned());
        let count = self.text("/proc/cpuinfo").map_or(0, |text| {
            text.lines()
                .filter(|line| line.split(':').next().is_some_and(|key| key.trim() == "processor"))
                .count()
        });
        area.note("processors", format!("{count}, {model}"));
        let flags = self.field("/proc/cpuinfo", "flags").unwrap_or_default();
        let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
        if has("constant_tsc") && has("nonstop_tsc") {
            area.pass("time-stamp counter", "constant and never stopping");
        } else {
            area.warn(
                "time-stamp counter",
                "not told to be constant and never stopping",
                "guests' clocks may be slow to read; keep the processor's deep idle states off",
            );
        }
        let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        match self.text(source) {
            Some(source) if source == "tsc" => area.pass("clock source", source),
            Some(source) => area.warn(
                "clock source",
                source,
                "reading the time is slow; see the kernel's log for why the time-stamp counter is not used",
            ),
            None => area.note("clock source", "not told"),
        }
    }

    fn memory(&self, area: &mut Area<'_>) {
        let gib = |name| {
            let text = self.field("/proc/meminfo", name)?;
            let kib: f64 = text.split_whitespace().next()?.parse().ok()?;
            Some(format!("{:.1} GiB", kib / f64::from(1 << 20)))
        };
        let unknown = || "unknown".to_owned();
        let total = gib("MemTotal").unwrap_or_else(unknown);
        let available = gib("MemAvailable").unwrap_or_else(unknown);
        area.note("memory", format!("{total}, {available} available"));
        let pools = "/sys/kernel/mm/hugepages";
        let pools: Vec<String> = self
            .names(pools)
            .iter()
            .filter_map(|name| {
                let count = |file: &str| self.text(&format!("{pools}/{name}/{file}"))?.parse::<u64>().ok();
                let size = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()? >> 10;
                Some((count("nr_hugepages")?, count("free_hugepages")?, size))
            })
            .filter(|(count, ..)| *count > 0)
            .map(|(count, free, size)| format!("{count} of {size} MiB, {free} free"))
            .collect();
        if pools.is_empty() {
            area.note("huge pages", "none reserved (vm.nr_hugepages reserves some)");
        } else {
            area.pass("huge pages", pools.join("; "));
        }
        match self.text("/sys/kernel/mm/transparent_hugepage/enabled").as_deref().and_then(bracketed) {
            Some("never") => area.warn(
                "transparent huge pages",
                "never",
                "guests run slower; echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
            ),
            Some(mode) => area.pass("transparent huge pages", mode),
            None => area.note("transparent huge pages", "the kernel has none"),
        }
        match self.text("/sys/kernel/mm/ksm/run").as_deref() {
            Some("1") => area.pass("merging of equal pages (KSM)", "runs"),
            Some(_) => area.note("merging of equal pages (KSM)", "there, not running"),
            None => area.note("merging of equal pages (KSM)", "the kernel has none"),
        }
        if self.path("/dev/userfaultfd").exists()
            || self.text("/proc/sys/vm/unprivileged_userfaultfd").is_some()
        {
            area.pass("userfaultfd", "there");
        } else {
            area.warn("userfaultfd", "not there", "needs a kernel with CONFIG_USERFAULTFD");
        }
        match self.text("/proc/sys/vm/memfd_noexec").as_deref() {
            Some("2") => area.fail(
                "executable memory",
                "vm.memfd_noexec is 2",
                "the translator cannot work; sysctl vm.memfd_noexec=1",
            ),
            _ => area.pass("executable memory", "the translator may have it"),
        }
    }

    fn numa(&self, area: &mut Area<'_>) {
        let nodes: Vec<String> = self
            .names("/sys/devices/system/node")
            .into_iter()
            .filter(|name| name.strip_prefix("node").is_some_and(|number| number.parse::<u32>().is_ok()))
            .collect();
        if nodes.len() < 2 {
            area.note("NUMA nodes", "1");
            return;
        }
        let cpus = |node: &String| {
            let list = self.text(&format!("/sys/devices/system/node/{node}/cpulist")).unwrap_or_default();
            format!("{node}: CPUs {list}")
        };
        let all: Vec<_> = nodes.iter().map(cpus).collect();
        area.note("NUMA nodes", format!("{} ({})", nodes.len(), all.join("; ")));
    }

    fn storage(&self, area: &mut Area<'_>) {
        // The setting came with Linux 6.6; before, io_uring is there since 5.1.
        match self.text("/proc/sys/kernel/io_uring_disabled").as_deref() {
            Some("0") => area.pass("io_uring", "for all users"),
            Some("1") => {
                area.warn("io_uring", "for privileged users only", "sysctl kernel.io_uring_disabled=0")
            }
            Some(_) => area.warn("io_uring", "switched off", "sysctl kernel.io_uring_disabled=0"),
            None => match self.kernel() {
                Some(version) if version >= (5, 1) => area.pass("io_uring", "for all users"),
                Some(_) => area.warn("io_uring", "the kernel has none", "needs Linux 5.1 or newer"),
                None => area.note("io_uring", "not told"),
            },
        }
    }

    /// The kernel's version.
    fn kernel(&self) -> Option<(u32, u32)> {
        let text = self.text("/proc/sys/kernel/osrelease")?;
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    fn network(&self, area: &mut Area<'_>) {
        let load =
            |module: &str| format!("load the module {module}, and let your user or group open the device");
        self.device(area, "TAP devices", "/dev/net/tun", &load("tun"));
        self.device(area, "vhost-net", "/dev/vhost-net", &load("vhost_net"));
        self.device(area, "vhost-vsock", "/dev/vhost-vsock", &load("vhost_vsock"));
    }

    /// A device file that must be there and may be opened.
    fn device(&self, area: &mut Area<'_>, name: &'static str, path: &str, advice: &str) {
        match File::options().read(true).write(true).open(self.path(path)) {
            Ok(_) => area.pass(name, path),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                area.warn(name, format!("there is no {path}"), advice);
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                area.warn(name, format!("no permission for {path}"), advice);
            }
            Err(error) => area.warn(name, format!("{path}: {error}"), advice),
        }
    }

    fn passthrough(&self, area: &mut Area<'_>) {
        let groups = self.names("/sys/kernel/iommu_groups").len();
        if groups > 0 {
            area.pass("IOMMU", format!("{groups} groups"));
        } else if self.names("/sys/class/iommu").is_empty() {
            area.warn(
                "IOMMU",
                "none at work",
                "devices cannot be passed through; switch VT-d or AMD-Vi on in the firmware (and intel_iommu=on)",
            );
        } else {
            area.warn("IOMMU", "there, but no device is in a group", "boot the kernel with iommu=pt");
        }
        self.device(area, "VFIO", "/dev/vfio/vfio", "load the module vfio_pci to pass devices through");
    }

    fn isolation(&self, area: &mut Area<'_>) {
        match self.text("/proc/sys/kernel/seccomp/actions_avail") {
            Some(actions) if actions.split_whitespace().any(|action| action == "kill_process") => {
                area.pass("seccomp filters", "there");
            }
            _ => area.warn("seccomp filters", "not there", "needs a kernel with CONFIG_SECCOMP_FILTER"),
        }
        match self.text("/sys/kernel/security/lsm") {
            Some(modules) if modules.split(',').any(|module| module == "landlock") => {
                area.pass("Landlock", "there");
            }
            Some(_) => area.warn("Landlock", "not switched on", "add landlock to the kernel's lsm= option"),
            None => area.note("Landlock", "unknown: /sys/kernel/security is not mounted or not readable"),
        }
        match self.text("/sys/fs/cgroup/cgroup.controllers") {
            Some(controllers) => {
                let missing: Vec<_> = ["cpu", "cpuset", "io", "memory", "pids"]
                    .into_iter()
                    .filter(|name| !controllers.split_whitespace().any(|word| word == *name))
                    .collect();
                if missing.is_empty() {
                    area.pass("cgroups", "version 2 with all controllers");
                } else {
                    let found = format!("version 2 without {}", missing.join(", "));
                    area.warn("cgroups", found, "boot the kernel with cgroup_no_v1=all");
                }
            }
            None if self.names("/sys/fs/cgroup").is_empty() => {
                area.warn("cgroups", "not mounted", "mount -t cgroup2 none /sys/fs/cgroup");
            }
            None => area.warn(
                "cgroups",
                "version 1",
                "limits are not available; boot with systemd.unified_cgroup_hierarchy=1",
            ),
        }
        match self.text("/proc/sys/user/max_user_namespaces").and_then(|text| text.parse::<u64>().ok()) {
            Some(1..) => area.pass("user namespaces", "there"),
            _ => area.warn("user namespaces", "not there", "sysctl user.max_user_namespaces=10000"),
        }
        if Path::new(&self.path("/sys/module/kvm_amd/parameters/sev")).exists() {
            let on = self.text("/sys/module/kvm_amd/parameters/sev");
            let on = matches!(on.as_deref(), Some("Y" | "1"));
            area.note("encrypted guests (SEV)", if on { "there" } else { "not there, or switched off" });
        }
    }
}

/// The word in brackets, by which the kernel marks what is chosen.
fn bracketed(text: &str) -> Option<&str> {
    Some(text.split_once('[')?.1.split_once(']')?.0)
}

#[cfg(test)]
mod tests {
    use super::super::check::Status;
    use super::*;

    fn checks(files: &[(&str, &str)]) -> Vec<Check> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let mut checks = Vec::new();
        Host::new(root.path()).check(&mut checks);
        checks
    }

    fn find<'a>(checks: &'a [Check], name: &str) -> &'a Check {
        checks.iter().find(|check| check.name == name).unwrap_or_else(|| panic!("no {name}"))
    }

    #[test]
    fn a_host_with_nothing_is_told_what_to_do() {
        let checks = checks(&[]);
        for check in &checks {
            let bad = matches!(check.status, Status::Warn | Status::Fail);
            assert_eq!(bad, check.advice.is_some(), "{check:?}");
        }
        assert_eq!(find(&checks, "TAP devices").found, "there is no /dev/net/tun");
        assert_eq!(find(&checks, "IOMMU").status, Status::Warn);
    }

    #[test]
    fn a_good_host_passes() {
        let hugepages = "sys/kernel/mm/hugepages/hugepages-2048kB";
        let checks = checks(&[
            (
                "proc/cpuinfo",
                "processor\t: 0\nmodel name\t: A: B\nflags\t\t: constant_tsc nonstop_tsc\nprocessor\t: 1\n",
            ),
            ("sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n"),
            ("proc/meminfo", "MemTotal:       33554432 kB\nMemAvailable:   1048576 kB\n"),
            (&format!("{hugepages}/nr_hugepages"), "8\n"),
            (&format!("{hugepages}/free_hugepages"), "3\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
            ("sys/devices/system/node/node0/cpulist", "0\n"),
            ("sys/devices/system/node/node1/cpulist", "1\n"),
            ("sys/devices/system/node/has_cpu", "0-1\n"),
            ("proc/sys/kernel/osrelease", "6.1.0-50-amd64\n"),
            ("dev/net/tun", ""),
            ("sys/kernel/iommu_groups/0/type", "DMA"),
            ("sys/kernel/security/lsm", "lockdown,landlock,bpf"),
            ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory hugetlb pids\n"),
        ]);
        let found = |name| (find(&checks, name).status, find(&checks, name).found.as_str());
        assert_eq!(found("processors"), (Status::Note, "2, A: B"));
        assert_eq!(found("memory"), (Status::Note, "32.0 GiB, 1.0 GiB available"));
        assert_eq!(found("huge pages"), (Status::Pass, "8 of 2 MiB, 3 free"));
        assert_eq!(found("transparent huge pages"), (Status::Pass, "madvise"));
        assert_eq!(found("NUMA nodes"), (Status::Note, "2 (node0: CPUs 0; node1: CPUs 1)"));
        for name in
            ["time-stamp counter", "clock source", "io_uring", "TAP devices", "IOMMU", "Landlock", "cgroups"]
        {
            assert_eq!(find(&checks, name).status, Status::Pass, "{name}");
        }
    }

    #[test]
    fn settings_that_hinder_are_named() {
        let checks = checks(&[
            ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n"),
            ("proc/sys/kernel/io_uring_disabled", "2\n"),
            ("proc/sys/vm/memfd_noexec", "2\n"),
            ("sys/kernel/security/lsm", "capability"),
            ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu pids\n"),
        ]);
        assert_eq!(find(&checks, "transparent huge pages").status, Status::Warn);
        assert_eq!(find(&checks, "io_uring").status, Status::Warn);
        assert_eq!(find(&checks, "executable memory").status, Status::Fail);
        assert_eq!(find(&checks, "cgroups").found, "version 2 without io, memory");
    }
}
