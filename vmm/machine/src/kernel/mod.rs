//! Loading the kernel, and the state that the boot processor starts in.
//!
//! A bzImage is unpacked here and its kernel entered directly, as the code in front of it would do after
//! much longer a time; where that isn't possible, or isn't wanted, the bzImage unpacks itself.

mod cache;
mod entry;
mod input;
mod memory;
mod version;

pub(crate) use entry::KernelEntry;

use crate::deterministic::Entropy;
use crate::{KernelSpec, MachineError};
use boot::{
    BootSpec, Compression, DirectEntry, KernelFile, MAX_UNPACKED, MemoryMap, Payload, Protocol, SetupHeader,
    UnpackError, Vmlinux,
};
use cache::Cache;
use guest_memory::GuestMemory;
use input::Input;
use memory::Writer;
use parking_lot::Mutex;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Bytes for the guest's random number generator.
const RNG_SEED: usize = 64;

/// A kernel and what belongs to it, which a thread of its own gets ready while the machine is built.
#[derive(Debug)]
pub(crate) struct KernelImage {
    files: Arc<Files>,
    /// What the thread returns. At every later reset the files are read again.
    first: Mutex<Option<JoinHandle<Result<Prepared, MachineError>>>>,
    /// Words of the command line that the machine needs, with their names.
    words: Vec<(&'static str, String)>,
}

/// Where a kernel comes from.
#[derive(Debug)]
struct Files {
    spec: KernelSpec,
    kernel: Input,
    initrd: Option<Input>,
    cache: Option<Cache>,
    /// The most bytes that a kernel may unpack to.
    limit: u64,
    entropy: Entropy,
}

/// What is loaded.
#[derive(Debug)]
struct Prepared {
    protocol: Protocol,
    /// The kernel in a bzImage, and what picks its physical address.
    unpacked: Option<(Vmlinux, Option<u64>)>,
    initrd: Option<Vec<u8>>,
}

impl KernelImage {
    /// Opens the files that `spec` names; none may be larger than the guest's `memory` in bytes.
    pub(crate) fn open(spec: &KernelSpec, memory: u64, entropy: Entropy) -> Result<Self, MachineError> {
        let open = |what, path: &Path| Input::open(what, path, memory);
        let files = Arc::new(Files {
            spec: spec.clone(),
            kernel: open("kernel", &spec.kernel)?,
            initrd: spec.initrd.as_ref().map(|path| open("initrd", path)).transpose()?,
            cache: if spec.unpack { Cache::of_user() } else { None },
            limit: memory.min(MAX_UNPACKED),
            entropy,
        });
        let for_thread = files.clone();
        let thread = std::thread::Builder::new().name("kernel".into());
        let first = thread.spawn(move || for_thread.prepare()).map_err(MachineError::Thread)?;
        Ok(Self { files, first: Mutex::new(Some(first)), words: Vec::new() })
    }

    /// Has `word` stand at the front of Linux's command line, unless that has a word `name` or `name=…`.
    pub(crate) fn add_word(&mut self, name: &'static str, word: &str) {
        self.words.push((name, word.to_owned()));
    }

