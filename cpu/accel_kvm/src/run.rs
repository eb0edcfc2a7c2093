//! The run loop, and with it the whole of a vCPU.

use crate::debug::{self, Debugging};
use crate::exit::{self, Exit};
use crate::ioctl;
use crate::kick::Entered;
use crate::vcpu::KvmVcpu;
use accel::{
    AccelError, DebugLimits, DebugSettings, DebugStop, HaltReason, StopToken, Vcpu, VcpuBus, X86State,
};
use kvm_bindings::kvm_debug_exit_arch;
use kvm_ioctls::VcpuFd;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;

/// What the run loop does after an exit.
enum Next {
    /// Goes on.
    Run,
    /// Ends the run.
    End(HaltReason),
}

impl Vcpu for KvmVcpu {
    fn id(&self) -> u32 {
        self.kernel.id
    }

    fn run(&mut self, bus: &dyn VcpuBus, stop: &StopToken) -> HaltReason {
        let shared = self.kernel.fd.get_kvm_run();
        let flag = NonNull::from(&mut shared.immediate_exit);
        let kicker = self.kicker.clone();
        // SAFETY: the page lives as long as the vCPU, which outlives what is entered here; nothing else in
        // this crate touches the flag.
        let entered = match unsafe { kicker.enter(flag) } {
            Ok(entered) => entered,
            Err(error) => return HaltReason::InternalError(format!("no signal for kicks: {error}")),
        };
        let _attached = stop.attach(self.kicker.clone());
        if let Err(error) = self.thaw() {
            return HaltReason::InternalError(format!("guest time cannot go on: {error}"));
        }
        let reason = match self.debugging.begin(&self.vm.patches, &self.kernel.fd) {
            Ok(()) => self.loop_until_end(bus, stop, &entered),
            Err(error) => HaltReason::InternalError(format!("KVM does not debug the vCPU: {error}")),
        };
        self.debugging.end(&self.vm.patches, &self.kernel.fd);
        match self.freeze() {
            Ok(()) => reason,
            Err(error) => HaltReason::InternalError(format!("guest time cannot be stopped: {error}")),
        }
    }

    fn reset(&mut self) {
        self.reset_state();
    }

    fn save(&self) -> Result<X86State, AccelError> {
        self.save_state()
    }

    fn restore(&mut self, state: &X86State) -> Result<(), AccelError> {
        self.restore_state(state)
    }

    fn debug_limits(&self) -> DebugLimits {
        debug::limits(&self.vm)
    }

    fn set_debug(&mut self, settings: &DebugSettings) -> Result<(), AccelError> {
        self.debugging = Debugging::default();
        self.debugging = Debugging::start(settings, self.kernel.id, &self.kernel.fd, &self.vm)?;
        Ok(())
    }

    fn translate(&self, address: u64) -> Result<Option<u64>, AccelError> {
        debug::translate(&self.kernel.fd, address)
    }
}

impl KvmVcpu {
    fn loop_until_end(&mut self, bus: &dyn VcpuBus, stop: &StopToken, entered: &Entered<'_>) -> HaltReason {
        loop {
            entered.pass();
            if stop.is_stopped() {
                return self.finish(bus, entered).unwrap_or(HaltReason::Stopped);
            }
            if let Err(error) = self.offer_ext_int(bus) {
                return self.broken(&format!("KVM takes no interrupt: {error}"));
            }
            if let Next::End(reason) = self.step(bus, entered) {
                return reason;
            }
        }
    }

