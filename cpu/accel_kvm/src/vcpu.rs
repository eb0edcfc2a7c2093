//! One vCPU.

use crate::ioctl;
use crate::kick::Kicker;
use crate::state::{self, Timer};
use crate::vm::{VmShared, refused};
use accel::{AccelError, HaltReason, StopToken, Vcpu, VcpuBus, X86State};
use kvm_bindings as kb;
use kvm_ioctls::VcpuFd;
use std::io;
use std::sync::Arc;

/// IA32_TIME_STAMP_COUNTER.
const MSR_TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
pub(crate) const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// One vCPU.
pub(crate) struct KvmVcpu {
    pub(crate) id: u32,
    pub(crate) fd: VcpuFd,
    pub(crate) vm: Arc<VmShared>,
    pub(crate) kicker: Arc<Kicker>,
    /// The vector of the 8259 pair that was last handed to the kernel.
    pub(crate) offered: Option<u8>,
    /// Whether the last run ended with a window for the 8259 pair's interrupts.
    pub(crate) ready_for_interrupt: bool,
    /// The MSRs that are saved: those of the VM's that this vCPU has.
    pub(crate) msrs: Vec<u32>,
    /// What the guest's writes have made of the counter: its difference to the VM's.
    pub(crate) tsc_delta: u64,
    /// The VM's offset that was last given to the kernel.
    applied: u64,
    /// Whether the kernel takes offsets of the counter; if not, its value is written.
    has_tsc_offset: bool,
    /// What the APIC's timer is up to; while the vCPU does not run, the kernel's is switched off.
    pub(crate) timer: Timer,
    power_on: Option<Box<X86State>>,
}

impl KvmVcpu {
    pub(crate) fn new(
        id: u32,
        fd: VcpuFd,
        vm: Arc<VmShared>,
        kicker: Arc<Kicker>,
    ) -> Result<Self, AccelError> {
        if let Some(khz) = vm.set_tsc_khz {
            ioctl::set_tsc_khz(&fd, khz)
                .map_err(|source| AccelError::Host { what: "the rate of a time-stamp counter", source })?;
        }
        if vm.enforce_pv {
            let mut request = kb::kvm_enable_cap {
                cap: kb::KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
                ..kb::kvm_enable_cap::default()
            };
            request.args[0] = 1;
            fd.enable_cap(&request).map_err(refused("only those of KVM's features that are announced"))?;
        }
        fd.set_cpuid2(&vm.cpu.cpuid(id, vm.time.hertz())?).map_err(refused("a vCPU's CPUID"))?;
        let has_tsc_offset = ioctl::tsc_offset(&fd).is_ok();
        let msrs = state::readable_msrs(&fd, &vm.msrs);
        let mut vcpu = Self {
            id,
            fd,
            vm,
            kicker,
            offered: None,
            ready_for_interrupt: false,
            msrs,
            tsc_delta: 0,
            applied: 0,
            has_tsc_offset,
            timer: Timer::default(),
            power_on: None,
        };
        if id != 0 {
            // Without a SIPI from the start; the kernel's own first state wants an INIT before it.
            vcpu.fd
                .set_mp_state(kb::kvm_mp_state { mp_state: kb::KVM_MP_STATE_INIT_RECEIVED })
                .map_err(refused("a vCPU that waits"))?;
        }
        let mut power_on = vcpu.save()?;
        power_on.events.mp_state =
            if id == 0 { accel::MpState::Runnable } else { accel::MpState::WaitForSipi };
        vcpu.power_on = Some(Box::new(power_on));
        Ok(vcpu)
    }

    /// The value of an MSR after power-on.
    pub(crate) fn power_on_msr(&self, index: u32) -> Option<u64> {
        self.power_on.as_ref()?.msr(index)
    }

    /// Reads one MSR.
    pub(crate) fn msr(&self, index: u32) -> io::Result<u64> {
        state::read_msrs(&self.fd, &[index])?
            .first()
            .map(|(_, value)| *value)
            .ok_or_else(|| io::Error::other(format!("MSR {index:#x} cannot be read")))
    }

