//! A machine that runs: its threads, and what ends it.

use crate::deterministic::Determinism;
use crate::drives::StorageListener;
use crate::ending::{Ending, Quitter};
use crate::hardware::Hardware;
use crate::pc;
use crate::requests::{Request, Requests};
use crate::run_state::{RunState, RunStatus, VmEvent, VmListener};
use crate::{MAX_VCPUS, MachineError, MachineKind, MachineSpec, microvm};
use accel::{Accelerator, DebugStop, HaltReason, StopToken, Vcpu, VcpuBus};
use chipset_x86::{Pm, PowerEvent};
use guest_memory::{GuestMemory, PreallocProgress};
use irq::{MsiMessage, MsiTarget};
use jobs::Storage;
use placement::{CpuMeter, CpuTime, Placement, PlacementError};
use std::fmt;
use std::sync::Arc;

/// Why a VM stands still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pause {
    /// It has ended.
    Ended(Ending),
    /// [`VmHandle::pause`].
    Asked,
    /// A vCPU met what [`Vcpu::set_debug`] asked for.
    Debug {
        /// Which vCPU.
        vcpu: u32,
        /// What it met.
        stop: DebugStop,
    },
    /// A vCPU shut down, as [`RunOptions::stop_at_triple_fault`] wants to know. The machine resets, or ends, when it
    /// goes on.
    TripleFault {
        /// Which vCPU.
        vcpu: u32,
    },
}

/// How [`Vm::run_until_pause`] runs.
#[derive(Clone, Copy)]
pub struct RunOptions<'a> {
    /// Which vCPUs run.
    pub vcpus: &'a dyn Fn(u32) -> bool,
    /// Whether a triple fault is something to pause at.
    pub stop_at_triple_fault: bool,
}

impl Default for RunOptions<'_> {
    /// All run, and a triple fault resets.
    fn default() -> Self {
        Self { vcpus: &|_| true, stop_at_triple_fault: false }
    }
}

/// Ends a VM, or presses its buttons, from any thread.
#[derive(Debug, Clone)]
pub struct VmHandle {
    requests: Arc<Requests>,
    meter: Arc<CpuMeter>,
    status: Arc<RunStatus>,
    buttons: Buttons,
}

/// The processor time that a VM took.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuUse {
    /// Of each vCPU.
    pub vcpus: Vec<CpuTime>,
    /// Of everything else in the process: devices, timers, control, and building the machine.
    pub io: CpuTime,
}

impl VmHandle {
    /// Ends the VM at once, as pulling the plug does.
    pub fn quit(&self, by: Quitter) {
        self.requests.push(Request::Quit(by));
    }

    /// What the VM is doing.
    pub fn run_state(&self) -> RunState {
        self.status.state()
    }

    /// Has the VM stand still until [`VmHandle::resume`]; its listener is told when it does. The state says why.
    pub fn hold(&self, state: RunState) {
        self.requests.push(Request::Hold(state));
    }

    /// Has the VM run on that [`VmHandle::hold`] had stopped.
    pub fn resume(&self) {
        self.requests.push(Request::Resume);
    }

    /// Presses the reset button.
    pub fn reset(&self) {
        self.requests.push(Request::Reset);
    }

    /// Presses the power button, which asks the guest to shut down; `false` says that the machine has none.
    pub fn press_power_button(&self) -> bool {
        let Some(pm) = &self.buttons.pm else { return false };
        pm.press_power_button();
        self.status.tell(VmEvent::PowerButton);
        true
    }

    /// Wakes a guest that sleeps in S3; `false` says that it does not.
    pub fn wake(&self) -> bool {
        let sleeps = self.run_state() == RunState::Suspended;
        if sleeps {
            self.requests.push(Request::Power(PowerEvent::Wake));
        }
        sleeps
    }

    /// Whether the machine can sleep and be woken.
    pub fn can_sleep(&self) -> bool {
        self.buttons.pm.is_some()
    }

