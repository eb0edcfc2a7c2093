//! Debugging a vCPU: see [`accel::DebugSettings`] (`KVM_SET_GUEST_DEBUG` in Linux's
//! `Documentation/virt/kvm/api.rst`).
//!
//! While breakpoints or watchpoints are set, the guest's own debug registers have no effect, and while a
//! vCPU single-steps, instructions that save the flags save a set TF: the kernel hides neither.

use crate::error::{errno, host};
use crate::patches::Patches;
use crate::vm_shared::VmShared;
use accel::{AccelError, DebugLimits, DebugSettings, DebugStop, WatchKind, Watchpoint};
use kvm_bindings as kb;
use kvm_ioctls::VcpuFd;

/// Debug registers that hold addresses.
const REGISTERS: usize = 4;
/// DR7 without breakpoints: its fixed bit, and exact matches of data.
const DR7: u64 = 0x600;
/// DR6: the exception is a single step.
const DR6_STEP: u64 = 1 << 14;
const DB: u32 = 1;
const BP: u32 = 3;

/// How a vCPU is debugged.
#[derive(Debug, Default)]
pub(crate) struct Debugging {
    single_step: bool,
    /// The kernel's flags for what was asked for.
    wanted: u32,
    /// Those that it was given.
    control: u32,
    /// What each debug register is for.
    registers: Vec<Register>,
    /// Breakpoints that are INT3: the linear address, and the guest physical one.
    patched: Vec<(u64, u64)>,
    /// The vCPU steps over an INT3 at this guest physical address that is not for it.
    passing: Option<u64>,
}

/// What a debug register is for.
#[derive(Debug, Clone, Copy)]
enum Register {
    Breakpoint(u64),
    /// Aligned bytes of a watchpoint: address and length.
    Watch(Watchpoint, u64, u64),
}

impl Register {
    fn address(self) -> u64 {
        match self {
            Self::Breakpoint(address) | Self::Watch(_, address, _) => address,
        }
    }

    /// R/W, and the length above it, as they stand in DR7 (Intel SDM volume 3, 18.2.4).
    fn control(self) -> u64 {
        match self {
            Self::Breakpoint(_) => 0,
            Self::Watch(point, _, len) => {
                let kind = if point.kind == WatchKind::Write { 1 } else { 3 };
                let len = match len {
                    1 => 0,
                    2 => 1,
                    8 => 2,
                    _ => 3,
                };
                kind | len << 2
            }
        }
    }
}

impl Debugging {
    /// Whether the vCPU is to stop after one instruction.
    pub(crate) fn is_stepping(&self) -> bool {
        self.single_step
    }

    /// Puts what a run needs into memory.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn begin(&mut self, patches: &Patches, fd: &VcpuFd) -> std::io::Result<()> {
        // INT3 that stands there for another vCPU must not come to this one's guest either.
        let others =
            if patches.are_planned() { kb::KVM_GUESTDBG_ENABLE | kb::KVM_GUESTDBG_USE_SW_BP } else { 0 };
        let control = self.wanted | others;
        if control != self.control {
            self.control = control;
            self.tell(fd, control)?;
        }
        self.patched.iter().for_each(|(_, gpa)| patches.insert(*gpa));
        Ok(())
    }

    /// Takes it away again.
    pub(crate) fn end(&mut self, patches: &Patches, fd: &VcpuFd) {
        if let Some(gpa) = self.passing.take() {
            patches.passed(gpa);
            if let Err(error) = self.tell(fd, self.control) {
                tracing::warn!("a vCPU goes on stepping: {error}");
            }
        }
        self.patched.iter().for_each(|(_, gpa)| patches.remove(*gpa));
    }

    fn tell(&self, fd: &VcpuFd, control: u32) -> std::io::Result<()> {
        let mut debug = kb::kvm_guest_debug { control, ..kb::kvm_guest_debug::default() };
        debug.arch.debugreg[7] = DR7;
        for (index, register) in self.registers.iter().enumerate() {
            debug.arch.debugreg[index] = register.address();
            debug.arch.debugreg[7] |= 2 << (2 * index) | register.control() << (16 + 4 * index);
        }
        fd.set_guest_debug(&debug).map_err(errno)
    }
}

/// The aligned pieces of 1, 2, 4 or 8 bytes that a watchpoint is made of.
fn pieces(point: &Watchpoint) -> Option<Vec<(u64, u64)>> {
    let mut pieces = Vec::new();
    let (mut address, mut left) = (point.address, point.len);
    while left > 0 {
        if pieces.len() == REGISTERS {
            return None;
        }
        let aligned = 1 << address.trailing_zeros().min(3);
        let len = aligned.min(1u64 << left.min(8).ilog2());
        pieces.push((address, len));
        address = address.wrapping_add(len);
        left -= len;
    }
    Some(pieces)
}

