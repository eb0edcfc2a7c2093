//! Making guest memory.

use crate::backing::Backing;
use crate::mapping::Mapping;
use crate::options::{Lock, MemoryOptions, PreallocProgress};
use crate::pages::{PageBitmap, PageTable};
use crate::{GuestMemory, MemoryError, PAGE_SIZE, Region, host, prealloc};
use rustix::io::Errno;
use rustix::mm::Advice;
use rustix::process::{Resource, getrlimit};
use std::ops::Range;
use std::sync::Arc;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

impl GuestMemory {
    /// Memory in the `regions` given as guest physical ranges, zero-filled, private to this process.
    ///
    /// # Errors
    /// [`MemoryError`] if the regions are not disjoint page-aligned ranges or the host lacks memory.
    pub fn new(regions: &[Range<u64>]) -> Result<Self, MemoryError> {
        Self::with_options(regions, &MemoryOptions::default(), &|_, _| {})
    }

    /// Memory in the `regions` given as guest physical ranges, made as `options` say. It is zero-filled but
    /// for memory in a file that holds something. `progress` is told of allocation in advance.
    ///
    /// # Errors
    /// [`MemoryError`] if the regions are not disjoint ranges of whole pages of the host's, if options
    /// contradict each other, or if the host lacks something.
    pub fn with_options(
        regions: &[Range<u64>],
        options: &MemoryOptions,
        progress: PreallocProgress<'_>,
    ) -> Result<Self, MemoryError> {
        let (sorted, total) = sort(regions)?;
        let backing = Backing::new(options, total)?;
        check(options, &backing, &sorted, total)?;
        backing.grow(options, total)?;
        let no_memory = |source: std::io::Error| MemoryError::NoMemory { bytes: total, source };

        let mut offset = 0;
        let mut mapped = Vec::with_capacity(sorted.len());
        let mut list = Vec::with_capacity(sorted.len());
        for region in &sorted {
            let len = region.end - region.start;
            let size = usize::try_from(len).map_err(|_| MemoryError::BadRegion(region.clone()))?;
            let mapping = Mapping::new(&backing, offset, size).map_err(|source| {
                let exhausted = source.raw_os_error() == Some(libc::ENOMEM);
                if backing.huge && exhausted {
                    host::too_few_huge_pages(backing.page_size, total - offset)
                } else {
                    no_memory(source)
                }
            })?;
            advise(&mapping, options)?;
            for binding in &options.bindings {
                let part = binding.range.start.max(region.start)..binding.range.end.min(region.end);
                if !part.is_empty() {
                    mapping.bind((part.start - region.start) as usize, part, binding)?;
                }
            }
            let host = mapping.start();
            let pages = Arc::new(PageTable::new(region.start, len, mapping));
            let mut builder = MmapRegionBuilder::new_with_bitmap(size, PageBitmap::new(pages.clone()))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(if backing.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE });
            if let Some(file) = &backing.file {
                builder = builder.with_file_offset(FileOffset::from_arc(file.clone(), offset));
            }
            // SAFETY: the mapping is as long as said, and the bitmap that the region owns keeps it.
            let mapping = unsafe { builder.with_raw_mmap_pointer(host) }
                .build()
                .map_err(|error| no_memory(std::io::Error::other(error.to_string())))?;
            list.push(Region { gpa: region.start, len, host, pages });
            mapped.push(
                GuestRegionMmap::new(mapping, GuestAddress(region.start))
                    .ok_or_else(|| MemoryError::BadRegion(region.clone()))?,
            );
            offset += len;
        }
        let backend = GuestMemoryMmap::from_regions(mapped)
            .map_err(|error| no_memory(std::io::Error::other(error.to_string())))?;
        let memory = Self { backend, regions: list.into(), backing, locked: options.lock != Lock::Off };
        memory.allocate(options, progress)?;
        Ok(memory)
    }

    /// Allocates and locks it, as far as the options say so.
    fn allocate(&self, options: &MemoryOptions, progress: PreallocProgress<'_>) -> Result<(), MemoryError> {
        let mappings: Vec<_> =
            self.regions.iter().map(|region| (region.pages.mapping(), region.len as usize)).collect();
        let bytes = self.len();
        // Huge pages were set aside somewhere; whether there are enough on these nodes shows only now, and
        // must not show in the middle of the guest's work.
        let bound_huge = self.backing.huge && !options.bindings.is_empty();
        if options.prealloc || options.lock == Lock::On || bound_huge {
            let huge = self.backing.huge.then_some(self.backing.page_size);
            prealloc::run(&mappings, self.backing.page_size, options.prealloc_threads, progress)
                .map_err(|errno| prealloc::error(errno, bytes, huge))?;
        }
        for (mapping, _) in mappings {
            mapping.lock(options.lock).map_err(|errno| lock_error(bytes, errno))?;
        }
        Ok(())
    }
}

