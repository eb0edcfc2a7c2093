//! A session as the protocol's crate wants it.

use crate::architecture::{RegisterBytes, RegisterNumber, X86};
use crate::monitor;
use crate::session::{Action, Debuggee, Session, SessionError, watchpoint};
use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread as threads;
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints as points;
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::target_description_xml_override::{
    TargetDescriptionXmlOverride, TargetDescriptionXmlOverrideOps,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};

/// The longest packet that a client may send, in bytes.
pub const PACKET_BYTES: usize = 16 << 10;
/// The protocol's numbers for memory that is not there, and for what cannot be asked.
const EFAULT: u8 = 14;
const EINVAL: u8 = 22;

/// The thread of a vCPU.
pub(crate) fn thread(vcpu: u32) -> Tid {
    Tid::new(vcpu as usize + 1).unwrap_or(Tid::MIN)
}

impl<D: Debuggee> Session<D> {
    /// The vCPU of a thread.
    fn vcpu(&self, thread: Tid) -> Result<usize, SessionError> {
        let vcpu = thread.get() - 1;
        if vcpu < self.debuggee.vcpus().len() { Ok(vcpu) } else { Err(SessionError::Thread(thread.get())) }
    }

    /// The vCPU of a thread that a register or memory is asked of.
    fn vcpu_of<T: Target<Error = SessionError>>(&self, thread: Tid) -> TargetResult<usize, T> {
        self.vcpu(thread).map_err(|_| TargetError::NonFatal)
    }
}

impl<D: Debuggee> Target for Session<D> {
    type Arch = X86;
    type Error = SessionError;

