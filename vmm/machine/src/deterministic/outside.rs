//! What comes from outside, on its way in.

use super::Entropy;
use super::trace::{Player, Recorder, Step, Trace};
use crate::Ending;
use crate::requests::{Request, Requests};
use accel::{External, Idle, Moment, StopToken};
use chardev::{Gate, PortGate, PortInput, Receiver};
use parking_lot::{Condvar, Mutex};
use recording::{Digests, Event, MAX_INPUT, Reason, Stamp};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

/// Everything that comes from outside to a deterministic machine: ports' input waits here until the vCPU is between two
/// instructions.
pub(crate) struct Outside {
    requests: Arc<Requests>,
    /// An idle vCPU waits as long on the host as in the VM.
    sleep: bool,
    random: Entropy,
    inner: Mutex<Inner>,
    answered: Condvar,
    /// The VM is about to end.
    closing: AtomicBool,
}

struct Inner {
    trace: Trace,
    ports: Vec<Arc<Receiver>>,
    /// Input that waits, at most one of each port.
    offers: VecDeque<(u16, PortInput)>,
    /// How much was taken of ports' last offers.
    answers: BTreeMap<u16, usize>,
    /// What stops the vCPU while it runs.
    stop: Option<StopToken>,
    output: OutputDigest,
    /// Where the vCPU stopped.
    last: (Stamp, u64),
    /// The replay is over, or not what was recorded.
    over: bool,
}

/// A number made of everything that ports send, by FNV-1a.
struct OutputDigest(u64);

impl OutputDigest {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, port: u16, bytes: &[u8]) {
        let port = port.to_le_bytes();
        for byte in bytes.iter().flat_map(|byte| [port[0], port[1], *byte]) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

impl Outside {
    pub(super) fn new(requests: &Arc<Requests>, sleep: bool, random: Entropy, trace: Trace) -> Self {
        let inner = Inner {
            trace,
            ports: Vec::new(),
            offers: VecDeque::new(),
            answers: BTreeMap::new(),
            stop: None,
            output: OutputDigest::new(),
            last: (Stamp::default(), 0),
            over: false,
        };
        Self {
            requests: requests.clone(),
            sleep,
            random,
            inner: Mutex::new(inner),
            answered: Condvar::new(),
            closing: AtomicBool::new(false),
        }
    }

    /// A recording begins.
    pub(super) fn record(&self, recorder: Recorder) {
        self.inner.lock().trace = Trace::Record(recorder);
    }

    /// The vCPU begins to run, and what stops it.
    pub(crate) fn running(&self, stop: &StopToken) {
        self.inner.lock().stop = Some(stop.clone());
    }

    /// The VM is about to end: nobody is waited for any more.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        let _inner = self.inner.lock();
        self.answered.notify_all();
    }

    /// The VM ended so. Writes that down, or compares it with what is written: gives how it ended then.
    pub(crate) fn finish(&self, ending: Ending) -> Ending {
        let mut inner = self.inner.lock();
        let Inner { trace, last: (stamp, registers), output, over, .. } = &mut *inner;
        let digests = Digests { registers: *registers, output: output.0 };
        if std::mem::replace(over, true) {
            return ending;
        }
        let Some(reason) = reason(&ending) else { return ending };
        match trace {
            Trace::Live => ending,
            Trace::Record(recorder) => match recorder.write(*stamp, &Event::End(digests, reason)) {
                Ok(()) => ending,
                Err(error) => Ending::RecordingFailed(error),
            },
            Trace::Replay(_) if matches!(ending, Ending::Quit(_)) => ending,
            Trace::Replay(player) => match player.end(*stamp, digests, reason) {
                Ok(()) => ending,
                Err(what) => Ending::Diverged(what),
            },
        }
    }

    /// How many instructions were executed until the vCPU last stopped, and the VM's time then in nanoseconds.
    pub(crate) fn progress(&self) -> (u64, u64) {
        let Stamp { count, time } = self.inner.lock().last.0;
        (count, time)
    }

