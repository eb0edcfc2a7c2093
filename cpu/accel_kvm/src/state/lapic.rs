//! The local APIC (Intel SDM volume 3, table 11-1: registers are 16 bytes apart).

use crate::error::errno;
use crate::state::msrs::{self, TSC_DEADLINE};
use accel::{LapicState, LvtState};
use clock::Nanos;
use kvm_bindings as kb;
use kvm_ioctls::VcpuFd;
use std::io;

const ID: usize = 0x20;
const VERSION: usize = 0x30;
const TPR: usize = 0x80;
const LDR: usize = 0xd0;
const DFR: usize = 0xe0;
const SVR: usize = 0xf0;
const ISR: usize = 0x100;
const TMR: usize = 0x180;
const IRR: usize = 0x200;
const ESR: usize = 0x280;
const LVT_CMCI: usize = 0x2f0;
const ICR: usize = 0x300;
const ICR_HIGH: usize = 0x310;
const LVT_TIMER: usize = 0x320;
const LVT_THERMAL: usize = 0x330;
const LVT_PERFORMANCE: usize = 0x340;
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const LVT_ERROR: usize = 0x370;
const TIMER_INITIAL: usize = 0x380;
const TIMER_CURRENT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;

/// IA32_APIC_BASE: x2APIC mode.
const X2APIC: u64 = 1 << 10;
const MASKED: u32 = 1 << 16;
/// Version 0x14 with six entries of the local vector table, as KVM's has it.
const KVM_VERSION: u32 = 0x14 | 5 << 16;

type Page = kb::kvm_lapic_state;

fn read(page: &Page, at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|byte| page.regs[at + byte] as u8))
}

fn write(page: &mut Page, at: usize, value: u32) {
    for (to, from) in page.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
        *to = from as _;
    }
}

fn read_vectors(page: &Page, at: usize) -> [u32; 8] {
    std::array::from_fn(|word| read(page, at + word * 16))
}

fn write_vectors(page: &mut Page, at: usize, words: &[u32; 8]) {
    for (word, value) in words.iter().enumerate() {
        write(page, at + word * 16, *value);
    }
}

/// Bus ticks per timer tick. KVM's bus clock is, like the neutral state's, one tick per nanosecond.
fn divisor(divide: u32) -> u64 {
    let code = divide & 3 | divide >> 1 & 4;
    1 << ((code + 1) & 7)
}

/// How the timer counts (bits 17 and 18 of its LVT entry).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

fn mode(lvt: u32) -> Mode {
    match lvt >> 17 & 3 {
        0 => Mode::OneShot,
        1 => Mode::Periodic,
        2 => Mode::TscDeadline,
        _ => Mode::Reserved,
    }
}

/// The timer of a local APIC whose vCPU does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Timer {
    /// The kernel's registers say all there is to say.
    #[default]
    InKernel,
    /// Counts down from `initial` since `start`. The kernel's is switched off meanwhile.
    Counts { initial: u32, start: Nanos },
    /// Waits for this value of the time-stamp counter. The kernel's is switched off meanwhile.
    Deadline(u64),
}

/// What is left to count at `now`: at least 1 of a periodic timer, 0 of one that is due.
fn current(initial: u32, divide: u32, periodic: bool, start: Nanos, now: Nanos) -> u32 {
    let ticks = now.saturating_sub(start) / divisor(divide);
    let initial = u64::from(initial);
    let left = match periodic {
        true => initial - ticks.checked_rem(initial).unwrap_or(0),
        false => initial.saturating_sub(ticks),
    };
    left as u32
}

/// Switches the kernel's timer off at `now`, and says what it was up to.
pub(super) fn stop_timer(fd: &VcpuFd, now: Nanos) -> io::Result<Timer> {
    let mut page = fd.get_lapic().map_err(errno)?;
    let mode = mode(read(&page, LVT_TIMER));
    let (initial, current) = (read(&page, TIMER_INITIAL), read(&page, TIMER_CURRENT));
    match mode {
        Mode::OneShot | Mode::Periodic if initial != 0 => {
            if mode == Mode::OneShot && current == 0 {
                // Its interrupt was raised, or is about to be: only the kernel knows.
                return Ok(Timer::InKernel);
            }
            let passed = u64::from(initial.saturating_sub(current)) * divisor(read(&page, TIMER_DIVIDE));
            write(&mut page, TIMER_INITIAL, 0);
            write(&mut page, TIMER_CURRENT, 0);
            fd.set_lapic(&page).map_err(errno)?;
            Ok(Timer::Counts { initial, start: now.saturating_sub(passed) })
        }
        Mode::TscDeadline => match msrs::read_msr(fd, TSC_DEADLINE)? {
            0 => Ok(Timer::InKernel),
            deadline => {
                msrs::write_msr(fd, TSC_DEADLINE, 0)?;
                Ok(Timer::Deadline(deadline))
            }
        },
        _ => Ok(Timer::InKernel),
    }
}

