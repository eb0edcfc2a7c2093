//! `cargo xtask suites`: others' CPU test suites on our accelerators, beside QEMU's TCG.

mod fex;
mod kvm_unit_tests;
mod process;
mod report;
mod snippet;
mod sources;
mod tcg;
mod test386;

use crate::Outcome;
use anyhow::Context;
use report::{Report, Row};
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  cargo xtask suites
  cargo xtask suites kvm-unit-tests --only 'apic|pcid' --tier translator
  cargo xtask suites test386 --sources ~/src --json

The suites' sources are cloned with git, and built with gcc, make and nasm, below target/suites.";

/// A suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "kebab-case")]
pub(crate) enum Suite {
    /// The KVM developers' tests of system-level features.
    KvmUnitTests,
    /// A BIOS-like program that tests an 80386.
    #[value(name = "test386")]
    Test386,
    /// The assembly tests of the FEX emulator: user code, with what it leaves in registers.
    Fex,
}

/// What to run and how.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Options {
    /// The suites to run [default: all]
    #[arg(value_enum)]
    suites: Vec<Suite>,
    /// A folder with clones of the suites' repositories, to be used instead of their public homes.
    #[arg(long, value_name = "DIR")]
    sources: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
    /// Only tests whose name contains one of these words, separated by `|`.
    #[arg(long, value_name = "WORDS")]
    only: Option<String>,
    /// Tiers of the translator to run: translator, interpreter [default: both]
    #[arg(long, value_name = "TIER", value_parser = ["translator", "interpreter"])]
    tier: Vec<String>,
    /// Leave QEMU out.
    #[arg(long)]
    no_tcg: bool,
    /// The program to test, instead of a release build of this one.
    #[arg(long, value_name = "FILE")]
    vireo: Option<PathBuf>,
}

/// What runs tests: a tier of ours, or TCG.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Engine {
    /// Our translating accelerator, executing by the tier of that name.
    Vireo {
        /// The program.
        program: PathBuf,
        /// The tier's name on its command line.
        tier: String,
    },
    /// QEMU's TCG.
    Tcg,
}

impl Engine {
    /// The name of its column.
    fn name(&self) -> &str {
        match self {
            Self::Vireo { tier, .. } => tier,
            Self::Tcg => "TCG",
        }
    }

    /// By how much longer it may take than the suite allows.
    fn patience(&self) -> u32 {
        match self {
            Self::Vireo { tier, .. } if tier == "interpreter" => 3,
            _ => 1,
        }
    }
}

/// Where a suite's sources and results are, and which tests are wanted.
pub(crate) struct Bench<'a> {
    root: &'a Path,
    sources: Option<&'a Path>,
    only: Vec<&'a str>,
    engines: Vec<Engine>,
}

impl Bench<'_> {
    /// Whether a test is to be run.
    fn wants(&self, test: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|word| test.contains(word))
    }

    /// A folder for what a suite leaves: its build, and what its tests print.
    fn folder(&self, suite: &str) -> PathBuf {
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| self.root.join("target"), PathBuf::from);
        target.join("suites").join(suite)
    }
}

/// Runs the suites and prints what came of each test.
pub(crate) fn run(root: &Path, options: &Options) -> Outcome {
    let program = match &options.vireo {
        Some(program) => program.clone(),
        None => crate::build_vireo(root)?,
    };
    let both = ["translator".to_owned(), "interpreter".to_owned()];
    let tiers = if options.tier.is_empty() { &both[..] } else { &options.tier[..] };
    let mut engines: Vec<_> =
        tiers.iter().map(|tier| Engine::Vireo { program: program.clone(), tier: tier.clone() }).collect();
    if !options.no_tcg {
        engines.push(Engine::Tcg);
    }
    let bench = Bench {
        root,
        sources: options.sources.as_deref(),
        only: options.only.as_deref().map(|only| only.split('|').collect()).unwrap_or_default(),
        engines,
    };
    let suites: &[Suite] = if options.suites.is_empty() {
        &[Suite::KvmUnitTests, Suite::Test386, Suite::Fex]
    } else {
        &options.suites
    };
    let mut reports = Vec::new();
    for suite in suites {
        let (name, rows): (_, Vec<Row>) = match suite {
            Suite::KvmUnitTests => ("kvm-unit-tests", kvm_unit_tests::run(&bench)?),
            Suite::Test386 => ("test386", test386::run(&bench)?),
            Suite::Fex => ("fex", fex::run(&bench)?),
        };
        let engines = bench.engines.iter().map(|engine| engine.name().to_owned()).collect();
        reports.push(Report { suite: name, engines, rows });
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&reports).context("writing JSON")?);
    } else {
        for report in &reports {
            print!("{report}");
        }
    }
    Ok(())
}
