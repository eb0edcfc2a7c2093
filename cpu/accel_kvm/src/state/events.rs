//! Events on their way.

use accel::{EventState, InjectedException, MpState};
use kvm_bindings as kb;

/// Bits of `interrupt.shadow` (`KVM_X86_SHADOW_INT_*`).
const SHADOW_MOV_SS: u8 = 1;
const SHADOW_STI: u8 = 2;

const INTERRUPTS_ON: u64 = 1 << 9;

pub(super) fn save(events: &kb::kvm_vcpu_events, mp_state: kb::kvm_mp_state) -> EventState {
    let exception = &events.exception;
    let nmi = &events.nmi;
    let waits = matches!(
        mp_state.mp_state,
        kb::KVM_MP_STATE_INIT_RECEIVED | kb::KVM_MP_STATE_UNINITIALIZED | kb::KVM_MP_STATE_SIPI_RECEIVED
    );
    let shadow = events.interrupt.shadow;
    let sipi = mp_state.mp_state == kb::KVM_MP_STATE_SIPI_RECEIVED;
    EventState {
        mp_state: match mp_state.mp_state {
            _ if waits => MpState::WaitForSipi,
            kb::KVM_MP_STATE_HALTED => MpState::Halted,
            _ => MpState::Runnable,
        },
        sti_shadow: shadow & SHADOW_STI != 0,
        // AMD's processors have one shadow, of which KVM says both. Most often it is STI's.
        mov_ss_shadow: shadow & (SHADOW_STI | SHADOW_MOV_SS) == SHADOW_MOV_SS,
        // One on its way counts as masked already, and is delivered again after a restore.
        nmi_masked: nmi.masked != 0 && nmi.injected == 0,
        nmi_pending: nmi.pending != 0 || nmi.injected != 0,
        init_pending: events.smi.latched_init != 0,
        sipi_pending: sipi.then_some(events.sipi_vector as u8),
        exception: (exception.injected != 0).then_some(InjectedException {
            vector: exception.nr,
            error: (exception.has_error_code != 0).then_some(exception.error_code),
        }),
        interrupt: (events.interrupt.injected != 0 && events.interrupt.soft == 0)
            .then_some(events.interrupt.nr),
    }
}

/// Whether a vCPU in this state takes interrupts now.
pub(super) fn takes_interrupts(regs: &kb::kvm_regs, events: &kb::kvm_vcpu_events) -> bool {
    regs.rflags & INTERRUPTS_ON != 0 && events.interrupt.shadow == 0
}

pub(super) fn load(events: &EventState) -> kb::kvm_vcpu_events {
    let mut kernel = kb::kvm_vcpu_events {
        flags: kb::KVM_VCPUEVENT_VALID_NMI_PENDING
            | kb::KVM_VCPUEVENT_VALID_SHADOW
            | kb::KVM_VCPUEVENT_VALID_SIPI_VECTOR,
        sipi_vector: events.sipi_pending.unwrap_or(0).into(),
        ..kb::kvm_vcpu_events::default()
    };
    if let Some(exception) = events.exception {
        kernel.exception.injected = 1;
        kernel.exception.nr = exception.vector;
        kernel.exception.has_error_code = exception.error.is_some().into();
        kernel.exception.error_code = exception.error.unwrap_or(0);
    }
    if let Some(vector) = events.interrupt {
        kernel.interrupt.injected = 1;
        kernel.interrupt.nr = vector;
    }
    if events.sti_shadow {
        kernel.interrupt.shadow |= SHADOW_STI;
    }
    if events.mov_ss_shadow {
        kernel.interrupt.shadow |= SHADOW_MOV_SS;
    }
    if events.init_pending {
        // The name is of another time: it says that an INIT waits, whatever for.
        kernel.flags |= kb::KVM_VCPUEVENT_VALID_SMM;
        kernel.smi.latched_init = 1;
    }
    kernel.nmi.pending = events.nmi_pending.into();
    kernel.nmi.masked = events.nmi_masked.into();
    kernel
}

/// The kernel's name for what the processor does.
pub(super) fn mp_state(events: &EventState) -> u32 {
    match (events.mp_state, events.sipi_pending) {
        (MpState::WaitForSipi, Some(_)) => kb::KVM_MP_STATE_SIPI_RECEIVED,
        (MpState::WaitForSipi, None) => kb::KVM_MP_STATE_INIT_RECEIVED,
        (MpState::Halted, _) => kb::KVM_MP_STATE_HALTED,
        (MpState::Runnable, _) => kb::KVM_MP_STATE_RUNNABLE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::option;
    use proptest::prelude::*;

    fn states() -> impl Strategy<Value = EventState> {
        let mp_state =
            prop_oneof![Just(MpState::Runnable), Just(MpState::Halted), Just(MpState::WaitForSipi)];
        let exception = option::of((0u8..32, option::of(any::<u32>())));
        let flags = any::<[bool; 5]>();
        (mp_state, flags, option::of(any::<u8>()), exception, option::of(any::<u8>())).prop_map(
            |(
                mp_state,
                [sti_shadow, mov_ss_shadow, nmi_masked, nmi_pending, init_pending],
                sipi,
                exception,
                interrupt,
            )| {
                EventState {
                    mp_state,
                    sti_shadow,
                    mov_ss_shadow: mov_ss_shadow && !sti_shadow,
                    nmi_masked,
                    nmi_pending,
                    init_pending,
                    sipi_pending: sipi.filter(|_| mp_state == MpState::WaitForSipi),
                    exception: exception.map(|(vector, error)| InjectedException { vector, error }),
                    interrupt,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn events_survive(events in states()) {
            let kernel = load(&events);
            let again = save(&kernel, kb::kvm_mp_state { mp_state: mp_state(&events) });
            prop_assert_eq!(again, events);
        }
    }
}
