//! The VM's run with a debugger.

use crate::endpoint::{Listener, Stream};
use crate::feed::Feed;
use crate::registers::Architecture;
use crate::session::{Debuggee, Session, SessionError};
use crate::target::{PACKET_BYTES, thread};
use accel::{DebugStop, Vcpu, WatchKind};
use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::{GdbStubStateMachine, GdbStubStateMachineInner, state};
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use gdbstub::target::ext::breakpoints::WatchKind as GdbWatchKind;
use guest_memory::GuestMemory;
use machine::{Ending, MachineError, Pause, Quitter, RunOptions, Vm};
use std::io::{self, BufWriter, Write};

/// How the VM begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// It runs.
    Running,
    /// It waits for a debugger to let it run.
    Paused,
}

/// How a session ended.
enum After {
    /// The VM goes on without a debugger.
    Detached,
    /// The connection broke; whether the VM was running.
    Lost { running: bool },
    /// Nothing was said: somebody looked whether there is a stub. The VM does as before.
    Silent,
    /// The VM ended.
    Ended(Ending),
}

impl Debuggee for &mut Vm {
    fn vcpus(&self) -> &[Box<dyn Vcpu>] {
        Vm::vcpus(self)
    }

    fn vcpus_mut(&mut self) -> &mut [Box<dyn Vcpu>] {
        Vm::vcpus_mut(self)
    }

    fn memory(&self) -> &GuestMemory {
        Vm::memory(self)
    }

    fn reset(&mut self) -> Result<(), String> {
        Vm::reset(self).map_err(|error| error.to_string())
    }
}

/// Runs the VM until it ends, as [`Vm::run`] does, with clients of `listener` as its debuggers, one at a time. A client
/// that connects stops it. `exit_code` is what a debugger is told of the VM's end.
///
/// # Errors
/// As [`Vm::run`].
pub fn run(
    vm: &mut Vm,
    listener: Listener,
    start: Start,
    exit_code: &dyn Fn(&Ending) -> u8,
) -> Result<Ending, MachineError> {
    let (handle, endpoint) = (vm.handle(), listener.endpoint().clone());
    let feed = Feed::start(listener, move || handle.pause()).map_err(MachineError::Thread)?;
    let ending = serve(vm, &feed, start, exit_code);
    // The thread that listens ends with the process only.
    endpoint.forget();
    ending
}

/// [`run`], with what clients send.
fn serve(
    vm: &mut Vm,
    feed: &Feed,
    start: Start,
    exit_code: &dyn Fn(&Ending) -> u8,
) -> Result<Ending, MachineError> {
    let (mut running, mut architecture) = (start == Start::Running, Architecture::default());
    loop {
        let pause = if running { vm.run_until_pause(&RunOptions::default())? } else { vm.wait() };
        if let Pause::Ended(ending) = pause {
            return Ok(ending);
        }
        let Some(client) = feed.take_client() else { continue };
        let mut session = Session::new(&mut *vm, architecture);
        let after = converse(&mut session, &client, feed, exit_code);
        session.end();
        architecture = session.architecture();
        feed.release(&client);
        running = match after? {
            After::Detached => {
                vm.release();
                true
            }
            After::Silent => running,
            After::Lost { running: true } => {
                tracing::warn!("the connection to gdb broke; the VM goes on");
                true
            }
            After::Lost { running: false } => {
                tracing::warn!("the connection to gdb broke; the VM stays stopped until gdb comes back");
                false
            }
            After::Ended(ending) => return Ok(ending),
        };
    }
}

/// What is written to a client.
struct Output(BufWriter<Stream>);

