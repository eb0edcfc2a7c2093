//! A machine around an accelerator: memory, a recording bus, threads for vCPUs.

use accel::{AccelVm, Accelerator, HaltReason, MpState, StopToken, Tier, Vcpu, VcpuBus, VmSpec, X86State};
use clock::{TimerService, VmClock};
use guest_memory::GuestMemory;
use parking_lot::{Condvar, Mutex};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What the cases run on.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    /// The accelerator.
    pub accelerator: &'a dyn Accelerator,
    /// How it executes.
    pub tier: Tier,
}

/// Guest RAM from address 0.
pub(crate) const RAM: u64 = 8 << 20;
/// RAM where firmware would be, with the reset vector at its end.
pub(crate) const TOP: Range<u64> = 0xffff_0000..0x1_0000_0000;
/// A guest writes its result here, and is stopped.
pub(crate) const EXIT_PORT: u16 = 0xf4;
/// A guest writes progress here.
pub(crate) const LOG_PORT: u16 = 0xe9;
/// A guest that writes here is stopped.
pub(crate) const STOP_PORT: i32 = 0xe8;
/// Reads and writes here are recorded.
pub(crate) const MMIO: u64 = 0xd000_0000;

/// Longer than any case takes on the slowest machine; a run is ended after this.
const LIMIT: Duration = Duration::from_secs(60);
/// Between looks at whether a run has ended that says nothing.
const LOOK: Duration = Duration::from_millis(50);

/// One access of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read(u64, usize),
    Write(u64, usize, u64),
    In(u16, usize),
    Out(u16, usize, u64),
    Acknowledge,
}

#[derive(Default)]
struct Recorded {
    log: Vec<Access>,
    exit: Option<u64>,
    /// The guest wrote to the stop port.
    stopped: bool,
}

/// Records what the guest does.
#[derive(Default)]
pub(crate) struct RecordingBus {
    recorded: Mutex<Recorded>,
    changed: Condvar,
    stop: Mutex<StopToken>,
    timed_out: AtomicBool,
}

fn value(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl RecordingBus {
    fn note(&self, access: Access) {
        let mut recorded = self.recorded.lock();
        recorded.log.push(access);
        self.changed.notify_all();
    }

    /// Everything so far.
    pub(crate) fn log(&self) -> Vec<Access> {
        self.recorded.lock().log.clone()
    }

    /// What was written to the log port.
    pub(crate) fn progress(&self) -> Vec<u64> {
        let progress = |access: &Access| match access {
            Access::Out(LOG_PORT, _, value) => Some(*value),
            _ => None,
        };
        self.recorded.lock().log.iter().filter_map(progress).collect()
    }

    /// Waits until the guest has written `value` to the log port.
    pub(crate) fn wait_for(&self, value: u64) {
        let mut recorded = self.recorded.lock();
        let seen = |recorded: &Recorded| {
            recorded
                .log
                .iter()
                .any(|access| matches!(access, Access::Out(LOG_PORT, _, seen) if *seen == value))
        };
        while !seen(&recorded) {
            assert!(
                recorded.exit.is_none() && !self.is_over(),
                "the guest ended without progress {value:#x}: {:x?}",
                recorded.log
            );
            self.changed.wait_for(&mut recorded, LOOK);
        }
    }

    /// Forgets everything so far.
    pub(crate) fn forget(&self) {
        *self.recorded.lock() = Recorded::default();
    }

    /// Waits until the guest has asked to be stopped, or has ended; the run's `stop` is said then.
    pub(crate) fn wait_for_stop(&self, stop: &StopToken) {
        let mut recorded = self.recorded.lock();
        while recorded.exit.is_none() && !recorded.stopped && !stop.is_stopped() {
            self.changed.wait_for(&mut recorded, LOOK);
        }
    }

    /// What the guest wrote to the exit port.
    pub(crate) fn exit(&self) -> Option<u64> {
        self.recorded.lock().exit
    }

    /// Whether there is nothing more to come of this run: the guest has ended, a processor has failed, or it took too
    /// long.
    pub(crate) fn is_over(&self) -> bool {
        self.stop.lock().is_stopped()
    }
}

/// What a read of `len` bytes at `address` gives: a pattern that names the place.
pub(crate) fn pattern(address: u64, len: usize) -> u64 {
    let word = (address ^ 0x5a).wrapping_mul(0x0101_0101_0101_0101);
    if len == 8 { word } else { word & ((1 << (8 * len)) - 1) }
}

impl VcpuBus for RecordingBus {
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.note(Access::Read(gpa, data.len()));
        let pattern = pattern(gpa, data.len()).to_le_bytes();
        let len = data.len();
        data.copy_from_slice(&pattern[..len]);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.note(Access::Write(gpa, data.len(), value(data)));
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.note(Access::In(port, data.len()));
        let pattern = pattern(port.into(), data.len()).to_le_bytes();
        let len = data.len();
        data.copy_from_slice(&pattern[..len]);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.note(Access::Out(port, data.len(), value(data)));
        if port == EXIT_PORT {
            self.recorded.lock().exit = Some(value(data));
            self.changed.notify_all();
            self.stop.lock().stop();
        }
        if i32::from(port) == STOP_PORT {
            self.recorded.lock().stopped = true;
            self.changed.notify_all();
            self.stop.lock().stop();
        }
    }

    fn acknowledge_ext_int(&self) -> u8 {
        self.note(Access::Acknowledge);
        0x77
    }
}

