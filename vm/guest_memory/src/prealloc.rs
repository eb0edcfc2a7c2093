//! Allocating guest memory before the guest starts, on several threads.

use crate::error::MemoryError;
use crate::mapping::Mapping;
use crate::options::PreallocProgress;
use parking_lot::Mutex;
use rustix::io::Errno;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// How much a thread allocates at a time.
const CHUNK: usize = 32 << 20;
/// The most threads that are used unasked.
const MOST_THREADS: usize = 16;

/// Allocates all of `mappings`, given with their lengths. `page_size` is that of the host's pages.
pub(crate) fn run(
    mappings: &[(&Mapping, usize)],
    page_size: u64,
    threads: Option<usize>,
    progress: PreallocProgress<'_>,
) -> Result<(), Errno> {
    let chunk = CHUNK.max(page_size as usize);
    let mut chunks = Vec::new();
    for (mapping, len) in mappings {
        for offset in (0..*len).step_by(chunk) {
            chunks.push((*mapping, offset, chunk.min(len - offset)));
        }
    }
    let total: u64 = chunks.iter().map(|(_, _, len)| *len as u64).sum();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.unwrap_or(processors.min(MOST_THREADS)).clamp(1, chunks.len().max(1));
    let (next, done, failed) = (AtomicUsize::new(0), AtomicU64::new(0), Mutex::new(None));
    let work = || {
        while let Some((mapping, offset, len)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(errno) = mapping.populate(*offset, *len) {
                failed.lock().get_or_insert(errno);
                // The other threads find nothing left to do.
                next.store(chunks.len(), Ordering::Relaxed);
                return;
            }
            let before = done.fetch_add(*len as u64, Ordering::Relaxed);
            progress(before + *len as u64, total);
        }
    };
    std::thread::scope(|scope| {
        for number in 1..threads {
            let name = format!("prealloc-{number}");
            // Without help this thread does all of it.
            let _ = std::thread::Builder::new().name(name).spawn_scoped(scope, work);
        }
        work();
    });
    let failed = failed.lock().take();
    failed.map_or(Ok(()), Err)
}

/// The error for a failed allocation of `bytes`.
pub(crate) fn error(errno: Errno, bytes: u64, huge_page: Option<u64>) -> MemoryError {
    match (errno, huge_page) {
        // The page that would have been touched would have ended the process.
        (Errno::FAULT | Errno::NOMEM, Some(size)) => crate::host::too_few_huge_pages(size, bytes),
        (Errno::INVAL, _) => MemoryError::Advice {
            what: "prealloc=on (MADV_POPULATE_WRITE, Linux 5.14)",
            source: errno.into(),
        },
        _ => MemoryError::NoMemory { bytes, source: errno.into() },
    }
}