impl Connection for Output {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.0.write_all(&[byte])
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

type Machine<'s, 'v> = GdbStubStateMachine<'s, Session<&'v mut Vm>, Output>;
type Running<'s, 'v> = GdbStubStateMachineInner<'s, state::Running, Session<&'v mut Vm>, Output>;
type StubError = gdbstub::stub::GdbStubError<SessionError, io::Error>;

/// Serves a client until it goes or the VM ends.
fn converse(
    session: &mut Session<&mut Vm>,
    client: &Stream,
    feed: &Feed,
    exit_code: &dyn Fn(&Ending) -> u8,
) -> Result<After, MachineError> {
    let broken = |error: &dyn std::fmt::Display, running| {
        tracing::warn!("gdb: {error}");
        Ok(After::Lost { running })
    };
    let output = match client.try_clone() {
        Ok(stream) => Output(BufWriter::new(stream)),
        Err(error) => return broken(&error, false),
    };
    let stub = GdbStub::builder(output).packet_buffer_size(PACKET_BYTES).build();
    let begun = stub
        .map_err(|error| error.to_string())
        .and_then(|stub| stub.run_state_machine(session).map_err(|error| error.to_string()));
    let mut machine = match begun {
        Ok(machine) => machine,
        Err(error) => return broken(&error, false),
    };
    let mut heard = false;
    loop {
        let running = matches!(machine, GdbStubStateMachine::Running(_));
        let next = match machine {
            GdbStubStateMachine::Idle(idle) => loop {
                if let Some(byte) = feed.byte() {
                    heard = true;
                    break idle.incoming_data(session, byte);
                }
                if feed.is_closed() {
                    return Ok(if heard { After::Lost { running: false } } else { After::Silent });
                }
                if let Pause::Ended(ending) = session.debuggee().wait() {
                    return Ok(After::Ended(ending));
                }
            },
            GdbStubStateMachine::Running(running) => {
                if let Some(byte) = feed.byte() {
                    running.incoming_data(session, byte)
                } else if feed.is_closed() {
                    return Ok(After::Lost { running: true });
                } else {
                    match go_on(session, running, exit_code)? {
                        Went::On(next) => next,
                        Went::Ended(ending) => return Ok(After::Ended(ending)),
                    }
                }
            }
            GdbStubStateMachine::CtrlCInterrupt(interrupt) => {
                let reason =
                    MultiThreadStopReason::SignalWithThread { tid: thread(0), signal: Signal::SIGINT };
                interrupt.interrupt_handled(session, Some(reason))
            }
            GdbStubStateMachine::Disconnected(end) => {
                return Ok(match end.get_reason() {
                    DisconnectReason::Kill => {
                        acknowledge_kill(client);
                        After::Ended(Ending::Quit(Quitter::Debugger))
                    }
                    _ => After::Detached,
                });
            }
        };
        machine = match next {
            Ok(machine) => machine,
            Err(error) => return broken(&error, running),
        };
    }
}

/// Answers `vKill`, which gdb waits for, and the protocol's crate does not. (To `k` nobody listens for an answer.)
fn acknowledge_kill(client: &Stream) {
    let answered = client.try_clone().and_then(|mut stream| stream.write_all(b"$OK#9a"));
    if let Err(error) = answered {
        tracing::debug!("gdb went before it was told that the VM ends: {error}");
    }
}

/// What came of letting the VM run.
enum Went<'s, 'v> {
    On(Result<Machine<'s, 'v>, StubError>),
    Ended(Ending),
}

/// Lets the VM run until there is something to say to the client, or something came from it.
fn go_on<'s, 'v>(
    session: &mut Session<&'v mut Vm>,
    stub: Running<'s, 'v>,
    exit_code: &dyn Fn(&Ending) -> u8,
) -> Result<Went<'s, 'v>, MachineError> {
    let stop = |vcpu, signal| MultiThreadStopReason::SignalWithThread { tid: thread(vcpu), signal };
    let pause = match session.prepare() {
        Ok(()) => {
            let vcpus: Vec<bool> =
                (0..session.debuggee().vcpus().len() as u32).map(|id| session.runs(id)).collect();
            let runs = |id: u32| vcpus.get(id as usize).copied().unwrap_or(true);
            let options = RunOptions { vcpus: &runs, stop_at_triple_fault: true };
            // Whoever had it stand still besides: the debugger wants it to run.
            session.debuggee().release();
            session.debuggee().run_until_pause(&options)?
        }
        Err(error) => {
            tracing::warn!("gdb: {error}");
            return Ok(Went::On(stub.report_stop(session, stop(0, Signal::SIGTRAP))));
        }
    };
    session.forget();
    let reason = match pause {
        Pause::Asked => return Ok(Went::On(Ok(stub.into()))),
        Pause::Debug { vcpu, stop } if session.goes_on(vcpu as usize, stop) => {
            return Ok(Went::On(Ok(stub.into())));
        }
        Pause::Debug { vcpu, stop } => stop_reason(session, vcpu, stop),
        // The machine resets when it goes on.
        Pause::TripleFault { vcpu } => stop(vcpu, Signal::SIGSEGV),
        Pause::Ended(ending) => {
            let code = MultiThreadStopReason::Exited(exit_code(&ending));
            if let Err(error) = stub.report_stop(session, code) {
                tracing::warn!("gdb: {error}");
            }
            return Ok(Went::Ended(ending));
        }
    };
    Ok(Went::On(stub.report_stop(session, reason)))
}

/// What gdb is told of a vCPU that stopped.
pub(crate) fn stop_reason<D: Debuggee>(
    session: &Session<D>,
    vcpu: u32,
    stop: DebugStop,
) -> MultiThreadStopReason<u64> {
    let tid = thread(vcpu);
    match stop {
        DebugStop::Step => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP },
        DebugStop::Breakpoint { address } if session.points.hardware.contains(&address) => {
            MultiThreadStopReason::HwBreak(tid)
        }
        DebugStop::Breakpoint { .. } => MultiThreadStopReason::SwBreak(tid),
        DebugStop::Watchpoint(point) => {
            let kind = match point.kind {
                WatchKind::Write => GdbWatchKind::Write,
                WatchKind::Read => GdbWatchKind::Read,
                WatchKind::Access => GdbWatchKind::ReadWrite,
            };
            MultiThreadStopReason::Watch { tid, kind, addr: point.address }
        }
    }
}
