//! The suite of bare guests on a KVM that is real: all cases run in one lab, and each is a test of its own here.

use accel::Tier;
use accel_conformance::{Target, for_each_case, for_each_cross_case, for_each_dirty_case};
use accel_dbt::DbtAccelerator;
use accel_kvm::KvmAccelerator;
use end_to_end::in_lab::lab_of_tests;
use std::path::PathBuf;
use std::sync::Mutex;

macro_rules! kvm {
    ($($module:ident::$name:ident),* $(,)?) => {
        $(#[test]
        fn $name() {
            run(stringify!($name), || alone(stringify!($name), |kvm| kvm));
        })*
    };
}

for_each_case!(kvm);

macro_rules! dirty_bitmaps {
    ($($name:ident),* $(,)?) => {
        mod with_dirty_bitmaps {
            $(#[test]
            fn $name() {
                let test = concat!("with_dirty_bitmaps::", stringify!($name));
                super::run(test, || super::alone(stringify!($name), |kvm| kvm.with_dirty_rings(false)));
            })*
        }
    };
}

for_each_dirty_case!(dirty_bitmaps);

macro_rules! between_accelerators {
    ($($name:ident),* $(,)?) => {
        mod with_the_translator {
            $(#[test]
            fn $name() {
                let test = concat!("with_the_translator::", stringify!($name));
                super::run(test, || super::between(stringify!($name)));
            })*
        }
    };
}

for_each_cross_case!(between_accelerators);

/// What the lab's processor lacks. The case is run where KVM is on real hardware only.
const BEYOND_LAB: &[(&str, &str)] =
    &[("any_number_of_breakpoints_stops", "QEMU's SVM does not tell a hypervisor of its guests' INT3")];

/// Runs a case of one accelerator.
fn alone(name: &str, configure: fn(KvmAccelerator) -> KvmAccelerator) {
    let accelerator = configure(KvmAccelerator::open().expect("the lab has KVM"));
    accel_conformance::run(name, &Target { accelerator: &accelerator, tier: Tier::Auto });
}

/// Runs a case of two accelerators, in both directions.
fn between(name: &str) {
    let accelerator = KvmAccelerator::open().expect("the lab has KVM");
    let kvm = Target { accelerator: &accelerator, tier: Tier::Auto };
    let dbt = Target { accelerator: &DbtAccelerator, tier: Tier::Translator };
    accel_conformance::run_cross(name, &kvm, &dbt);
    accel_conformance::run_cross(name, &dbt, &kvm);
}

/// In the lab, runs the case; outside, looks up what came of it there.
fn run(test: &str, case: impl FnOnce()) {
    if let Some((_, lacking)) = BEYOND_LAB.iter().find(|(case, _)| *case == test) {
        eprintln!("{test} is NOT RUN in the lab: {lacking}");
        return;
    }
    if kvm_lab::is_inside() {
        case();
        return;
    }
    let text = results();
    let line = format!("test {test} ... ok");
    if !text.lines().any(|known| known == line) {
        panic!("{test} did not pass in the lab:\n{text}");
    }
}

/// What the lab's run printed. The first test that asks has it run; where each test is a process of its own
/// (nextest), they share it by a file named after their run.
fn results() -> String {
    static RESULTS: Mutex<Option<String>> = Mutex::new(None);
    let mut results = RESULTS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(text) = &*results {
        return text.clone();
    }
    let text = match std::env::var("NEXTEST_RUN_ID") {
        Ok(id) => shared_by_file(&id),
        Err(_) => run_in_lab(),
    };
    *results = Some(text.clone());
    text
}

fn shared_by_file(id: &str) -> String {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let lock = std::fs::File::create(folder.join("kvm_conformance.lock")).unwrap();
    lock.lock().unwrap();
    let path = folder.join("kvm_conformance.log");
    let head = format!("run {id}\n");
    match std::fs::read_to_string(&path) {
        Ok(text) if text.starts_with(&head) => text,
        _ => {
            let text = head + &run_in_lab();
            std::fs::write(&path, &text).unwrap();
            text
        }
    }
}

/// On one processor, which the vCPUs share: with several, the lab's emulator at times goes on with old code when
/// another processor has modified it (the cases of modified code fail there now and then, with one they don't).
fn run_in_lab() -> String {
    match lab_of_tests(&[]).memory(1024).output() {
        Ok((_, text)) => text,
        Err(error) => error.to_string(),
    }
}
