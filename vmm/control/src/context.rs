//! What commands work on.

use crate::ear::{Counts, Ear};
use crate::error::{QmpError, Result};
use crate::events::Hub;
use block_filters::ThrottleLimits;
use jobs::Storage;
use machine::{Quitter, RunState, VmHandle};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The VM that commands are about.
pub trait Machine: Send + Sync {
    /// What it is doing.
    fn run_state(&self) -> RunState;
    /// Has it stand still, for this reason.
    fn hold(&self, state: RunState);
    /// Has it run on.
    fn resume(&self);
    /// Presses its reset button.
    fn reset(&self);
    /// Presses its power button, if it has one.
    fn press_power_button(&self) -> bool;
    /// Wakes its guest, if that sleeps.
    fn wake(&self) -> bool;
    /// Whether its guest can sleep and be woken.
    fn can_sleep(&self) -> bool;
    /// Sends its processors a non-maskable interrupt.
    fn inject_nmi(&self);
    /// The host's number of the thread of each vCPU that runs now.
    fn vcpu_threads(&self) -> Vec<Option<i32>>;
    /// Ends it.
    fn quit(&self);
}

impl Machine for VmHandle {
    fn run_state(&self) -> RunState {
        Self::run_state(self)
    }

    fn hold(&self, state: RunState) {
        Self::hold(self, state);
    }

    fn resume(&self) {
        Self::resume(self);
    }

    fn reset(&self) {
        Self::reset(self);
    }

    fn press_power_button(&self) -> bool {
        Self::press_power_button(self)
    }

    fn wake(&self) -> bool {
        Self::wake(self)
    }

    fn can_sleep(&self) -> bool {
        Self::can_sleep(self)
    }

    fn inject_nmi(&self) {
        Self::inject_nmi(self);
    }

    fn vcpu_threads(&self) -> Vec<Option<i32>> {
        Self::vcpu_threads(self)
    }

    fn quit(&self) {
        Self::quit(self, Quitter::Control);
    }
}

/// What is known of the VM and does not change.
#[derive(Debug, Clone, Default)]
pub struct VmFacts {
    /// Its name, if it has one.
    pub name: Option<String>,
    /// Its UUID, in the usual form.
    pub uuid: String,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// The machine type, as people name it.
    pub machine: String,
    /// It runs on KVM.
    pub kvm: bool,
    /// The host has KVM.
    pub kvm_present: bool,
    /// Its character devices: a label, and what it is connected to.
    pub chardevs: Vec<(String, String)>,
}

/// What commands work on.
pub(crate) struct Context {
    pub(crate) vm: Arc<dyn Machine>,
    pub(crate) facts: VmFacts,
    pub(crate) hub: Arc<Hub>,
    pub(crate) counts: Arc<Counts>,
    /// The names of all commands, and everything as `query-qmp-schema` answers it.
    pub(crate) about: (Vec<&'static str>, Value),
    /// The VM's disks, if it can have any.
    disks: Option<Arc<Storage>>,
    /// The limits that were set for drives, by their names.
    pub(crate) throttles: RefCell<HashMap<String, ThrottleLimits>>,
}

impl Context {
    /// What commands work on that `about` tells of.
    pub(crate) fn new(
        vm: Arc<dyn Machine>,
        facts: VmFacts,
        ear: &Ear,
        about: (Vec<&'static str>, Value),
        disks: Option<Arc<Storage>>,
    ) -> Self {
        let (hub, counts) = (ear.hub.clone(), ear.counts.clone());
        Self { vm, facts, hub, counts, about, disks, throttles: RefCell::default() }
    }

    /// The VM's disks.
    ///
    /// # Errors
    /// There can be none.
    pub(crate) fn disks(&self) -> Result<&Arc<Storage>> {
        self.disks.as_ref().ok_or_else(|| QmpError::generic("There are no disks"))
    }

    /// Does something with the VM's disks, on a thread where it may wait.
    ///
    /// # Errors
    /// That of `work`, or there can be no disks.
    pub(crate) async fn storage<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Storage) -> block_graph::Result<R> + Send + 'static,
    ) -> Result<R> {
        let disks = self.disks()?.clone();
        Ok(io_loop::blocking(move || work(&disks)).await?)
    }

    /// Waits until the VM's state is `wanted`, or `counter` has gone on, or the VM has ended, or belongs to a debugger.
    pub(crate) async fn wait_for(
        &self,
        wanted: impl Fn(RunState) -> bool,
        counter: Option<&AtomicU64>,
        before: u64,
    ) {
        let counted = || counter.is_some_and(|counter| counter.load(Ordering::SeqCst) != before);
        self.hub
            .until(|| {
                let state = self.vm.run_state();
                wanted(state) || counted() || matches!(state, RunState::Shutdown | RunState::Debug)
            })
            .await;
    }
}
