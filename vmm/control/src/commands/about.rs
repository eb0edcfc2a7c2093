//! Commands about the control socket itself, and about what does not change while the VM runs.

use crate::command::Command;
use crate::context::Context;
use crate::error::Result;
use crate::version::{self, VersionInfo};
use machine::{MAX_VCPUS, MachineKind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(super) fn commands() -> Vec<Command> {
    vec![
        Command::new("qmp_capabilities", qmp_capabilities),
        Command::new("query-version", query_version),
        Command::new("query-commands", query_commands),
        Command::new("query-qmp-schema", query_qmp_schema),
        Command::new("query-name", query_name),
        Command::new("query-uuid", query_uuid),
        Command::new("query-kvm", query_kvm),
        Command::new("query-machines", query_machines),
        Command::new("query-current-machine", query_current_machine),
        Command::new("query-target", query_target),
        Command::new("query-chardev", query_chardev),
        Command::new("query-iothreads", query_iothreads),
        Command::new("query-memory-size-summary", query_memory_size_summary),
    ]
}

/// A capability of the protocol. There is none yet that a client can ask for.
#[derive(Deserialize, JsonSchema)]
enum Capability {}

#[derive(Deserialize, JsonSchema)]
struct Capabilities {
    #[allow(dead_code, reason = "a list of nothing")]
    enable: Option<Vec<Capability>>,
}

async fn qmp_capabilities(_: &Context, _: Capabilities) -> Result<()> {
    Ok(())
}

async fn query_version(_: &Context, (): ()) -> Result<VersionInfo> {
    Ok(version::version())
}

#[derive(Serialize, JsonSchema)]
struct CommandInfo {
    name: &'static str,
}

async fn query_commands(context: &Context, (): ()) -> Result<Vec<CommandInfo>> {
    Ok(context.about.0.iter().map(|name| CommandInfo { name }).collect())
}

async fn query_qmp_schema(context: &Context, (): ()) -> Result<Value> {
    Ok(context.about.1.clone())
}

#[derive(Serialize, JsonSchema)]
struct NameInfo {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
}

async fn query_name(context: &Context, (): ()) -> Result<NameInfo> {
    Ok(NameInfo { name: context.facts.name.clone() })
}

#[derive(Serialize, JsonSchema)]
struct UuidInfo {
    #[serde(rename = "UUID")]
    uuid: String,
}

async fn query_uuid(context: &Context, (): ()) -> Result<UuidInfo> {
    Ok(UuidInfo { uuid: context.facts.uuid.clone() })
}

#[derive(Serialize, JsonSchema)]
struct KvmInfo {
    enabled: bool,
    present: bool,
}

async fn query_kvm(context: &Context, (): ()) -> Result<KvmInfo> {
    Ok(KvmInfo { enabled: context.facts.kvm, present: context.facts.kvm_present })
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct MachineInfo {
    name: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    is_default: Option<bool>,
    cpu_max: u32,
    hotpluggable_cpus: bool,
    numa_mem_supported: bool,
    deprecated: bool,
    acpi: bool,
}

async fn query_machines(_: &Context, (): ()) -> Result<Vec<MachineInfo>> {
    let machine = |(n, (name, _)): (usize, &(&'static str, MachineKind))| MachineInfo {
        name,
        is_default: (n == 0).then_some(true),
        cpu_max: MAX_VCPUS,
        hotpluggable_cpus: false,
        numa_mem_supported: true,
        deprecated: false,
        acpi: true,
    };
    Ok(MachineKind::NAMES.iter().enumerate().map(machine).collect())
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct CurrentMachineParams {
    wakeup_suspend_support: bool,
}

async fn query_current_machine(context: &Context, (): ()) -> Result<CurrentMachineParams> {
    Ok(CurrentMachineParams { wakeup_suspend_support: context.vm.can_sleep() })
}

#[derive(Serialize, JsonSchema)]
struct TargetInfo {
    arch: &'static str,
}

async fn query_target(_: &Context, (): ()) -> Result<TargetInfo> {
    Ok(TargetInfo { arch: "x86_64" })
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct ChardevInfo {
    label: String,
    filename: String,
    frontend_open: bool,
}

async fn query_chardev(context: &Context, (): ()) -> Result<Vec<ChardevInfo>> {
    let info = |(label, filename): &(String, String)| ChardevInfo {
        label: label.clone(),
        filename: filename.clone(),
        frontend_open: true,
    };
    Ok(context.facts.chardevs.iter().map(info).collect())
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct IoThreadInfo {
    id: String,
    thread_id: i64,
}

/// I/O threads belong to the queues of devices here, and none has a name.
async fn query_iothreads(_: &Context, (): ()) -> Result<Vec<IoThreadInfo>> {
    Ok(Vec::new())
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct MemoryInfo {
    base_memory: u64,
    plugged_memory: u64,
}

async fn query_memory_size_summary(context: &Context, (): ()) -> Result<MemoryInfo> {
    Ok(MemoryInfo { base_memory: context.facts.memory, plugged_memory: 0 })
}