/// The debug registers that hardware breakpoints and watchpoints take.
fn registers(settings: &DebugSettings) -> Result<Vec<Register>, String> {
    let mut registers: Vec<_> =
        settings.hardware_breakpoints.iter().map(|address| Register::Breakpoint(*address)).collect();
    for point in &settings.watchpoints {
        if point.kind == WatchKind::Read {
            return Err("KVM watches for loads and stores together, not for loads alone".into());
        }
        let pieces = pieces(point).ok_or_else(|| format!("{} bytes are more than KVM watches", point.len))?;
        registers.extend(pieces.into_iter().map(|(address, len)| Register::Watch(*point, address, len)));
    }
    if registers.len() > REGISTERS {
        return Err(format!(
            "hardware breakpoints and watchpoints take {} debug registers, and there are {REGISTERS}",
            registers.len()
        ));
    }
    Ok(registers)
}

/// What of debugging KVM is able to do.
pub(crate) fn limits(vm: &VmShared) -> DebugLimits {
    DebugLimits {
        hardware: Some(REGISTERS as u32),
        read_watchpoints: false,
        hold_interrupts: vm.blocks_interrupts,
        guest_registers: false,
    }
}

/// See [`accel::Vcpu::translate`].
pub(crate) fn translate(fd: &VcpuFd, address: u64) -> Result<Option<u64>, AccelError> {
    let translation = fd.translate_gva(address).map_err(errno).map_err(host("a translation"))?;
    Ok((translation.valid != 0).then_some(translation.physical_address))
}

impl Debugging {
    /// Has the vCPU `id` debugged as `settings` say.
    ///
    /// # Errors
    /// See [`accel::Vcpu::set_debug`].
    pub(crate) fn start(
        settings: &DebugSettings,
        id: u32,
        fd: &VcpuFd,
        vm: &VmShared,
    ) -> Result<Self, AccelError> {
        vm.patches.forget(id);
        let debugging = Self::plan(settings, id, fd, vm).and_then(|debugging| {
            debugging.tell(fd, debugging.control).map_err(host("debugging a vCPU (KVM_SET_GUEST_DEBUG)"))?;
            Ok(debugging)
        });
        if debugging.is_err() {
            vm.patches.forget(id);
            let _ = Self::default().tell(fd, 0); // the error that there is says more
        }
        debugging
    }

    fn plan(settings: &DebugSettings, id: u32, fd: &VcpuFd, vm: &VmShared) -> Result<Self, AccelError> {
        let refused = |reason| AccelError::Debug { id, reason };
        let mut registers = registers(settings).map_err(refused)?;
        let mut patched = Vec::new();
        // Registers first: nothing of the guest's is changed for them, and where nothing is mapped yet they do too.
        let mut breakpoints = settings.breakpoints.clone();
        breakpoints.sort_unstable();
        breakpoints.dedup();
        for address in breakpoints {
            if registers.len() < REGISTERS {
                registers.push(Register::Breakpoint(address));
                continue;
            }
            match vm.patches.plan(id, address, translate(fd, address)?) {
                Some(gpa) => patched.push((address, gpa)),
                None => {
                    let reason = format!(
                        "there is no memory at {address:#x} now, and all {REGISTERS} debug registers are taken"
                    );
                    return Err(refused(reason));
                }
            }
        }
        let mut control = 0;
        let mut want = |wanted: bool, flag: u32| control |= if wanted { flag } else { 0 };
        want(!settings.is_empty(), kb::KVM_GUESTDBG_ENABLE);
        want(settings.single_step, kb::KVM_GUESTDBG_SINGLESTEP);
        let hold = settings.single_step && settings.hold_interrupts && vm.blocks_interrupts;
        want(hold, kb::KVM_GUESTDBG_BLOCKIRQ);
        want(!patched.is_empty(), kb::KVM_GUESTDBG_USE_SW_BP);
        want(!registers.is_empty(), kb::KVM_GUESTDBG_USE_HW_BP);
        Ok(Self {
            single_step: settings.single_step,
            wanted: control,
            control,
            registers,
            patched,
            passing: None,
        })
    }

