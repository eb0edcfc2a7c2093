//! How a VM uses the host: what the host's kernel says of a running one.

use end_to_end::{Guest, boot, power_off};
use std::path::Path;

fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A field of a `status` or `smaps` text.
fn field<'a>(text: &'a str, name: &str) -> &'a str {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.unwrap_or_else(|| panic!("no {name} in {text}")).trim()
}

/// The name, the permitted processors, the policy and the real-time priority of each thread.
fn threads(guest: &Guest) -> Vec<(String, String, u32, u32)> {
    let mut found = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", guest.id())).unwrap() {
        let task = task.unwrap().path();
        let status = read(task.join("status"));
        let stat = read(task.join("stat"));
        // Field 3 follows the name; 40 and 41 are priority and policy (proc_pid_stat(5)).
        let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        let number = |field: usize| fields[field - 3].parse().unwrap();
        let (name, cpus) = (field(&status, "Name"), field(&status, "Cpus_allowed_list"));
        found.push((name.to_owned(), cpus.to_owned(), number(41), number(40)));
    }
    found
}

/// The part of `smaps` on the largest mapping: guest memory.
fn guest_memory(guest: &Guest) -> String {
    let text = read(format!("/proc/{}/smaps", guest.id()));
    let mut mappings: Vec<String> = Vec::new();
    for line in text.lines() {
        let field = line.split_whitespace().next().is_some_and(|word| word.ends_with(':'));
        match mappings.last_mut() {
            Some(mapping) if field => {
                mapping.push('\n');
                mapping.push_str(line);
            }
            _ => mappings.push(line.to_owned()),
        }
    }
    let size = |mapping: &String| {
        // Reservations without access are no memory.
        let access = mapping.split(' ').nth(1).is_some_and(|access| access.starts_with("rw"));
        if access { field(mapping, "Size").trim_end_matches(" kB").parse::<u64>().unwrap() } else { 0 }
    };
    mappings.into_iter().max_by_key(size).unwrap()
}

fn flags(mapping: &str) -> String {
    format!(" {} ", field(mapping, "VmFlags"))
}

/// The first and the last processor that this test may use.
fn two_cpus() -> Option<(String, String)> {
    let list = field(&read("/proc/self/status"), "Cpus_allowed_list").to_owned();
    let first = list.split([',', '-']).next()?.to_owned();
    let last = list.rsplit([',', '-']).next()?.to_owned();
    (first != last).then_some((first, last))
}

#[test]
fn threads_run_where_they_are_pinned() {
    let Some((first, last)) = two_cpus() else {
        eprintln!("LEFT OUT: pinning needs a host with two CPUs");
        return;
    };
    let pins = [format!("vcpus={last}"), format!("0={first}"), format!("io={last}")];
    let arguments = ["debian:13", "--smp", "2", "--pin", &pins[0], "--pin", &pins[1], "--pin", &pins[2]];
    let guest = boot(&arguments);
    let threads = threads(&guest);
    let mut names = Vec::new();
    for (name, cpus, policy, _) in &threads {
        let expected = if name == "vcpu-0" { &first } else { &last };
        assert_eq!((cpus, policy), (expected, &0), "{name} of {threads:?}");
        names.push(name.as_str());
    }
    // The guest's driver started this one, on a vCPU's thread.
    assert!(names.contains(&"vcpu-1") && names.contains(&"virtio-rng"), "{names:?}");
    power_off(guest);
}

#[test]
fn vcpus_have_their_priority_and_devices_do_not() {
    let program = ["debian:13", "--smp", "2", "--sched", "vcpus=rr:3", "--sched", "1=fifo:2"];
    let permitted = std::process::Command::new("chrt").args(["-f", "3", "true"]).status();
    if !permitted.is_ok_and(|status| status.success()) {
        eprintln!("LEFT OUT: real-time priorities need permission (root, or CAP_SYS_NICE), and chrt");
        return;
    }
    let guest = boot(&program);
    for (name, _, policy, priority) in threads(&guest) {
        // SCHED_FIFO is 1 and SCHED_RR is 2.
        let expected = match name.as_str() {
            "vcpu-0" => (2, 3),
            "vcpu-1" => (1, 2),
            _ => (0, 0),
        };
        assert_eq!((policy, priority), expected, "{name}");
    }
    power_off(guest);
}

#[test]
fn memory_is_treated_as_said() {
    let guest = boot(&["debian:13", "-m", "300M", "--memory-backing", "thp=on,ksm=on,dump=off"]);
    let mapping = guest_memory(&guest);
    assert_eq!(field(&mapping, "Size"), "307200 kB");
    for flag in [" hg ", " mg ", " dd "] {
        assert!(flags(&mapping).contains(flag), "{flag} in {mapping}");
    }
    power_off(guest);

    let guest = boot(&["debian:13", "-m", "300M", "--memory-backing", "prealloc=on,lock=on,thp=off"]);
    let mapping = guest_memory(&guest);
    assert!(flags(&mapping).contains(" lo ") && flags(&mapping).contains(" nh "), "{mapping}");
    assert_eq!(field(&mapping, "Locked"), "307200 kB");
    power_off(guest);
}

