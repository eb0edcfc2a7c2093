//! Loading the kernel, and the state that the boot processor starts in.
//!
//! A bzImage is unpacked here and its kernel entered directly, as the code in front of it would do after
//! much longer a time; where that isn't possible, or isn't wanted, the bzImage unpacks itself.

mod cache;
mod entry;
mod input;
mod memory;

pub(crate) use entry::KernelEntry;

use crate::{KernelSpec, MachineError};
use boot::{BootSpec, DirectEntry, MAX_UNPACKED, MemoryMap, Protocol, SetupHeader, Vmlinux};
use cache::Cache;
use guest_memory::GuestMemory;
use input::Input;
use memory::Writer;
use std::path::Path;

/// Bytes for the guest's random number generator.
const RNG_SEED: usize = 64;

/// A kernel and what belongs to it: files that are read at every reset.
#[derive(Debug)]
pub(crate) struct KernelImage {
    spec: KernelSpec,
    kernel: Input,
    initrd: Option<Input>,
    cache: Option<Cache>,
}

impl KernelImage {
    /// Opens the files that `spec` names; none may be larger than the guest's `memory` in bytes.
    pub(crate) fn open(spec: &KernelSpec, memory: u64) -> Result<Self, MachineError> {
        let open = |what, path: &Path| Input::open(what, path, memory);
        let kernel = open("kernel", &spec.kernel)?;
        let initrd = spec.initrd.as_ref().map(|path| open("initrd", path)).transpose()?;
        let cache = if spec.unpack { Cache::of_user() } else { None };
        Ok(Self { spec: spec.clone(), kernel, initrd, cache })
    }

    /// Puts everything into guest memory; `rsdp` is where the ACPI tables begin. `fresh` says that nothing
    /// was ever written to memory that a kernel is loaded to.
    pub(crate) fn load(
        &self,
        memory: &GuestMemory,
        map: &MemoryMap,
        rsdp: u64,
        fresh: bool,
    ) -> Result<KernelEntry, MachineError> {
        let path = &self.spec.kernel;
        let boot_error = |source| MachineError::Boot { path: path.clone(), source };
        let kernel = self.kernel.read(path)?;
        let initrd = match (&self.initrd, &self.spec.initrd) {
            (Some(initrd), Some(path)) => Some(initrd.read(path)?),
            _ => None,
        };
        let mut seed = [0; RNG_SEED];
        let spec = BootSpec {
            kernel: &kernel,
            initrd: initrd.as_deref(),
            cmdline: &self.spec.append,
            memory: map,
            rsdp: Some(rsdp),
            direct: None,
            rng_seed: if random(&mut seed) { &seed } else { &[] },
        };
        let packed = boot::identify(&kernel).map_err(boot_error)? == Protocol::BzImage;
        let unpacked = if packed && self.spec.unpack { self.unpack(&kernel, memory) } else { None };
        let direct = unpacked.as_ref().and_then(|(vmlinux, place)| {
            let direct = Some(DirectEntry { vmlinux, place: *place });
            boot::load(&BootSpec { direct, ..spec.clone() }, &mut Writer::new(memory, fresh))
                .inspect_err(|error| unpacks_itself(path, error))
                .ok()
        });
        let loaded = match direct {
            Some(loaded) => loaded,
            // An attempt may have left something in memory.
            None => {
                let fresh = fresh && !(packed && self.spec.unpack);
                boot::load(&spec, &mut Writer::new(memory, fresh)).map_err(boot_error)?
            }
        };
        for placed in &loaded.placed {
            tracing::debug!("{:#x}..{:#x}: {}", placed.range.start, placed.range.end, placed.what);
        }
        Ok(KernelEntry::new(loaded.entry))
    }

    /// The kernel in a bzImage, at virtual addresses picked at random unless its command line has
    /// `nokaslr`, and what picks its physical address.
    fn unpack(&self, kernel: &[u8], memory: &GuestMemory) -> Option<(Vmlinux, Option<u64>)> {
        let limit = memory.len().min(MAX_UNPACKED);
        let get = || match self.cache.as_ref().and_then(|cache| cache.get(kernel, limit)) {
            Some(vmlinux) => Ok(vmlinux),
            None => Vmlinux::unpack(kernel, limit).map(|(vmlinux, compression)| {
                tracing::debug!("unpacked {} bytes ({compression})", vmlinux.bytes().len());
                if let Some(cache) = &self.cache {
                    cache.put(kernel, &vmlinux);
                }
                vmlinux
            }),
        };
        let not_possible = |error: &dyn std::fmt::Display| unpacks_itself(&self.spec.kernel, error);
        let mut vmlinux = get().inspect_err(|error| not_possible(error)).ok()?;
        let mut numbers = [0; 16];
        let wanted = !self.spec.append.split_ascii_whitespace().any(|word| word == "nokaslr");
        if !wanted || !random(&mut numbers) {
            return Some((vmlinux, None));
        }
        let [slide, place] = [0, 8]
            .map(|at| numbers[at..].first_chunk().map_or(0, |bytes: &[u8; 8]| u64::from_le_bytes(*bytes)));
        let header = SetupHeader::parse(kernel).inspect_err(|error| not_possible(error)).ok()?;
        match vmlinux.slide(&header, slide) {
            Ok(()) => Some((vmlinux, Some(place))),
            // It was built not to move.
            Err(boot::SlideError::NoTable) => Some((vmlinux, None)),
            Err(error) => {
                not_possible(&error);
                None
            }
        }
    }
}

fn unpacks_itself(path: &Path, error: &dyn std::fmt::Display) {
    tracing::info!("{} is left to unpack itself: {error}", path.display());
}

/// Fills `bytes` with random ones. `false`: the host has none yet, early in its own start.
fn random(bytes: &mut [u8]) -> bool {
    let len = bytes.len();
    rustix::rand::getrandom(bytes, rustix::rand::GetRandomFlags::NONBLOCK).is_ok_and(|count| count == len)
}
