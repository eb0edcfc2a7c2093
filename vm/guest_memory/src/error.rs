//! Why guest memory could not be made or accessed.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

/// Why guest memory could not be made or accessed. Every message names the thing and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region is empty, unaligned, overlapping, or past the address space.
    #[error("guest memory region {:#x}..{:#x} is empty, not page-aligned or overlaps another", .0.start, .0.end)]
    BadRegion(Range<u64>),
    /// No region begins at an address.
    #[error("no region of guest memory begins at {gpa:#x}")]
    NoRegion {
        /// The address.
        gpa: u64,
    },
    /// The host cannot give the memory.
    #[error("the host cannot provide {} of guest memory: {source}", Size(*.bytes))]
    NoMemory {
        /// The size asked for.
        bytes: u64,
        /// The host's error.
        source: io::Error,
    },
    /// More memory than the host can ever hold.
    #[error(
        "{} of guest memory are more than this host's {} of RAM and {} of swap; give the guest less, or \
         permit it with vm.overcommit_memory=1",
        Size(*.bytes), Size(*.ram), Size(*.swap)
    )]
    HostTooSmall {
        /// The size asked for.
        bytes: u64,
        /// The host's RAM in bytes.
        ram: u64,
        /// Its swap space in bytes.
        swap: u64,
    },
    /// Memory is to be there at once, and the host has not that much to spare.
    #[error(
        "{} of guest memory are to be allocated at once (prealloc or lock), and this host has {} available; \
         give the guest less or leave that option out",
        Size(*.bytes), Size(*.available)
    )]
    NotAvailable {
        /// The size asked for.
        bytes: u64,
        /// What could be given without harm.
        available: u64,
    },
    /// The host has no huge pages of this size.
    #[error("this host has no huge pages of {}; it offers {offered}", Size(*.size))]
    NoHugePageSize {
        /// The page size in bytes.
        size: u64,
        /// The sizes that there are.
        offered: String,
    },
    /// Too few huge pages are reserved.
    #[error(
        "{needed} huge pages of {} are needed, and {free} of {total} are free; reserve more as root with: \
         echo {} > /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
        Size(*.size), .total - .free.min(.total) + .needed, .size >> 10
    )]
    TooFewHugePages {
        /// The page size in bytes.
        size: u64,
        /// Pages needed.
        needed: u64,
        /// Pages that nobody uses or has a claim on.
        free: u64,
        /// Pages that are reserved in all.
        total: u64,
    },
    /// A size or an address is no multiple of the page size.
    #[error("{what} of {bytes} bytes is no multiple of the page size of the host's memory, {}", Size(*.page))]
    Unaligned {
        /// What it is the size of.
        what: &'static str,
        /// The size.
        bytes: u64,
        /// The page size in bytes.
        page: u64,
    },
    /// The file that memory is to be in cannot be had.
    #[error("cannot use {path} as guest memory: {source}", path = .path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The file that memory is to be in is too small.
    #[error(
        "{path} has {len} bytes, and the guest's memory {needed}; a file that holds something is not made \
         larger", path = .path.display()
    )]
    FileTooSmall {
        /// Which file.
        path: PathBuf,
        /// Its size in bytes.
        len: u64,
        /// The memory's size in bytes.
        needed: u64,
    },
    /// The file system has not the space.
    #[error(
        "{path} needs {} more, and its file system has {} left", Size(*.needed), Size(*.available),
        path = .path.display()
    )]
    NoSpace {
        /// Which file.
        path: PathBuf,
        /// Bytes that it does not have yet.
        needed: u64,
        /// Bytes that there are.
        available: u64,
    },
    /// Memory cannot be locked.
    #[error(
        "cannot lock {} of guest memory: {source}; this process may lock {}: raise the limit (ulimit -l, or \
         LimitMEMLOCK= in a systemd unit) or give the program CAP_IPC_LOCK",
        Size(*.bytes), .limit.map_or("everything".to_owned(), |limit| Size(limit).to_string())
    )]
    Lock {
        /// The memory's size in bytes.
        bytes: u64,
        /// The process's limit in bytes, if it has one.
        limit: Option<u64>,
        /// The host's error.
        source: io::Error,
    },
    /// Advice that the host's kernel does not know.
    #[error("this host's kernel does not take the advice {what}: {source}")]
    Advice {
        /// The advice.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// Only private memory can be merged.
    #[error("ksm=on needs private memory, and {0} is not; leave out ksm=on, or shared=on and huge pages")]
    NotMergeable(&'static str),
    /// A NUMA node that the host does not have.
    #[error("the host has no NUMA node {node}; it has {online}")]
    NoHostNode {
        /// The node.
        node: u32,
        /// The nodes that there are, as a list.
        online: String,
    },
    /// Memory cannot be bound to nodes.
    #[error(
        "cannot bind guest memory {:#x}..{:#x} to the host's NUMA nodes {nodes}: {source}", .range.start,
        .range.end
    )]
    Bind {
        /// The guest physical addresses.
        range: Range<u64>,
        /// The nodes, as a list.
        nodes: String,
        /// The host's error.
        source: io::Error,
    },
    /// The pages of a file on a disk do not follow a policy.
    #[error(
        "guest memory in {path} cannot be bound to NUMA nodes: only files on tmpfs and hugetlbfs can",
        path = .path.display()
    )]
    BindFile {
        /// Which file.
        path: PathBuf,
    },
    /// An access to addresses that are not guest memory.
    #[error("{len} bytes at guest physical address {gpa:#x} are not all guest memory")]
    OutOfRange {
        /// The first address.
        gpa: u64,
        /// The length in bytes.
        len: u64,
    },
}

/// A size for people: in the largest unit of 1024 that it is a whole number of, or with one digit after the
/// point.
pub(crate) struct Size(pub(crate) u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, &str); 4] = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
        let Some((shift, name)) = UNITS.into_iter().find(|(shift, _)| self.0 >> shift > 0) else {
            return write!(f, "{} bytes", self.0);
        };
        let (whole, rest) = (self.0 >> shift, self.0 & ((1 << shift) - 1));
        if rest == 0 {
            write!(f, "{whole}{name}")
        } else {
            write!(f, "{whole}.{}{name}", (u128::from(rest) * 10) >> shift)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (4096, "4K"),
            (2 << 20, "2M"),
            (3 << 29, "1.5G"),
            (u64::MAX, "16777215.9T"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn too_few_huge_pages_are_told_with_the_cure() {
        let error = MemoryError::TooFewHugePages { size: 2 << 20, needed: 256, free: 1, total: 3 };
        assert_eq!(
            error.to_string(),
            "256 huge pages of 2M are needed, and 1 of 3 are free; reserve more as root with: echo 258 > \
             /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
        );
    }
}
