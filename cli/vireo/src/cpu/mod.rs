//! `vireo cpu`: the processors that guests can be given.

mod decode;

use crate::accelerator::{self, Preference};
use accel::{Accelerator, CpuSpec, Tier};
use accel_kvm::HostReport;
use anyhow::{Context, Result};
use decode::Processor;
use serde::Serialize;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use x86_cpuid::CpuModel;

const EXAMPLES: &str = "\
Examples:
  vireo cpu list
  vireo cpu show EPYC-Rome,-avx2        what a guest of `vireo run --cpu EPYC-Rome,-avx2` would see
  vireo cpu show max --json | jq -r '.features[]'";

/// Options of `vireo cpu`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Lists the CPU models, those that cannot be had here last, with what they would need.
    List(List),
    /// Shows what CPUID says to a guest: features, family and model, all leaves.
    Show(Show),
}

#[derive(clap::Args)]
struct List {
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
struct Show {
    /// The processor, as in `vireo run --cpu`: MODEL[,+FEATURE][,-FEATURE][,FEATURE=on|off]...
    #[arg(value_name = "MODEL[,FEATURES]", default_value = "max")]
    cpu: CpuSpec,
    #[command(flatten)]
    common: Common,
}

#[derive(clap::Args)]
struct Common {
    /// The accelerator that is to execute the guest: kvm, dbt, or a list of which the first that works is taken.
    #[arg(long, value_name = "ACCEL[:ACCEL]", default_value = accelerator::DEFAULT)]
    accel: Preference,
    /// As JSON, for programs.
    #[arg(long)]
    json: bool,
}

/// What `vireo cpu list` tells.
#[derive(Serialize)]
struct ModelList {
    /// The version of this format.
    version: u32,
    accelerator: &'static str,
    models: Vec<Model>,
}

#[derive(Serialize)]
struct Model {
    name: String,
    description: String,
    /// Whether it can be had here.
    available: bool,
    /// The features that it has and that are not to be had.
    missing: Vec<&'static str>,
}

/// Runs the subcommand.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let text = match &options.command {
        Command::List(List { common }) => {
            let list = ModelList::new(accelerator(common)?.as_ref());
            if common.json { json(&list)? } else { list.text() }
        }
        Command::Show(Show { cpu, common }) => {
            let accelerator = accelerator(common)?;
            let processor = Processor::new(accelerator.name(), cpu, &accelerator.cpuid(cpu)?);
            if common.json { json(&processor)? } else { processor.text() }
        }
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever reads it has read enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
        result => result.context("cannot write to standard output")?,
    }
    Ok(ExitCode::SUCCESS)
}

fn json(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(value).context("cannot write JSON")? + "\n")
}

fn accelerator(common: &Common) -> Result<Box<dyn Accelerator>> {
    let choice = accelerator::choose(&common.accel, Tier::Auto, false, HostReport::probe)?;
    Ok(accelerator::open(choice.kind)?)
}

impl ModelList {
    fn new(accelerator: &dyn Accelerator) -> Self {
        let there = accelerator.cpu_models();
        let available = there.iter().map(|(name, description)| Model {
            name: name.clone(),
            description: description.clone(),
            available: true,
            missing: Vec::new(),
        });
        // Under KVM models go without what is missing.
        let known = CpuModel::list(CpuModel::available).into_iter();
        let others =
            known.filter(|model| there.iter().all(|(name, _)| *name != model.name)).map(|model| Model {
                name: model.name.to_owned(),
                description: model.description.to_owned(),
                available: false,
                missing: model.missing.into_iter().filter_map(x86_cpuid::feature::Feature::name).collect(),
            });
        Self { version: 1, accelerator: accelerator.name(), models: available.chain(others).collect() }
    }

    fn text(&self) -> String {
        let width = self.models.iter().map(|model| model.name.len()).max().unwrap_or_default();
        let mut text = String::new();
        for model in &self.models {
            let Model { name, description, .. } = model;
            text += &format!("{name:width$}  {description}\n");
            if !model.available {
                text += &format!("{:width$}  not here: it has {}\n", "", model.missing.join(", "));
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::accelerator::Kind;

    #[test]
    fn every_model_of_the_translator_is_listed_and_shown() {
        let accelerator = accelerator::open(Kind::Dbt).unwrap();
        let list = ModelList::new(accelerator.as_ref());
        assert!(list.models[0].name == "max" && list.models[0].available);
        for model in &list.models {
            let spec: CpuSpec = model.name.parse().unwrap();
            let leaves = accelerator.cpuid(&spec);
            assert_eq!(leaves.is_ok(), model.available, "{}", model.name);
            assert_eq!(model.missing.is_empty(), model.available, "{}", model.name);
            let Ok(leaves) = leaves else { continue };
            let processor = Processor::new("dbt", &spec, &leaves);
            assert!(processor.features.contains(&"sse2"), "{}", model.name);
            assert!(!processor.brand.is_empty());
        }
        assert!(list.text().contains("x86-64-v2"));
    }

    #[test]
    fn what_cannot_be_had_is_said_in_a_line() {
        let accelerator = accelerator::open(Kind::Dbt).unwrap();
        for (spec, words) in [
            ("EPIC", "did you mean EPYC?"),
            ("x86-64-v9", "did you mean x86-64-v"),
            ("qemu64,+avx2", "needs avx"),
            ("max,+sse4-3", "did you mean sse4_"),
            ("qemu64,-sse2", "every 64-bit processor"),
        ] {
            let error = accelerator.cpuid(&spec.parse().unwrap()).unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains('\n'), "{spec}: {error}");
        }
    }
}
