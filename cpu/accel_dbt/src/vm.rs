//! One VM.

use crate::counted::Counted;
use crate::debug::Debugging;
use crate::engine::Engine;
use crate::events::Events;
use crate::halt_poll::HaltPoll;
use crate::shared::{Requests, VcpuShared};
use crate::tsc::TscSource;
use crate::vcpu::DbtVcpu;
use crate::vm_shared::VmShared;
use accel::{AccelError, AccelVm, EoiListener, External, Tier, Vcpu, VmSpec};
use clock::TimerService;
use guest_memory::{CodeWriteHook, GuestMemory};
use irq::MsiTarget;
use lapic::{ApicBus, ApicConfig};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::{Arc, Weak};
use x86_core::Cpu;
use x86_core::cpuid::CpuModel;
use x86_lockstep::Lockstep;
use x86_translate::{Translator, TranslatorVcpu};

/// Tells the translator of writes to code. The translator holds the memory, which holds this.
struct CodeWrites(Weak<Translator>);

impl CodeWriteHook for CodeWrites {
    fn code_written(&self, gpa: u64, len: u64) {
        if let Some(translator) = self.0.upgrade() {
            translator.code_written(gpa, len);
        }
    }
}

/// One VM.
pub(crate) struct DbtVm {
    shared: Arc<VmShared>,
}

impl DbtVm {
    pub(crate) fn new(
        spec: &VmSpec,
        model: CpuModel,
        memory: &GuestMemory,
        timers: &Arc<TimerService>,
        tsc: TscSource,
        translator: Option<Arc<Translator>>,
    ) -> Self {
        if let Some(translator) = &translator {
            memory.set_code_hook(Arc::new(CodeWrites(Arc::downgrade(translator))));
        }
        let config = ApicConfig {
            vcpus: spec.vcpus,
            physical_bits: model.physical_mask().count_ones() as u8,
            tsc_hertz: tsc.hertz(),
        };
        let shared = VmShared {
            memory: memory.clone(),
            clock: timers.clock().clone(),
            tsc,
            apics: ApicBus::new(config, timers),
            model: Arc::new(model),
            vcpus: spec.vcpus,
            tier: spec.tier,
            halt_poll: spec.halt_poll,
            counted: Counted::new(timers),
            translator,
            breakpoints: Mutex::default(),
            made: Mutex::new(Vec::new()),
        };
        Self { shared: Arc::new(shared) }
    }

    fn made(&self) -> Vec<Arc<VcpuShared>> {
        self.shared.made.lock().clone()
    }
}

impl AccelVm for DbtVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, AccelError> {
        let refused = |reason| AccelError::VcpuId { id, reason };
        if id >= self.shared.vcpus {
            return Err(refused("the VM was made for fewer"));
        }
        let mut cpu = Cpu::new(self.shared.model.clone(), id);
        cpu.lock_needed = self.shared.vcpus > 1;
        let engine = match &self.shared.translator {
            None => Engine::Interpreter(cpu),
            Some(translator) if self.shared.tier == Tier::Lockstep => {
                let lockstep = Lockstep::new(&self.shared.memory, translator, cpu).map_err(|error| {
                    AccelError::Host { what: "memory for a second VM", source: std::io::Error::other(error) }
                })?;
                Engine::Lockstep(Box::new(lockstep))
            }
            Some(translator) => Engine::Translator(Box::new(TranslatorVcpu::new(translator, cpu))),
        };
        let shared = VcpuShared::new(engine);
        let lapic = self.shared.apics.connect(id, shared.clone()).ok_or(refused("it exists already"))?;
        self.shared.made.lock().push(shared.clone());
        if let Some(counted) = &self.shared.counted {
            let vcpu = Arc::downgrade(&shared);
            counted.connect(move || {
                if let Some(vcpu) = vcpu.upgrade() {
                    vcpu.post(Requests::LOOK);
                }
            });
        }
        let (events, halt_poll) = (Events::at_reset(id), HaltPoll::new(self.shared.halt_poll));
        Ok(Box::new(DbtVcpu {
            id,
            vm: self.shared.clone(),
            shared,
            lapic,
            events,
            halt_poll,
            debugging: Debugging::default(),
            repeating: false,
        }))
    }

    fn msi_target(&self) -> Arc<dyn MsiTarget> {
        self.shared.apics.clone()
    }

    fn set_ext_int(&self, level: bool) {
        self.shared.apics.set_ext_int(level);
    }

    fn set_eoi_listener(&self, listener: EoiListener) {
        self.shared.apics.set_eoi_listener(listener);
    }

    fn memory_changed(&self, _range: Range<u64>) {
        for vcpu in self.made() {
            vcpu.post(Requests::FLUSH);
        }
    }

    fn set_dirty_log(&self, on: bool) {
        self.shared.memory.set_dirty_log(on);
        for vcpu in self.made() {
            vcpu.revoke_writes();
            vcpu.quiesce();
        }
    }

    fn take_dirty(&self, page: &mut dyn FnMut(u64)) {
        let mut pages = Vec::new();
        self.shared.memory.take_dirty(|gpa| pages.push(gpa));
        // A store may have looked its right to write up before the log was taken and be under way still.
        // Its page is among those just taken, so what counts is that it is done before they are read.
        for vcpu in self.made() {
            vcpu.revoke_writes();
            vcpu.quiesce();
        }
        pages.into_iter().for_each(page);
    }

    fn tsc_hertz(&self) -> u64 {
        self.shared.tsc.hertz()
    }

    fn set_external(&self, external: Arc<dyn External>) {
        if let Some(counted) = &self.shared.counted {
            counted.set_external(external);
        }
    }
}
