//! Events and a guest: intercepted exceptions and interrupts, virtual interrupts, events that the host injects (AMD
//! APM volume 2, 15.12, 15.13, 15.20 and 15.21).

use super::{Exit, code};
use crate::exceptions::{Event, Source};
use crate::{Core, Cpu, Exception, Trap, flags, shadow, vector};

/// EXITINTINFO and EVENTINJ: the event's type, whether there is an error code, and an event at all.
const TYPE: u32 = 8;
const HAS_ERROR: u64 = 1 << 11;
const VALID: u64 = 1 << 31;

/// Types of events.
const INTERRUPT: u64 = 0;
const NMI: u64 = 2;
const EXCEPTION: u64 = 3;
const SOFTWARE: u64 = 4;

/// What is to be done about interrupts between two instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InterruptAction {
    /// Nothing.
    None,
    /// The interrupt from outside goes to a handler.
    Physical,
    /// [`Core::intercept_interrupt`]: the host takes it.
    Intercept,
    /// [`Core::virtual_interrupt`].
    Virtual,
}

/// Whether what a VMCB asks to inject is an event.
pub(super) fn may_inject(injected: u64) -> bool {
    if injected & VALID == 0 {
        return true;
    }
    let vector = injected as u8;
    match injected >> TYPE & 7 {
        EXCEPTION => vector < 32 && vector != vector::NMI,
        kind => matches!(kind, INTERRUPT | NMI | SOFTWARE),
    }
}

impl Event {
    /// As EXITINTINFO has it.
    fn exit_information(&self) -> u64 {
        let kind = match self.source {
            Source::External if self.vector == vector::NMI => NMI,
            Source::External => INTERRUPT,
            Source::Software if !matches!(self.vector, vector::BP | vector::OF) => SOFTWARE,
            _ => EXCEPTION,
        };
        let error = self.error.map_or(0, |error| HAS_ERROR | u64::from(error) << 32);
        VALID | kind << TYPE | u64::from(self.vector) | error
    }
}

impl Cpu {
    /// What is to be done about interrupts now, given whether one from outside waits.
    pub fn interrupt_action(&self, waits: bool) -> InterruptAction {
        const SHADOW: u8 = shadow::STI | shadow::MOV_SS;
        let open = self.rflags & flags::IF != 0 && self.interrupt_shadow & SHADOW == 0;
        if !self.svm.guest {
            let taken = waits && open && self.svm.gif;
            return if taken { InterruptAction::Physical } else { InterruptAction::None };
        }
        let interrupts = self.svm.control.interrupts;
        let host_open = if interrupts.masking() { self.svm.host.rflags & flags::IF != 0 } else { open };
        if waits && host_open && self.svm.gif {
            return match self.svm.intercepts(code::INTR) {
                true => InterruptAction::Intercept,
                false => InterruptAction::Physical,
            };
        }
        if open && interrupts.waits() { InterruptAction::Virtual } else { InterruptAction::None }
    }

    /// Whether there is something to do about interrupts as soon as the interrupt flag is set and no shadow of an
    /// instruction holds them off, given whether one from outside waits.
    pub fn wants_interrupt_window(&self, waits: bool) -> bool {
        if !self.svm.guest {
            return waits && self.svm.gif;
        }
        let interrupts = self.svm.control.interrupts;
        interrupts.waits() || (waits && self.svm.gif && !interrupts.masking())
    }

    /// Whether NMIs can be taken as far as the global interrupt flag goes.
    pub fn global_interrupts(&self) -> bool {
        self.svm.gif
    }
}

