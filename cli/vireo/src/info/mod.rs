//! `vireo info`: what this host offers to VMs, and what to do about what it lacks.

mod check;
mod host;

use crate::accelerator::{self, Preference};
use accel::Tier;
use accel_kvm::{Engine, HostReport};
use anyhow::{Context, Result};
use check::{Area, Check};
use host::Host;
use serde::Serialize;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  vireo info
  vireo info --json | jq -r .chosen         which accelerator a run would take

Words:
  PASS  as it should be
  NOTE  for information
  WARN  something works less well, or not, that many do without
  FAIL  something that VMs need is missing

Exit codes:
  0  an accelerator can be had
  10 none can";

/// Options of `vireo info`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// As JSON, for programs.
    #[arg(long)]
    json: bool,
}

/// All that is known of the host.
#[derive(Serialize)]
struct Report {
    /// The version of this format.
    version: u32,
    /// The accelerator that a run takes when nothing is said.
    chosen: Option<&'static str>,
    /// Why, in one line.
    reason: String,
    /// What was looked at.
    checks: Vec<Check>,
    /// All that the host says of its KVM.
    kvm: HostReport,
}

/// Looks at the host and prints what it found.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let report = Report::new(HostReport::probe(), &Host::new("/"))?;
    let text = if options.json {
        serde_json::to_string_pretty(&report).context("cannot write JSON")? + "\n"
    } else {
        report.text()
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever reads it has read enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
        result => result.context("cannot write to standard output")?,
    }
    let code = if report.chosen.is_some() { 0 } else { crate::exit::NO_ACCELERATOR };
    Ok(ExitCode::from(code))
}

impl Report {
    fn new(kvm: HostReport, host: &Host) -> Result<Self> {
        let mut checks = Vec::new();
        check_kvm(&kvm, &mut Area { name: "kvm", checks: &mut checks });
        host.check(&mut checks);
        let preference: Preference = accelerator::DEFAULT.parse().map_err(anyhow::Error::msg)?;
        let choice = accelerator::choose(&preference, Tier::Auto, false, || kvm.clone());
        let (chosen, reason) = match choice {
            Ok(choice) => (Some(choice.kind.name()), choice.note.unwrap_or_default()),
            Err(error) => (None, error.to_string()),
        };
        Ok(Self { version: 1, chosen, reason, checks, kvm })
    }

    fn text(&self) -> String {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or_default();
        let mut text = String::new();
        let mut area = "";
        for check in &self.checks {
            if check.area != area {
                area = check.area;
                text += &format!("{area}\n");
            }
            text += &format!("  {} {:width$}  {}\n", check.status, check.name, check.found);
            if let Some(advice) = &check.advice {
                text += &format!("       {:width$}  -> {advice}\n", "");
            }
        }
        text + &format!("\nA run's {}\n", self.reason)
    }
}

fn check_kvm(kvm: &HostReport, area: &mut Area<'_>) {
    match &kvm.engine {
        Engine::VtX => area.pass("virtualization extensions", "Intel VT-x"),
        Engine::AmdV => area.pass("virtualization extensions", "AMD-V"),
        Engine::Software { module } => area.warn(
            "virtualization extensions",
            format!("none in the processor; software in their place: {module}"),
            "guests run on the translator; in a VM, have its host switch nested virtualization on",
        ),
    }
    let device = kvm.device.display().to_string();
    match kvm.usable() {
        Ok(()) => area.pass("device", device),
        // A device without extensions is one that a run does without: the translator takes over.
        Err(problem) => area.warn("device", problem.to_string(), "until then guests run on the translator"),
    }
    if let Some(version) = kvm.api_version {
        area.pass("API", format!("version {version}"));
    }
    match kvm.nested {
        Some(true) => area.pass("nested virtualization", "on"),
        Some(false) => area.note("nested virtualization", "off (the parameter `nested` of KVM's module)"),
        None => {}
    }
    if kvm.capabilities.is_empty() {
        return;
    }
    let missing = |needed: bool| {
        let lacks = kvm.capabilities.iter().filter(|cap| cap.needed == needed && cap.value <= 0);
        lacks.map(|cap| cap.name).collect::<Vec<_>>()
    };
    let (needed, useful) = (missing(true), missing(false));
    let there = kvm.capabilities.iter().filter(|cap| cap.value > 0).count();
    if !needed.is_empty() {
        area.fail("capabilities", format!("lacks {}", needed.join(", ")), "use a newer kernel");
    } else if useful.is_empty() {
        area.pass("capabilities", format!("all {there} that are used"));
    } else {
        let found = format!("{there}, all that are needed; not there: {}", useful.join(", "));
        area.note("capabilities", found);
    }
    area.note(
        "most vCPUs of a VM",
        format!(
            "{}, recommended {}; {} memory slots",
            kvm.max_vcpus, kvm.recommended_vcpus, kvm.memory_slots
        ),
    );
}