#[test]
fn memory_in_a_file_is_the_guests() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    let backing = format!("file={}", path.display());
    let mut guest = boot(&["debian:13", "-m", "256M", "--memory-backing", &backing]);
    let mapping = guest_memory(&guest);
    assert!(mapping.contains(path.to_str().unwrap()) && flags(&mapping).contains(" sh "), "{mapping}");
    // Put together in the guest, so that the typed line is not what is found.
    assert_eq!(guest.shell("words=$(echo seen from outside | tr a-z A-Z)"), 0);
    let memory = std::fs::read(&path).unwrap();
    assert_eq!(memory.len(), 256 << 20);
    let expected = b"SEEN FROM OUTSIDE";
    assert!(memory.windows(expected.len()).any(|window| window == expected));
    power_off(guest);
}

/// Has the host reserve huge pages while it lives.
struct Reserved(u64);

const RESERVE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl Reserved {
    fn new(pages: u64) -> Option<Self> {
        let before = std::fs::read_to_string(RESERVE).ok()?.trim().parse::<u64>().ok()?;
        std::fs::write(RESERVE, (before + pages).to_string()).ok()?;
        let reserved = Self(before);
        let free = read(RESERVE.replace("nr_", "free_")).trim().parse::<u64>().unwrap();
        (free >= pages).then_some(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(RESERVE, self.0.to_string());
    }
}

#[test]
fn memory_is_of_huge_pages() {
    let Some(_reserved) = Reserved::new(128) else {
        eprintln!("LEFT OUT: 128 huge pages of 2 MiB cannot be reserved in {RESERVE}");
        return;
    };
    for shared in ["off", "on"] {
        let backing = format!("hugepages=2M,shared={shared}");
        let guest = boot(&["debian:13", "-m", "256M", "--memory-backing", &backing]);
        let mapping = guest_memory(&guest);
        assert!(flags(&mapping).contains(" ht "), "{mapping}");
        assert_eq!(field(&mapping, "KernelPageSize"), "2048 kB");
        power_off(guest);
    }
}

#[test]
fn the_guest_sees_its_nodes() {
    let mut guest = boot(&[
        "debian:13:generic",
        "--smp",
        "4",
        "--numa",
        "node,cpus=0-1,memory=512M,host-nodes=0",
        "--numa",
        "node,cpus=2-3,memory=1G",
        "--numa",
        "dist,src=0,dst=1,val=31",
    ]);
    let nodes = "/sys/devices/system/node";
    assert_eq!(guest.shell(&format!("test \"$(cat {nodes}/online)\" = 0-1")), 0);
    assert_eq!(guest.shell(&format!("test \"$(cat {nodes}/node0/cpulist)\" = 0-1")), 0);
    assert_eq!(guest.shell(&format!("test \"$(cat {nodes}/node1/cpulist)\" = 2-3")), 0);
    assert_eq!(guest.shell(&format!("test \"$(cat {nodes}/node1/distance)\" = '31 10'")), 0);
    // Nodes that contradict the sockets in CPUID would have the kernel complain.
    assert_eq!(guest.shell("dmesg | grep -E 'WARNING|not on the same node|SRAT: .*(not used|invalid)'"), 1);
    let of_node = "awk '/MemTotal/ { print int($4 / 1000) }'";
    assert_eq!(guest.shell(&format!("test $({of_node} {nodes}/node1/meminfo) -gt 900")), 0);
    assert_eq!(guest.shell(&format!("test $({of_node} {nodes}/node0/meminfo) -lt 540")), 0);
    let maps = read(format!("/proc/{}/numa_maps", guest.id()));
    assert!(maps.contains(" bind:0 "), "{maps}");
    power_off(guest);
}

#[test]
fn cpu_time_is_told() {
    let output = end_to_end::run(&[
        "run",
        "debian:13",
        "--accel",
        "dbt",
        "--no-reboot",
        "--cpu-times",
        "--halt-poll",
        "100us",
        "--append",
        "panic=-1 rdinit=/nothing init=/nothing",
    ]);
    let errors = String::from_utf8_lossy(&output.stderr);
    let line = |name: &str| {
        let line = errors.lines().find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("no line {name}: {errors}")).split_whitespace().nth(1).unwrap()
    };
    assert_ne!(line("vcpu-0"), "0.00s");
    assert!(line("io").ends_with('s'));
}