/// Has the kernel's timer, which is up to `timer`, go on at `now`.
pub(super) fn start_timer(fd: &VcpuFd, timer: Timer, now: Nanos) -> io::Result<()> {
    match timer {
        Timer::InKernel => Ok(()),
        Timer::Counts { initial, start } => {
            let mut page = fd.get_lapic().map_err(errno)?;
            let periodic = mode(read(&page, LVT_TIMER)) == Mode::Periodic;
            write(&mut page, TIMER_INITIAL, initial);
            let left = current(initial, read(&page, TIMER_DIVIDE), periodic, start, now);
            write(&mut page, TIMER_CURRENT, left);
            fd.set_lapic(&page).map_err(errno)
        }
        Timer::Deadline(deadline) => msrs::write_msr(fd, TSC_DEADLINE, deadline),
    }
}

/// The neutral state of a local APIC whose timer is up to `timer`.
pub(super) fn save(page: &Page, apic_base: u64, timer: &Timer) -> LapicState {
    let x2apic = apic_base & X2APIC != 0;
    let id = read(page, ID);
    let lvt_timer = read(page, LVT_TIMER);
    let initial = read(page, TIMER_INITIAL);
    let irr = read_vectors(page, IRR);
    let isr = read_vectors(page, ISR);
    let raised = |words: &[u32; 8]| words[(lvt_timer as usize & 0xff) / 32] >> (lvt_timer & 31) & 1 != 0;
    let (timer_initial, timer_start, tsc_deadline) = match *timer {
        Timer::Counts { initial, start } => (initial, Some(start), 0),
        Timer::Deadline(deadline) => (initial, None, deadline),
        // A one-shot timer that is due: that its interrupt was raised can be seen only as long as it is not
        // ended. Better once too often than lost.
        Timer::InKernel if mode(lvt_timer) == Mode::OneShot && initial != 0 => {
            let silent = lvt_timer & MASKED != 0 || raised(&irr) || raised(&isr);
            (initial, (!silent).then_some(0), 0)
        }
        Timer::InKernel => (initial, None, 0),
    };
    LapicState {
        apic_base,
        id: if x2apic { id } else { id >> 24 },
        // In x2APIC mode it follows from the id.
        ldr: if x2apic { 0 } else { read(page, LDR) & 0xff00_0000 },
        dfr: read(page, DFR) | 0x0fff_ffff,
        tpr: read(page, TPR) as u8,
        svr: read(page, SVR),
        isr,
        tmr: read_vectors(page, TMR),
        irr,
        esr: read(page, ESR),
        esr_pending: 0,
        icr: u64::from(read(page, ICR)) & !(1 << 12) | u64::from(read(page, ICR_HIGH)) << 32,
        lvt: LvtState {
            cmci: read(page, LVT_CMCI) | if read(page, VERSION) >> 16 & 0xff < 6 { MASKED } else { 0 },
            timer: lvt_timer,
            thermal: read(page, LVT_THERMAL),
            performance: read(page, LVT_PERFORMANCE),
            lint0: read(page, LVT_LINT0),
            lint1: read(page, LVT_LINT1),
            error: read(page, LVT_ERROR),
        },
        timer_initial,
        timer_divide: read(page, TIMER_DIVIDE),
        timer_start,
        tsc_deadline,
        lint0_level: false,
        ext_int_latched: false,
    }
}

/// What a restored timer is up to.
pub(super) fn timer_of(state: &LapicState) -> Timer {
    match (mode(state.lvt.timer), state.timer_start) {
        (Mode::OneShot | Mode::Periodic, Some(start)) if state.timer_initial != 0 => {
            Timer::Counts { initial: state.timer_initial, start }
        }
        (Mode::TscDeadline, _) if state.tsc_deadline != 0 => Timer::Deadline(state.tsc_deadline),
        _ => Timer::InKernel,
    }
}

