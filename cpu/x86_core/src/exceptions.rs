//! Exceptions and interrupts: double and triple faults, and the way into a handler in each mode (Intel SDM
//! volume 3, chapter 6).

mod legacy;
mod long;

#[cfg(test)]
mod tests;

use crate::{Core, Exception, Msrs, Seg, Trap, flags, shadow, vector};

/// What brought an event about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A fault or abort of the processor.
    Hardware,
    /// An NMI, or an interrupt from outside.
    External,
    /// INT n, INT3, INTO: the gate's DPL is checked.
    Software,
    /// INT1.
    Privileged,
}

/// An event on its way to a handler.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Event {
    pub(crate) vector: u8,
    pub(crate) source: Source,
    pub(crate) error: Option<u32>,
    /// What is pushed as return address.
    pub(crate) return_rip: u64,
    /// What is pushed as flags.
    pub(crate) flags: u64,
}

impl Event {
    /// The error code that names the IDT entry.
    pub(crate) fn idt_fault(self, fault: u8) -> Trap {
        Trap::with_error(fault, u32::from(self.vector) * 8 + 2)
    }
}

/// Exceptions that make a double fault of another such (Intel SDM volume 3, table 6-4).
fn is_contributory(vector: u8) -> bool {
    matches!(vector, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP)
}

/// Whether `second`, raised while `first` was being delivered, makes a double fault.
fn makes_double_fault(first: u8, second: u8) -> bool {
    match first {
        vector::PF => second == vector::PF || is_contributory(second),
        _ => is_contributory(first) && is_contributory(second),
    }
}

/// Exceptions in the delivery of one another before it is given up. Double faults end real chains sooner; but
/// a task whose TSS asks for a debug trap, and whose debug handler is itself, would go on for ever.
const LONGEST_CHAIN: usize = 8;

