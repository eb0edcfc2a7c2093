//! Commands that run, stop and end the VM.

use crate::command::Command;
use crate::context::Context;
use crate::error::{QmpError, Result};
use machine::RunState;
use schemars::JsonSchema;
use serde::Serialize;
use std::sync::atomic::Ordering;

pub(super) fn commands() -> Vec<Command> {
    vec![
        Command::new("query-status", query_status),
        Command::new("query-cpus-fast", query_cpus_fast),
        Command::new("stop", stop),
        Command::new("cont", cont),
        Command::new("quit", quit),
        Command::new("system_reset", system_reset),
        Command::new("system_powerdown", system_powerdown),
        Command::new("system_wakeup", system_wakeup),
        Command::new("inject-nmi", inject_nmi),
    ]
}

/// QAPI's `RunState`, as far as a VM here has them.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Status {
    Prelaunch,
    Running,
    Suspended,
    Paused,
    IoError,
    Debug,
    Shutdown,
}

#[derive(Serialize, JsonSchema)]
struct StatusInfo {
    running: bool,
    status: Status,
}

async fn query_status(context: &Context, (): ()) -> Result<StatusInfo> {
    let state = context.vm.run_state();
    let status = match state {
        RunState::Prelaunch => Status::Prelaunch,
        RunState::Running => Status::Running,
        RunState::Suspended => Status::Suspended,
        RunState::Paused => Status::Paused,
        RunState::IoError => Status::IoError,
        RunState::Debug => Status::Debug,
        RunState::Shutdown => Status::Shutdown,
    };
    Ok(StatusInfo { running: state == RunState::Running, status })
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct CpuInfoFast {
    cpu_index: u32,
    qom_path: String,
    /// 0 while the VM stands still.
    thread_id: i32,
    target: &'static str,
}

async fn query_cpus_fast(context: &Context, (): ()) -> Result<Vec<CpuInfoFast>> {
    let threads = context.vm.vcpu_threads();
    let cpu = |cpu_index: u32| CpuInfoFast {
        cpu_index,
        qom_path: format!("/machine/unattached/device[{cpu_index}]"),
        thread_id: threads.get(cpu_index as usize).copied().flatten().unwrap_or(0),
        target: "x86_64",
    };
    Ok((0..context.facts.vcpus).map(cpu).collect())
}

/// Answers when the VM stands still.
async fn stop(context: &Context, (): ()) -> Result<()> {
    if context.vm.run_state().is_live() {
        context.vm.hold(RunState::Paused);
        context.wait_for(|state| !state.is_live(), None, 0).await;
    }
    Ok(())
}

/// Answers when the VM has run, even if it stands still again.
async fn cont(context: &Context, (): ()) -> Result<()> {
    if context.vm.run_state() == RunState::Debug {
        return Err(QmpError::generic("A debugger has the guest stand still, and has to let it run"));
    }
    let counter = &context.counts.resumed;
    let before = counter.load(Ordering::SeqCst);
    if !context.vm.run_state().is_live() {
        context.vm.resume();
        context.wait_for(RunState::is_live, Some(counter), before).await;
    }
    Ok(())
}

async fn quit(context: &Context, (): ()) -> Result<()> {
    context.vm.quit();
    Ok(())
}

/// Answers when the VM was reset, or at once if a debugger has it stand still: it is reset when that lets it run.
async fn system_reset(context: &Context, (): ()) -> Result<()> {
    let counter = &context.counts.reset;
    let before = counter.load(Ordering::SeqCst);
    context.vm.reset();
    context.wait_for(|_| false, Some(counter), before).await;
    Ok(())
}

async fn system_powerdown(context: &Context, (): ()) -> Result<()> {
    if context.vm.press_power_button() {
        return Ok(());
    }
    Err(QmpError::generic(format!("The machine type '{}' has no power button", context.facts.machine)))
}

async fn system_wakeup(context: &Context, (): ()) -> Result<()> {
    if !context.vm.can_sleep() {
        return Err(QmpError::generic("wake-up from suspend is not supported by this guest"));
    }
    if context.vm.wake() {
        return Ok(());
    }
    Err(QmpError::generic("Unable to wake up: guest is not in suspended state"))
}

async fn inject_nmi(context: &Context, (): ()) -> Result<()> {
    context.vm.inject_nmi();
    Ok(())
}
