//! One suite of bare guests that every accelerator must run alike.
//!
//! Each [`Case`] assembles a small guest, runs it on the [`Target`] and panics if the guest or the host saw
//! something else than the architecture says. An accelerator's tests go through [`CASES`].

// A guest is one listing; cutting it in pieces would not make it clearer.
#![allow(clippy::too_many_lines)]

mod addresses;
mod basic;
mod counted;
mod cross;
mod debugging;
mod events;
mod feature;
mod guest;
mod io;
mod litmus;
mod modes;
mod rig;
mod smp;
mod snapshot;
mod svm;

pub use rig::Target;

/// One guest and what is expected of it.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// Runs it; panics if it fails.
    pub run: fn(&Target<'_>),
}

/// Hands the list of all cases, as `module::name, ...`, to the macro `$callback`: to make a test of each.
#[macro_export]
macro_rules! for_each_case {
    ($callback:ident) => {
        $callback! {
            basic::starts_at_the_reset_vector,
            basic::real_mode_brings_up_long_mode,
            basic::ports_and_mmio_of_all_sizes,
            basic::string_io_reaches_the_bus,
            basic::exceptions_arrive_with_error_codes,
            basic::a_triple_fault_ends_the_run,
            basic::cpuid_knows_the_processor,
            basic::modified_code_is_executed,
            basic::code_modified_from_outside_is_executed,
            basic::the_dirty_log_has_the_pages_written,
            io::mmio_of_string_instructions,
            io::mmio_of_vector_instructions,
            io::mmio_that_is_read_modified_and_written,
            io::doorbells_signal_without_the_bus,
            io::events_raise_interrupts,
            io::the_dirty_log_starts_over_when_taken,
            io::the_dirty_log_takes_many_pages_at_once,
            io::stores_to_memory_that_is_only_read_reach_the_bus,
            modes::real_mode_interrupts_use_the_vector_table,
            modes::protected_mode_pages_with_two_levels,
            modes::protected_mode_pages_with_pae,
            modes::compatibility_mode_runs_in_long_mode,
            modes::page_faults_say_what_was_wrong,
            modes::the_trap_flag_steps,
            modes::a_double_fault_has_a_stack_of_its_own,
            addresses::process_contexts_keep_apart,
            addresses::protection_keys_guard_user_pages,
            addresses::protection_keys_guard_privileged_pages,
            addresses::five_levels_map_57_bits,
            events::stop_ends_a_busy_loop,
            events::no_stop_is_lost,
            events::kicks_leave_the_guest_running,
            events::stop_ends_a_halt,
            events::an_msi_wakes_a_halted_processor,
            events::level_triggered_interrupts_are_ended,
            events::the_8259s_vector_is_asked_for,
            events::an_nmi_arrives_with_interrupts_off,
            events::interrupts_wait_for_their_shadow,
            events::task_priority_holds_interrupts_back,
            events::the_periodic_timer_counts,
            events::tsc_deadlines_arrive,
            events::the_counter_advances_and_stops,
            smp::init_and_sipi_start_a_processor,
            smp::x2apic_starts_processors,
            smp::processors_answer_each_other_s_interrupts,
            smp::locked_increments_are_not_lost,
            smp::a_processor_modifies_another_s_code,
            litmus::two_processors_see_stores_in_order,
            litmus::more_processors_see_stores_in_order,
            snapshot::a_saved_run_goes_on_elsewhere,
            snapshot::a_halted_processor_is_saved_halted,
            snapshot::a_timer_goes_on_after_a_restore,
            snapshot::any_state_is_saved_as_it_was_restored,
            snapshot::impossible_states_are_refused,
            snapshot::reset_starts_over,
            debugging::breakpoints_stop_before_the_instruction,
            debugging::hardware_breakpoints_stop_before_the_instruction,
            debugging::any_number_of_breakpoints_stops,
            debugging::breakpoints_are_met_in_code_that_has_run,
            debugging::single_steps_execute_one_instruction,
            debugging::single_steps_can_hold_interrupts,
            debugging::watchpoints_stop_after_the_access,
            debugging::code_of_32_bits_is_debugged,
            debugging::loads_are_watched_for_alone_or_refused,
            debugging::more_than_there_is_is_refused,
            debugging::the_guest_keeps_its_own_breakpoints,
            debugging::breakpoints_are_a_processor_s_own,
            debugging::debugging_outlives_a_reset,
            debugging::addresses_are_translated,
            svm::interrupts_leave_a_guest_and_virtual_ones_reach_it,
            svm::a_guest_of_a_guest_is_saved_as_it_runs,
        }
    };
}

/// Hands the list of the cases of dirty tracking, as `name, ...`, to the macro `$callback`: for accelerators that have
/// more than one way of it.
#[macro_export]
macro_rules! for_each_dirty_case {
    ($callback:ident) => {
        $callback! {
            the_dirty_log_has_the_pages_written,
            the_dirty_log_starts_over_when_taken,
            the_dirty_log_takes_many_pages_at_once,
        }
    };
}

macro_rules! list {
    ($($module:ident::$name:ident),* $(,)?) => {
        /// All cases.
        pub const CASES: &[Case] = &[$(Case { name: stringify!($name), run: $module::$name }),*];
    };
}

for_each_case!(list);

/// One guest that runs under two accelerators in turn.
#[derive(Debug, Clone, Copy)]
pub struct CrossCase {
    /// Its name.
    pub name: &'static str,
    /// Runs it; panics if it fails. It starts under the first.
    pub run: fn(&Target<'_>, &Target<'_>),
}

/// Hands the list of all cases of two accelerators, as `name, ...`, to the macro `$callback`.
#[macro_export]
macro_rules! for_each_cross_case {
    ($callback:ident) => {
        $callback! {
            a_run_alternates,
            string_instructions_are_moved_in_their_middle,
            a_busy_run_alternates,
            an_interrupt_is_ended_elsewhere,
            a_timer_goes_on_elsewhere,
            a_processor_is_started_elsewhere,
            a_halted_processor_is_woken_elsewhere,
            an_event_in_flight_arrives_elsewhere,
            both_processors_go_on_elsewhere,
        }
    };
}

macro_rules! cross_list {
    ($($name:ident),* $(,)?) => {
        /// All cases of two accelerators.
        pub const CROSS_CASES: &[CrossCase] =
            &[$(CrossCase { name: stringify!($name), run: cross::$name }),*];
    };
}

for_each_cross_case!(cross_list);

/// Runs the case of two accelerators with this name, from the first to the second.
///
/// # Panics
/// If it fails, or there is none.
pub fn run_cross(name: &str, from: &Target<'_>, to: &Target<'_>) {
    let case = CROSS_CASES.iter().find(|case| case.name == name);
    (case.expect("a case of this suite").run)(from, to);
}

/// Runs a guest whose time is made of instructions on both targets, which must be able to count them: it does the same
/// at the same counts.
///
/// # Panics
/// If it does not.
pub fn run_counted(first: &Target<'_>, second: &Target<'_>) {
    counted::the_same_happens_at_the_same_counts(first, second);
}

/// Runs the case with this name.
///
/// # Panics
/// If it fails, or there is none.
pub fn run(name: &str, target: &Target<'_>) {
    let case = CASES.iter().find(|case| case.name == name);
    (case.expect("a case of this suite").run)(target);
}