/// A VM with its surroundings. Time passes.
pub(crate) struct Rig {
    pub(crate) memory: GuestMemory,
    pub(crate) clock: VmClock,
    pub(crate) timers: Arc<TimerService>,
    pub(crate) vm: Arc<dyn AccelVm>,
    pub(crate) bus: Arc<RecordingBus>,
    pub(crate) vcpus: Vec<Box<dyn Vcpu>>,
}

/// Ends the run if the thread that has it panics: the other threads need not wait for the limit then.
struct StopIfPanicking<'a>(&'a StopToken);

impl Drop for StopIfPanicking<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

impl Rig {
    pub(crate) fn new(target: &Target<'_>, vcpus: u32) -> Self {
        Self::with_ram(target, vcpus, RAM)
    }

    /// The same with `ram` bytes of RAM from address 0.
    pub(crate) fn with_ram(target: &Target<'_>, vcpus: u32, ram: u64) -> Self {
        let timers = TimerService::new(VmClock::new()).expect("the host has threads");
        Self::with_timers(target, vcpus, ram, timers)
    }

    /// The same where time is made of instructions, each of which takes two nanoseconds.
    pub(crate) fn counted(target: &Target<'_>, vcpus: u32) -> Self {
        Self::with_timers(target, vcpus, RAM, TimerService::without_thread(VmClock::counted(1)))
    }

    fn with_timers(target: &Target<'_>, vcpus: u32, ram: u64, timers: Arc<TimerService>) -> Self {
        let memory = GuestMemory::new(&[0..ram, TOP]).expect("the host has some memory");
        let clock = timers.clock().clone();
        let spec = VmSpec { vcpus, tier: target.tier, ..VmSpec::default() };
        let vm = target.accelerator.create_vm(&spec, &memory, &timers).expect("a VM");
        let vcpus = (0..vcpus).map(|id| vm.create_vcpu(id).expect("a vCPU")).collect();
        Self { memory, clock, timers, vm, bus: Arc::default(), vcpus }
    }

    pub(crate) fn write(&self, gpa: u64, data: &[u8]) {
        self.memory.write(gpa, data).expect("the test writes to RAM");
    }

    pub(crate) fn read_u64(&self, gpa: u64) -> u64 {
        let mut data = [0; 8];
        self.memory.read(gpa, &mut data).expect("the test reads RAM");
        u64::from_le_bytes(data)
    }

    /// Changes a vCPU's state.
    pub(crate) fn edit(&mut self, id: usize, edit: impl FnOnce(&mut X86State)) {
        let mut state = self.vcpus[id].save().expect("a state");
        edit(&mut state);
        self.vcpus[id].restore(&state).expect("the state is one");
    }

