//! `cargo xtask isa`: the interpreter's instructions against the host's processor, counted by extension.

use crate::Outcome;
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

/// The tests that compare, each with its package. Each prints lines as
/// "AVX2: 40 instructions, 960 comparisons".
const TESTS: &[(&str, &[&str])] =
    &[("x86_fpu", &["--lib", "tests::"]), ("x86_interp", &["--test", "host_cpu"])];

/// Instruction forms and comparisons.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    instructions: usize,
    comparisons: usize,
}

/// Runs the comparisons and prints the table. Fails if an instruction differs.
pub(crate) fn run(root: &Path) -> Outcome {
    let mut table = BTreeMap::<String, Count>::new();
    let mut failed = Vec::new();
    for (package, arguments) in TESTS {
        let mut command = Command::new("cargo");
        command.current_dir(root).args(["test", "--quiet", "--package", package]).args(*arguments);
        command.args(["--", "--nocapture", "--test-threads", "1"]).stderr(Stdio::inherit());
        let output = command.output().context("starting cargo")?;
        let mut compared = 0;
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            if let Some((extension, count)) = parse(line) {
                let entry = table.entry(extension.to_owned()).or_default();
                // The same forms are compared in several modes.
                entry.instructions = entry.instructions.max(count.instructions);
                entry.comparisons += count.comparisons;
                compared += count.comparisons;
            }
        }
        if output.status.success() && compared == 0 {
            bail!("the tests of {package} compare nothing");
        }
        if !output.status.success() {
            failed.push(*package);
        }
    }
    println!("{:<36} {:>12} {:>12}", "extension", "instructions", "comparisons");
    let mut sum = Count::default();
    for (extension, count) in &table {
        println!("{extension:<36} {:>12} {:>12}", count.instructions, count.comparisons);
        sum.instructions += count.instructions;
        sum.comparisons += count.comparisons;
    }
    println!("{:<36} {:>12} {:>12}", "all", sum.instructions, sum.comparisons);
    if !failed.is_empty() {
        bail!("instructions of {} differ from the host's", failed.join(", "));
    }
    Ok(())
}

/// What a line of a test says, if it is of those that count.
fn parse(line: &str) -> Option<(&str, Count)> {
    let (extension, rest) = line.rsplit_once(": ")?;
    let (instructions, comparisons) = rest.split_once(" instructions, ")?;
    let comparisons = comparisons.strip_suffix(" comparisons")?;
    Some((
        // Test runners may print dots before it.
        extension.trim_start_matches('.').trim(),
        Count { instructions: instructions.parse().ok()?, comparisons: comparisons.parse().ok()? },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_count() {
        let count = Count { instructions: 12, comparisons: 340 };
        assert_eq!(
            parse("EVEX AVX512VL+AVX512F: 12 instructions, 340 comparisons"),
            Some(("EVEX AVX512VL+AVX512F", count))
        );
        assert_eq!(parse("..SSE2: 12 instructions, 340 comparisons"), Some(("SSE2", count)));
        for other in
            ["in all 3 instructions, 4 comparisons", "test a: ok", "AVX: x instructions, 1 comparisons"]
        {
            assert_eq!(parse(other), None);
        }
    }
}