    /// What an exit of the kernel for a debug exception means to others; nothing if it was the guest's own, which it
    /// is given then, or of no account.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn answer(
        &mut self,
        exit: kb::kvm_debug_exit_arch,
        fd: &VcpuFd,
        vm: &VmShared,
    ) -> std::io::Result<Option<DebugStop>> {
        if let Some(gpa) = self.passing.take() {
            vm.patches.passed(gpa);
            self.tell(fd, self.control)?;
            if exit.exception == DB && !self.single_step && self.met(exit.dr6).is_none() {
                return Ok(None);
            }
        }
        let stop = match exit.exception {
            DB => self.met(exit.dr6),
            BP => {
                let here = self.patched.iter().any(|(address, _)| *address == exit.pc);
                here.then_some(DebugStop::Breakpoint { address: exit.pc })
            }
            _ => None,
        };
        if stop.is_some() {
            return Ok(stop);
        }
        if exit.exception == BP
            && let Ok(Some(gpa)) = translate(fd, exit.pc)
        {
            if vm.patches.contains(gpa) {
                // The same code at another address, or another vCPU's.
                vm.patches.pass(gpa);
                self.passing = Some(gpa);
                let block = if vm.blocks_interrupts { kb::KVM_GUESTDBG_BLOCKIRQ } else { 0 };
                let step = kb::KVM_GUESTDBG_ENABLE | kb::KVM_GUESTDBG_SINGLESTEP | block;
                self.tell(fd, self.control | step)?;
                return Ok(None);
            }
            if !vm.patches.is_int3(gpa) {
                // It was another vCPU's, whose run has ended since. What stands there now is executed.
                return Ok(None);
            }
        }
        self.give_to_guest(exit, fd)?;
        Ok(None)
    }

    /// What a #DB with this DR6 means, if it is not the guest's own.
    fn met(&self, dr6: u64) -> Option<DebugStop> {
        let met = self.registers.iter().enumerate().filter(|(index, _)| dr6 >> index & 1 != 0);
        let watch = met.clone().find_map(|(_, register)| match register {
            Register::Watch(point, ..) => Some(DebugStop::Watchpoint(*point)),
            Register::Breakpoint(_) => None,
        });
        let step = (self.single_step && dr6 & DR6_STEP != 0).then_some(DebugStop::Step);
        let breakpoint =
            met.map(|(_, register)| DebugStop::Breakpoint { address: register.address() }).next();
        watch.or(step).or(breakpoint)
    }

    /// Delivers the guest the exception that was its own.
    fn give_to_guest(&self, exit: kb::kvm_debug_exit_arch, fd: &VcpuFd) -> std::io::Result<()> {
        let inject = if exit.exception == BP {
            kb::KVM_GUESTDBG_INJECT_BP
        } else {
            let mut registers = fd.get_debug_regs().map_err(errno)?;
            // Which of the guest's breakpoints were met is set anew by each exception; the rest gathers.
            registers.dr6 = registers.dr6 & !0xf | exit.dr6 & (DR6_STEP | 0xf | 1 << 13);
            fd.set_debug_regs(&registers).map_err(errno)?;
            kb::KVM_GUESTDBG_INJECT_DB
        };
        self.tell(fd, self.control | kb::KVM_GUESTDBG_ENABLE | inject)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(address: u64, len: u64, kind: WatchKind) -> Watchpoint {
        Watchpoint { address, len, kind }
    }

    #[test]
    fn watchpoints_are_made_of_aligned_pieces() {
        let cut = |address, len| pieces(&watch(address, len, WatchKind::Write));
        assert_eq!(cut(0x1000, 8), Some(vec![(0x1000, 8)]));
        assert_eq!(cut(0x1002, 4), Some(vec![(0x1002, 2), (0x1004, 2)]));
        assert_eq!(cut(0x1001, 7), Some(vec![(0x1001, 1), (0x1002, 2), (0x1004, 4)]));
        assert_eq!(cut(0x1000, 32).map(|pieces| pieces.len()), Some(4));
        assert_eq!(cut(0x1000, 33), None);
        assert_eq!(cut(0x1000, u64::MAX), None);
    }

    #[test]
    fn what_does_not_fit_the_debug_registers_is_refused() {
        let mut settings = DebugSettings { hardware_breakpoints: vec![1, 2], ..Default::default() };
        settings.watchpoints = vec![watch(0x1001, 3, WatchKind::Access)];
        let made = registers(&settings).unwrap();
        assert_eq!(made.len(), 4);
        assert_eq!(made[3].control(), 0b0111);
        settings.hardware_breakpoints.push(3);
        assert!(registers(&settings).unwrap_err().contains("take 5 debug registers"));
        settings.watchpoints = vec![watch(0x1000, 8, WatchKind::Read)];
        assert!(registers(&settings).is_err());
    }
}
