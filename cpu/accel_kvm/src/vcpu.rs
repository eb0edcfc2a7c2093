//! One vCPU.

use crate::debug::Debugging;
use crate::error::{errno, host, refused};
use crate::ioctl;
use crate::kick::Kicker;
use crate::state::{self, KernelVcpu, TSC};
use crate::vm_shared::VmShared;
use accel::{AccelError, X86State};
use kvm_bindings as kb;
use kvm_ioctls::VcpuFd;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One vCPU.
pub(crate) struct KvmVcpu {
    pub(crate) kernel: KernelVcpu,
    pub(crate) vm: Arc<VmShared>,
    pub(crate) kicker: Arc<Kicker>,
    pub(crate) debugging: Debugging,
    /// What the guest's writes have made of the counter: its difference to the VM's.
    tsc_delta: u64,
    /// The VM's offset that was last given to the kernel.
    applied: u64,
    /// Whether the kernel takes offsets of the counter; if not, its value is written.
    has_tsc_offset: bool,
}

impl KvmVcpu {
    pub(crate) fn new(
        id: u32,
        fd: VcpuFd,
        vm: Arc<VmShared>,
        kicker: Arc<Kicker>,
    ) -> Result<Self, AccelError> {
        if let Some(khz) = vm.set_tsc_khz {
            ioctl::set_tsc_khz(&fd, khz).map_err(host("the rate of a time-stamp counter"))?;
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
        if let Some(revision) = vm.cpu.microcode()
            && let Err(error) = state::set_microcode(&fd, revision)
        {
            tracing::debug!("a revision of microcode that is not the model's: {error}");
        }
        let has_tsc_offset = ioctl::tsc_offset(&fd).is_ok();
        let kernel = KernelVcpu::new(id, fd, vm.cpu.xsave_layout(), vm.has_sregs2, &vm.msrs);
        let debugging = Debugging::default();
        let mut vcpu = Self { kernel, vm, kicker, debugging, tsc_delta: 0, applied: 0, has_tsc_offset };
        if id != 0 {
            // Without a SIPI from the start; the kernel's own first state wants an INIT before it.
            vcpu.kernel
                .fd
                .set_mp_state(kb::kvm_mp_state { mp_state: kb::KVM_MP_STATE_INIT_RECEIVED })
                .map_err(refused("a vCPU that waits"))?;
        }
        let mut power_on = vcpu.save_state()?;
        power_on.events.mp_state =
            if id == 0 { accel::MpState::Runnable } else { accel::MpState::WaitForSipi };
        vcpu.kernel.set_power_on(power_on);
        Ok(vcpu)
    }

    /// The host's counter as the kernel scales it for this vCPU.
    fn host_counter(&self) -> io::Result<u64> {
        if self.has_tsc_offset {
            let offset = ioctl::tsc_offset(&self.kernel.fd)?;
            Ok(self.kernel.msr(TSC)?.wrapping_sub(offset))
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
                vm.set_clock(&clock).map_err(errno)
            },
        )?;
        // The counter first: the kernel reckons by it how long a deadline is off.
        let result = self.set_counter(offset).and_then(|ahead| {
            let now = self.vm.time.clock().now();
            self.kernel.start_timer(now, ahead)
        });
        if result.is_err() {
            self.vm.time.leave(0);
        }
        result
    }

    /// Sets the counter to the VM's, whose offset is `offset`, with what the guest made of it. Gives by how much it
    /// is ahead of that even so: a KVM in software takes the offset and leaves the counter as it is.
    fn set_counter(&mut self, offset: u64) -> io::Result<u64> {
        let offset_here = offset.wrapping_add(self.tsc_delta);
        self.applied = offset;
        if self.has_tsc_offset {
            ioctl::set_tsc_offset(&self.kernel.fd, offset_here)?;
            Ok(ioctl::tsc_offset(&self.kernel.fd)?.wrapping_sub(offset_here))
        } else {
            self.kernel.set_msr(TSC, self.host_counter()?.wrapping_add(offset_here))?;
            Ok(0)
        }
    }

    /// Stops the guest's time.
    pub(crate) fn freeze(&mut self) -> io::Result<()> {
        self.kernel.ready_for_interrupt = self.kernel.fd.get_kvm_run().ready_for_interrupt_injection != 0;
        let now = self.vm.time.clock().now();
        let host = self.host_counter();
        let counter = self.kernel.msr(TSC);
        self.vm.time.leave(*host.as_ref().unwrap_or(&0));
        let (host, counter) = (host?, counter?);
        if self.has_tsc_offset {
            self.tsc_delta = ioctl::tsc_offset(&self.kernel.fd)?.wrapping_sub(self.applied);
        } else {
            // Measured: differences below this are the measurement's.
            const NOISE: u64 = 1 << 20;
            let delta = counter.wrapping_sub(host).wrapping_sub(self.applied);
            if delta.wrapping_sub(self.tsc_delta).wrapping_add(NOISE) > 2 * NOISE {
                self.tsc_delta = delta;
            }
        }
        self.kernel.stop_timer(now)
    }

    /// See [`accel::Vcpu::save`].
    pub(crate) fn save_state(&self) -> Result<X86State, AccelError> {
        let mut state = state::save(&self.kernel)?;
        state.lapic.lint0_level = self.vm.ext_int.load(Ordering::SeqCst);
        state.tsc_time = self.vm.time.clock().now();
        state.tsc = self.vm.time.now().wrapping_add(self.tsc_delta);
        Ok(state)
    }

    /// See [`accel::Vcpu::restore`].
    pub(crate) fn restore_state(&mut self, state: &X86State) -> Result<(), AccelError> {
        let result = self.restore_checked(state);
        if result.is_err() {
            self.reset_state();
        }
        result
    }

    fn restore_checked(&mut self, state: &X86State) -> Result<(), AccelError> {
        let source = self.vm.time.at(state.tsc_time);
        self.take_over(state, state.tsc.wrapping_sub(source))?;
        self.vm.time.forget();
        Ok(())
    }

    /// See [`accel::Vcpu::reset`].
    pub(crate) fn reset_state(&mut self) {
        let Some(power_on) = self.kernel.power_on().cloned() else { return };
        if let Err(error) = self.take_over(&power_on, 0) {
            tracing::error!("vCPU {} is not as after power-on: {error}", self.kernel.id);
        }
    }

    /// Takes over a state whose counter differs from the VM's by `tsc_delta`.
    fn take_over(&mut self, state: &X86State, tsc_delta: u64) -> Result<(), AccelError> {
        for vector in state::restore(&mut self.kernel, state)? {
            self.vm.expect_eoi(self.kernel.id, vector).map_err(host("a route for an interrupt"))?;
        }
        self.vm.ext_int.store(state.lapic.lint0_level, Ordering::SeqCst);
        self.tsc_delta = tsc_delta;
        Ok(())
    }
}
