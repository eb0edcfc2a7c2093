//! The accelerator itself.

use crate::tsc::TscSource;
use crate::vm::DbtVm;
use accel::{AccelError, AccelVm, Accelerator, CpuSpec, CpuidLeaf, Tier, VmSpec};
use clock::{TimerService, VmClock};
use guest_memory::GuestMemory;
use std::sync::Arc;
use x86_core::cpuid::CpuModel;
use x86_translate::{Options, Translator};

/// The most vCPUs: xAPIC ids have 8 bits, and 255 is everybody.
pub const MAX_VCPUS: u32 = 255;

const NAME: &str = "dbt";

/// The rate of the time-stamp counter where instructions are counted, if nobody says another: a tick each nanosecond.
const COUNTED_HERTZ: u64 = clock::NANOS_PER_SECOND;

/// The accelerator that interprets and translates.
#[derive(Debug, Clone, Copy, Default)]
pub struct DbtAccelerator;

impl Accelerator for DbtAccelerator {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_models(&self) -> Vec<(String, String)> {
        let there = CpuModel::list(CpuModel::available).into_iter().filter(|model| model.missing.is_empty());
        there.map(|model| (model.name.to_owned(), model.description.to_owned())).collect()
    }

    fn cpuid(&self, cpu: &CpuSpec) -> Result<Vec<CpuidLeaf>, AccelError> {
        let model = cpu_model(cpu)?.with_vcpus(1);
        let places = CpuModel::LEAVES.iter().flat_map(|(leaf, subs)| (0..*subs).map(|sub| (*leaf, sub)));
        let hertz = cpu.tsc_hertz.unwrap_or_else(|| TscSource::new(VmClock::new()).hertz());
        let leaves =
            places.map(|(leaf, sub)| CpuidLeaf { leaf, sub, registers: model.leaf(leaf, sub, 0, hertz) });
        Ok(leaves.filter(|leaf| leaf.registers != [0; 4]).collect())
    }

    fn create_vm(
        &self,
        spec: &VmSpec,
        memory: &GuestMemory,
        timers: &Arc<TimerService>,
    ) -> Result<Arc<dyn AccelVm>, AccelError> {
        if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
            return Err(AccelError::VcpuCount { accelerator: NAME, vcpus: spec.vcpus, most: MAX_VCPUS });
        }
        let counted = timers.clock().counter().is_some();
        let refused = |reason| Err(AccelError::Counted { accelerator: NAME, reason });
        match spec.tier {
            _ if !counted => {}
            Tier::Lockstep => return refused("both tiers of --tier lockstep would"),
            _ if spec.vcpus > 1 => return refused("there is more than one vCPU"),
            _ => {}
        }
        if spec.cpu.tsc_hertz.is_some() && !counted {
            return Err(AccelError::CpuFeature {
                name: "tsc-frequency".into(),
                cpu: spec.cpu.name.clone(),
                reason: "translated code reads the host's own counter".into(),
            });
        }
        let model = cpu_model(&spec.cpu)?.with_vcpus(spec.vcpus_per_socket());
        let translator = match spec.tier {
            Tier::Interpreter => None,
            Tier::Auto | Tier::Translator => Some(translator(spec, memory, counted)?),
            Tier::Lockstep if spec.vcpus == 1 => Some(translator(spec, memory, false)?),
            Tier::Lockstep => {
                let reason = "it can have one vCPU only".into();
                return Err(AccelError::Tier { accelerator: NAME, tier: spec.tier.name(), reason });
            }
        };
        let tsc = match counted {
            true => TscSource::counted(timers.clock().clone(), spec.cpu.tsc_hertz.unwrap_or(COUNTED_HERTZ)),
            false => TscSource::new(timers.clock().clone()),
        };
        Ok(Arc::new(DbtVm::new(spec, model, memory, timers, tsc, translator)))
    }
}

fn cpu_model(spec: &CpuSpec) -> Result<CpuModel, AccelError> {
    let found = CpuModel::by_name(&spec.name);
    let mut model =
        found.map_err(|error| AccelError::Cpu { accelerator: NAME, reason: error.to_string() })?;
    model.change_features(&spec.features).map_err(|(name, error)| AccelError::CpuFeature {
        name,
        cpu: spec.name.clone(),
        reason: error.to_string(),
    })?;
    Ok(model)
}

fn translator(spec: &VmSpec, memory: &GuestMemory, counting: bool) -> Result<Arc<Translator>, AccelError> {
    // What is compared must be exact.
    let strict = spec.tier == Tier::Lockstep;
    let options = Options { lock_needed: spec.vcpus > 1, strict, counting, ..Options::default() };
    Translator::new(memory.clone(), &options).map_err(|error| AccelError::Host {
        what: "memory for translated code",
        source: std::io::Error::other(error),
    })
}
