//! Bringing a vCPU out of the kernel.
//!
//! A kick sets the vCPU's `immediate_exit` flag, then sends its thread a signal whose handler does nothing.
//! Wherever the thread is, the kick is not lost: in guest code the signal ends `KVM_RUN`; before it, the flag
//! makes it return at once. The run loop clears the flag, and only then looks at why it was kicked.

use accel::Kick;
use parking_lot::Mutex;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

extern "C" fn nothing(_signal: libc::c_int) {}

/// The signal of kicks.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the handler, once per process.
fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let install = || {
        // SAFETY: all zeroes is a valid `sigaction`: no flags, an empty mask. Without SA_RESTART the signal
        // interrupts ioctls.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as *const () as usize;
        // SAFETY: the action is complete, and its handler does nothing, which is safe at any moment.
        let result = unsafe { libc::sigaction(signal(), &action, std::ptr::null_mut()) };
        if result < 0 {
            Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
        } else {
            Ok(())
        }
    };
    INSTALLED.get_or_init(install).map_err(io::Error::from_raw_os_error)
}

/// Lets the signal through to this thread.
fn unblock() -> io::Result<()> {
    // SAFETY: all zeroes is a valid signal set, which the calls then fill in.
    let result = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// The place of a vCPU's `immediate_exit` flag, in the page that it shares with the kernel.
struct Flag(NonNull<u8>);

// SAFETY: the flag is only accessed as an atomic, from whatever thread.
unsafe impl Send for Flag {}

/// A vCPU that runs, as other threads see it.
struct Running {
    thread: libc::pthread_t,
    flag: Flag,
}

/// Kicks one vCPU.
#[derive(Default)]
pub(crate) struct Kicker {
    /// There while the vCPU's thread is in [`Kicker::enter`]'s scope.
    running: Mutex<Option<Running>>,
    /// How often the vCPU entered or left `KVM_RUN`: odd while it is in there.
    passages: AtomicU64,
}

/// Between looks at whether a vCPU has come out: about what that takes.
const OUT: Duration = Duration::from_micros(20);

impl Kicker {
    /// Makes this thread the one that runs the vCPU whose flag is at `immediate_exit`, until what this
    /// returns is dropped.
    ///
    /// # Safety
    /// `immediate_exit` must stay valid until then, and be accessed as an atomic only.
    pub(crate) unsafe fn enter(&self, immediate_exit: NonNull<u8>) -> io::Result<Entered<'_>> {
        install()?;
        unblock()?;
        // SAFETY: asks for this thread's own id.
        let thread = unsafe { libc::pthread_self() };
        *self.running.lock() = Some(Running { thread, flag: Flag(immediate_exit) });
        Ok(Entered { kicker: self, flag: immediate_exit })
    }

    /// Returns when each of the vCPUs has been outside `KVM_RUN` since this was called.
    pub(crate) fn bring_out(vcpus: &[Arc<Self>]) {
        let inside = |vcpu: &Arc<Self>| {
            let passages = vcpu.passages.load(Ordering::SeqCst);
            (passages % 2 == 1).then(|| (vcpu.clone(), passages))
        };
        let inside: Vec<_> = vcpus.iter().filter_map(inside).collect();
        inside.iter().for_each(|(vcpu, _)| vcpu.kick());
        for (vcpu, passages) in inside {
            while vcpu.passages.load(Ordering::SeqCst) == passages {
                std::thread::sleep(OUT);
            }
        }
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        if let Some(running) = &*self.running.lock() {
            // SAFETY: the flag is valid while `running` is there, and so is the thread, which takes it away
            // under the lock that is held here before it ends.
            unsafe {
                AtomicU8::from_ptr(running.flag.0.as_ptr()).store(1, Ordering::SeqCst);
                libc::pthread_kill(running.thread, signal());
            }
        }
    }
}

/// The scope of a vCPU's run.
pub(crate) struct Entered<'a> {
    kicker: &'a Kicker,
    flag: NonNull<u8>,
}

impl Entered<'_> {
    fn flag(&self) -> &AtomicU8 {
        // SAFETY: valid and atomic as the caller of `enter` said.
        unsafe { AtomicU8::from_ptr(self.flag.as_ptr()) }
    }

    /// Forgets kicks up to now. What they were about must be looked at after this.
    pub(crate) fn pass(&self) {
        self.flag().store(0, Ordering::SeqCst);
    }

    /// Has the next `KVM_RUN` finish what the last one left open, and return.
    pub(crate) fn kick_self(&self) {
        self.flag().store(1, Ordering::SeqCst);
    }
}

impl Entered<'_> {
    /// The scope of one `KVM_RUN`.
    pub(crate) fn passage(&self) -> Passage<'_> {
        Passage::new(&self.kicker.passages)
    }
}

/// The scope of one `KVM_RUN`.
pub(crate) struct Passage<'a>(&'a AtomicU64);

impl<'a> Passage<'a> {
    fn new(passages: &'a AtomicU64) -> Self {
        // Only the vCPU's own thread writes it.
        passages.store(passages.load(Ordering::Relaxed) + 1, Ordering::Release);
        Self(passages)
    }
}

impl Drop for Passage<'_> {
    fn drop(&mut self) {
        self.0.store(self.0.load(Ordering::Relaxed) + 1, Ordering::Release);
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        *self.kicker.running.lock() = None;
        self.pass();
    }
}
