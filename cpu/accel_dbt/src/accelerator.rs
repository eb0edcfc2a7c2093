//! The accelerator itself.

use crate::tsc::TscSource;
use crate::vm::DbtVm;
use accel::{AccelError, AccelVm, Accelerator, CpuSpec, Tier, VmSpec};
use clock::TimerService;
use guest_memory::GuestMemory;
use std::sync::Arc;
use x86_core::cpuid::CpuModel;
use x86_translate::{Options, Translator};

/// The most vCPUs: xAPIC ids have 8 bits, and 255 is everybody.
pub const MAX_VCPUS: u32 = 255;

const NAME: &str = "dbt";

/// The accelerator that interprets and translates.
#[derive(Debug, Clone, Copy, Default)]
pub struct DbtAccelerator;

impl Accelerator for DbtAccelerator {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_models(&self) -> Vec<(String, String)> {
        let line = |name: &&str| {
            let description = match *name {
                "max" => "everything that this accelerator and the host can do",
                "qemu64" => "the least that 64-bit systems need",
                "x86-64-v1" => "the x86-64 baseline",
                "x86-64-v2" => "x86-64-v2: up to SSE4.2 and POPCNT",
                "x86-64-v3" => "x86-64-v3: up to AVX2, BMI2 and FMA",
                _ => "",
            };
            ((*name).to_owned(), description.to_owned())
        };
        CpuModel::names().iter().map(line).collect()
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
        let model = cpu_model(&spec.cpu)?.with_vcpus(spec.vcpus_per_socket());
        let translator = match spec.tier {
            Tier::Interpreter => None,
            Tier::Auto | Tier::Translator => Some(translator(spec, memory)?),
            Tier::Lockstep if spec.vcpus == 1 => Some(translator(spec, memory)?),
            Tier::Lockstep => {
                let reason = "it can have one vCPU only".into();
                return Err(AccelError::Tier { accelerator: NAME, tier: spec.tier.name(), reason });
            }
        };
        let tsc = TscSource::new(timers.clock().clone());
        Ok(Arc::new(DbtVm::new(spec, model, memory, timers, tsc, translator)))
    }
}

fn cpu_model(spec: &CpuSpec) -> Result<CpuModel, AccelError> {
    let mut model = CpuModel::by_name(&spec.name).map_err(|_| AccelError::UnknownCpu {
        accelerator: NAME,
        name: spec.name.clone(),
        known: CpuModel::names().join(", "),
    })?;
    if spec.tsc_hertz.is_some() {
        return Err(AccelError::CpuFeature {
            name: "tsc-frequency".into(),
            cpu: spec.name.clone(),
            reason: "translated code reads the host's own counter".into(),
        });
    }
    for (name, on) in &spec.features {
        model.change_feature(name, *on).map_err(|error| AccelError::CpuFeature {
            name: name.clone(),
            cpu: spec.name.clone(),
            reason: error.to_string(),
        })?;
    }
    Ok(model)
}

fn translator(spec: &VmSpec, memory: &GuestMemory) -> Result<Arc<Translator>, AccelError> {
    // What is compared must be exact.
    let strict = spec.tier == Tier::Lockstep;
    let options = Options { lock_needed: spec.vcpus > 1, strict, ..Options::default() };
    Translator::new(memory.clone(), &options).map_err(|error| AccelError::Host {
        what: "memory for translated code",
        source: std::io::Error::other(error),
    })
}
