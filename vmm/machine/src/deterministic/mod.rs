//! Machines that do the same whenever they run: time is made of instructions, numbers that are to be random of a seed,
//! and what comes from outside comes between two instructions, whose count can be recorded.

mod entropy;
mod identity;
mod outside;
mod trace;

pub use identity::{Difference, TraceError};

pub(crate) use entropy::{DEVICE, Entropy, KERNEL};
pub(crate) use outside::{Outside, Ports};

use crate::requests::Requests;
use crate::{DeterministicSpec, MachineError, MachineSpec, TraceSpec};
use accel::Accelerator;
use clock::{TimerService, VmClock};
use std::fs::File;
use std::io::{BufReader, Write};
use std::path::Path;
use std::sync::Arc;
use trace::{Player, Recorder, Trace};

/// What makes a machine deterministic.
pub(crate) struct Determinism {
    pub(crate) spec: DeterministicSpec,
    pub(crate) outside: Arc<Outside>,
    /// The header of the recording that is to be written.
    header: Vec<(String, String)>,
}

impl Determinism {
    /// What `spec` asks for on `accelerator`. A recording that is to be replayed is read to its end, and says how time
    /// and random numbers are made.
    pub(crate) fn open(
        spec: &MachineSpec,
        accelerator: &dyn Accelerator,
        requests: &Arc<Requests>,
    ) -> Result<Option<Self>, MachineError> {
        let Some(wanted) = &spec.deterministic else { return Ok(None) };
        let mut wanted = wanted.clone();
        let mut header = Vec::new();
        let mut trace = Trace::Live;
        if let Some(what) = &wanted.trace {
            let (TraceSpec::Record(path) | TraceSpec::Replay(path)) = what;
            let path = path.clone();
            let failed = |source| MachineError::Trace { path: path.clone(), source };
            identity::check(spec).map_err(failed)?;
            header = identity::of(spec, accelerator)?;
            if let TraceSpec::Replay(_) = what {
                let player = open_recording(&path, &header, &mut wanted).map_err(failed)?;
                trace = Trace::Replay(player);
            } else {
                header.extend(identity::of_time(&wanted));
            }
        }
        let random = Entropy::seeded(wanted.seed, entropy::PROCESSOR);
        let outside = Outside::new(requests, wanted.sleep, random, trace);
        Ok(Some(Self { spec: wanted, outside: Arc::new(outside), header }))
    }

    /// The machine is built: a recording begins, if there is to be one.
    pub(crate) fn begin(&self) -> Result<(), MachineError> {
        let Some(TraceSpec::Record(path)) = &self.spec.trace else { return Ok(()) };
        let failed = |source| MachineError::Trace { path: path.clone(), source: TraceError::Write(source) };
        let file = File::create(path).map_err(failed)?;
        let writer = recording::Writer::new(Box::new(file) as Box<dyn Write + Send>, &self.header);
        self.outside.record(Recorder::new(writer.map_err(failed)?));
        Ok(())
    }

    /// Random numbers for devices, and for the kernel.
    pub(crate) fn entropy(&self, stream: u64) -> Entropy {
        Entropy::seeded(self.spec.seed, stream)
    }
}

/// Reads a recording to its end, and begins to read it again.
fn open_recording(
    path: &Path,
    now: &[(String, String)],
    spec: &mut DeterministicSpec,
) -> Result<Player, TraceError> {
    let open = || {
        let file = File::open(path).map_err(TraceError::Read)?;
        Ok::<_, TraceError>(recording::Reader::new(BufReader::new(file))?)
    };
    let mut reader = open()?;
    identity::compare(reader.header(), now, spec)?;
    while reader.next_event()?.is_some() {}
    Player::new(open()?)
}

/// Timers for a machine, by the clock that it is to have.
pub(crate) fn timers(determinism: Option<&Arc<Determinism>>) -> Result<Arc<TimerService>, MachineError> {
    match determinism {
        Some(determinism) => Ok(TimerService::without_thread(VmClock::counted(determinism.spec.shift))),
        None => TimerService::new(VmClock::new()).map_err(MachineError::Thread),
    }
}
