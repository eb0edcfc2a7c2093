//! Why `KVM_RUN` returned (`struct kvm_run` in Linux's `Documentation/virt/kvm/api.rst`).

use crate::error::errno;
use kvm_bindings as kb;
use kvm_ioctls::VcpuFd;
use std::fmt::Write;
use std::io;

/// Bytes that instructions have at most.
const INSTRUCTION: usize = 15;

/// Why `KVM_RUN` returned. Data is in the page shared with the kernel, which takes reads' results from there
/// when the vCPU runs on.
#[derive(Debug)]
pub(crate) enum Exit<'a> {
    /// `IN`, or `INS` several times: elements of `size` bytes.
    PioRead { port: u16, size: usize, data: &'a mut [u8] },
    /// `OUT` or `OUTS`.
    PioWrite { port: u16, size: usize, data: &'a [u8] },
    /// A load from no memory.
    MmioRead { gpa: u64, data: &'a mut [u8] },
    /// A store to no memory.
    MmioWrite { gpa: u64, data: &'a [u8] },
    /// The end of a level-triggered interrupt.
    Eoi { vector: u8 },
    /// Nothing that needs an answer: a window for interrupts, a signal.
    Nothing,
    /// The vCPU's dirty ring is full.
    DirtyRingFull,
    /// A triple fault.
    Shutdown,
    /// What the guest asks of a hypervisor's management.
    SystemEvent { kind: u32 },
    /// An access of an MSR that KVM does not do itself.
    Msr { index: u32, write: bool, error: &'a mut u8 },
    /// A debug exception, while the vCPU is debugged.
    Debug(kb::kvm_debug_exit_arch),
    /// KVM cannot go on; says why.
    Broken(String),
}

/// Enters the guest, and says why it came back.
///
/// # Errors
/// The kernel's; `EINTR` is a kick.
pub(crate) fn run(fd: &mut VcpuFd) -> io::Result<Exit<'_>> {
    if let Err(error) = fd.run() {
        return Err(errno(error));
    }
    Ok(decode(fd.get_kvm_run()))
}

fn decode(run: &mut kb::kvm_run) -> Exit<'_> {
    let page = std::ptr::from_mut(run).cast::<u8>();
    let reason = run.exit_reason;
    let fields = &mut run.__bindgen_anon_1;
    match reason {
        kb::KVM_EXIT_IO => {
            // SAFETY: the kernel says which member of the union it filled in.
            let io = unsafe { fields.io };
            let (size, count) = (usize::from(io.size), io.count as usize);
            // SAFETY: the kernel keeps this data in the pages after this one, all of which are mapped.
            let data =
                unsafe { std::slice::from_raw_parts_mut(page.add(io.data_offset as usize), size * count) };
            if u32::from(io.direction) == kb::KVM_EXIT_IO_IN {
                Exit::PioRead { port: io.port, size, data }
            } else {
                Exit::PioWrite { port: io.port, size, data }
            }
        }
        kb::KVM_EXIT_MMIO => {
            // SAFETY: the kernel says which member of the union it filled in.
            let mmio = unsafe { &mut fields.mmio };
            let data = &mut mmio.data[..mmio.len.min(8) as usize];
            if mmio.is_write == 0 {
                Exit::MmioRead { gpa: mmio.phys_addr, data }
            } else {
                Exit::MmioWrite { gpa: mmio.phys_addr, data }
            }
        }
        // SAFETY: the kernel says which member of the union it filled in.
        kb::KVM_EXIT_IOAPIC_EOI => Exit::Eoi { vector: unsafe { fields.eoi.vector } },
        kb::KVM_EXIT_IRQ_WINDOW_OPEN | kb::KVM_EXIT_INTR | kb::KVM_EXIT_HLT | kb::KVM_EXIT_SET_TPR => {
            Exit::Nothing
        }
        kb::KVM_EXIT_DIRTY_RING_FULL => Exit::DirtyRingFull,
        kb::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        kb::KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: the kernel says which member of the union it filled in.
            Exit::SystemEvent { kind: unsafe { fields.system_event.type_ } }
        }
        reason @ (kb::KVM_EXIT_X86_RDMSR | kb::KVM_EXIT_X86_WRMSR) => {
            // SAFETY: the kernel says which member of the union it filled in.
            let msr = unsafe { &mut fields.msr };
            Exit::Msr { index: msr.index, write: reason == kb::KVM_EXIT_X86_WRMSR, error: &mut msr.error }
        }
        // SAFETY: the kernel says which member of the union it filled in.
        kb::KVM_EXIT_DEBUG => Exit::Debug(unsafe { fields.debug.arch }),
        _ => Exit::Broken(broken(reason, fields)),
    }
}

/// A line on an exit that nothing can be done about.
fn broken(reason: u32, fields: &kb::kvm_run__bindgen_ty_1) -> String {
    match reason {
        kb::KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: the kernel says which member of the union it filled in.
            internal_error(unsafe { &fields.internal })
        }
        kb::KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: the kernel says which member of the union it filled in.
            let fail = unsafe { fields.fail_entry };
            let reason = fail.hardware_entry_failure_reason;
            format!(
                "the processor does not enter the guest: reason {reason:#x} on host processor {}",
                fail.cpu
            )
        }
        kb::KVM_EXIT_UNKNOWN => {
            // SAFETY: the kernel says which member of the union it filled in.
            let reason = unsafe { fields.hw.hardware_exit_reason };
            format!("KVM does not know the processor's exit reason {reason:#x}")
        }
        kb::KVM_EXIT_MEMORY_FAULT => {
            // SAFETY: the kernel says which member of the union it filled in.
            let fault = unsafe { fields.memory_fault };
            format!("KVM cannot access guest memory at {:#x} (flags {:#x})", fault.gpa, fault.flags)
        }
        other => format!("KVM ended the run for reason {other}, which nobody asked for"),
    }
}