    /// Lets all vCPUs run until the guest writes to the exit port, or `meanwhile` on this thread calls the
    /// token's stop and returns. Returns why each ended.
    pub(crate) fn run_while(
        &mut self,
        meanwhile: impl FnOnce(&Surroundings<'_>, &StopToken),
    ) -> Vec<HaltReason> {
        let stop = StopToken::new();
        *self.bus.stop.lock() = stop.clone();
        self.clock.start();
        self.timers.clock_changed();
        let bus = self.bus.clone();
        let surroundings = Surroundings { memory: &self.memory, vm: &self.vm, bus: &bus };
        let finished = Arc::new((Mutex::new(false), Condvar::new()));
        let reasons = std::thread::scope(|scope| {
            let watchdog = (finished.clone(), stop.clone(), bus.clone());
            scope.spawn(move || {
                let (finished, stop, bus) = watchdog;
                let mut done = finished.0.lock();
                while !*done {
                    if finished.1.wait_for(&mut done, LIMIT).timed_out() {
                        bus.timed_out.store(true, Ordering::SeqCst);
                        stop.stop();
                        return;
                    }
                }
            });
            let run = |vcpu: &'_ mut Box<dyn Vcpu>| {
                let _end = StopIfPanicking(&stop);
                let reason = vcpu.run(&*bus, &stop);
                if reason != HaltReason::Stopped {
                    stop.stop();
                }
                reason
            };
            let threads: Vec<_> = self.vcpus.iter_mut().map(|vcpu| scope.spawn(move || run(vcpu))).collect();
            // A failure here must end the vCPUs too, or the scope never does.
            let outcome =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| meanwhile(&surroundings, &stop)));
            if outcome.is_err() {
                stop.stop();
            }
            let reasons: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
            *finished.0.lock() = true;
            finished.1.notify_all();
            if let Err(panic) = outcome {
                std::panic::resume_unwind(panic);
            }
            reasons.into_iter().map(|reason| reason.expect("a vCPU's thread panicked")).collect()
        });
        self.clock.stop();
        self.timers.clock_changed();
        let place = |vcpu: &dyn Vcpu| vcpu.save().map(|state| (state.rip, state.rflags, state.events));
        assert!(
            !self.bus.timed_out.load(Ordering::SeqCst),
            "the guest did not end in time; it did {:x?} and is at {:x?}",
            self.bus.log(),
            self.vcpus.iter().map(|vcpu| place(&**vcpu)).collect::<Vec<_>>()
        );
        reasons
    }

    /// Runs the guest until it exits, and gives what it said.
    pub(crate) fn run(&mut self) -> u64 {
        self.run_with(|_| {})
    }

    /// Lets the vCPUs run, after the guest wrote 1 to the log port, for a while and again, until number `id` is
    /// halted.
    pub(crate) fn run_until_halted(&mut self, id: usize) {
        let start = Instant::now();
        let halted = |rig: &Self| rig.vcpus[id].save().expect("a state").events.mp_state == MpState::Halted;
        while !halted(self) {
            assert!(start.elapsed() < LIMIT, "processor {id} does not halt");
            self.run_while(|rig, stop| {
                rig.bus.wait_for(1);
                std::thread::sleep(Duration::from_millis(1));
                stop.stop();
            });
        }
    }

    /// The same as [`Rig::run`], with something for this thread to do meanwhile.
    pub(crate) fn run_with(&mut self, meanwhile: impl FnOnce(&Surroundings<'_>)) -> u64 {
        let reasons = self.run_while(|rig, _| meanwhile(rig));
        assert!(
            reasons.iter().all(|reason| *reason == HaltReason::Stopped),
            "{reasons:?}; the guest did {:x?}",
            self.bus.log()
        );
        self.bus.exit().expect("the guest said something before it ended")
    }
}

/// What can be touched while the vCPUs run.
pub(crate) struct Surroundings<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(crate) vm: &'a Arc<dyn AccelVm>,
    pub(crate) bus: &'a RecordingBus,
}

impl Surroundings<'_> {
    /// Waits until the guest has changed the quadword at `gpa` from `old`, and gives what it is then.
    pub(crate) fn wait_for_change(&self, gpa: u64, old: u64) -> u64 {
        let start = Instant::now();
        loop {
            let mut data = [0; 8];
            self.memory.read(gpa, &mut data).expect("the test reads RAM");
            let now = u64::from_le_bytes(data);
            if now != old {
                return now;
            }
            assert!(start.elapsed() < LIMIT, "the guest leaves {gpa:#x} at {old:#x}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
