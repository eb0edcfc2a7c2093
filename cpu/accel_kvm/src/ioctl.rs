//! The ioctls that `kvm-ioctls` has no wrapper for, or none that fits (Linux's
//! `Documentation/virt/kvm/api.rst`).

use kvm_bindings as kb;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd};

const KVMIO: u64 = 0xae;
const WRITE: u64 = 1;
const READ: u64 = 2;

/// An ioctl's number (`include/uapi/asm-generic/ioctl.h`).
const fn number(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | KVMIO << 8 | number
}

const KVM_INTERRUPT: u64 = number(WRITE, 0x86, size_of::<kb::kvm_interrupt>());
const KVM_IRQFD: u64 = number(WRITE, 0x76, size_of::<kb::kvm_irqfd>());
const KVM_IOEVENTFD: u64 = number(WRITE, 0x79, size_of::<kb::kvm_ioeventfd>());
const KVM_GET_TSC_KHZ: u64 = number(0, 0xa3, 0);
const KVM_SET_TSC_KHZ: u64 = number(0, 0xa2, 0);
const KVM_X86_SET_MSR_FILTER: u64 = number(WRITE, 0xc6, size_of::<kb::kvm_msr_filter>());
const KVM_GET_SREGS2: u64 = number(READ, 0xcc, size_of::<kb::kvm_sregs2>());
const KVM_SET_SREGS2: u64 = number(WRITE, 0xcd, size_of::<kb::kvm_sregs2>());
const KVM_RESET_DIRTY_RINGS: u64 = number(0, 0xc7, 0);
const KVM_SET_DEVICE_ATTR: u64 = number(WRITE, 0xe1, size_of::<kb::kvm_device_attr>());
const KVM_GET_DEVICE_ATTR: u64 = number(WRITE, 0xe2, size_of::<kb::kvm_device_attr>());