    /// Sends all processors a non-maskable interrupt.
    pub fn inject_nmi(&self) {
        self.buttons.msi.signal(NMI_TO_ALL);
    }

    /// Has the VM stand still for a while: [`Vm::run_until_pause`] and [`Vm::wait`] return.
    pub fn pause(&self) {
        self.requests.push(Request::Pause);
    }

    /// The host's number of the thread that runs each vCPU now; `None` while it stands still.
    pub fn vcpu_threads(&self) -> Vec<Option<i32>> {
        self.meter.threads()
    }

    /// The processor time that the VM took so far.
    pub fn cpu_use(&self) -> CpuUse {
        CpuUse { vcpus: self.meter.vcpus(), io: self.meter.io() }
    }
}

/// What of a machine is operated from outside.
#[derive(Clone)]
struct Buttons {
    pm: Option<Arc<Pm>>,
    msi: Arc<dyn MsiTarget>,
}

impl fmt::Debug for Buttons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buttons").field("power", &self.pm.is_some()).finish_non_exhaustive()
    }
}

/// A message to all local APICs (physical destination 0xff) with the delivery mode NMI (Intel SDM volume 3, 12.11).
const NMI_TO_ALL: MsiMessage = MsiMessage { address: 0xfee0_0000 | 0xff << 12, data: 4 << 8 };

/// A machine, ready to run.
pub struct Vm {
    hardware: Hardware,
    vcpus: Vec<Box<dyn Vcpu>>,
    requests: Arc<Requests>,
    placement: Arc<Placement>,
    meter: Arc<CpuMeter>,
    status: Arc<RunStatus>,
    /// Why it stands still until somebody has it run on, if it does.
    held: Option<RunState>,
    no_reboot: bool,
    /// The guest sleeps in S3.
    asleep: bool,
    determinism: Option<Arc<Determinism>>,
    /// The vCPU that shut down, if the machine is to reset for that when it goes on.
    shut_down: Option<u32>,
}

impl Vm {
    /// Builds the machine that `spec` describes on `accelerator`, with its kernel loaded.
    ///
    /// # Errors
    /// [`MachineError`] naming what is not possible.
    pub fn new(spec: &MachineSpec, accelerator: &dyn Accelerator) -> Result<Self, MachineError> {
        Self::with_progress(spec, accelerator, &|_, _| {})
    }

