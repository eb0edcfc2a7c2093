//! What one client has set up, and what its packets do.

use crate::registers::{Architecture, Layout, Refused, code_address};
use accel::{AccelError, DebugSettings, DebugStop, Vcpu, WatchKind, Watchpoint, X86State};
use guest_memory::GuestMemory;
use std::collections::BTreeSet;

/// Breakpoints, and watchpoints, of a client at most.
const MOST_POINTS: usize = 1024;
const PAGE: u64 = 4096;
/// XCR0: the guest uses AVX.
const AVX: u64 = 1 << 2;

/// What is debugged. It stands still whenever a session looks at it.
pub trait Debuggee {
    /// Its processors, by number.
    fn vcpus(&self) -> &[Box<dyn Vcpu>];
    /// The same, to change their state.
    fn vcpus_mut(&mut self) -> &mut [Box<dyn Vcpu>];
    /// Its memory.
    fn memory(&self) -> &GuestMemory;
    /// Makes it as after power-on.
    ///
    /// # Errors
    /// Why it cannot be done, in one line.
    fn reset(&mut self) -> Result<(), String>;
}

/// What ends a connection.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The accelerator refused what never should be.
    #[error(transparent)]
    Accel(#[from] AccelError),
    /// The client names a thread that is none.
    #[error("there is no thread {0}")]
    Thread(usize),
}

/// What a vCPU does when the client lets the VM go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Continue,
    Step,
    /// Steps while it is in this range of addresses.
    Range(u64, u64),
}

/// Breakpoints and watchpoints.
#[derive(Debug, Clone, Default)]
pub(crate) struct Points {
    pub(crate) software: BTreeSet<u64>,
    pub(crate) hardware: BTreeSet<u64>,
    pub(crate) watched: Vec<Watchpoint>,
}

/// One client's session with a VM.
pub struct Session<D> {
    pub(crate) debuggee: D,
    pub(crate) layout: Layout,
    pub(crate) points: Points,
    /// What the next client is to take the processors for.
    pub(crate) architecture: Architecture,
    /// Whether single steps take interrupts.
    pub(crate) step_interrupts: bool,
    actions: Vec<Option<Action>>,
    /// Whether vCPUs without an action stand still.
    locked: bool,
    /// The processors' states, as far as they were asked for since they last ran.
    states: Vec<Option<Box<X86State>>>,
}

impl<D: Debuggee> Session<D> {
    /// A session with nothing set up yet, whose client takes the processors for what `architecture` says.
    pub fn new(debuggee: D, architecture: Architecture) -> Self {
        let count = debuggee.vcpus().len();
        let avx = debuggee
            .vcpus()
            .first()
            .and_then(|vcpu| vcpu.save().ok())
            .is_some_and(|state| state.xcr0 & AVX != 0);
        Self {
            debuggee,
            layout: Layout::new(architecture, avx),
            points: Points::default(),
            architecture,
            step_interrupts: false,
            actions: vec![None; count],
            locked: false,
            states: vec![None; count],
        }
    }

    /// What is debugged.
    pub fn debuggee(&mut self) -> &mut D {
        &mut self.debuggee
    }

    /// What the next client is to take the processors for.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Debugs nothing any more.
    pub fn end(&mut self) {
        self.points = Points::default();
        for vcpu in self.debuggee.vcpus_mut() {
            if let Err(error) = vcpu.set_debug(&DebugSettings::default()) {
                tracing::warn!("{error}");
            }
        }
    }

    /// The state of a vCPU.
    pub(crate) fn state(&mut self, vcpu: usize) -> Result<&X86State, AccelError> {
        if self.states[vcpu].is_none() {
            self.states[vcpu] = Some(Box::new(self.debuggee.vcpus()[vcpu].save()?));
        }
        Ok(self.states[vcpu].as_ref().expect("it was just put there"))
    }

    /// Changes the state of a vCPU; if there is none as `change` makes it, it stays as it was.
    pub(crate) fn change(
        &mut self,
        vcpu: usize,
        change: impl FnOnce(&Layout, &mut X86State) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        let layout = self.layout.clone();
        let old = self.state(vcpu).map_err(|_| Refused)?.clone();
        let mut new = old.clone();
        change(&layout, &mut new)?;
        if new == old {
            return Ok(());
        }
        self.states[vcpu] = None;
        let place = &mut self.debuggee.vcpus_mut()[vcpu];
        place.restore(&new).map_err(|error| {
            tracing::debug!("{error}");
            if let Err(error) = place.restore(&old) {
                tracing::error!("vCPU {vcpu} is not as it was: {error}");
            }
            Refused
        })
    }

    /// The linear address of a vCPU's next instruction.
    pub(crate) fn code_address(&mut self, vcpu: usize) -> Result<u64, AccelError> {
        self.state(vcpu).map(code_address)
    }