impl Core<'_> {
    /// Leaves the guest for an interrupt from outside, which waits still.
    ///
    /// # Errors
    /// [`Trap::TripleFault`] alone.
    pub fn intercept_interrupt(&mut self) -> Result<(), Trap> {
        self.exit_guest(Exit::plain(code::INTR))
    }

    /// Leaves the guest for an NMI, if it is intercepted; the NMI waits still then.
    ///
    /// # Errors
    /// [`Trap::TripleFault`] alone.
    pub fn intercept_nmi(&mut self) -> Result<bool, Trap> {
        self.intercept_event(code::NMI)
    }

    /// Leaves the guest for an SMI, if it is intercepted; the SMI waits still then. There is no system management mode
    /// that it could be taken to else.
    ///
    /// # Errors
    /// [`Trap::TripleFault`] alone.
    pub fn intercept_smi(&mut self) -> Result<bool, Trap> {
        self.intercept_event(code::SMI)
    }

    /// Leaves the guest for an INIT, if it is intercepted; the INIT waits still then.
    ///
    /// # Errors
    /// [`Trap::TripleFault`] alone.
    pub fn intercept_init(&mut self) -> Result<bool, Trap> {
        self.intercept_event(code::INIT)
    }

    fn intercept_event(&mut self, code: u64) -> Result<bool, Trap> {
        let intercepted = self.cpu.svm.intercepts(code);
        if intercepted {
            self.exit_guest(Exit::plain(code))?;
        }
        Ok(intercepted)
    }

    /// Raises #SX for an INIT if VM_CR asks for that (AMD APM volume 2, 15.28); the INIT is done with then.
    ///
    /// # Errors
    /// [`Trap::TripleFault`].
    pub fn redirect_init(&mut self) -> Result<bool, Trap> {
        const SX: u8 = 30;
        let redirects = self.redirects_init();
        if redirects {
            self.deliver(Exception { vector: SX, error: Some(1), address: 0 })?;
        }
        Ok(redirects)
    }

    /// Delivers the guest's virtual interrupt, or leaves the guest if that is intercepted.
    ///
    /// # Errors
    /// [`Trap::TripleFault`] alone.
    pub fn virtual_interrupt(&mut self) -> Result<(), Trap> {
        if self.intercept_event(code::VINTR)? {
            return Ok(());
        }
        let vector = self.cpu.svm.control.interrupts.vector();
        self.cpu.svm.control.interrupts.acknowledge();
        self.interrupt(vector)
    }

    /// Delivers what the host injects into the guest that it has just entered.
    pub(super) fn inject(&mut self, injected: u64, next_rip: u64) -> Result<(), Trap> {
        if injected & VALID == 0 {
            return Ok(());
        }
        let kind = injected >> TYPE & 7;
        // That of an NMI does not count, and hypervisors leave it out.
        let vector = if kind == NMI { vector::NMI } else { injected as u8 };
        let error = (injected & HAS_ERROR != 0).then_some((injected >> 32) as u32);
        let instruction = kind == SOFTWARE || kind == EXCEPTION && matches!(vector, vector::BP | vector::OF);
        let source = match kind {
            SOFTWARE => Source::Software,
            EXCEPTION => Source::Hardware,
            _ => Source::External,
        };
        let fault = kind == EXCEPTION && !instruction && vector != vector::DB;
        let event = Event {
            vector,
            source,
            error: error.filter(|_| kind == EXCEPTION),
            return_rip: if instruction { next_rip } else { self.cpu.rip },
            flags: self.cpu.rflags | if fault { flags::RF } else { 0 },
        };
        self.deliver_event(event)
    }

    /// The #VMEXIT that an exception of the guest makes, if it is intercepted.
    pub(crate) fn intercepted_exception(&self, exception: &Exception) -> Option<Exit> {
        if exception.vector >= 32 || !self.cpu.svm.intercepts(code::EXCEPTION + u64::from(exception.vector)) {
            return None;
        }
        let error = exception.error.unwrap_or(0);
        let page_fault = exception.vector == vector::PF;
        Some(Exit {
            info1: u64::from(error),
            info2: if page_fault { exception.address } else { 0 },
            data_access: page_fault && error & crate::page_fault::FETCH == 0,
            ..Exit::plain(code::EXCEPTION + u64::from(exception.vector))
        })
    }

    /// Notes that an event is on its way to a handler of the guest.
    pub(crate) fn delivery_begins(&mut self, event: &Event) {
        if self.cpu.svm.guest {
            self.cpu.svm.delivering = event.exit_information();
        }
    }

    /// A triple fault, which the host of a guest may intercept.
    ///
    /// # Errors
    /// [`Trap::TripleFault`] if it does not.
    pub(crate) fn shut_down(&mut self) -> Result<(), Trap> {
        if self.cpu.svm.intercepts(code::SHUTDOWN) {
            return self.exit_guest(Exit::plain(code::SHUTDOWN));
        }
        Err(Trap::TripleFault)
    }
}