/// Calls an ioctl that takes a number.
fn plain(fd: &impl AsRawFd, request: u64, argument: u64) -> io::Result<i32> {
    // SAFETY: the request takes no pointer.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Calls an ioctl on `argument`.
///
/// # Safety
/// `request` must be one that takes a `T`, which the kernel reads, and writes no more than.
unsafe fn with<T>(fd: &impl AsRawFd, request: u64, argument: &mut T) -> io::Result<i32> {
    // SAFETY: the caller says that the kernel takes this for what it is; it lives until the call returns.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Queues the interrupt `vector` of a controller outside the kernel.
pub(crate) fn interrupt(vcpu: &impl AsRawFd, vector: u8) -> io::Result<()> {
    let mut argument = kb::kvm_interrupt { irq: vector.into() };
    // SAFETY: KVM_INTERRUPT reads this structure.
    unsafe { with(vcpu, KVM_INTERRUPT, &mut argument) }.map(drop)
}

/// Binds `event` to the interrupt `gsi`, or unbinds it.
pub(crate) fn irqfd(vm: &impl AsRawFd, event: BorrowedFd<'_>, gsi: u32, bind: bool) -> io::Result<()> {
    let flags = if bind { 0 } else { kb::KVM_IRQFD_FLAG_DEASSIGN };
    let mut argument = kb::kvm_irqfd { fd: event.as_raw_fd() as u32, gsi, flags, ..kb::kvm_irqfd::default() };
    // SAFETY: KVM_IRQFD reads this structure.
    unsafe { with(vm, KVM_IRQFD, &mut argument) }.map(drop)
}

/// Binds an event to guest writes, or unbinds it.
pub(crate) fn ioeventfd(vm: &impl AsRawFd, argument: kb::kvm_ioeventfd) -> io::Result<()> {
    let mut argument = argument;
    // SAFETY: KVM_IOEVENTFD reads this structure.
    unsafe { with(vm, KVM_IOEVENTFD, &mut argument) }.map(drop)
}

/// The rate of a vCPU's time-stamp counter in kHz.
pub(crate) fn tsc_khz(vcpu: &impl AsRawFd) -> io::Result<u32> {
    plain(vcpu, KVM_GET_TSC_KHZ, 0).map(|khz| khz as u32)
}

/// Sets the rate of a vCPU's time-stamp counter.
pub(crate) fn set_tsc_khz(vcpu: &impl AsRawFd, khz: u32) -> io::Result<()> {
    plain(vcpu, KVM_SET_TSC_KHZ, khz.into()).map(drop)
}

/// Gives entries of dirty rings that were taken back to the kernel.
pub(crate) fn reset_dirty_rings(vm: &impl AsRawFd) -> io::Result<()> {
    plain(vm, KVM_RESET_DIRTY_RINGS, 0).map(drop)
}

/// Has guests' accesses of the MSRs in `denied` leave the kernel, or fault.
pub(crate) fn deny_msrs(vm: &impl AsRawFd, denied: &[RangeInclusive<u32>]) -> io::Result<()> {
    // In the bitmaps, a bit that is clear denies.
    let mut bitmaps: Vec<Vec<u8>> =
        denied.iter().map(|range| vec![0; (range.end() - range.start()) as usize / 8 + 1]).collect();
    let mut filter =
        kb::kvm_msr_filter { flags: kb::KVM_MSR_FILTER_DEFAULT_ALLOW, ..kb::kvm_msr_filter::default() };
    for ((place, range), bitmap) in filter.ranges.iter_mut().zip(denied).zip(&mut bitmaps) {
        *place = kb::kvm_msr_filter_range {
            flags: kb::KVM_MSR_FILTER_READ | kb::KVM_MSR_FILTER_WRITE,
            nmsrs: range.end() - range.start() + 1,
            base: *range.start(),
            bitmap: bitmap.as_mut_ptr(),
        };
    }
    // SAFETY: KVM_X86_SET_MSR_FILTER reads this structure and the bitmaps, which live until it returns and have a
    // bit for each MSR.
    unsafe { with(vm, KVM_X86_SET_MSR_FILTER, &mut filter) }.map(drop)
}

/// The special registers with the PDPTEs.
pub(crate) fn sregs2(vcpu: &impl AsRawFd) -> io::Result<kb::kvm_sregs2> {
    let mut argument = kb::kvm_sregs2::default();
    // SAFETY: KVM_GET_SREGS2 fills this structure.
    unsafe { with(vcpu, KVM_GET_SREGS2, &mut argument) }.map(|_| argument)
}

/// Sets the special registers with the PDPTEs.
pub(crate) fn set_sregs2(vcpu: &impl AsRawFd, sregs: &kb::kvm_sregs2) -> io::Result<()> {
    let mut argument = *sregs;
    // SAFETY: KVM_SET_SREGS2 reads this structure.
    unsafe { with(vcpu, KVM_SET_SREGS2, &mut argument) }.map(drop)
}

fn tsc_offset_attribute(value: &mut u64) -> kb::kvm_device_attr {
    kb::kvm_device_attr {
        flags: 0,
        group: kb::KVM_VCPU_TSC_CTRL,
        attr: kb::KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_mut(value) as u64,
    }
}

/// What the kernel adds to the host's counter (at the guest's rate) for the guest's.
pub(crate) fn tsc_offset(vcpu: &impl AsRawFd) -> io::Result<u64> {
    let mut value = 0;
    let mut argument = tsc_offset_attribute(&mut value);
    // SAFETY: KVM_GET_DEVICE_ATTR reads this structure and writes eight bytes where it points, to `value`.
    unsafe { with(vcpu, KVM_GET_DEVICE_ATTR, &mut argument) }.map(|_| value)
}

/// Sets what [`tsc_offset`] gives.
pub(crate) fn set_tsc_offset(vcpu: &impl AsRawFd, offset: u64) -> io::Result<()> {
    let mut value = offset;
    let mut argument = tsc_offset_attribute(&mut value);
    // SAFETY: KVM_SET_DEVICE_ATTR reads this structure and eight bytes where it points, of `value`.
    unsafe { with(vcpu, KVM_SET_DEVICE_ATTR, &mut argument) }.map(drop)
}
