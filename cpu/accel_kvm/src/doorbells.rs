//! Guest writes that signal events.

use crate::error::host;
use crate::ioctl;
use accel::{AccelError, DoorbellAddress, Doorbells};
use kvm_bindings as kb;
use kvm_ioctls::VmFd;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

const DATAMATCH: u32 = 1 << kb::kvm_ioeventfd_flag_nr_datamatch;
const PIO: u32 = 1 << kb::kvm_ioeventfd_flag_nr_pio;
const DEASSIGN: u32 = 1 << kb::kvm_ioeventfd_flag_nr_deassign;

/// KVM's ioeventfds.
pub(crate) struct KvmDoorbells(pub(crate) Arc<VmFd>);

impl KvmDoorbells {
    fn call(
        &self,
        address: DoorbellAddress,
        len: u32,
        data: Option<u64>,
        event: BorrowedFd<'_>,
        flags: u32,
    ) -> Result<(), AccelError> {
        let (addr, pio) = match address {
            DoorbellAddress::Mmio(gpa) => (gpa, 0),
            DoorbellAddress::Pio(port) => (port.into(), PIO),
        };
        let argument = kb::kvm_ioeventfd {
            datamatch: data.unwrap_or(0),
            addr,
            len,
            fd: event.as_raw_fd(),
            flags: flags | pio | if data.is_some() { DATAMATCH } else { 0 },
            ..kb::kvm_ioeventfd::default()
        };
        ioctl::ioeventfd(&*self.0, argument).map_err(host("an event for guest writes"))
    }
}

impl Doorbells for KvmDoorbells {
    fn register(
        &self,
        address: DoorbellAddress,
        len: u32,
        data: Option<u64>,
        event: BorrowedFd<'_>,
    ) -> Result<(), AccelError> {
        self.call(address, len, data, event, 0)
    }

    fn unregister(
        &self,
        address: DoorbellAddress,
        len: u32,
        data: Option<u64>,
        event: BorrowedFd<'_>,
    ) -> Result<(), AccelError> {
        self.call(address, len, data, event, DEASSIGN)
    }
}