    /// Enters the guest once, and answers its exit.
    fn step(&mut self, bus: &dyn VcpuBus, entered: &Entered<'_>) -> Next {
        match enter(&mut self.kernel.fd, entered) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => Next::Run,
            Err(error) => Next::End(self.broken(&format!("KVM does not run the vCPU: {error}"))),
            Ok(Exit::Broken(why)) => Next::End(self.broken(&why)),
            Ok(exit) => match answer(exit, bus) {
                // Not every KVM says that a step is done whose instruction came out here.
                Answer::Accessed if self.debugging.is_stepping() => {
                    Next::End(self.finish(bus, entered).unwrap_or(HaltReason::Debug(DebugStop::Step)))
                }
                Answer::Accessed | Answer::Done => Next::Run,
                Answer::Eoi(vector) => {
                    self.vm.end_of_interrupt(vector);
                    Next::Run
                }
                Answer::DirtyRingFull => {
                    let emptied = self.vm.slots.lock().collect_dirty();
                    emptied.map_or_else(|error| Next::End(self.broken(&error.to_string())), |()| Next::Run)
                }
                Answer::Shutdown => Next::End(HaltReason::TripleFault),
                Answer::Debug(exit) => self.debugged(exit).map_or(Next::Run, Next::End),
                Answer::SystemEvent(kind) => {
                    Next::End(self.broken(&format!("the guest asked KVM for system event {kind}")))
                }
            },
        }
    }

    /// Has the kernel finish the instruction whose access was just answered, so that the state is one
    /// between instructions.
    fn finish(&mut self, bus: &dyn VcpuBus, entered: &Entered<'_>) -> Option<HaltReason> {
        loop {
            entered.kick_self();
            match enter(&mut self.kernel.fd, entered) {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => return None,
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Some(self.broken(&format!("KVM does not run the vCPU: {error}"))),
                // An access can have several parts, each with an exit of its own.
                Ok(Exit::Broken(why)) => return Some(self.broken(&why)),
                Ok(exit) => match answer(exit, bus) {
                    // A ring that is full is emptied when the log is taken, or in the next run.
                    Answer::Accessed | Answer::Done | Answer::DirtyRingFull => {}
                    Answer::Eoi(vector) => self.vm.end_of_interrupt(vector),
                    Answer::Shutdown => return Some(HaltReason::TripleFault),
                    Answer::Debug(exit) => {
                        if let Some(reason) = self.debugged(exit) {
                            return Some(reason);
                        }
                    }
                    Answer::SystemEvent(kind) => {
                        return Some(self.broken(&format!("the guest asked KVM for system event {kind}")));
                    }
                },
            }
        }
    }

    /// Deals with a debug exception; gives why the run ends, if it does.
    fn debugged(&mut self, exit: kvm_debug_exit_arch) -> Option<HaltReason> {
        match self.debugging.answer(exit, &self.kernel.fd, &self.vm) {
            Ok(stop) => stop.map(HaltReason::Debug),
            Err(error) => Some(self.broken(&format!("KVM does not debug the vCPU: {error}"))),
        }
    }

    /// Hands the 8259 pair's interrupt over if the vCPU can take it; else asks for an exit when it can.
    fn offer_ext_int(&mut self, bus: &dyn VcpuBus) -> io::Result<()> {
        if self.vm.ext_int.load(Ordering::SeqCst) && ready(&mut self.kernel.fd) {
            let _one_at_a_time = self.vm.acknowledging.lock();
            if self.vm.ext_int.load(Ordering::SeqCst) {
                let vector = bus.acknowledge_ext_int();
                ioctl::interrupt(&self.kernel.fd, vector)?;
                self.kernel.offered = Some(vector);
            }
        }
        let wanted = self.vm.ext_int.load(Ordering::SeqCst);
        self.kernel.fd.get_kvm_run().request_interrupt_window = wanted.into();
        Ok(())
    }

    /// An end of the run that is nobody's wish, with where the guest was.
    fn broken(&self, why: &str) -> HaltReason {
        HaltReason::InternalError(format!("{why}; {}", self.place()))
    }

    /// Where the guest is, for people.
    fn place(&self) -> String {
        let (Ok(regs), Ok(sregs)) = (self.kernel.fd.get_regs(), self.kernel.fd.get_sregs()) else {
            return "its state cannot be read".into();
        };
        let mode = match (sregs.cr0 & 1, sregs.efer >> 10 & 1, sregs.cs.l) {
            (0, ..) => "real mode",
            (_, 1, 1) => "64-bit mode",
            _ => "protected mode",
        };
        format!(
            "{mode}, CS {:#x} (base {:#x}), RIP {:#x}, RSP {:#x}, RFLAGS {:#x}, CR0 {:#x}, CR2 {:#x}, CR3 {:#x}, \
             CR4 {:#x}, EFER {:#x}",
            sregs.cs.selector,
            sregs.cs.base,
            regs.rip,
            regs.rsp,
            regs.rflags,
            sregs.cr0,
            sregs.cr2,
            sregs.cr3,
            sregs.cr4,
            sregs.efer
        )
    }
}

/// Enters the guest, and says why it came back.
fn enter<'a>(fd: &'a mut VcpuFd, entered: &Entered<'_>) -> io::Result<Exit<'a>> {
    let _passage = entered.passage();
    exit::run(fd)
}

fn ready(fd: &mut VcpuFd) -> bool {
    fd.get_kvm_run().ready_for_interrupt_injection != 0
}

/// What is left to do of an exit.
enum Answer {
    Done,
    /// The same, of an access that is part of an instruction.
    Accessed,
    Eoi(u8),
    DirtyRingFull,
    Shutdown,
    SystemEvent(u32),
    Debug(kvm_debug_exit_arch),
}

fn answer(exit: Exit<'_>, bus: &dyn VcpuBus) -> Answer {
    match exit {
        Exit::PioRead { port, size, data } => {
            data.chunks_exact_mut(size).for_each(|element| bus.pio_read(port, element));
            return Answer::Accessed;
        }
        Exit::PioWrite { port, size, data } => {
            data.chunks_exact(size).for_each(|element| bus.pio_write(port, element));
            return Answer::Accessed;
        }
        Exit::MmioRead { gpa, data } => {
            for (at, len) in pieces(data.len()) {
                bus.mmio_read(gpa + at as u64, &mut data[at..at + len]);
            }
            return Answer::Accessed;
        }
        Exit::MmioWrite { gpa, data } => {
            for (at, len) in pieces(data.len()) {
                bus.mmio_write(gpa + at as u64, &data[at..at + len]);
            }
            return Answer::Accessed;
        }
        // An MSR that nobody has: #GP.
        Exit::Msr { write, index, error } => {
            tracing::debug!("the guest {} MSR {index:#x}", if write { "writes" } else { "reads" });
            *error = 1;
        }
        Exit::Eoi { vector } => return Answer::Eoi(vector),
        Exit::Shutdown => return Answer::Shutdown,
        Exit::SystemEvent { kind } => return Answer::SystemEvent(kind),
        Exit::DirtyRingFull => return Answer::DirtyRingFull,
        Exit::Debug(exit) => return Answer::Debug(exit),
        Exit::Nothing | Exit::Broken(_) => {}
    }
    Answer::Done
}

/// Offsets and lengths of the parts of an access of `len` bytes, each of 1, 2, 4 or 8: what a page's end cuts
/// off has other lengths.
fn pieces(len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = len - at;
        let piece = if left == 0 { return None } else { 1 << left.min(8).ilog2() };
        at += piece;
        Some((at - piece, piece))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_cut_into_what_buses_know() {
        let all = |len| pieces(len).collect::<Vec<_>>();
        for len in [1, 2, 4, 8] {
            assert_eq!(all(len), [(0, len)]);
        }
        assert_eq!(all(0), []);
        assert_eq!(all(3), [(0, 2), (2, 1)]);
        assert_eq!(all(7), [(0, 4), (4, 2), (6, 1)]);
    }
}