    pub(crate) fn set_msr(&self, index: u32, value: u64) -> io::Result<()> {
        match state::write_msrs(&self.fd, &[(index, value)])? {
            None => Ok(()),
            Some(_) => Err(io::Error::other(format!("MSR {index:#x} cannot be {value:#x}"))),
        }
    }

    /// The host's counter as the kernel scales it for this vCPU.
    fn host_counter(&self) -> io::Result<u64> {
        if self.has_tsc_offset {
            let offset = ioctl::tsc_offset(&self.fd)?;
            Ok(self.msr(MSR_TSC)?.wrapping_sub(offset))
        } else {
            // SAFETY: reads the time-stamp counter, which every x86-64 processor has.
            Ok(unsafe { core::arch::x86_64::_rdtsc() })
        }
    }

    /// Lets the guest's time go on.
    pub(crate) fn thaw(&mut self) -> io::Result<()> {
        let vm = &self.vm.vm;
        let offset = self.vm.time.enter(
            || self.host_counter(),
            |now| {
                let clock = kb::kvm_clock_data { clock: now, ..kb::kvm_clock_data::default() };
                vm.set_clock(&clock).map_err(|error| io::Error::from_raw_os_error(error.errno()))
            },
        )?;
        let result = self.set_counter(offset).and_then(|()| {
            let now = self.vm.time.clock().now();
            state::start_timer(self, now)
        });
        if result.is_err() {
            self.vm.time.leave(0);
        }
        result
    }

    /// Sets the counter to the VM's, whose offset is `offset`, with what the guest made of it.
    fn set_counter(&mut self, offset: u64) -> io::Result<()> {
        let offset_here = offset.wrapping_add(self.tsc_delta);
        if self.has_tsc_offset {
            ioctl::set_tsc_offset(&self.fd, offset_here)?;
        } else {
            self.set_msr(MSR_TSC, self.host_counter()?.wrapping_add(offset_here))?;
        }
        self.applied = offset;
        Ok(())
    }

    /// Stops the guest's time.
    pub(crate) fn freeze(&mut self) -> io::Result<()> {
        self.ready_for_interrupt = self.fd.get_kvm_run().ready_for_interrupt_injection != 0;
        let now = self.vm.time.clock().now();
        let host = self.host_counter();
        let counter = self.msr(MSR_TSC);
        self.vm.time.leave(*host.as_ref().unwrap_or(&0));
        let (host, counter) = (host?, counter?);
        if self.has_tsc_offset {
            self.tsc_delta = ioctl::tsc_offset(&self.fd)?.wrapping_sub(self.applied);
        } else {
            // Measured: differences below this are the measurement's.
            const NOISE: u64 = 1 << 20;
            let delta = counter.wrapping_sub(host).wrapping_sub(self.applied);
            if delta.wrapping_sub(self.tsc_delta).wrapping_add(NOISE) > 2 * NOISE {
                self.tsc_delta = delta;
            }
        }
        self.timer = state::stop_timer(self, now)?;
        Ok(())
    }

    fn restore_checked(&mut self, state: &X86State) -> Result<(), AccelError> {
        let source = self.vm.time.at(state.tsc_time);
        state::restore(self, state, state.tsc.wrapping_sub(source))?;
        self.vm.time.forget();
        Ok(())
    }
}

impl Vcpu for KvmVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn run(&mut self, bus: &dyn VcpuBus, stop: &StopToken) -> HaltReason {
        self.run_loop(bus, stop)
    }

    fn reset(&mut self) {
        let Some(power_on) = self.power_on.clone() else { return };
        if let Err(error) = state::restore(self, &power_on, 0) {
            tracing::error!("vCPU {} is not as after power-on: {error}", self.id);
        }
    }

    fn save(&self) -> Result<X86State, AccelError> {
        state::save(self)
    }

    fn restore(&mut self, state: &X86State) -> Result<(), AccelError> {
        let result = self.restore_checked(state);
        if result.is_err() {
            self.reset();
        }
        result
    }
}
