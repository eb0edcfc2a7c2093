//! What other threads may touch of a vCPU.

use crate::engine::Engine;
use crate::halt_poll::HaltPoll;
use accel::Kick;
use lapic::{Event, VcpuSink};
use parking_lot::{Condvar, Mutex};
use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use x86_core::{Cpu, Tlb};

/// Requests to a vCPU: a set of bits, and the vector of a SIPI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Requests(u32);

impl Requests {
    /// Look at interrupts, or at the stop token.
    pub(crate) const LOOK: u32 = 1 << 0;
    pub(crate) const NMI: u32 = 1 << 1;
    pub(crate) const INIT: u32 = 1 << 2;
    pub(crate) const SIPI: u32 = 1 << 3;
    /// Drop all cached translations.
    pub(crate) const FLUSH: u32 = 1 << 4;
    /// A second NMI came before the first was seen.
    const SECOND_NMI: u32 = 1 << 5;
    pub(crate) const SMI: u32 = 1 << 6;
    const SIPI_VECTOR: u32 = 24;

    /// These, and those that were taken after them, as far as single bits go.
    pub(crate) fn and(self, later: Self) -> Self {
        Self(self.0 | later.0)
    }

    pub(crate) fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    /// How many NMIs came, as far as it matters: see [`Events::note`](crate::events::Events::note).
    pub(crate) fn nmis(self) -> u8 {
        u8::from(self.has(Self::NMI)) + u8::from(self.has(Self::SECOND_NMI))
    }

    pub(crate) fn sipi(self) -> Option<u8> {
        self.has(Self::SIPI).then_some((self.0 >> Self::SIPI_VECTOR) as u8)
    }
}

/// One vCPU, as other threads see it. Owns the engine with the processor, so that the exit flag can be
/// reached however long somebody holds on to this.
pub(crate) struct VcpuShared {
    engine: UnsafeCell<Engine>,
    /// The processor in the engine.
    cpu: NonNull<Cpu>,
    requests: AtomicU32,
    sleeping: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
    /// Whether the vCPU is in its run loop.
    running: AtomicBool,
    /// Counts passes of the run loop: at each, no access of an instruction before is under way.
    passes: AtomicU64,
}

// SAFETY: other threads touch only the atomics, those inside of the processor included; the processor
// itself and the engine are touched by the one `DbtVcpu` that holds them.
unsafe impl Send for VcpuShared {}
// SAFETY: as for `Send`.
unsafe impl Sync for VcpuShared {}

impl VcpuShared {
    pub(crate) fn new(mut engine: Engine) -> Arc<Self> {
        let cpu = engine.place();
        Arc::new(Self {
            engine: UnsafeCell::new(engine),
            cpu,
            requests: AtomicU32::new(0),
            sleeping: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            running: AtomicBool::new(false),
            passes: AtomicU64::new(0),
        })
    }

    /// The engine.
    ///
    /// # Safety
    /// Only the vCPU itself may call this, for one use at a time.
    #[allow(clippy::mut_from_ref)] // the caller is the one owner
    pub(crate) unsafe fn engine(&self) -> &mut Engine {
        // SAFETY: the caller is its only user.
        unsafe { &mut *self.engine.get() }
    }

    fn exit_request(&self) -> &AtomicU32 {
        // SAFETY: the memory lives as long as `self`; the field is an atomic.
        unsafe { &(*self.cpu.as_ptr()).exit_request }
    }

    /// The TLB, for the invalidation of rights to write, which are atomics.
    fn tlb(&self) -> &Tlb {
        // SAFETY: the memory lives as long as `self`; the methods used here touch atomics only.
        unsafe { &(*self.cpu.as_ptr()).tlb }
    }

    /// Has all stores of the vCPU take the slow path once.
    pub(crate) fn revoke_writes(&self) {
        self.tlb().invalidate_all_writes();
    }

