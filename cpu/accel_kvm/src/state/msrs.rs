//! Model-specific registers.

use crate::error::errno;
use kvm_bindings::{self as kb, Msrs};
use kvm_ioctls::{Kvm, VcpuFd};
use std::io;
use std::ops::RangeInclusive;

/// IA32_TIME_STAMP_COUNTER.
pub(crate) const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

/// IA32_BIOS_SIGN_ID, AMD's PATCH_LEVEL: the revision of the microcode. It is the model's, and no part of saved states.
const MICROCODE: u32 = 0x8b;

/// The revision of the host's microcode, if KVM says it.
pub(crate) fn host_microcode(kvm: &Kvm) -> Option<u64> {
    let entry = kb::kvm_msr_entry { index: MICROCODE, ..kb::kvm_msr_entry::default() };
    let mut list = Msrs::from_entries(&[entry]).ok()?;
    let count = kvm.get_msrs(&mut list).ok()?;
    list.as_slice()[..count].first().map(|entry| entry.data)
}

/// Has a vCPU report `revision`.
pub(crate) fn set_microcode(fd: &VcpuFd, revision: u64) -> io::Result<()> {
    write_msr(fd, MICROCODE, revision)
}

/// The MSRs of a guest's state, as far as they are no field of their own of the neutral state: not the
/// time-stamp counter and its deadline, APIC_BASE, EFER and the bases of FS and GS.
const SAVED: &[RangeInclusive<u32>] = &[
    0x11..=0x12,   // kvmclock's old numbers
    0x3a..=0x3b,   // feature control, TSC_ADJUST
    0x48..=0x48,   // SPEC_CTRL
    0xe1..=0xe1,   // UMWAIT_CONTROL
    0x122..=0x122, // TSX_CTRL
    0x140..=0x140, // MISC_FEATURE_ENABLES
    0x174..=0x176, // SYSENTER
    0x1a0..=0x1a0, // MISC_ENABLE
    0x1c4..=0x1c5, // XFD
    0x1d9..=0x1d9, // DEBUGCTL
    0x277..=0x277, // PAT
    0x6a0..=0x6a0, // shadow stacks
    0x6a2..=0x6a2,
    0x6a4..=0x6a8,
    0xda0..=0xda0,             // XSS
    0x4b56_4d00..=0x4b56_4d06, // kvmclock, async page faults, steal time, PV EOI, polling
    0xc000_0081..=0xc000_0084, // STAR, LSTAR, CSTAR, SFMASK
    0xc000_0102..=0xc000_0103, // KERNEL_GS_BASE, TSC_AUX
    0xc000_0104..=0xc000_0104, // TSC_RATIO
    0xc001_011f..=0xc001_011f, // VIRT_SPEC_CTRL
];

/// Those of them that KVM knows but does not list: MTRRs.
const UNLISTED: &[RangeInclusive<u32>] =
    &[0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x277..=0x277, 0x2ff..=0x2ff];

/// The saved MSRs that a host has whose KVM lists `listed`.
pub(crate) fn saved_msrs(listed: &[u32]) -> Vec<u32> {
    let listed = SAVED.iter().cloned().flatten().filter(|msr| listed.contains(msr));
    let mut all: Vec<u32> = listed.chain(UNLISTED.iter().cloned().flatten()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Those of `msrs` that this vCPU has.
pub(crate) fn readable_msrs(fd: &VcpuFd, msrs: &[u32]) -> Vec<u32> {
    let mut left = msrs;
    let mut readable = Vec::with_capacity(msrs.len());
    // The kernel stops at the first that it cannot read.
    while !left.is_empty() {
        let read = read_msrs(fd, left).map_or(0, |read| read.len());
        readable.extend_from_slice(&left[..read]);
        left = left.get(read + 1..).unwrap_or(&[]);
    }
    readable
}

/// Reads MSRs up to the first that cannot be read.
pub(super) fn read_msrs(fd: &VcpuFd, msrs: &[u32]) -> io::Result<Vec<(u32, u64)>> {
    let entry = |msr: &u32| kb::kvm_msr_entry { index: *msr, ..kb::kvm_msr_entry::default() };
    let entries: Vec<_> = msrs.iter().map(entry).collect();
    let mut list = Msrs::from_entries(&entries).map_err(|error| io::Error::other(format!("{error:?}")))?;
    let count = fd.get_msrs(&mut list).map_err(errno)?;
    Ok(list.as_slice()[..count].iter().map(|entry| (entry.index, entry.data)).collect())
}

/// Writes MSRs up to the first that cannot be written, whose place in the list it gives.
fn write_msrs(fd: &VcpuFd, msrs: &[(u32, u64)]) -> io::Result<Option<usize>> {
    let entry = |(index, data): &(u32, u64)| kb::kvm_msr_entry { index: *index, data: *data, reserved: 0 };
    let entries: Vec<_> = msrs.iter().map(entry).collect();
    let list = Msrs::from_entries(&entries).map_err(|error| io::Error::other(format!("{error:?}")))?;
    let count = fd.set_msrs(&list).map_err(errno)?;
    Ok((count < msrs.len()).then_some(count))
}

/// Reads one MSR.
pub(crate) fn read_msr(fd: &VcpuFd, index: u32) -> io::Result<u64> {
    read_msrs(fd, &[index])?
        .first()
        .map(|(_, value)| *value)
        .ok_or_else(|| io::Error::other(format!("MSR {index:#x} cannot be read")))
}

/// Writes one MSR.
pub(crate) fn write_msr(fd: &VcpuFd, index: u32, value: u64) -> io::Result<()> {
    match write_msrs(fd, &[(index, value)])? {
        None => Ok(()),
        Some(_) => Err(io::Error::other(format!("MSR {index:#x} cannot be {value:#x}"))),
    }
}

/// Has the MSRs be as `wanted`; says which cannot.
pub(super) fn restore(fd: &VcpuFd, wanted: &[(u32, u64)]) -> Result<(), String> {
    let mut left = wanted;
    while !left.is_empty() {
        let stopped = write_msrs(fd, left).map_err(|error| error.to_string())?;
        let Some(stopped) = stopped else { break };
        let (index, value) = left[stopped];
        // What cannot be written may be so already.
        let present = read_msr(fd, index).map_err(|error| error.to_string())?;
        if present != value {
            return Err(format!("MSR {index:#x} cannot be {value:#x} here"));
        }
        left = &left[stopped + 1..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_keeps_to_what_the_host_lists() {
        let saved = saved_msrs(&[0x10, 0x174, 0xc000_0103, 0xc000_0080]);
        assert!(saved.contains(&0x174) && saved.contains(&0xc000_0103));
        assert!(!saved.contains(&0x10) && !saved.contains(&0x175) && !saved.contains(&0xc000_0080));
        assert!(saved.contains(&0x277) && saved.contains(&0x26f));
        assert!(saved.is_sorted());
    }
}
