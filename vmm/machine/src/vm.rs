//! A machine that runs: its threads, and what ends it.

use crate::pc::Pc;
use crate::requests::{Request, Requests};
use crate::{MachineError, MachineSpec};
use accel::{Accelerator, HaltReason, StopToken, Vcpu, VcpuBus};
use chipset_x86::PowerEvent;
use std::sync::Arc;

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset itself, and was not to reboot.
    Reset,
    /// The guest's kernel panicked.
    Panicked,
    /// A vCPU shut down, and the guest was not to reboot.
    TripleFault {
        /// Which vCPU.
        vcpu: u32,
    },
    /// The guest wrote to the debug-exit device.
    DebugExit(u8),
    /// A person or another program ended it.
    Quit,
    /// The accelerator failed.
    InternalError(String),
}

/// Ends a VM, or presses its buttons, from any thread.
#[derive(Debug, Clone)]
pub struct VmHandle {
    requests: Arc<Requests>,
}

impl VmHandle {
    /// Ends the VM at once, as pulling the plug does.
    pub fn quit(&self) {
        self.requests.push(Request::Quit);
    }
}

/// A machine, ready to run.
pub struct Vm {
    pc: Pc,
    vcpus: Vec<Box<dyn Vcpu>>,
    requests: Arc<Requests>,
    no_reboot: bool,
}

impl Vm {
    /// Builds the machine that `spec` describes on `accelerator`, with its kernel loaded.
    ///
    /// # Errors
    /// [`MachineError`] naming what is not possible.
    pub fn new(spec: &MachineSpec, accelerator: &dyn Accelerator) -> Result<Self, MachineError> {
        let requests = Arc::new(Requests::default());
        let pc = Pc::build(spec, accelerator, &requests)?;
        let vcpus = (0..spec.vcpus).map(|id| pc.accel.create_vcpu(id)).collect::<Result<Vec<_>, _>>()?;
        let mut vm = Self { pc, vcpus, requests, no_reboot: spec.no_reboot };
        vm.load_kernel(true)?;
        Ok(vm)
    }

    /// What other threads hold on the VM by.
    pub fn handle(&self) -> VmHandle {
        VmHandle { requests: self.requests.clone() }
    }

    fn load_kernel(&mut self, fresh: bool) -> Result<(), MachineError> {
        let entry = self.pc.load_kernel(fresh)?;
        if let Some(first) = self.vcpus.first_mut() {
            let mut state = first.save()?;
            entry.apply(&mut state);
            first.restore(&state)?;
        }
        Ok(())
    }

    /// Runs the VM until it ends, on threads of its own; returns why.
    ///
    /// # Errors
    /// [`MachineError`] if the host cannot start threads, or the kernel cannot be loaded again after a
    /// reset.
    pub fn run(&mut self) -> Result<Ending, MachineError> {
        loop {
            let request = self.run_until_request()?;
            match request {
                Request::Quit => return Ok(Ending::Quit),
                Request::InternalError(error) => return Ok(Ending::InternalError(error)),
                Request::Power(PowerEvent::PowerOff) => return Ok(Ending::PowerOff),
                Request::Power(PowerEvent::DebugExit(code)) => return Ok(Ending::DebugExit(code)),
                Request::Power(PowerEvent::Panicked) => return Ok(Ending::Panicked),
                Request::Power(PowerEvent::CrashLoaded) => {}
                Request::Power(PowerEvent::Reset) if self.no_reboot => return Ok(Ending::Reset),
                Request::TripleFault { vcpu } if self.no_reboot => return Ok(Ending::TripleFault { vcpu }),
                Request::Power(PowerEvent::Reset) => self.reset()?,
                Request::TripleFault { vcpu } => {
                    tracing::warn!("vCPU {vcpu} shut down by a triple fault; the machine resets");
                    self.reset()?;
                }
            }
        }
    }

    fn reset(&mut self) -> Result<(), MachineError> {
        self.requests.clear();
        self.pc.reset();
        for vcpu in &mut self.vcpus {
            vcpu.reset();
        }
        self.load_kernel(false)
    }

    /// Lets everything run until somebody asks for something, and stops it again.
    fn run_until_request(&mut self) -> Result<Request, MachineError> {
        let stop = StopToken::new();
        let (pc, requests) = (&self.pc, &self.requests);
        let bus: &dyn VcpuBus = &*pc.bus;
        let request = std::thread::scope(|scope| {
            pc.start();
            let mut failed = None;
            for vcpu in &mut self.vcpus {
                let stop = &stop;
                let name = format!("vcpu-{}", vcpu.id());
                let spawned = std::thread::Builder::new()
                    .name(name)
                    .spawn_scoped(scope, move || report(requests, vcpu.id(), vcpu.run(bus, stop)));
                if let Err(error) = spawned {
                    failed = Some(MachineError::Thread(error));
                    break;
                }
            }
            let request = if failed.is_none() { Some(requests.wait()) } else { None };
            stop.stop();
            failed.map_or(Ok(request), Err)
        });
        self.pc.stop();
        Ok(request?.unwrap_or(Request::Quit))
    }
}

/// Turns the end of a vCPU's run into a request.
fn report(requests: &Requests, vcpu: u32, reason: HaltReason) {
    match reason {
        HaltReason::Stopped => {}
        HaltReason::TripleFault => requests.push(Request::TripleFault { vcpu }),
        HaltReason::InternalError(error) => {
            requests.push(Request::InternalError(format!("vCPU {vcpu}: {error}")));
        }
    }
}