    /// Reads guest memory by linear addresses of a vCPU, as much of it as there is; gives how much.
    pub(crate) fn read_memory(&mut self, vcpu: usize, address: u64, data: &mut [u8]) -> usize {
        let mut done = 0;
        while done < data.len() {
            let at = address.wrapping_add(done as u64);
            let len = ((PAGE - at % PAGE) as usize).min(data.len() - done);
            let Ok(Some(gpa)) = self.debuggee.vcpus()[vcpu].translate(at) else { break };
            if self.debuggee.memory().read(gpa, &mut data[done..done + len]).is_err() {
                break;
            }
            done += len;
        }
        done
    }

    /// Writes guest memory by linear addresses of a vCPU; whether all of it could be written.
    pub(crate) fn write_memory(&mut self, vcpu: usize, address: u64, data: &[u8]) -> bool {
        let mut done = 0;
        while done < data.len() {
            let at = address.wrapping_add(done as u64);
            let len = ((PAGE - at % PAGE) as usize).min(data.len() - done);
            let Ok(Some(gpa)) = self.debuggee.vcpus()[vcpu].translate(at) else { return false };
            if self.debuggee.memory().write(gpa, &data[done..done + len]).is_err() {
                return false;
            }
            done += len;
        }
        true
    }

    /// Changes breakpoints and watchpoints, if the accelerator can do what comes of it.
    pub(crate) fn change_points(&mut self, change: impl FnOnce(&mut Points)) -> bool {
        let before = self.points.clone();
        change(&mut self.points);
        let Points { software, hardware, watched } = &self.points;
        let few = [software.len(), hardware.len(), watched.len()].iter().all(|count| *count <= MOST_POINTS);
        let settings = self.settings(Action::Continue);
        let set = |vcpu: &mut Box<dyn Vcpu>| {
            vcpu.set_debug(&settings).inspect_err(|error| tracing::debug!("{error}")).is_ok()
        };
        let done = few && self.debuggee.vcpus_mut().iter_mut().all(set);
        if !done {
            self.points = before;
        }
        done
    }

    fn settings(&self, action: Action) -> DebugSettings {
        DebugSettings {
            single_step: action != Action::Continue,
            hold_interrupts: !self.step_interrupts,
            breakpoints: self.points.software.iter().copied().collect(),
            hardware_breakpoints: self.points.hardware.iter().copied().collect(),
            watchpoints: self.points.watched.clone(),
        }
    }

    /// Forgets what the vCPUs were to do.
    pub(crate) fn clear_actions(&mut self) {
        self.actions.fill(None);
        self.locked = false;
    }

    pub(crate) fn set_action(&mut self, vcpu: usize, action: Action) {
        self.actions[vcpu] = Some(action);
    }

    pub(crate) fn lock(&mut self) {
        self.locked = true;
    }

    /// Whether a vCPU runs when the VM goes on.
    pub fn runs(&self, vcpu: u32) -> bool {
        !self.locked || self.actions.get(vcpu as usize).is_some_and(Option::is_some)
    }

    /// Prepares the vCPUs to go on as the client said.
    ///
    /// # Errors
    /// What the accelerator cannot do.
    pub fn prepare(&mut self) -> Result<(), AccelError> {
        self.forget();
        for vcpu in 0..self.actions.len() {
            let settings = self.settings(self.actions[vcpu].unwrap_or(Action::Continue));
            self.debuggee.vcpus_mut()[vcpu].set_debug(&settings)?;
        }
        Ok(())
    }

    /// The processors' states are not known any more.
    pub fn forget(&mut self) {
        self.states.fill(None);
    }

    /// Whether a vCPU that met `stop` goes on by itself.
    pub(crate) fn goes_on(&mut self, vcpu: usize, stop: DebugStop) -> bool {
        match (stop, self.actions.get(vcpu)) {
            (DebugStop::Step, Some(Some(Action::Range(start, end)))) => {
                let (start, end) = (*start, *end);
                self.code_address(vcpu).is_ok_and(|address| (start..end).contains(&address))
            }
            // It was met as another vCPU stopped, and is gone since.
            (DebugStop::Watchpoint(point), _) => !self.points.watched.contains(&point),
            _ => false,
        }
    }
}

/// The accelerator's name for what is watched for.
pub(crate) fn watchpoint(
    address: u64,
    len: u64,
    kind: gdbstub::target::ext::breakpoints::WatchKind,
) -> Watchpoint {
    use gdbstub::target::ext::breakpoints::WatchKind as Gdb;
    let kind = match kind {
        Gdb::Write => WatchKind::Write,
        Gdb::Read => WatchKind::Read,
        Gdb::ReadWrite => WatchKind::Access,
    };
    Watchpoint { address, len, kind }
}