impl Core<'_> {
    /// Does what is due after an instruction that did not complete: delivers the exception, or leaves the guest.
    ///
    /// # Errors
    /// [`Trap::TripleFault`] alone.
    pub fn deliver_trap(&mut self, trap: Trap) -> Result<(), Trap> {
        match trap {
            Trap::Exception(exception) => self.deliver(exception),
            Trap::Intercepted => self.leave_guest(),
            Trap::TripleFault => self.shut_down(),
        }
    }

    /// Delivers an exception, and what arises from that: further exceptions, a double fault, a #VMEXIT.
    ///
    /// # Errors
    /// [`Trap::TripleFault`] alone.
    pub fn deliver(&mut self, exception: Exception) -> Result<(), Trap> {
        let mut current = exception;
        for _ in 0..LONGEST_CHAIN {
            if let Some(exit) = self.intercepted_exception(&current) {
                return self.exit_guest(exit);
            }
            if current.vector == vector::PF {
                self.cpu.cr2 = current.address;
            }
            let fault = !matches!(current.vector, vector::DB | vector::NMI | vector::BP | vector::OF);
            let event = Event {
                vector: current.vector,
                source: Source::Hardware,
                error: current.error,
                return_rip: self.cpu.rip,
                flags: self.cpu.rflags | if fault { flags::RF } else { 0 },
            };
            if current.vector == vector::DB {
                // General-detect is switched off for the handler, and no branch of it is recorded.
                self.cpu.dr[7] &= !(1 << 13);
                self.cpu.msrs.debugctl &= !Msrs::LAST_BRANCH_RECORDS;
            }
            let next = match self.transfer_to_handler(event) {
                Ok(()) => return Ok(()),
                Err(Trap::Exception(next)) => next,
                Err(trap) => return self.deliver_trap(trap),
            };
            if current.vector == vector::DF {
                return self.shut_down();
            }
            let double = makes_double_fault(current.vector, next.vector);
            if double && next.vector == vector::PF {
                // CR2 tells of it even so.
                self.cpu.cr2 = next.address;
            }
            current =
                if double { Exception { vector: vector::DF, error: Some(0), address: 0 } } else { next };
        }
        self.shut_down()
    }

    /// Delivers an interrupt from outside, or the exception that its delivery raises.
    ///
    /// # Errors
    /// [`Trap::TripleFault`] alone.
    pub fn interrupt(&mut self, vector: u8) -> Result<(), Trap> {
        self.cpu.halted = false;
        self.deliver_event(Event {
            vector,
            source: Source::External,
            error: None,
            return_rip: self.cpu.rip,
            flags: self.cpu.rflags,
        })
    }

    /// Delivers an event, or what its delivery brings about.
    pub(crate) fn deliver_event(&mut self, event: Event) -> Result<(), Trap> {
        let nested = match self.transfer_to_handler(event) {
            Err(Trap::Exception(nested)) => nested,
            Err(trap) => return self.deliver_trap(trap),
            Ok(()) => return Ok(()),
        };
        let exception = event.source == Source::Hardware;
        if exception && event.vector == vector::DF {
            return self.shut_down();
        }
        if exception && makes_double_fault(event.vector, nested.vector) {
            if nested.vector == vector::PF {
                self.cpu.cr2 = nested.address;
            }
            return self.deliver(Exception { vector: vector::DF, error: Some(0), address: 0 });
        }
        self.deliver(nested)
    }

    /// Delivers a non-maskable interrupt; further ones wait for IRET.
    ///
    /// # Errors
    /// [`Trap::TripleFault`] alone.
    pub fn nmi(&mut self) -> Result<(), Trap> {
        let result = self.interrupt(vector::NMI);
        self.cpu.interrupt_shadow |= shadow::NMI;
        result
    }

    /// INT n, INT3 and INTO; `next_rip` is the address of the instruction that follows.
    ///
    /// # Errors
    /// The fault of the instruction.
    pub fn software_interrupt(&mut self, vector: u8, next_rip: u64) -> Result<(), Trap> {
        if self.vm86() && self.cpu.iopl() < 3 {
            return Err(Trap::gp(0));
        }
        self.instruction_interrupt(vector, next_rip, Source::Software)
    }

    /// INT3 and INTO, which virtual-8086 mode lets through, and INT1.
    pub(crate) fn instruction_interrupt(
        &mut self,
        vector: u8,
        next_rip: u64,
        source: Source,
    ) -> Result<(), Trap> {
        let event =
            Event { vector, source, error: None, return_rip: next_rip, flags: self.cpu.rflags & !flags::RF };
        self.transfer_to_handler(event)
    }

    /// Goes to the handler, or leaves the state as it was and says what hindered.
    fn transfer_to_handler(&mut self, event: Event) -> Result<(), Trap> {
        self.delivery_begins(&event);
        let result = if self.cpu.long_mode() {
            self.long_handler(event)
        } else if self.cpu.cr0 & crate::cr0::PE != 0 {
            self.protected_handler(event)
        } else {
            self.real_handler(event)
        };
        match result {
            Ok(()) => {
                self.cpu.interrupt_shadow &= shadow::NMI;
                self.cpu.svm.delivering = 0;
                Ok(())
            }
            Err(Trap::Exception(mut nested)) => {
                // EXT: the event was none of the program's own making.
                if event.source != Source::Software
                    && matches!(nested.vector, vector::TS | vector::NP | vector::SS | vector::GP)
                {
                    nested.error = nested.error.map(|error| error | 1);
                }
                Err(Trap::Exception(nested))
            }
            other => other,
        }
    }

    /// The interrupt vector table of real mode.
    fn real_handler(&mut self, event: Event) -> Result<(), Trap> {
        let offset = u32::from(event.vector) * 4;
        if offset + 3 > u32::from(self.cpu.idtr.limit) {
            return Err(event.idt_fault(vector::GP));
        }
        let table = self.system_address(self.cpu.idtr.base.wrapping_add(u64::from(offset)));
        let target: u32 = self.read_linear(table, self.system_bank())?;
        let old_stack = self.cpu.regs[crate::reg::RSP];
        let code = self.cpu.segments[Seg::Cs as usize].selector;
        let pushed = self
            .push(2, event.flags & !flags::RF)
            .and_then(|()| self.push(2, u64::from(code)))
            .and_then(|()| self.push(2, event.return_rip));
        if let Err(trap) = pushed {
            self.cpu.regs[crate::reg::RSP] = old_stack;
            return Err(trap);
        }
        self.set_rflags(self.cpu.rflags & !(flags::IF | flags::TF | flags::AC | flags::RF));
        self.load_real_segment(Seg::Cs, (target >> 16) as u16);
        self.cpu.rip = u64::from(target & 0xffff);
        self.mode_changed();
        Ok(())
    }
}
