//! What can be wrong with a kernel, an initrd or a command line.

use std::fmt;

/// The file that an error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A Linux bzImage.
    BzImage,
    /// An ELF file, entered by PVH, multiboot or Linux's 64-bit protocol.
    Elf,
    /// A multiboot kernel without (or beside) ELF headers.
    Multiboot,
    /// The initial RAM disk.
    Initrd,
    /// A kernel whose kind isn't known yet.
    Kernel,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BzImage => "bzImage",
            Self::Elf => "ELF kernel",
            Self::Multiboot => "multiboot kernel",
            Self::Initrd => "initrd",
            Self::Kernel => "kernel",
        })
    }
}

/// A write to guest memory that isn't backed by RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no guest RAM at {gpa:#x}..{:#x}", gpa.saturating_add(*len))]
pub struct OutOfMemoryRange {
    /// First guest physical address of the write.
    pub gpa: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// Why a kernel can't be booted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// The file is something else.
    #[error(
        "not an x86 kernel: the file is {found}; accepted are a Linux bzImage, an ELF vmlinux and a multiboot kernel"
    )]
    NotAKernel {
        /// What the file looks like.
        found: &'static str,
    },
    /// A kernel, but for another processor.
    #[error("the kernel is for {found}, this machine is x86-64")]
    WrongArchitecture {
        /// The architecture that the file names.
        found: String,
    },
    /// The file ends before a field or a part that its headers promise.
    #[error("{file} is truncated: {field} needs bytes {offset:#x}..{:#x}, the file has {have:#x}", offset.saturating_add(*need))]
    Truncated {
        /// The file.
        file: FileKind,
        /// The field or part.
        field: &'static str,
        /// Where it starts in the file.
        offset: u64,
        /// How long it is.
        need: u64,
        /// The length of the file.
        have: u64,
    },
    /// The host can't read the file there.
    #[error("{file}: {field} at offset {offset:#x} cannot be read: {error}")]
    Unreadable {
        /// The file.
        file: FileKind,
        /// The field or part.
        field: &'static str,
        /// Where it starts in the file.
        offset: u64,
        /// What the host says.
        error: String,
    },
    /// A field's value makes no sense.
    #[error("{file}: {field} at offset {offset:#x} is {value:#x}, {expected}")]
    BadField {
        /// The file.
        file: FileKind,
        /// The field's name in its specification.
        field: &'static str,
        /// Where it lies in the file.
        offset: u64,
        /// The value found.
        value: u64,
        /// What would have been right.
        expected: &'static str,
    },
    /// A valid file that asks for what isn't offered.
    #[error("{file}: {what}")]
    Unsupported {
        /// The file.
        file: FileKind,
        /// What isn't supported, and what is.
        what: &'static str,
    },
    /// The kernel takes a shorter command line than given.
    #[error("the kernel command line has {len} bytes, this kernel takes at most {max}")]
    CommandLineTooLong {
        /// Length of the given line.
        len: usize,
        /// The limit that the kernel states.
        max: usize,
    },
    /// A zero byte would cut the command line off.
    #[error("the kernel command line has a zero byte at position {position}")]
    CommandLineNul {
        /// Where it is.
        position: usize,
    },
    /// There's no room for the initrd.
    #[error(
        "the initrd of {size} bytes doesn't fit: the largest free stretch of guest RAM below {limit:#x} has {room} bytes"
    )]
    InitrdTooBig {
        /// Its size.
        size: u64,
        /// The longest free stretch.
        room: u64,
        /// The address that it may not pass.
        limit: u64,
    },
    /// There's no room for the kernel.
    #[error(
        "the kernel needs {size} bytes of RAM between {min:#x} and {max:#x} (alignment {align:#x}), which this machine lacks; give the guest more memory"
    )]
    KernelTooBig {
        /// Bytes needed to run.
        size: u64,
        /// Alignment needed.
        align: u64,
        /// Lowest acceptable address.
        min: u64,
        /// Upper bound.
        max: u64,
    },
    /// A part with a fixed address lies where there's no free RAM.
    #[error("{file}: {what} wants guest addresses {start:#x}..{end:#x}, which aren't free RAM")]
    OutsideRam {
        /// The file.
        file: FileKind,
        /// The part.
        what: &'static str,
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// More memory regions than the boot protocol can describe.
    #[error("the memory map has {count} regions, the boot protocol describes at most {max}")]
    TooManyRegions {
        /// Regions in the map.
        count: usize,
        /// The protocol's limit.
        max: usize,
    },
    /// The memory map given isn't usable.
    #[error("memory map: {0}")]
    MemoryMap(#[from] crate::MemoryMapError),
    /// Guest memory refused a write.
    #[error(transparent)]
    Memory(#[from] OutOfMemoryRange),
}
