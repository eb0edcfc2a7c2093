//! States go in and come out again.

use crate::DbtAccelerator;
use accel::{AccelVm, Accelerator, MpState, Tier, Vcpu, VmSpec, X86State};
use clock::{TimerService, VmClock};
use guest_memory::GuestMemory;
use proptest::prelude::*;
use std::sync::Arc;
use x86_core::cpuid::CpuModel;

/// A vCPU, and what it needs to live.
struct Rig {
    clock: VmClock,
    _timers: Arc<TimerService>,
    vm: Arc<dyn AccelVm>,
    vcpu: Box<dyn Vcpu>,
}

/// The model with the most state on this host.
fn widest() -> &'static str {
    if CpuModel::by_name("x86-64-v4").is_ok() { "x86-64-v4" } else { "max" }
}

/// A vCPU of the widest model, with SVM.
fn rig(tier: Tier) -> Rig {
    rig_of(tier, &format!("{},+svm", widest()))
}

fn rig_of(tier: Tier, model: &str) -> Rig {
    let memory = GuestMemory::new(std::slice::from_ref(&(0..0x10_0000))).unwrap();
    let clock = VmClock::new();
    let timers = TimerService::new(clock.clone()).unwrap();
    let cpu = model.parse().unwrap();
    let spec = VmSpec { tier, cpu, ..VmSpec::default() };
    let vm = DbtAccelerator.create_vm(&spec, &memory, &timers).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    Rig { clock, _timers: timers, vm, vcpu }
}

fn segment() -> impl Strategy<Value = accel::Segment> {
    let rights = any::<u16>().prop_map(|rights| rights & 0xf0ff);
    (any::<u16>(), any::<u64>(), any::<u32>(), rights, any::<bool>()).prop_map(
        |(selector, base, limit, rights, unusable)| accel::Segment {
            selector,
            base,
            limit,
            rights,
            unusable,
        },
    )
}

prop_compose! {
    /// A state that differs from `base`.
    fn changed(base: X86State)(
        base in Just(base),
        regs in any::<[u64; 16]>(),
        rip in any::<u64>(),
        flags in any::<u16>(),
        segments in prop::array::uniform6(segment()),
        tables in prop::array::uniform2((any::<u64>(), any::<u16>())),
        long in any::<bool>(),
        shadows in any::<[bool; 4]>(),
        mp_state in prop_oneof![Just(MpState::Runnable), Just(MpState::Halted), Just(MpState::WaitForSipi)],
        st in prop::array::uniform8(any::<[u8; 10]>()),
        vectors in prop::collection::vec(any::<[u64; 8]>(), 16),
        opmask in any::<[u64; 8]>(),
        mxcsr in any::<u16>(),
        msrs in any::<[u64; 4]>(),
        tsc in 0..u64::MAX >> 1,
        deadline in 1u64..1 << 62,
        time in 0u64..1 << 60,
        svm in any::<[u64; 6]>(),
    ) -> X86State {
            let mut state = base;
            state.regs = regs;
            state.rip = rip;
            state.rflags = u64::from(flags) & 0x7fd5 | 2;
            state.segments = segments;
            // Real mode has no privilege levels.
            state.segments[X86State::SS].rights &= !0x60;
            state.gdtr = accel::TableRegister { base: tables[0].0, limit: tables[0].1 };
            state.idtr = accel::TableRegister { base: tables[1].0, limit: tables[1].1 };
            if long {
                (state.cr0, state.cr4, state.efer) = (0x8000_0011, 0x20, 0x500);
                state.segments[X86State::SS].rights |= 0x60;
            }
            if svm[0] % 4 != 0 {
                let guest = (svm[0] % 4 != 1).then(|| accel::SvmGuestState {
                    vmcb: svm[1] & !0xfff,
                    intercepts: [svm[2] as u32; 6],
                    msrpm: svm[3] & !0xfff,
                    tsc_offset: svm[4],
                    asid: svm[5] as u32,
                    interrupts: svm[5],
                    nested_paging: svm[0] % 4 == 2,
                    ncr3: svm[4],
                    host: accel::SvmHostState {
                        cr0: 0x8000_0011,
                        cr4: 0x20,
                        efer: 0x1500,
                        rflags: 2,
                        rip: svm[2],
                        segments: [segments[0], segments[1], segments[2], segments[3]],
                        ..Default::default()
                    },
                    ..Default::default()
                });
                state.svm = Some(Box::new(accel::SvmState { vm_cr: 1, hsave: svm[1], gif: true, guest }));
            }
            state.events.mp_state = mp_state;
            state.events.sti_shadow = shadows[0];
            state.events.mov_ss_shadow = shadows[1];
            state.events.nmi_masked = shadows[2];
            state.events.nmi_pending = shadows[3];
            state.fpu.st = st;
            state.fpu.vectors = vectors;
            // As wide as the model has them on this host.
            let mask = CpuModel::by_name(widest()).unwrap().xcr0_mask();
            let words = if mask & 1 << 6 != 0 { 8 } else if mask & 4 != 0 { 4 } else { 2 };
            state.fpu.vectors.iter_mut().for_each(|vector| vector[words..].fill(0));
            if words == 8 {
                state.fpu.opmask = opmask;
            }
            state.xcr0 = mask;
            state.fpu.mxcsr = mxcsr.into();
            for (number, value) in [0x174, 0xc000_0081, 0xc000_0082, 0xc000_0102].into_iter().zip(msrs) {
                state.set_msr(number, value);
            }
            (state.tsc, state.tsc_time) = (tsc, time);
            // In TSC-deadline mode, and armed.
            state.lapic.lvt.timer = 2 << 17 | 0x40;
            state.lapic.tsc_deadline = tsc.saturating_add(deadline);
            state
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn what_is_restored_is_saved_again(
        state in changed(rig(Tier::Interpreter).vcpu.save().unwrap()),
        translated in any::<bool>(),
    ) {
        let mut rig = rig(if translated { Tier::Translator } else { Tier::Interpreter });
        rig.clock.set(state.tsc_time);
        rig.vcpu.restore(&state).unwrap();
        let mut saved = rig.vcpu.save().unwrap();
        // A deadline that is the counter's 0 comes out as 1: 0 is "not armed".
        saved.lapic.tsc_deadline = saved.lapic.tsc_deadline.max(1);
        prop_assert_eq!(saved, state);
    }

    #[test]
    fn no_bytes_bring_it_down(bytes in prop::collection::vec(any::<u8>(), 0..64), at in any::<prop::sample::Index>()) {
        let mut rig = rig(Tier::Interpreter);
        let mut saved = rig.vcpu.save().unwrap().to_saved();
        let at = at.index(saved.bytes.len());
        for (byte, new) in saved.bytes[at..].iter_mut().zip(bytes) {
            *byte = new;
        }
        if let Ok(state) = X86State::from_saved(&saved) {
            let _ = rig.vcpu.restore(&state);
            let _ = rig.vcpu.save().unwrap();
        }
    }
}

#[test]
fn a_processor_without_svm_refuses_its_state() {
    let mut rig = rig_of(Tier::Interpreter, "x86-64-v2");
    let mut state = rig.vcpu.save().unwrap();
    state.svm = Some(Box::default());
    let error = rig.vcpu.restore(&state).unwrap_err();
    assert!(error.to_string().contains("svm"), "{error}");
}

#[test]
fn a_vcpu_is_made_once() {
    let rig = rig(Tier::Interpreter);
    assert!(rig.vm.create_vcpu(0).is_err());
    assert!(rig.vm.create_vcpu(1).is_err());
}
