//! What executes guest instructions, as the machine sees it: the accelerator traits and the neutral CPU
//! state. No back end lives here.
//!
//! An [`Accelerator`] makes an [`AccelVm`], which makes [`Vcpu`]s. The machine owns the threads: it calls
//! [`Vcpu::run`] on a thread per vCPU; the exit loop lives inside the back end and calls the [`VcpuBus`].
//! A [`StopToken`] ends runs from any thread. [`X86State`] is everything a vCPU knows, in a format that
//! belongs to no back end, so that a VM saved under one runs on under another.

mod debug;
mod error;
mod external;
mod spec;
mod state;
mod stop;
mod svm;

pub use debug::{DebugLimits, DebugSettings, DebugStop, WatchKind, Watchpoint};
pub use error::AccelError;
pub use external::{External, Idle, Moment};
pub use spec::{CpuSpec, CpuSpecError, CpuidLeaf, Tier, VmSpec};
pub use state::{
    EventState, FpuState, InjectedException, LapicState, LvtState, MpState, Segment, TableRegister,
    X86_STATE_KIND, X86_STATE_VERSION, X86State,
};
pub use stop::{Attachment, Kick, StopToken};
pub use svm::{SvmGuestState, SvmHostState, SvmState};

use clock::TimerService;
use guest_memory::GuestMemory;
use irq::{MsiMessage, MsiTarget};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// A way to execute guest instructions.
pub trait Accelerator: Send + Sync {
    /// Its name, as on a command line.
    fn name(&self) -> &'static str;

    /// The CPU models it offers: name and one line of description, the default first.
    fn cpu_models(&self) -> Vec<(String, String)>;

    /// What CPUID says to the only vCPU of a VM with this processor, but for what depends on its state: the leaves that
    /// say something, ascending.
    ///
    /// # Errors
    /// [`AccelError`] if there is no such processor here.
    fn cpuid(&self, cpu: &CpuSpec) -> Result<Vec<CpuidLeaf>, AccelError>;

    /// A VM without vCPUs. Guest time is that of the clock of `timers`. If that counts instructions, the vCPU calls
    /// timers back at exact counts, on its own thread, and everything that the guest sees comes from
    /// [`AccelVm::set_external`] or is a consequence of what it does.
    ///
    /// # Errors
    /// [`AccelError`] if the spec is not one that this accelerator can do, or the host refuses.
    fn create_vm(
        &self,
        spec: &VmSpec,
        memory: &GuestMemory,
        timers: &Arc<TimerService>,
    ) -> Result<Arc<dyn AccelVm>, AccelError>;
}

/// Told of end-of-interrupt messages, with the vector: what an I/O APIC needs to let level-triggered
/// interrupts through again.
pub type EoiListener = Arc<dyn Fn(u8) + Send + Sync>;

/// One VM's part of an accelerator.
pub trait AccelVm: Send + Sync {
    /// Makes vCPU number `id`, which is also its APIC id; number 0 is the bootstrap processor. Each can be
    /// made once. It is as after power-on: number 0 at the reset vector, the others waiting for a SIPI.
    ///
    /// # Errors
    /// [`AccelError`] if there is no such vCPU, or it exists, or the host refuses.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, AccelError>;

    /// Where message-signalled interrupts go: devices' and the I/O APIC's.
    fn msi_target(&self) -> Arc<dyn MsiTarget>;

    /// Drives the INTR output of the 8259 pair, which is wired to every local APIC's LINT0. A vCPU that
    /// takes the interrupt calls [`VcpuBus::acknowledge_ext_int`].
    fn set_ext_int(&self, level: bool);

    /// Sets who is told of ends of level-triggered interrupts. The listener is called on vCPU threads, and
    /// may signal interrupts.
    fn set_eoi_listener(&self, listener: EoiListener);

    /// Says that guest physical addresses `range` changed between memory, memory that processors only read
    /// ([`GuestMemory::set_read_only`]) and device, or to other memory: cached translations of them are dropped
    /// before this returns to a vCPU's next instruction.
    fn memory_changed(&self, range: Range<u64>);

    /// Begins or ends dirty logging, in the accelerator and in the [`GuestMemory`].
    fn set_dirty_log(&self, on: bool);

    /// Brings everything that vCPUs wrote into the [`GuestMemory`]'s dirty log, takes the log, and calls
    /// `page` with the address of each dirty page.
    fn take_dirty(&self, page: &mut dyn FnMut(u64));

    /// Guest writes that signal an event without a call of the bus. `None` where they always call it.
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }

    /// Interrupts raised by events. `None` where somebody must read the event and call
    /// [`AccelVm::msi_target`].
    fn irqfd(&self) -> Option<Arc<dyn Irqfd>> {
        None
    }

    /// The rate of the guest's time-stamp counter.
    fn tsc_hertz(&self) -> u64;

    /// Sets, once and before the vCPU runs, what comes from outside to a VM whose clock counts instructions.
    fn set_external(&self, external: Arc<dyn External>) {
        let _ = external;
    }
}