fn lock_error(bytes: u64, errno: Errno) -> MemoryError {
    MemoryError::Lock { bytes, limit: getrlimit(Resource::Memlock).current, source: errno.into() }
}

/// The regions by ascending address, and their size in all.
fn sort(regions: &[Range<u64>]) -> Result<(Vec<Range<u64>>, u64), MemoryError> {
    let mut sorted = regions.to_vec();
    sorted.sort_by_key(|region| region.start);
    let mut total = 0u64;
    for (index, region) in sorted.iter().enumerate() {
        let aligned = region.start % PAGE_SIZE == 0 && region.end % PAGE_SIZE == 0;
        let disjoint = index == 0 || sorted[index - 1].end <= region.start;
        if region.is_empty() || !aligned || !disjoint {
            return Err(MemoryError::BadRegion(region.clone()));
        }
        total = total
            .checked_add(region.end - region.start)
            .ok_or_else(|| MemoryError::BadRegion(region.clone()))?;
    }
    Ok((sorted, total))
}

/// Refuses what cannot be, before anything is allocated.
fn check(
    options: &MemoryOptions,
    backing: &Backing,
    regions: &[Range<u64>],
    total: u64,
) -> Result<(), MemoryError> {
    let page = backing.page_size;
    for region in regions {
        for bytes in [region.start, region.end - region.start] {
            if !bytes.is_multiple_of(page) {
                return Err(MemoryError::Unaligned { what: "guest memory", bytes, page });
            }
        }
    }
    for binding in &options.bindings {
        for bytes in [binding.range.start, binding.range.end] {
            if !bytes.is_multiple_of(page) {
                return Err(MemoryError::Unaligned { what: "a node's memory", bytes, page });
            }
        }
        if let Some(path) = backing.on_disk.as_ref().filter(|_| backing.shared) {
            return Err(MemoryError::BindFile { path: path.clone() });
        }
    }
    if options.merge {
        let reason = if backing.huge { "memory of huge pages" } else { "shared memory" };
        if backing.huge || backing.shared {
            return Err(MemoryError::NotMergeable(reason));
        }
    }
    let at_once = options.prealloc || options.lock == Lock::On;
    if at_once && !backing.huge {
        host::check_available(total, options.lock == Lock::On)?;
    }
    host::warn_of_void_advice(options.transparent_huge == Some(true), backing.shared, options.merge);
    Ok(())
}

/// Tells the host's kernel how to treat a mapping.
fn advise(mapping: &Mapping, options: &MemoryOptions) -> Result<(), MemoryError> {
    match options.transparent_huge {
        Some(true) => mapping.advise_all("thp=on (MADV_HUGEPAGE)", Advice::LinuxHugepage)?,
        Some(false) => mapping.advise_all("thp=off (MADV_NOHUGEPAGE)", Advice::LinuxNoHugepage)?,
        None => {}
    }
    if options.merge {
        mapping.advise_all("ksm=on (MADV_MERGEABLE)", Advice::LinuxMergeable)?;
    }
    if !options.dump {
        mapping.advise_all("dump=off (MADV_DONTDUMP)", Advice::LinuxDontDump)?;
    }
    Ok(())
}
