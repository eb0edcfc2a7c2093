//! The translator's accelerator against the suite.

use accel::Tier;
use accel_conformance::{Target, for_each_case, for_each_cross_case};
use accel_dbt::DbtAccelerator;

macro_rules! interpreter {
    ($($module:ident::$name:ident),* $(,)?) => {
        mod interpreter {
            $(#[test]
            fn $name() {
                super::run(stringify!($name), super::Tier::Interpreter);
            })*
        }
    };
}

for_each_case!(interpreter);

macro_rules! translator {
    ($($module:ident::$name:ident),* $(,)?) => {
        mod translator {
            $(#[test]
            fn $name() {
                super::run(stringify!($name), super::Tier::Translator);
            })*
        }
    };
}

for_each_case!(translator);

fn run(name: &str, tier: Tier) {
    accel_conformance::run(name, &Target { accelerator: &DbtAccelerator, tier });
}

macro_rules! between_tiers {
    ($($name:ident),* $(,)?) => {
        mod between_tiers {
            $(#[test]
            fn $name() {
                let target = |tier| super::Target { accelerator: &super::DbtAccelerator, tier };
                let [interpreter, translator] = [super::Tier::Interpreter, super::Tier::Translator].map(target);
                accel_conformance::run_cross(stringify!($name), &interpreter, &translator);
                accel_conformance::run_cross(stringify!($name), &translator, &interpreter);
            })*
        }
    };
}

for_each_cross_case!(between_tiers);

#[test]
fn counted_guests_do_the_same_on_both_tiers() {
    let target = |tier| Target { accelerator: &DbtAccelerator, tier };
    accel_conformance::run_counted(&target(Tier::Interpreter), &target(Tier::Translator));
}

macro_rules! lockstep {
    ($($name:ident),* $(,)?) => {
        mod lockstep {
            $(#[test]
            fn $name() {
                super::run(stringify!($name), super::Tier::Lockstep);
            })*
        }
    };
}

// The cases of one processor, but for those whose memory is changed from outside while they look at it (when
// the change comes is not the same for both engines), the one that asks for interrupts within a block (they
// are delivered between blocks here), and the one that is saved so often that it takes minutes.
lockstep![
    starts_at_the_reset_vector,
    real_mode_brings_up_long_mode,
    ports_and_mmio_of_all_sizes,
    string_io_reaches_the_bus,
    exceptions_arrive_with_error_codes,
    a_triple_fault_ends_the_run,
    modified_code_is_executed,
    stop_ends_a_halt,
    an_msi_wakes_a_halted_processor,
    level_triggered_interrupts_are_ended,
    the_8259s_vector_is_asked_for,
    task_priority_holds_interrupts_back,
    the_periodic_timer_counts,
    tsc_deadlines_arrive,
    the_counter_advances_and_stops,
    stores_to_memory_that_is_only_read_reach_the_bus,
    a_timer_goes_on_after_a_restore,
    impossible_states_are_refused,
];
