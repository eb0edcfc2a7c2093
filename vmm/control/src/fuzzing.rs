//! A client's bytes without a socket.

use crate::commands;
use crate::context::{Context, Machine, VmFacts};
use crate::ear::Ear;
use crate::monitor::{Monitor, Service};
use crate::outbox::Outbox;

use machine::{RunState, VmEvent};
use parking_lot::Mutex;
use std::rc::Rc;
use std::sync::Arc;

/// A VM that carries everything out at once, and notes what else it was asked for.
#[derive(Debug)]
pub struct Obedient {
    state: Mutex<RunState>,
    ear: Ear,
    asked: Mutex<Vec<&'static str>>,
}

impl Obedient {
    /// One that was not started yet; `ear` hears of what happens to it.
    pub fn new(ear: &Ear) -> Self {
        Self { state: Mutex::default(), ear: ear.clone(), asked: Mutex::default() }
    }

    /// What it was asked for that changes nothing.
    pub fn asked(&self) -> Vec<&'static str> {
        self.asked.lock().clone()
    }

    fn set(&self, state: RunState, event: &VmEvent) {
        *self.state.lock() = state;
        self.ear.hear(event);
    }
}

impl Machine for Obedient {
    fn run_state(&self) -> RunState {
        *self.state.lock()
    }

    fn hold(&self, state: RunState) {
        self.set(state, &VmEvent::Stopped);
    }

    fn resume(&self) {
        self.set(RunState::Running, &VmEvent::Resumed);
    }

    fn reset(&self) {
        self.ear.hear(&VmEvent::Reset { guest: false });
    }

    fn press_power_button(&self) -> bool {
        self.ear.hear(&VmEvent::PowerButton);
        true
    }

    fn wake(&self) -> bool {
        let sleeps = self.run_state() == RunState::Suspended;
        if sleeps {
            self.set(RunState::Running, &VmEvent::Woken);
        }
        sleeps
    }

    fn can_sleep(&self) -> bool {
        true
    }

    fn inject_nmi(&self) {
        self.asked.lock().push("nmi");
    }

    fn vcpu_threads(&self) -> Vec<Option<i32>> {
        vec![Some(17)]
    }

    fn quit(&self) {
        self.asked.lock().push("quit");
    }
}

/// Has a client send `bytes`, `piece` at a time, and returns the answers. Events, which have times in them, are left
/// out.
pub fn converse(bytes: &[u8], piece: usize) -> Vec<u8> {
    let ear = Ear::default();
    let vm = Arc::new(Obedient::new(&ear));
    let table = commands::table();
    let context = Context::new(vm, VmFacts { vcpus: 1, ..VmFacts::default() }, &ear, table.about(), None);
    let service = Rc::new(Service { table, context, turn: futures_util::lock::Mutex::new(()) });
    let outbox = Arc::new(Outbox::default());
    let mut said = Vec::new();
    io_loop::block_on(async {
        let mut monitor = Monitor::new(service, outbox.clone());
        for piece in bytes.chunks(piece.max(1)) {
            monitor.receive(piece).await;
            said.extend(outbox.take_all());
        }
        monitor.end().await;
        said.extend(outbox.take_all());
    });
    said
}