    /// The command line for a kernel of that protocol.
    fn command_line(&self, protocol: Protocol) -> String {
        let given = &self.files.spec.append;
        let has =
            |name: &str| given.split_ascii_whitespace().any(|word| word.split('=').next() == Some(name));
        let added = self.words.iter().filter(|(name, _)| protocol != Protocol::Multiboot && !has(name));
        let mut words: Vec<&str> = added.map(|(_, word)| word.as_str()).collect();
        // As by other loaders, the kernel is named before its arguments.
        let name = self.files.spec.kernel.to_string_lossy();
        if protocol == Protocol::Multiboot {
            words.push(&name);
        }
        words.extend(Some(given.as_str()).filter(|given| !given.is_empty()));
        words.join(" ")
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
        let first = self.first.lock().take().and_then(|thread| thread.join().ok());
        let Prepared { protocol, unpacked, initrd } = first.unwrap_or_else(|| self.files.prepare())?;
        let path = &self.files.spec.kernel;
        let cmdline = self.command_line(protocol);
        let mut seed = [0; RNG_SEED];
        let spec = BootSpec {
            kernel: self.files.kernel.as_kernel(path)?,
            initrd: initrd.as_deref(),
            cmdline: &cmdline,
            memory: map,
            rsdp: Some(rsdp),
            direct: None,
            rng_seed: if self.files.entropy.fill(&mut seed) { &seed } else { &[] },
        };
        let direct = unpacked.as_ref().and_then(|(vmlinux, place)| {
            let direct = Some(DirectEntry { vmlinux, place: *place });
            boot::load(&BootSpec { direct, ..spec.clone() }, &mut Writer::new(memory, fresh))
                .inspect_err(|error| unpacks_itself(path, error))
                .ok()
        });
        let loaded = match direct {
            Some(loaded) => loaded,
            None => {
                // An attempt may have left something in memory.
                let fresh = fresh && unpacked.is_none();
                boot::load(&spec, &mut Writer::new(memory, fresh))
                    .map_err(|source| MachineError::Boot { path: path.clone(), source })?
            }
        };
        for placed in &loaded.placed {
            tracing::debug!("{:#x}..{:#x}: {}", placed.range.start, placed.range.end, placed.what);
        }
        Ok(KernelEntry::new(loaded))
    }
}

impl Files {
    fn prepare(&self) -> Result<Prepared, MachineError> {
        let path = &self.spec.kernel;
        let kernel = self.kernel.as_kernel(path)?;
        let initrd = match (&self.initrd, &self.spec.initrd) {
            (Some(initrd), Some(path)) => Some(initrd.read(path)?.into_owned()),
            _ => None,
        };
        let protocol =
            boot::identify(&kernel).map_err(|source| MachineError::Boot { path: path.clone(), source })?;
        let wanted = protocol == Protocol::BzImage && self.spec.unpack;
        let unpacked = if wanted { self.unpack(&kernel) } else { None };
        Ok(Prepared { protocol, unpacked, initrd })
    }

    /// The kernel in a bzImage, at virtual addresses picked at random unless its command line has
    /// `nokaslr`, and what picks its physical address.
    fn unpack(&self, kernel: &KernelFile<'_>) -> Option<(Vmlinux, Option<u64>)> {
        let not_possible = |error: &dyn std::fmt::Display| unpacks_itself(&self.spec.kernel, error);
        let mut vmlinux = self.get_unpacked().inspect_err(|error| not_possible(error)).ok()?;
        let mut numbers = [0; 16];
        let wanted = !self.spec.append.split_ascii_whitespace().any(|word| word == "nokaslr");
        if !wanted || !self.entropy.fill(&mut numbers) {
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

    /// From the cache, if unpacking takes longer than reading what was unpacked.
    fn get_unpacked(&self) -> Result<Vmlinux, NotUnpacked> {
        let version = self.kernel.version();
        let cache = self.cache.as_ref().zip(version.as_ref());
        if let Some(vmlinux) = cache.and_then(|(cache, version)| cache.get(version, self.limit)) {
            return Ok(vmlinux);
        }
        let kernel = self.kernel.read(&self.spec.kernel)?;
        let payload = Payload::find(&kernel)?;
        let vmlinux = Vmlinux::from_bytes(payload.unpack(self.limit)?);
        tracing::debug!("unpacked {} bytes ({})", vmlinux.bytes().len(), payload.compression);
        if let Some((cache, version)) = cache
            && payload.compression != Compression::Lz4
            && version.is_settled()
            && self.kernel.version().as_ref() == Some(version)
        {
            cache.put(version, &vmlinux);
        }
        Ok(vmlinux)
    }
}

/// Why a bzImage is left to unpack itself.
#[derive(Debug, thiserror::Error)]
enum NotUnpacked {
    #[error(transparent)]
    Read(#[from] MachineError),
    #[error(transparent)]
    Unpack(#[from] UnpackError),
}

fn unpacks_itself(path: &Path, error: &dyn std::fmt::Display) {
    tracing::info!("{} is left to unpack itself: {error}", path.display());
}