    fn base_ops(&mut self) -> BaseOps<'_, X86, SessionError> {
        BaseOps::MultiThread(self)
    }

    // Breakpoints that gdb puts into memory itself would be the guest's.
    fn guard_rail_implicit_sw_breakpoints(&self) -> bool {
        true
    }

    fn support_breakpoints(&mut self) -> Option<points::BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }

    fn support_target_description_xml_override(
        &mut self,
    ) -> Option<TargetDescriptionXmlOverrideOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> threads::MultiThreadBase for Session<D> {
    fn read_registers(&mut self, regs: &mut RegisterBytes, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu_of::<Self>(tid)?;
        let layout = self.layout.clone();
        let state = self.state(vcpu).map_err(|_| TargetError::NonFatal)?;
        regs.0 = layout.read_all(state);
        Ok(())
    }

    fn write_registers(&mut self, regs: &RegisterBytes, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu_of::<Self>(tid)?;
        let written = self.change(vcpu, |layout, state| layout.write_all(state, &regs.0));
        written.map_err(|_| TargetError::NonFatal)
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, address: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let vcpu = self.vcpu_of::<Self>(tid)?;
        // An answer is as long as a packet at most, in two digits a byte. The protocol's crate would read what was
        // asked for beyond that piece by piece, to the end of addresses and on.
        if data.len() > PACKET_BYTES / 2 {
            return Err(TargetError::Errno(EINVAL));
        }
        match self.read_memory(vcpu, address, data) {
            0 if !data.is_empty() => Err(TargetError::Errno(EFAULT)),
            read => Ok(read),
        }
    }

    fn write_addrs(&mut self, address: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu_of::<Self>(tid)?;
        if self.write_memory(vcpu, address, data) { Ok(()) } else { Err(TargetError::Errno(EFAULT)) }
    }

    fn list_active_threads(&mut self, each: &mut dyn FnMut(Tid)) -> Result<(), SessionError> {
        (0..self.debuggee.vcpus().len() as u32).for_each(|vcpu| each(thread(vcpu)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<threads::MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> SingleRegisterAccess<Tid> for Session<D> {
    fn read_register(
        &mut self,
        tid: Tid,
        number: RegisterNumber,
        buffer: &mut [u8],
    ) -> TargetResult<usize, Self> {
        let vcpu = self.vcpu_of::<Self>(tid)?;
        let layout = self.layout.clone();
        let state = self.state(vcpu).map_err(|_| TargetError::NonFatal)?;
        let bytes = layout.read(state, number.0).ok_or(TargetError::NonFatal)?;
        buffer.get_mut(..bytes.len()).ok_or(TargetError::NonFatal)?.copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn write_register(&mut self, tid: Tid, number: RegisterNumber, value: &[u8]) -> TargetResult<(), Self> {
        let vcpu = self.vcpu_of::<Self>(tid)?;
        let written = self.change(vcpu, |layout, state| layout.write(state, number.0, value));
        written.map_err(|_| TargetError::NonFatal)
    }
}

impl<D: Debuggee> ThreadExtraInfo for Session<D> {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, SessionError> {
        let vcpu = self.vcpu(tid)?;
        let state = self.debuggee.vcpus()[vcpu].save()?;
        let text = format!("vCPU {vcpu}, {}", monitor::activity(&state));
        let len = text.len().min(buffer.len());
        buffer[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl<D: Debuggee> threads::MultiThreadResume for Session<D> {
    // Whoever drives the session lets it go on.
    fn resume(&mut self) -> Result<(), SessionError> {
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), SessionError> {
        self.clear_actions();
        Ok(())
    }

    // Signals are a host program's matter; a machine has none.
    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), SessionError> {
        let vcpu = self.vcpu(tid)?;
        self.set_action(vcpu, Action::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<threads::MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_range_step(&mut self) -> Option<threads::MultiThreadRangeSteppingOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<threads::MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> threads::MultiThreadSingleStep for Session<D> {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), SessionError> {
        let vcpu = self.vcpu(tid)?;
        self.set_action(vcpu, Action::Step);
        Ok(())
    }
}

impl<D: Debuggee> threads::MultiThreadRangeStepping for Session<D> {
    fn set_resume_action_range_step(&mut self, tid: Tid, start: u64, end: u64) -> Result<(), SessionError> {
        let vcpu = self.vcpu(tid)?;
        self.set_action(vcpu, Action::Range(start, end));
        Ok(())
    }
}

impl<D: Debuggee> threads::MultiThreadSchedulerLocking for Session<D> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), SessionError> {
        self.lock();
        Ok(())
    }
}

impl<D: Debuggee> points::Breakpoints for Session<D> {
    fn support_sw_breakpoint(&mut self) -> Option<points::SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<points::HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<points::HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl<D: Debuggee> points::SwBreakpoint for Session<D> {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.change_points(|points| {
            points.software.insert(address);
        }))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.change_points(|points| {
            points.software.remove(&address);
        }))
    }
}

impl<D: Debuggee> points::HwBreakpoint for Session<D> {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.change_points(|points| {
            points.hardware.insert(address);
        }))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.change_points(|points| {
            points.hardware.remove(&address);
        }))
    }
}

impl<D: Debuggee> points::HwWatchpoint for Session<D> {
    fn add_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: points::WatchKind,
    ) -> TargetResult<bool, Self> {
        if len == 0 || address.checked_add(len - 1).is_none() {
            return Ok(false);
        }
        let point = watchpoint(address, len, kind);
        Ok(self.change_points(|points| points.watched.push(point)))
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: points::WatchKind,
    ) -> TargetResult<bool, Self> {
        let point = watchpoint(address, len, kind);
        Ok(self.change_points(|points| {
            if let Some(at) = points.watched.iter().position(|watched| *watched == point) {
                points.watched.remove(at);
            }
        }))
    }
}

impl<D: Debuggee> MonitorCmd for Session<D> {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), SessionError> {
        out.write_raw(monitor::execute(self, &String::from_utf8_lossy(command)).as_bytes());
        Ok(())
    }
}

impl<D: Debuggee> TargetDescriptionXmlOverride for Session<D> {
    fn target_description_xml(
        &self,
        annex: &[u8],
        offset: u64,
        length: usize,
        buffer: &mut [u8],
    ) -> TargetResult<usize, Self> {
        if annex != b"target.xml" {
            return Err(TargetError::NonFatal);
        }
        let text = self.layout.description().as_bytes();
        let rest = usize::try_from(offset).ok().and_then(|offset| text.get(offset..)).unwrap_or_default();
        let len = rest.len().min(length).min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}
