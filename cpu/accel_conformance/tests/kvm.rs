//! KVM's accelerator against the suite. On a host with a software KVM the cases that need what it lacks are
//! listed, and not run.

use accel::Tier;
use accel_conformance::{Target, for_each_case, for_each_cross_case, for_each_dirty_case};
use accel_dbt::DbtAccelerator;
use accel_kvm::{Engine, HostReport, KvmAccelerator};

/// The cases that a software KVM (`kvm_pvm`) gets wrong or cannot run, each with what it lacks.
const BEYOND_SOFTWARE: &[(&str, &str)] = &[
    ("a_saved_run_goes_on_elsewhere", "it emulates no x87 instructions in privileged code"),
    ("a_run_alternates", "it emulates no x87 instructions in privileged code"),
    ("the_dirty_log_starts_over_when_taken", "it emulates no x87 instructions in privileged code"),
    ("a_busy_run_alternates", "it emulates few vector instructions in privileged code"),
    ("exceptions_arrive_with_error_codes", "it emulates no INT3 in privileged code"),
    ("any_number_of_breakpoints_stops", "it emulates no INT3 in privileged code"),
    ("the_guest_keeps_its_own_breakpoints", "it emulates no INT3 in privileged code"),
    ("code_of_32_bits_is_debugged", "it watches no memory in privileged code"),
    ("watchpoints_stop_after_the_access", "it watches no memory in privileged code"),
    ("protected_mode_pages_with_two_levels", "it pages in 64-bit mode only"),
    ("protected_mode_pages_with_pae", "it pages in 64-bit mode only"),
    ("interrupts_wait_for_their_shadow", "it delivers interrupts late in privileged code"),
    ("task_priority_holds_interrupts_back", "it delivers interrupts late in privileged code"),
    ("level_triggered_interrupts_are_ended", "it does not report the end of an interrupt"),
    ("an_interrupt_is_ended_elsewhere", "it does not report the end of an interrupt"),
];

macro_rules! kvm {
    ($($module:ident::$name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*
    };
}

for_each_case!(kvm);

macro_rules! dirty_logs {
    ($($name:ident),* $(,)?) => {
        mod with_dirty_bitmaps {
            $(#[test]
            fn $name() {
                super::run_with_dirty_rings(stringify!($name), false);
            })*
        }
        mod with_dirty_rings {
            $(#[test]
            fn $name() {
                super::run_with_dirty_rings(stringify!($name), true);
            })*
        }
    };
}

for_each_dirty_case!(dirty_logs);

macro_rules! between_accelerators {
    ($($name:ident),* $(,)?) => {
        mod with_the_translator {
            $(#[test]
            fn $name() {
                super::run_between(stringify!($name), super::Tier::Translator);
            })*
        }
        mod with_the_interpreter {
            $(#[test]
            fn $name() {
                super::run_between(stringify!($name), super::Tier::Interpreter);
            })*
        }
    };
}

for_each_cross_case!(between_accelerators);

/// Runs a case on KVM, if it can be had here.
fn run(name: &str) {
    if let Some(accelerator) = kvm_for(name) {
        accel_conformance::run(name, &Target { accelerator: &accelerator, tier: Tier::Auto });
    }
}

/// Runs a case on a KVM that tells of written pages by rings, or by bitmaps.
fn run_with_dirty_rings(name: &str, rings: bool) {
    let (Some(accelerator), software) =
        (kvm_for(name), matches!(HostReport::probe().engine, Engine::Software { .. }))
    else {
        return;
    };
    if rings && software && name == "the_dirty_log_takes_many_pages_at_once" {
        eprintln!("{name} is NOT RUN on the software KVM: it overfills its rings");
        return;
    }
    let accelerator = accelerator.with_dirty_rings(rings);
    accel_conformance::run(name, &Target { accelerator: &accelerator, tier: Tier::Auto });
}

/// Runs a case of two accelerators on KVM and the other one, in both directions.
fn run_between(name: &str, tier: Tier) {
    if let Some(accelerator) = kvm_for(name) {
        let kvm = Target { accelerator: &accelerator, tier: Tier::Auto };
        let dbt = Target { accelerator: &DbtAccelerator, tier };
        accel_conformance::run_cross(name, &kvm, &dbt);
        accel_conformance::run_cross(name, &dbt, &kvm);
    }
}

/// KVM, if this case can run here.
fn kvm_for(name: &str) -> Option<KvmAccelerator> {
    let host = HostReport::probe();
    if let Err(problem) = host.usable() {
        eprintln!("{name} is NOT RUN: {problem}");
        return None;
    }
    let lacking = BEYOND_SOFTWARE.iter().find(|(case, _)| *case == name);
    if let (Engine::Software { module }, Some((_, lacking))) = (&host.engine, lacking) {
        eprintln!("{name} is NOT RUN on the software KVM ({module}): {lacking}");
        return None;
    }
    Some(KvmAccelerator::open().expect("the host's KVM was just found usable"))
}