fn internal_error(internal: &kb::kvm_run__bindgen_ty_1__bindgen_ty_13) -> String {
    let count = (internal.ndata as usize).min(internal.data.len());
    let data = &internal.data[..count];
    let what = match internal.suberror {
        kb::KVM_INTERNAL_ERROR_EMULATION => "it cannot emulate an instruction",
        kb::KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions came at once",
        kb::KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered",
        kb::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit was unexpected",
        _ => "unknown",
    };
    let mut line = format!("KVM internal error {}: {what}", internal.suberror);
    let emulation = internal.suberror == kb::KVM_INTERNAL_ERROR_EMULATION;
    // Its first word are flags; with the first flag, a length and the instruction's bytes follow.
    let has_bytes = data.first().is_some_and(|flags| flags & 1 != 0) && data.len() >= 3;
    if emulation && has_bytes {
        let bytes: Vec<u8> = data[1..].iter().flat_map(|word| word.to_le_bytes()).collect();
        let len = usize::from(bytes[0]).min(INSTRUCTION).min(bytes.len() - 1);
        line.push_str(", bytes");
        for byte in &bytes[1..=len] {
            let _ = write!(line, " {byte:02x}"); // into a string: cannot fail
        }
    } else if !data.is_empty() {
        let _ = write!(line, ", data {data:x?}");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn internal_errors_are_readable() {
        let mut internal = kb::kvm_run__bindgen_ty_1__bindgen_ty_13 {
            suberror: kb::KVM_INTERNAL_ERROR_EMULATION,
            ndata: 4,
            ..Default::default()
        };
        internal.data[0] = 1;
        internal.data[1] = u64::from_le_bytes([3, 0x0f, 0xc7, 0x0e, 0, 0, 0, 0]);
        assert_eq!(
            internal_error(&internal),
            "KVM internal error 1: it cannot emulate an instruction, bytes 0f c7 0e"
        );
        internal.ndata = u32::MAX;
        internal.suberror = 3;
        assert!(
            internal_error(&internal)
                .starts_with("KVM internal error 3: an event could not be delivered, data [1")
        );
        internal.ndata = 0;
        internal.suberror = 99;
        assert_eq!(internal_error(&internal), "KVM internal error 99: unknown");
    }
}