    /// Posts requests and has the vCPU look at them.
    pub(crate) fn post(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        self.rouse();
    }

    fn rouse(&self) {
        self.exit_request().store(1, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) {
            let _lock = self.lock.lock();
            self.wake.notify_one();
        }
    }

    fn post_nmi(&self) {
        let _ = self.requests.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| {
            Some(old | if old & Requests::NMI == 0 { Requests::NMI } else { Requests::SECOND_NMI })
        });
        self.rouse();
    }

    /// The first of several SIPIs counts.
    fn post_sipi(&self, vector: u8) {
        let new = Requests::SIPI | u32::from(vector) << Requests::SIPI_VECTOR;
        let _ = self.requests.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| {
            (old & Requests::SIPI == 0).then_some(old | new)
        });
        self.rouse();
    }

    /// An INIT, which makes every SIPI before it void.
    fn post_init(&self) {
        let sipi = Requests::SIPI | 0xff << Requests::SIPI_VECTOR;
        let _ = self
            .requests
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| Some(old & !sipi | Requests::INIT));
        self.rouse();
    }

    /// Takes all requests. A request posted from here on sets the exit flag again.
    pub(crate) fn take(&self) -> Requests {
        self.exit_request().store(0, Ordering::SeqCst);
        Requests(self.requests.swap(0, Ordering::SeqCst))
    }

    /// The requests that wait, without taking them.
    pub(crate) fn peek(&self) -> Requests {
        Requests(self.requests.load(Ordering::SeqCst))
    }

    /// Waits until there are requests.
    pub(crate) fn wait(&self, halt_poll: &mut HaltPoll) {
        halt_poll.wait(|| self.requests.load(Ordering::Relaxed) != 0, || self.sleep());
    }

    fn sleep(&self) {
        let mut lock = self.lock.lock();
        self.sleeping.store(true, Ordering::SeqCst);
        self.pass();
        while self.requests.load(Ordering::SeqCst) == 0 {
            self.wake.wait(&mut lock);
        }
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// Waits until there are requests, or for `time` at most; says whether there are.
    pub(crate) fn wait_for(&self, time: Option<Duration>) -> bool {
        let end = time.and_then(|time| Instant::now().checked_add(time));
        let mut lock = self.lock.lock();
        self.sleeping.store(true, Ordering::SeqCst);
        self.pass();
        let mut timed_out = false;
        while self.requests.load(Ordering::SeqCst) == 0 && !timed_out {
            match end {
                Some(end) => timed_out = self.wake.wait_until(&mut lock, end).timed_out(),
                None => self.wake.wait(&mut lock),
            }
        }
        self.sleeping.store(false, Ordering::SeqCst);
        self.requests.load(Ordering::SeqCst) != 0
    }

    /// Notes that the vCPU is between two instructions.
    pub(crate) fn pass(&self) {
        self.passes.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::SeqCst);
    }

    /// Waits until the vCPU has been between two instructions. Not to be called on a vCPU's thread.
    pub(crate) fn quiesce(&self) {
        let before = self.passes.load(Ordering::SeqCst);
        self.post(Requests::LOOK);
        let under_way = || {
            self.running.load(Ordering::SeqCst)
                && !self.sleeping.load(Ordering::SeqCst)
                && self.passes.load(Ordering::SeqCst) == before
        };
        while under_way() {
            std::thread::sleep(Duration::from_micros(20));
        }
    }
}

impl Kick for VcpuShared {
    fn kick(&self) {
        self.post(Requests::LOOK);
    }
}

impl VcpuSink for VcpuShared {
    fn event(&self, event: Event) {
        match event {
            Event::Interrupt => self.post(Requests::LOOK),
            Event::Smi => self.post(Requests::SMI),
            Event::Nmi => self.post_nmi(),
            Event::Init => self.post_init(),
            Event::Sipi(vector) => self.post_sipi(vector),
        }
    }
}
