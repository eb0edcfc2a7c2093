//! KVM's accelerator against the suite. On a host with a software KVM the cases that need what it lacks are
//! listed, and not run.

use accel::Tier;
use accel_conformance::{Target, for_each_case};
use accel_kvm::{Engine, HostReport, KvmAccelerator};

/// The cases that a software KVM (`kvm_pvm`) gets wrong or cannot run, each with what it lacks.
const BEYOND_SOFTWARE: &[(&str, &str)] = &[
    ("a_saved_run_goes_on_elsewhere", "it emulates no x87 instructions in privileged code"),
    ("exceptions_arrive_with_error_codes", "it emulates no INT3 in privileged code"),
    ("interrupts_wait_for_their_shadow", "it delivers interrupts late in privileged code"),
    ("task_priority_holds_interrupts_back", "it delivers interrupts late in privileged code"),
    ("level_triggered_interrupts_are_ended", "it does not report the end of an interrupt"),
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

fn run(name: &str) {
    let host = HostReport::probe();
    if let Err(problem) = host.usable() {
        eprintln!("{name} is NOT RUN: {problem}");
        return;
    }
    let lacking = BEYOND_SOFTWARE.iter().find(|(case, _)| *case == name);
    if let (Engine::Software { module }, Some((_, lacking))) = (&host.engine, lacking) {
        eprintln!("{name} is NOT RUN on the software KVM ({module}): {lacking}");
        return;
    }
    let accelerator = KvmAccelerator::open().expect("the host's KVM was just found usable");
    accel_conformance::run(name, &Target { accelerator: &accelerator, tier: Tier::Auto });
}
