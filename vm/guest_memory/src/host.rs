//! What the host has to offer: its memory, its huge pages, its NUMA nodes.

use crate::MemoryError;
use std::path::Path;

/// Where the host tells of its huge pages.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages";
/// Where it tells of its NUMA nodes.
const NODES_ONLINE: &str = "/sys/devices/system/node/online";

/// Refuses memory that the host can never hold, unless its administrator permits that.
pub(crate) fn check_total(bytes: u64) -> Result<(), MemoryError> {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit);
    let [ram, swap] = [info.totalram, info.totalswap].map(|amount| unit.saturating_mul(amount));
    let always = || {
        std::fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|setting| setting.trim() == "1")
    };
    if bytes > ram.saturating_add(swap) && !always() {
        return Err(MemoryError::HostTooSmall { bytes, ram, swap });
    }
    Ok(())
}

/// Refuses to allocate at once what the host has not available. `locked` memory cannot go to swap.
pub(crate) fn check_available(bytes: u64, locked: bool) -> Result<(), MemoryError> {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else { return Ok(()) };
    let Some(free) = meminfo(&text, "MemAvailable") else { return Ok(()) };
    let swap = if locked { 0 } else { meminfo(&text, "SwapFree").unwrap_or(0) };
    let available = free.saturating_add(swap);
    if bytes > available {
        return Err(MemoryError::NotAvailable { bytes, available });
    }
    Ok(())
}

/// A value of `/proc/meminfo` in bytes.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The sizes of huge pages that the host has, in bytes, ascending.
pub fn huge_page_sizes() -> Vec<u64> {
    let Ok(folder) = std::fs::read_dir(HUGE_PAGES) else { return Vec::new() };
    let mut sizes: Vec<_> = folder
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            let kib = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?;
            kib.parse::<u64>().ok()?.checked_mul(1024)
        })
        .collect();
    sizes.sort_unstable();
    sizes
}

/// Refuses a size of huge pages that the host does not have.
pub(crate) fn check_huge_page_size(size: u64) -> Result<(), MemoryError> {
    let sizes = huge_page_sizes();
    if sizes.contains(&size) {
        return Ok(());
    }
    let names: Vec<_> = sizes.iter().map(|size| crate::error::Size(*size).to_string()).collect();
    let offered = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Err(MemoryError::NoHugePageSize { size, offered })
}

/// What there is of huge pages, for the error that `bytes` of them could not be had.
pub(crate) fn too_few_huge_pages(size: u64, bytes: u64) -> MemoryError {
    let folder = Path::new(HUGE_PAGES).join(format!("hugepages-{}kB", size >> 10));
    let read = |name: &str| {
        let text = std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0)
    };
    let free = read("free_hugepages").saturating_sub(read("resv_hugepages"));
    MemoryError::TooFewHugePages { size, needed: bytes.div_ceil(size), free, total: read("nr_hugepages") }
}

/// Refuses NUMA nodes that the host does not have.
pub(crate) fn check_nodes(nodes: &[u32]) -> Result<(), MemoryError> {
    // A kernel without NUMA has node 0 and does not say so.
    let online = std::fs::read_to_string(NODES_ONLINE).unwrap_or_else(|_| "0".into());
    let online = online.trim();
    match nodes.iter().find(|node| !in_list(online, **node)) {
        Some(node) => Err(MemoryError::NoHostNode { node: *node, online: online.to_owned() }),
        None => Ok(()),
    }
}

/// Whether a list of the kernel's, such as `0-3,8`, has `number`.
fn in_list(list: &str, number: u32) -> bool {
    list.split(',').any(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let bounds = first.trim().parse::<u32>().ok().zip(last.trim().parse::<u32>().ok());
        bounds.is_some_and(|(first, last)| (first..=last).contains(&number))
    })
}

/// Warns of settings of the host under which advice that it took has no effect.
pub(crate) fn warn_of_void_advice(transparent_huge: bool, shared: bool, merge: bool) {
    let setting = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    if transparent_huge {
        let path = if shared {
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
        } else {
            "/sys/kernel/mm/transparent_hugepage/enabled"
        };
        let text = setting(path);
        if text.contains("[never]") || text.contains("[deny]") {
            let word = if shared { "advise" } else { "madvise" };
            tracing::warn!(
                "thp=on has no effect while {path} is {}: echo {word} > {path}",
                text.trim().split(['[', ']']).nth(1).unwrap_or("never")
            );
        }
    }
    let path = "/sys/kernel/mm/ksm/run";
    if merge && setting(path).trim() != "1" {
        tracing::warn!("ksm=on has no effect while KSM does not run: echo 1 > {path}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_the_kernel() {
        assert!(in_list("0-3,8", 2) && in_list("0-3,8\n", 8) && in_list("0", 0));
        assert!(!in_list("0-3,8", 4) && !in_list("", 0) && !in_list("x-y", 1));
    }

    #[test]
    fn what_the_host_has_is_read() {
        let text = "MemTotal:  24 kB\nMemAvailable:    16 kB\nSwapFree: none\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(16384));
        assert_eq!(meminfo(text, "SwapFree"), None);
        assert_eq!(meminfo(text, "Mem"), None);
        assert!(matches!(check_total(1 << 60), Err(MemoryError::HostTooSmall { .. })) || overcommits());
        assert!(check_total(4096).is_ok() && check_available(4096, true).is_ok());
        assert!(matches!(check_available(1 << 60, false), Err(MemoryError::NotAvailable { .. })));
        assert!(matches!(check_nodes(&[0, 1000]), Err(MemoryError::NoHostNode { node: 1000, .. })));
        assert!(matches!(check_huge_page_size(12345), Err(MemoryError::NoHugePageSize { .. })));
    }

    fn overcommits() -> bool {
        std::fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap().trim() == "1"
    }
}