    /// Gives the port's guest input, and says how much it took.
    fn let_in(&self, port: u16, input: &PortInput) -> Option<usize> {
        let receive = self.inner.lock().ports.get(usize::from(port))?.clone();
        Some(receive(input))
    }

    /// Lets in what waits; writes it down if a recording is made.
    fn let_in_offers(&self, now: Stamp) {
        loop {
            let Some((port, input)) = self.inner.lock().offers.pop_front() else { return };
            let taken = self.let_in(port, &input).unwrap_or(0);
            let mut inner = self.inner.lock();
            if let Trace::Record(recorder) = &mut inner.trace
                && taken > 0
                && let Err(error) = recorder.write(now, &event(port, &input, taken))
            {
                self.requests.push_and_stop(Request::RecordingFailed(error));
            }
            inner.answers.insert(port, taken);
            self.answered.notify_all();
        }
    }

    /// Has happen what is recorded of this moment.
    fn replay(&self, now: Stamp, digest: &dyn Fn() -> u64) {
        loop {
            let step = {
                let mut inner = self.inner.lock();
                let Inner { trace, output, over, .. } = &mut *inner;
                let Trace::Replay(player) = trace else { return };
                if *over {
                    return;
                }
                let step = player.step(now, &|| Digests { registers: digest(), output: output.0 });
                *over = matches!(step, Step::Over { .. } | Step::Diverged(_));
                step
            };
            match step {
                Step::Go => return,
                Step::Over { cut } => return self.requests.push_and_stop(Request::Replayed { cut }),
                Step::Diverged(what) => return self.requests.push_and_stop(Request::Diverged(what)),
                Step::LetIn(event) => {
                    let (port, input) = match event {
                        Event::Input { port, bytes } => (port, PortInput::Bytes(bytes)),
                        Event::Break { port } => (port, PortInput::Break),
                        Event::Check(_) | Event::End(..) => continue,
                    };
                    if self.let_in(port, &input) != Some(input.len()) {
                        self.diverged(now, &format!("port {port} does not take the input that it took"));
                    }
                }
            }
        }
    }

    fn diverged(&self, now: Stamp, what: &str) {
        let mut inner = self.inner.lock();
        if let Trace::Replay(player) = &inner.trace
            && !inner.over
        {
            let text = player.diverged(now, what);
            inner.over = true;
            drop(inner);
            self.requests.push_and_stop(Request::Diverged(text));
        }
    }

    /// Writes down how things are.
    fn check(&self, now: Stamp, digest: &dyn Fn() -> u64) {
        let mut inner = self.inner.lock();
        let Inner { trace, output, .. } = &mut *inner;
        if let Trace::Record(recorder) = trace
            && let Err(error) =
                recorder.write(now, &Event::Check(Digests { registers: digest(), output: output.0 }))
        {
            self.requests.push_and_stop(Request::RecordingFailed(error));
        }
    }
}

fn stamp(moment: Moment) -> Stamp {
    Stamp { count: moment.count, time: moment.time }
}

/// What is written down of input that was taken in part.
fn event(port: u16, input: &PortInput, taken: usize) -> Event {
    match input {
        PortInput::Bytes(bytes) => Event::Input { port, bytes: bytes[..taken.min(bytes.len())].to_vec() },
        PortInput::Break => Event::Break { port },
    }
}

/// How recordings name the ways in which VMs end; `None` is for those that say nothing of the guest.
fn reason(ending: &Ending) -> Option<Reason> {
    const CODES: u16 = 0x100;
    Some(Reason(match ending {
        Ending::Quit(_) => 0,
        Ending::PowerOff => 1,
        Ending::Reset => 2,
        Ending::Panicked => 3,
        Ending::TripleFault { .. } => 4,
        Ending::DebugExit(code) => CODES | u16::from(*code),
        Ending::InternalError(_) | Ending::RecordingFailed(_) => return None,
        Ending::Replayed { .. } | Ending::Diverged(_) => return None,
    }))
}

