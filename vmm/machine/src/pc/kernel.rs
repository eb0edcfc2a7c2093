//! Loading the kernel, and the state that the boot processor starts in.

use crate::{KernelSpec, MachineError};
use accel::X86State;
use boot::{BootSpec, EntryState, LoadMemory, MemoryMap, OutOfMemoryRange};
use guest_memory::GuestMemory;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A kernel and what belongs to it, read once and loaded at every reset.
#[derive(Debug)]
pub(super) struct KernelImage {
    spec: KernelSpec,
    kernel: Vec<u8>,
    initrd: Option<Vec<u8>>,
}

impl KernelImage {
    /// Reads the files that `spec` names; none may be larger than the guest's `memory` in bytes.
    pub(super) fn read(spec: &KernelSpec, memory: u64) -> Result<Self, MachineError> {
        let kernel = read_file("kernel", &spec.kernel, memory)?;
        let initrd = spec.initrd.as_ref().map(|path| read_file("initrd", path, memory)).transpose()?;
        Ok(Self { spec: spec.clone(), kernel, initrd })
    }

    /// Puts everything into guest memory; `rsdp` is where the ACPI tables begin.
    pub(super) fn load(
        &self,
        memory: &GuestMemory,
        map: &MemoryMap,
        rsdp: u64,
    ) -> Result<KernelEntry, MachineError> {
        let spec = BootSpec {
            kernel: &self.kernel,
            initrd: self.initrd.as_deref(),
            cmdline: &self.spec.append,
            memory: map,
            rsdp: Some(rsdp),
        };
        let loaded = boot::load(&spec, &mut Writer(memory))
            .map_err(|source| MachineError::Boot { path: self.spec.kernel.clone(), source })?;
        for placed in &loaded.placed {
            tracing::debug!("{:#x}..{:#x}: {}", placed.range.start, placed.range.end, placed.what);
        }
        Ok(KernelEntry(loaded.entry))
    }
}

fn read_file(what: &'static str, path: &Path, memory: u64) -> Result<Vec<u8>, MachineError> {
    let failed = |source| MachineError::File { what, path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(failed(std::io::ErrorKind::IsADirectory.into()));
    }
    let mut bytes = Vec::new();
    file.take(memory.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > memory {
        let len = metadata.len().max(bytes.len() as u64);
        return Err(MachineError::FileTooLarge { what, path: path.into(), len, memory });
    }
    Ok(bytes)
}

struct Writer<'a>(&'a GuestMemory);

impl LoadMemory for Writer<'_> {
    fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), OutOfMemoryRange> {
        self.0.write(gpa, bytes).map_err(|_| OutOfMemoryRange { gpa, len: bytes.len() as u64 })
    }
}

/// How the boot processor starts.
#[derive(Debug)]
pub(crate) struct KernelEntry(EntryState);

impl KernelEntry {
    /// Changes `state`, that of a processor after reset, to the one that the boot protocol prescribes.
    pub(crate) fn apply(&self, state: &mut X86State) {
        let entry = &self.0;
        let segment = |from: &boot::Segment| accel::Segment {
            selector: from.selector,
            base: from.base,
            limit: from.limit,
            rights: from.rights,
            unusable: from.rights == 0,
        };
        state.regs = [0; 16];
        state.regs[X86State::RAX] = entry.rax;
        state.regs[X86State::RBX] = entry.rbx;
        state.regs[X86State::RSP] = entry.rsp;
        state.regs[X86State::RSI] = entry.rsi;
        state.rip = entry.rip;
        state.rflags = entry.rflags;
        state.cr0 = entry.cr0;
        state.cr3 = entry.cr3;
        state.cr4 = entry.cr4;
        state.efer = entry.efer;
        state.segments = [segment(&entry.data); 6];
        state.segments[X86State::CS] = segment(&entry.cs);
        state.tr = segment(&entry.tr);
        state.gdtr = accel::TableRegister { base: entry.gdtr.base, limit: entry.gdtr.limit };
        state.idtr = accel::TableRegister { base: entry.idtr.base, limit: entry.idtr.limit };
    }
}