    /// As [`Vm::new`]; `progress` is told of memory that is allocated in advance. The calling thread becomes
    /// one of the VM's I/O threads, and is placed as these are.
    ///
    /// # Errors
    /// As [`Vm::new`].
    pub fn with_progress(
        spec: &MachineSpec,
        accelerator: &dyn Accelerator,
        progress: PreallocProgress<'_>,
    ) -> Result<Self, MachineError> {
        if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
            return Err(MachineError::VcpuCount { vcpus: spec.vcpus, most: MAX_VCPUS });
        }
        let placement = Arc::new(Placement::new(&spec.host.placement, spec.vcpus)?);
        // Before there are other threads: they are placed with this one.
        placement.place_io()?;
        let meter = Arc::new(CpuMeter::new(spec.vcpus));
        let requests = Arc::new(Requests::default());
        let determinism = Determinism::open(spec, accelerator, &requests)?.map(Arc::new);
        let build = match spec.kind {
            MachineKind::Pc => pc::build,
            MachineKind::Micro => microvm::build,
        };
        let hardware = build(spec, accelerator, determinism.as_ref(), &requests, progress)?;
        if let Some(determinism) = &determinism {
            hardware.accel.set_external(determinism.outside.clone());
            determinism.begin()?;
        }
        let vcpus =
            (0..spec.vcpus).map(|id| hardware.accel.create_vcpu(id)).collect::<Result<Vec<_>, _>>()?;
        let status = requests.status.clone();
        let mut vm = Self {
            status,
            hardware,
            vcpus,
            requests,
            placement,
            meter,
            held: None,
            no_reboot: spec.no_reboot,
            determinism,
            asleep: false,
            shut_down: None,
        };
        vm.load(true)?;
        Ok(vm)
    }

    /// What other threads hold on the VM by.
    pub fn handle(&self) -> VmHandle {
        VmHandle {
            requests: self.requests.clone(),
            meter: self.meter.clone(),
            status: self.status.clone(),
            buttons: Buttons { pm: self.hardware.pm.clone(), msi: self.hardware.accel.msi_target() },
        }
    }

    /// What changes the VM's disks while it runs; its jobs tell `listener`, which must not wait. To be called once.
    ///
    /// # Errors
    /// [`MachineError::Storage`].
    pub fn storage(&mut self, listener: StorageListener) -> Result<Arc<Storage>, MachineError> {
        self.hardware.drives.storage(listener)
    }

    /// Sets who hears of what happens to the VM. To be called once.
    pub fn listen(&self, listener: VmListener) {
        self.status.listen(listener);
    }

    /// Has the VM wait for [`VmHandle::resume`] before it starts.
    pub fn hold(&mut self) {
        self.held = Some(RunState::Prelaunch);
    }

    /// Has the VM run when it is run, whoever had it stand still: a debugger's word.
    pub fn release(&mut self) {
        self.held = None;
    }

    /// What it is doing while it runs, or somebody else than a debugger has it stand still.
    fn show_state(&self) {
        let live = if self.asleep { RunState::Suspended } else { RunState::Running };
        self.status.set(self.held.unwrap_or(live));
    }

    fn load(&mut self, fresh: bool) -> Result<(), MachineError> {
        let entry = self.hardware.load(fresh)?;
        if let (Some(first), Some(entry)) = (self.vcpus.first_mut(), entry) {
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
            if let Pause::Ended(ending) = self.run_until_pause(&RunOptions::default())? {
                return Ok(ending);
            }
        }
    }

    /// Runs the VM until it ends or is to stand still; resets happen inside.
    ///
    /// # Errors
    /// As [`Vm::run`].
    pub fn run_until_pause(&mut self, options: &RunOptions<'_>) -> Result<Pause, MachineError> {
        let pause = self.run_to_pause(options)?;
        Ok(self.finish(pause))
    }

    /// A recording ends with the VM, and so does a replay.
    fn finish(&self, pause: Pause) -> Pause {
        let pause = match (pause, &self.determinism) {
            (Pause::Ended(ending), Some(determinism)) => Pause::Ended(determinism.outside.finish(ending)),
            (pause, _) => pause,
        };
        let ended = matches!(pause, Pause::Ended(_));
        self.status.set(if ended { RunState::Shutdown } else { RunState::Debug });
        pause
    }

    /// If the machine is deterministic: how many instructions were executed until it last stood still, and its time then
    /// in nanoseconds.
    pub fn progress(&self) -> Option<(u64, u64)> {
        self.determinism.as_ref().map(|determinism| determinism.outside.progress())
    }

    fn run_to_pause(&mut self, options: &RunOptions<'_>) -> Result<Pause, MachineError> {
        self.requests.clear_stops();
        if let Some(vcpu) = self.shut_down.take() {
            if self.no_reboot {
                return Ok(Pause::Ended(Ending::TripleFault { vcpu }));
            }
            self.reset_by(true)?;
        }
        loop {
            self.show_state();
            // What came while the VM stood still comes first.
            let request = match self.requests.take() {
                Some(request) => request,
                None if self.held.is_some() => self.requests.wait(),
                None if self.asleep => self.sleep_until_request(),
                None => self.run_until_request(options.vcpus)?,
            };
            match request {
                // What it stands still for already is of no account, but that nobody started it yet stays.
                Request::Hold(state) => self.held = self.held.or(Some(state)),
                Request::Resume => self.held = None,
                Request::Reset => self.reset_by(false)?,
                Request::Power(PowerEvent::Sleep) => {
                    self.asleep = true;
                    self.status.tell(VmEvent::Suspended);
                }
                Request::Power(PowerEvent::Wake) if self.asleep => self.wake()?,
                Request::Power(PowerEvent::Reset) if !self.no_reboot => self.reset_by(true)?,
                Request::Power(PowerEvent::CrashLoaded) => self.status.tell(VmEvent::CrashLoaded),
                Request::TripleFault { vcpu } if options.stop_at_triple_fault => {
                    self.shut_down = Some(vcpu);
                    return Ok(Pause::TripleFault { vcpu });
                }
                Request::TripleFault { vcpu } if !self.no_reboot => {
                    tracing::warn!("vCPU {vcpu} shut down by a triple fault; the machine resets");
                    self.reset_by(true)?;
                }
                Request::Power(PowerEvent::Panicked) => {
                    self.status.tell(VmEvent::Panicked);
                    return Ok(Pause::Ended(Ending::Panicked));
                }
                request => {
                    if let Some(pause) = pause(request) {
                        return Ok(pause);
                    }
                }
            }
        }
    }

    /// Waits, while the VM stands still, until it is to end, or somebody calls [`VmHandle::pause`]. What the guest asked
    /// for before it stopped comes when it goes on.
    pub fn wait(&mut self) -> Pause {
        loop {
            if let Some(pause) = pause(self.requests.wait_for(Request::is_of_host)) {
                return self.finish(pause);
            }
        }
    }

    /// The vCPUs, by number. They stand still.
    pub fn vcpus(&self) -> &[Box<dyn Vcpu>] {
        &self.vcpus
    }

    /// The same, to change their state.
    pub fn vcpus_mut(&mut self) -> &mut [Box<dyn Vcpu>] {
        &mut self.vcpus
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.hardware.memory
    }

    /// Resets the machine, as its button does, and loads the kernel again.
    ///
    /// # Errors
    /// [`MachineError`] if the kernel cannot be loaded again.
    pub fn reset(&mut self) -> Result<(), MachineError> {
        self.requests.clear();
        self.shut_down = None;
        self.asleep = false;
        self.hardware.reset();
        for vcpu in &mut self.vcpus {
            vcpu.reset();
        }
        self.load(false)
    }

    /// Resets the machine, and says so: whether its guest wanted it.
    fn reset_by(&mut self, guest: bool) -> Result<(), MachineError> {
        self.reset()?;
        self.status.tell(VmEvent::Reset { guest });
        Ok(())
    }

    /// Resets the machine, but for its memory, and has the guest go on where it wants to after a sleep.
    fn wake(&mut self) -> Result<(), MachineError> {
        let entry = self.hardware.wake();
        self.asleep = false;
        self.status.tell(VmEvent::Woken);
        for vcpu in &mut self.vcpus {
            vcpu.reset();
        }
        match (entry, self.vcpus.first_mut(), self.hardware.boot.is_firmware()) {
            (Some(entry), Some(first), _) => {
                let mut state = first.save()?;
                entry.apply(&mut state);
                first.restore(&state)?;
                Ok(())
            }
            // It looks after that itself.
            (_, _, true) => Ok(()),
            _ => {
                tracing::warn!("the guest slept without saying where it goes on; the machine resets");
                self.reset()
            }
        }
    }

    /// Lets devices and the clock run, but no vCPU, until somebody asks for something.
    fn sleep_until_request(&mut self) -> Request {
        self.hardware.start();
        let timers = &self.hardware.timers;
        while let (Some(counter), Some(deadline)) = (timers.clock().counter(), timers.next_deadline())
            && self.requests.is_empty()
        {
            // Nobody counts: time is passed over until the guest wakes.
            counter.advance_to(deadline);
            timers.fire_next();
        }
        let request = self.requests.wait();
        self.hardware.stop();
        request
    }

    /// Lets everything run until somebody asks for something, and stops it again.
    fn run_until_request(&mut self, runs: &dyn Fn(u32) -> bool) -> Result<Request, MachineError> {
        let stop = StopToken::new();
        let (hardware, requests, placement, meter) =
            (&self.hardware, &self.requests, &self.placement, &self.meter);
        let bus: &dyn VcpuBus = &*hardware.bus;
        requests.set_running(Some(stop.clone()));
        let outside = self.determinism.as_ref().map(|determinism| &determinism.outside);
        if let Some(outside) = outside {
            outside.running(&stop);
        }
        let request = std::thread::scope(|scope| {
            hardware.start();
            let mut failed = None;
            for vcpu in self.vcpus.iter_mut().filter(|vcpu| runs(vcpu.id())) {
                let stop = &stop;
                let name = format!("vcpu-{}", vcpu.id());
                let spawned = std::thread::Builder::new().name(name).spawn_scoped(scope, move || {
                    let _measuring = meter.measure(vcpu.id());
                    match place(placement, vcpu.id()) {
                        Ok(()) => report(requests, vcpu.id(), vcpu.run(bus, stop)),
                        Err(error) => requests.push(Request::InternalError(error.to_string())),
                    }
                });
                if let Err(error) = spawned {
                    failed = Some(MachineError::Thread(error));
                    break;
                }
            }
            let request = if failed.is_none() { Some(requests.wait()) } else { None };
            if let (Some(Request::Quit(_)), Some(outside)) = (&request, outside) {
                // The vCPU may wait until somebody reads its output.
                outside.close();
            }
            stop.stop();
            failed.map_or(Ok(request), Err)
        });
        self.requests.set_running(None);
        self.hardware.stop();
        // There is always one, or an error.
        Ok(request?.unwrap_or(Request::Pause))
    }
}