/// A place that a guest writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DoorbellAddress {
    /// A guest physical address.
    Mmio(u64),
    /// An I/O port.
    Pio(u16),
}

/// Guest writes that signal an event (KVM's ioeventfd).
pub trait Doorbells: Send + Sync {
    /// Has writes of `len` bytes (0: any) to `address`, and if `data` is given of that value only, signal
    /// `event`.
    ///
    /// # Errors
    /// [`AccelError::Host`] if the host refuses.
    fn register(
        &self,
        address: DoorbellAddress,
        len: u32,
        data: Option<u64>,
        event: BorrowedFd<'_>,
    ) -> Result<(), AccelError>;

    /// Takes back a registration made with the same arguments.
    ///
    /// # Errors
    /// [`AccelError::Host`] if the host refuses.
    fn unregister(
        &self,
        address: DoorbellAddress,
        len: u32,
        data: Option<u64>,
        event: BorrowedFd<'_>,
    ) -> Result<(), AccelError>;
}

/// Interrupts raised by events (KVM's irqfd).
pub trait Irqfd: Send + Sync {
    /// Routes `event` to an interrupt. Nothing is delivered until [`IrqfdRoute::set`].
    ///
    /// # Errors
    /// [`AccelError::Host`] if the host refuses.
    fn route(&self, event: BorrowedFd<'_>) -> Result<Box<dyn IrqfdRoute>, AccelError>;
}

/// One event's route to an interrupt. Dropping it ends it.
pub trait IrqfdRoute: Send + Sync {
    /// Delivers `message` whenever the event is signalled; `None` keeps the event pending.
    ///
    /// # Errors
    /// [`AccelError::Host`] if the host refuses.
    fn set(&self, message: Option<MsiMessage>) -> Result<(), AccelError>;
}

/// What a vCPU reaches outside itself. Called on the vCPU's thread, in the middle of an instruction; what
/// it does to the VM takes effect from the next instruction on.
pub trait VcpuBus: Sync {
    /// A load of 1, 2, 4 or 8 bytes from guest physical addresses that are no RAM.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// A store to guest physical addresses that are no RAM, or are only read.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
    /// `IN` of 1, 2 or 4 bytes.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// `OUT`.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// The interrupt acknowledge cycle: the 8259 pair's vector.
    fn acknowledge_ext_int(&self) -> u8;
}

/// Why [`Vcpu::run`] returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HaltReason {
    /// The token said stop.
    Stopped,
    /// The processor shut down: a fault while delivering a double fault. Boards answer with a reset.
    TripleFault,
    /// What [`Vcpu::set_debug`] asked for has come.
    Debug(DebugStop),
    /// The back end cannot go on. The vCPU's state may be inconsistent.
    InternalError(String),
}

/// One virtual processor. It belongs to the thread that calls it.
pub trait Vcpu: Send {
    /// Its number and APIC id.
    fn id(&self) -> u32;

    /// Executes guest instructions until `stop` says stop or the processor cannot go on. A halted
    /// processor, and one that waits for a SIPI, waits inside. Returns at an instruction boundary.
    fn run(&mut self, bus: &dyn VcpuBus, stop: &StopToken) -> HaltReason;

    /// The state after power-on, its local APIC's included.
    fn reset(&mut self);

    /// All state that a guest can see. To be called while no vCPU of the VM runs.
    ///
    /// # Errors
    /// [`AccelError::Host`] if the host refuses.
    fn save(&self) -> Result<X86State, AccelError>;

    /// Takes over a state. It is untrusted input. To be called while no vCPU of the VM runs.
    ///
    /// # Errors
    /// [`AccelError::BadState`] if it is no state of a processor like this one; the vCPU is then as after
    /// [`Vcpu::reset`].
    fn restore(&mut self, state: &X86State) -> Result<(), AccelError>;

    /// What of [`Vcpu::set_debug`] there is.
    fn debug_limits(&self) -> DebugLimits;

    /// How the next runs are debugged, instead of how they were until now. Resets and restored states leave it. To be
    /// called while the vCPU does not run.
    ///
    /// # Errors
    /// [`AccelError::Debug`] if the accelerator cannot do that, or not now; nothing is debugged then.
    fn set_debug(&mut self, settings: &DebugSettings) -> Result<(), AccelError>;

    /// The guest physical address that the linear address `address` is mapped to now, whatever the rights, if it is.
    /// To be called while the vCPU does not run. The guest's page tables stay as they are, but that an accelerator may
    /// mark entries as accessed.
    ///
    /// # Errors
    /// [`AccelError::Host`] if the host refuses.
    fn translate(&self, address: u64) -> Result<Option<u64>, AccelError>;
}