impl External for Outside {
    fn at_boundary(&self, now: Moment, digest: &dyn Fn() -> u64) {
        let now = stamp(now);
        let (replays, checks) = {
            let inner = self.inner.lock();
            let due = |recorder: &Recorder| now.count >= recorder.next_check();
            let checks = matches!(&inner.trace, Trace::Record(recorder) if due(recorder));
            (matches!(inner.trace, Trace::Replay(_)), checks)
        };
        if replays {
            return self.replay(now, digest);
        }
        if checks {
            self.check(now, digest);
        }
        self.let_in_offers(now);
    }

    fn next_count(&self) -> u64 {
        match &self.inner.lock().trace {
            Trace::Live => u64::MAX,
            Trace::Record(recorder) => recorder.next_check(),
            Trace::Replay(player) => player.next().map_or(u64::MAX, |stamp| stamp.count),
        }
    }

    fn idle(&self, now: Moment, deadline: Option<u64>) -> Idle {
        let inner = self.inner.lock();
        let Trace::Replay(player) = &inner.trace else {
            return match (self.sleep, deadline) {
                (true, _) => Idle::Sleep,
                (false, Some(deadline)) => Idle::Skip(deadline),
                (false, None) => Idle::Stand,
            };
        };
        let next = next_here(player, now.count);
        match (next, deadline) {
            (Some(next), deadline) if deadline.is_none_or(|deadline| next <= deadline) => Idle::Skip(next),
            (_, Some(deadline)) => Idle::Skip(deadline),
            (_, None) if inner.over => Idle::Stand,
            (_, None) => {
                drop(inner);
                self.diverged(stamp(now), "the processor waits for what never comes");
                Idle::Stand
            }
        }
    }

    fn is_waiting(&self) -> bool {
        !self.inner.lock().offers.is_empty()
    }

    fn woke(&self, now: Moment, digest: &dyn Fn() -> u64) {
        self.check(stamp(now), digest);
    }

    fn stopped(&self, now: Moment, digest: &dyn Fn() -> u64) {
        let mut inner = self.inner.lock();
        inner.last = (stamp(now), digest());
        inner.stop = None;
    }

    fn random(&self) -> u64 {
        self.random.word()
    }
}

/// When the next recorded event is, if that is before the next instruction.
fn next_here(player: &Player, count: u64) -> Option<u64> {
    player.next().filter(|stamp| stamp.count == count).map(|stamp| stamp.time)
}

/// [`Outside`], as ports see it.
pub(crate) struct Ports(pub(crate) Arc<Outside>);

impl Gate for Ports {
    fn port(&self, receive: Receiver) -> Arc<dyn PortGate> {
        let mut inner = self.0.inner.lock();
        // There are a handful.
        let number = inner.ports.len() as u16;
        inner.ports.push(Arc::new(receive));
        Arc::new(Port { outside: Arc::downgrade(&self.0), number })
    }
}

/// One port.
struct Port {
    outside: Weak<Outside>,
    number: u16,
}

impl PortGate for Port {
    fn input(&self, input: &PortInput) -> Option<usize> {
        let outside = self.outside.upgrade()?;
        let mut inner = outside.inner.lock();
        if let Trace::Replay(_) = inner.trace {
            // It is what was recorded that counts.
            return Some(input.len());
        }
        let input = match input {
            PortInput::Bytes(bytes) => PortInput::Bytes(bytes[..bytes.len().min(MAX_INPUT)].to_vec()),
            PortInput::Break => PortInput::Break,
        };
        inner.offers.push_back((self.number, input));
        let stop = inner.stop.clone();
        if let Some(stop) = stop {
            // Not with the lock, which the vCPU takes.
            parking_lot::MutexGuard::unlocked(&mut inner, || stop.kick());
        }
        loop {
            if let Some(taken) = inner.answers.remove(&self.number) {
                return Some(taken);
            }
            if outside.closing.load(Ordering::SeqCst) {
                return None;
            }
            outside.answered.wait(&mut inner);
        }
    }

    fn output(&self, bytes: &[u8]) {
        if let Some(outside) = self.outside.upgrade() {
            outside.inner.lock().output.add(self.number, bytes);
        }
    }

    fn is_closing(&self) -> bool {
        self.outside.upgrade().is_none_or(|outside| outside.closing.load(Ordering::SeqCst))
    }
}