/// The kernel's registers of a local APIC, with its timer off.
pub(super) fn load(state: &LapicState) -> Page {
    let mut page = Page { regs: [0; 1024] };
    let x2apic = state.apic_base & X2APIC != 0;
    write(&mut page, ID, if x2apic { state.id } else { state.id << 24 });
    write(&mut page, VERSION, KVM_VERSION);
    write(&mut page, TPR, state.tpr.into());
    // The kernel makes this up itself in x2APIC mode.
    write(&mut page, LDR, state.ldr);
    write(&mut page, DFR, state.dfr);
    write(&mut page, SVR, state.svr);
    write_vectors(&mut page, ISR, &state.isr);
    write_vectors(&mut page, TMR, &state.tmr);
    write_vectors(&mut page, IRR, &state.irr);
    write(&mut page, ESR, state.esr);
    write(&mut page, ICR, state.icr as u32);
    write(&mut page, ICR_HIGH, (state.icr >> 32) as u32);
    let lvt = &state.lvt;
    write(&mut page, LVT_CMCI, lvt.cmci);
    write(&mut page, LVT_TIMER, lvt.timer);
    write(&mut page, LVT_THERMAL, lvt.thermal);
    write(&mut page, LVT_PERFORMANCE, lvt.performance);
    write(&mut page, LVT_LINT0, lvt.lint0);
    write(&mut page, LVT_LINT1, lvt.lint1);
    write(&mut page, LVT_ERROR, lvt.error);
    write(&mut page, TIMER_DIVIDE, state.timer_divide);
    page
}

/// Vectors of level-triggered interrupts that wait or are in service.
pub(super) fn level_vectors(state: &LapicState) -> Vec<u8> {
    let live = |vector: &usize| {
        let bit = |words: &[u32; 8]| words[vector / 32] >> (vector % 32) & 1 != 0;
        bit(&state.tmr) && (bit(&state.irr) || bit(&state.isr))
    };
    (0..256).filter(live).map(|vector| vector as u8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn counts() {
        assert_eq!(current(100, 0xb, false, 50, 120), 30);
        assert_eq!(current(100, 0xb, false, 50, 150), 0);
        assert_eq!(current(100, 0xb, true, 50, 150), 100);
        assert_eq!(current(100, 0, true, 0, 210), 95);
        assert_eq!(current(0, 0, true, 0, 210), 0);
    }

    #[test]
    fn level_triggered_interrupts_are_found() {
        let mut state = save(&Page { regs: [0; 1024] }, 0, &Timer::InKernel);
        state.tmr = [0, 1 << 19, 0, 0, 0, 0, 0, 1 << 31];
        state.isr[1] = 1 << 19;
        state.irr[7] = 1 << 31 | 1;
        assert_eq!(level_vectors(&state), [0x33, 0xff]);
        state.isr[1] = 0;
        assert_eq!(level_vectors(&state), [0xff]);
    }

    fn states() -> impl Strategy<Value = LapicState> {
        let words = || any::<[u32; 8]>();
        (any::<[u32; 10]>(), words(), words(), words(), any::<bool>(), any::<u64>(), 0u32..3, any::<u32>())
            .prop_map(|(numbers, isr, tmr, irr, x2apic, icr, timer_mode, start)| {
                let [ldr, tpr, svr, esr, divide, thermal, performance, lint0, lint1, initial] = numbers;
                let mut state = LapicState {
                    apic_base: 0xfee0_0800 | if x2apic { X2APIC } else { 0 },
                    id: 7,
                    ldr: if x2apic { 0 } else { ldr & 0xff00_0000 },
                    dfr: u32::MAX,
                    tpr: tpr as u8,
                    svr,
                    isr,
                    tmr,
                    irr,
                    esr,
                    esr_pending: 0,
                    icr: icr & !(1 << 12),
                    lvt: LvtState {
                        cmci: MASKED,
                        timer: timer_mode << 17 | 0x41,
                        thermal,
                        performance,
                        lint0,
                        lint1,
                        error: MASKED,
                    },
                    timer_initial: 0,
                    timer_divide: divide,
                    timer_start: None,
                    tsc_deadline: 0,
                    lint0_level: false,
                    ext_int_latched: false,
                };
                if timer_mode == 2 {
                    state.tsc_deadline = initial.into();
                } else if initial != 0 {
                    state.timer_initial = initial;
                    state.timer_start = Some(start.into());
                }
                state
            })
    }

    proptest! {
        #[test]
        fn states_survive(state in states()) {
            let again = save(&load(&state), state.apic_base, &timer_of(&state));
            prop_assert_eq!(again, state);
        }
    }
}