/// Places the calling thread as that of a vCPU, and as I/O threads those that devices start from it.
fn place(placement: &Arc<Placement>, vcpu: u32) -> Result<(), PlacementError> {
    if placement.is_empty() {
        return Ok(());
    }
    placement.place_vcpu(vcpu)?;
    let placement = placement.clone();
    device::set_start_hook(Some(Arc::new(move || {
        if let Err(error) = placement.place_io() {
            tracing::warn!("{error}");
        }
    })));
    Ok(())
}

/// What a request that nothing else is done about means for who runs the VM.
fn pause(request: Request) -> Option<Pause> {
    let ending = match request {
        Request::Quit(by) => Ending::Quit(by),
        Request::InternalError(error) => Ending::InternalError(error),
        Request::Power(PowerEvent::PowerOff) => Ending::PowerOff,
        Request::Power(PowerEvent::DebugExit(code)) => Ending::DebugExit(code),
        Request::Power(PowerEvent::Panicked) => Ending::Panicked,
        Request::Power(PowerEvent::CrashLoaded | PowerEvent::Sleep | PowerEvent::Wake) => return None,
        Request::Power(PowerEvent::Reset) => Ending::Reset,
        Request::TripleFault { vcpu } => Ending::TripleFault { vcpu },
        Request::Replayed { cut } => Ending::Replayed { cut },
        Request::Diverged(what) => Ending::Diverged(what),
        Request::RecordingFailed(error) => Ending::RecordingFailed(error),
        Request::Debug { vcpu, stop } => return Some(Pause::Debug { vcpu, stop }),
        Request::Pause => return Some(Pause::Asked),
        Request::Hold(_) | Request::Resume | Request::Reset => return None,
    };
    Some(Pause::Ended(ending))
}

/// Turns the end of a vCPU's run into a request.
fn report(requests: &Requests, vcpu: u32, reason: HaltReason) {
    match reason {
        HaltReason::Stopped => {}
        HaltReason::Debug(stop) => requests.push(Request::Debug { vcpu, stop }),
        HaltReason::TripleFault => requests.push(Request::TripleFault { vcpu }),
        HaltReason::InternalError(error) => {
            requests.push(Request::InternalError(format!("vCPU {vcpu}: {error}")));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(determinism) = &self.determinism {
            determinism.outside.close();
        }
    }
}
