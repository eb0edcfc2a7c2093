//! The state that the boot processor starts in.

use crate::bios;
use accel::X86State;
use boot::{EntryState, Loaded, Protocol};

/// How the boot processor starts.
#[derive(Debug)]
pub(crate) struct KernelEntry {
    state: EntryState,
    /// It expects a PC as a BIOS leaves it.
    after_bios: bool,
}

impl KernelEntry {
    pub(super) fn new(loaded: Loaded) -> Self {
        Self { after_bios: loaded.protocol == Protocol::Multiboot, state: loaded.entry }
    }

    /// Whether the kernel expects what a BIOS leaves behind.
    pub(crate) fn is_after_bios(&self) -> bool {
        self.after_bios
    }

    /// Changes `state`, that of a processor after reset, to the one that the boot protocol prescribes.
    pub(crate) fn apply(&self, state: &mut X86State) {
        let entry = &self.state;
        if self.after_bios {
            bios::program_apic(state);
        }
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
