//! For fuzzing and tests: a client's bytes, without a connection and without a machine around the processors.

use crate::server::stop_reason;
use crate::session::{Debuggee, Session};
use crate::target::{PACKET_BYTES, thread};
use accel::{DebugStop, Vcpu};
use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{GdbStub, MultiThreadStopReason};
use guest_memory::GuestMemory;
use std::convert::Infallible;

/// Processors and their memory, without a machine around them.
pub struct Processors {
    /// The memory.
    pub memory: GuestMemory,
    /// The processors, by number.
    pub vcpus: Vec<Box<dyn Vcpu>>,
}

impl Debuggee for Processors {
    fn vcpus(&self) -> &[Box<dyn Vcpu>] {
        &self.vcpus
    }

    fn vcpus_mut(&mut self) -> &mut [Box<dyn Vcpu>] {
        &mut self.vcpus
    }

    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn reset(&mut self) -> Result<(), String> {
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.reset());
        Ok(())
    }
}

/// Counts what is said.
struct Counter<'a>(&'a mut usize);

impl Connection for Counter<'_> {
    type Error = Infallible;

    fn write(&mut self, _byte: u8) -> Result<(), Infallible> {
        *self.0 += 1;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Gives the stub `bytes` as a client's; `run` lets the processors run for a while, and says which was stopped by what
/// it is debugged for. Gives how many bytes the stub has answered with.
pub fn converse<D: Debuggee>(
    session: &mut Session<D>,
    bytes: &[u8],
    mut run: impl FnMut(&mut Session<D>) -> Option<(u32, DebugStop)>,
) -> usize {
    let mut said = 0;
    let stub = GdbStub::builder(Counter(&mut said)).packet_buffer_size(PACKET_BYTES).build();
    let Ok(Ok(mut machine)) = stub.map(|stub| stub.run_state_machine(session)) else { return 0 };
    let mut bytes = bytes.iter().copied();
    loop {
        let next = match machine {
            GdbStubStateMachine::Idle(idle) => match bytes.next() {
                Some(byte) => idle.incoming_data(session, byte),
                None => break,
            },
            GdbStubStateMachine::Running(running) => {
                if session.prepare().is_err() {
                    break;
                }
                let stop = run(session);
                session.forget();
                match (stop, bytes.next()) {
                    (Some((vcpu, stop)), _) => {
                        let reason = stop_reason(session, vcpu, stop);
                        running.report_stop(session, reason)
                    }
                    (None, Some(byte)) => running.incoming_data(session, byte),
                    (None, None) => break,
                }
            }
            GdbStubStateMachine::CtrlCInterrupt(interrupt) => {
                let reason =
                    MultiThreadStopReason::SignalWithThread { tid: thread(0), signal: Signal::SIGINT };
                interrupt.interrupt_handled(session, Some(reason))
            }
            GdbStubStateMachine::Disconnected(_) => break,
        };
        match next {
            Ok(next) => machine = next,
            Err(_) => break,
        }
    }
    session.end();
    said
}
