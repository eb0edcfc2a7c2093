//! What is done about recordings: writing one, or having it happen again.

use super::TraceError;
use recording::{Digests, Event, Reader, Reason, Stamp, Writer};
use std::fs::File;
use std::io::{BufReader, Write};

/// Instructions between two looks at the VM that are written down.
const CHECK_PERIOD: u64 = 1 << 24;

/// What a VM does about recordings.
pub(super) enum Trace {
    /// Nothing.
    Live,
    Record(Recorder),
    Replay(Player),
}

/// A recording that is written.
pub(super) struct Recorder {
    writer: Writer<Box<dyn Write + Send>>,
    next_check: u64,
}

impl Recorder {
    pub(super) fn new(writer: Writer<Box<dyn Write + Send>>) -> Self {
        Self { writer, next_check: CHECK_PERIOD }
    }

    pub(super) fn next_check(&self) -> u64 {
        self.next_check
    }

    /// Writes an event; gives what is wrong if that fails.
    pub(super) fn write(&mut self, now: Stamp, event: &Event) -> Result<(), String> {
        self.next_check = now.count.saturating_add(CHECK_PERIOD);
        self.writer.write(now, event).map_err(|error| format!("the recording cannot be written: {error}"))
    }
}

/// What is to happen at a moment of a replay.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing more.
    Go,
    /// This is to be let in.
    LetIn(Event),
    /// The recording is over.
    Over {
        /// It was cut off.
        cut: bool,
    },
    /// The VM does something else than it did.
    Diverged(String),
}

/// A recording that happens again.
pub(super) struct Player {
    reader: Reader<BufReader<File>>,
    next: Option<(Stamp, Event)>,
    /// The last event that was as recorded.
    same: Stamp,
}

impl Player {
    pub(super) fn new(mut reader: Reader<BufReader<File>>) -> Result<Self, TraceError> {
        let next = reader.next_event()?;
        Ok(Self { reader, next, same: Stamp::default() })
    }

    /// When the next event is.
    pub(super) fn next(&self) -> Option<Stamp> {
        self.next.as_ref().map(|(stamp, _)| *stamp)
    }

    /// What is to happen now.
    pub(super) fn step(&mut self, now: Stamp, digests: &dyn Fn() -> Digests) -> Step {
        loop {
            let Some((stamp, event)) = &self.next else { return Step::Over { cut: true } };
            let early = now.count < stamp.count || now.count == stamp.count && now.time < stamp.time;
            if early {
                return Step::Go;
            }
            if now != *stamp {
                return Step::Diverged(
                    self.diverged(now, &format!("{} came in at {}", name(event), words(*stamp))),
                );
            }
            match event {
                Event::Check(recorded) => {
                    if let Some(what) = differs(*recorded, digests()) {
                        return Step::Diverged(self.diverged(now, what));
                    }
                    if let Err(error) = self.advance() {
                        return Step::Diverged(error);
                    }
                }
                Event::End(recorded, reason) => {
                    if *reason != Reason::default() {
                        return Step::Diverged(self.diverged(now, "the guest ended the VM here"));
                    }
                    return match differs(*recorded, digests()) {
                        Some(what) => Step::Diverged(self.diverged(now, what)),
                        None => Step::Over { cut: false },
                    };
                }
                Event::Input { .. } | Event::Break { .. } => {
                    let event = event.clone();
                    return match self.advance() {
                        Ok(()) => Step::LetIn(event),
                        Err(error) => Step::Diverged(error),
                    };
                }
            }
        }
    }

    fn advance(&mut self) -> Result<(), String> {
        if let Some(same) = self.next() {
            self.same = same;
        }
        self.next =
            self.reader.next_event().map_err(|error| format!("the recording changed meanwhile: {error}"))?;
        Ok(())
    }

    /// The VM ended by itself: whether it did when it was recorded.
    pub(super) fn end(&self, now: Stamp, digests: Digests, reason: Reason) -> Result<(), String> {
        match &self.next {
            Some((stamp, Event::End(recorded, then))) if *then == reason && *stamp == now => {
                differs(*recorded, digests).map_or(Ok(()), |what| Err(self.diverged(now, what)))
            }
            Some((stamp, event)) => {
                Err(self
                    .diverged(now, &format!("the VM ends here; {} came at {}", name(event), words(*stamp))))
            }
            None => Ok(()),
        }
    }

    /// The message.
    pub(super) fn diverged(&self, now: Stamp, what: &str) -> String {
        let Stamp { count, .. } = self.same;
        format!(
            "the replay diverged at instruction {}: {what} (all was as recorded at instruction {count})",
            now.count
        )
    }
}

fn name(event: &Event) -> &'static str {
    match event {
        Event::Input { .. } => "recorded input",
        Event::Break { .. } => "a recorded break condition",
        Event::Check(_) => "a recorded moment",
        Event::End(..) => "the recorded end",
    }
}

fn words(stamp: Stamp) -> String {
    format!("instruction {}, {} ns", stamp.count, stamp.time)
}

fn differs(recorded: Digests, now: Digests) -> Option<&'static str> {
    match (recorded.registers == now.registers, recorded.output == now.output) {
        (true, true) => None,
        (true, false) => Some("the output is not what was recorded"),
        (false, true) => Some("the processor's registers are not what was recorded"),
        (false, false) => Some("neither the processor's registers nor the output are what was recorded"),
    }
}
