//! `cargo xtask isa`: the interpreter's instructions against the host's processor, counted by extension.

use crate::Outcome;
use anyhow::{Context, bail};
use iced_x86::{Code, EncodingKind};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};

/// The tests that compare, each with its package. They print lines that [`parse`] reads.
const TESTS: &[(&str, &[&str])] =
    &[("x86_fpu", &["--lib", "tests::"]), ("x86_interp", &["--test", "host_cpu"])];

/// How much to compare.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Seed of the random operands.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// How many times as many operands as usual.
    #[arg(long, value_name = "TIMES", default_value_t = 1)]
    rounds: u64,
    /// Name the instruction forms that were not compared.
    #[arg(long)]
    missing: bool,
}

/// What was compared of an instruction form.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    /// Comparisons in code of 64, 32 and 16 bits.
    comparisons: [usize; 3],
    /// Those that differ.
    mismatches: usize,
}

impl Count {
    fn add(&mut self, other: Self) {
        for (sum, count) in self.comparisons.iter_mut().zip(other.comparisons) {
            *sum += count;
        }
        self.mismatches += other.mismatches;
    }
}

/// Runs the comparisons and prints the table. Fails if an instruction differs.
pub(crate) fn run(root: &Path, options: &Options) -> Outcome {
    let names: HashMap<String, Code> = Code::values().map(|code| (format!("{code:?}"), code)).collect();
    let mut compared = HashMap::<Code, Count>::new();
    let mut failed = Vec::new();
    for (package, arguments) in TESTS {
        let mut command = Command::new("cargo");
        command.current_dir(root).args(["test", "--quiet", "--package", package]).args(*arguments);
        command.args(["--", "--nocapture", "--test-threads", "1"]).stderr(Stdio::inherit());
        command.env("T0_SEED", options.seed.to_string()).env("T0_ROUNDS", options.rounds.to_string());
        let output = command.output().context("starting cargo")?;
        let before = compared.len();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            if let Some((form, count)) = parse(line) {
                let code = names.get(form).with_context(|| format!("{form:?} is no instruction form"))?;
                compared.entry(*code).or_default().add(count);
            }
        }
        if output.status.success() && compared.len() == before {
            bail!("the tests of {package} compare nothing");
        }
        if !output.status.success() {
            failed.push(*package);
        }
    }
    let table = Table::new(&compared);
    print!("{table}");
    if options.missing {
        for (extension, row) in table.0.iter().filter(|(_, row)| !row.missing.is_empty()) {
            println!("not compared of {extension}: {}", row.missing.join(" "));
        }
    }
    if !failed.is_empty() {
        bail!("instructions of {} differ from the host's", failed.join(", "));
    }
    Ok(())
}

/// A form and what was compared of it, if the line of a test says so: "Nopd in 64-bit code: 12 comparisons, 0 differ".
fn parse(line: &str) -> Option<(&str, Count)> {
    let (form, rest) = line.split_once(" in ")?;
    let (bits, rest) = rest.split_once("-bit code: ")?;
    let (comparisons, rest) = rest.split_once(" comparisons, ")?;
    let mismatches = rest.strip_suffix(" differ")?.parse().ok()?;
    let mode = ["64", "32", "16"].iter().position(|mode| *mode == bits)?;
    let mut count = Count { mismatches, ..Count::default() };
    count.comparisons[mode] = comparisons.parse().ok()?;
    // Test runners may print dots before it.
    Some((form.trim_start_matches('.').trim(), count))
}

/// The forms of an extension.
#[derive(Debug, Default)]
struct Row {
    /// How many there are that user code can execute.
    forms: usize,
    /// How many were compared.
    compared: usize,
    count: Count,
    /// Those that were not.
    missing: Vec<String>,
}

/// By extension.
struct Table(BTreeMap<String, Row>);

impl Table {
    /// Of extensions of which nothing was compared, since the host lacks them, there is no row.
    fn new(compared: &HashMap<Code, Count>) -> Self {
        let mut rows = BTreeMap::<String, Row>::new();
        for code in Code::values().filter(|code| is_of_user_code(*code)) {
            let row = rows.entry(extension(code)).or_default();
            row.forms += 1;
            match compared.get(&code) {
                Some(count) => {
                    row.compared += 1;
                    row.count.add(*count);
                }
                None => row.missing.push(format!("{code:?}")),
            }
        }
        rows.retain(|_, row| row.compared != 0);
        Self(rows)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |first: &str, rest: [String; 6]| {
            write!(f, "{first:<36}")?;
            rest.iter().try_for_each(|cell| write!(f, " {cell:>10}"))?;
            writeln!(f)
        };
        let titles = ["forms", "compared", "64-bit", "32-bit", "16-bit", "mismatches"];
        line("extension", titles.map(str::to_owned))?;
        let mut sum = Row::default();
        let cells = |row: &Row| {
            let [long, compatible, short] = row.count.comparisons;
            [row.forms, row.compared, long, compatible, short, row.count.mismatches]
                .map(|number| number.to_string())
        };
        for (extension, row) in &self.0 {
            line(extension, cells(row))?;
            sum.forms += row.forms;
            sum.compared += row.compared;
            sum.count.add(row.count);
        }
        line("all", cells(&sum))?;
        let comparisons: usize = sum.count.comparisons.iter().sum();
        writeln!(f, "{comparisons} comparisons in all")
    }
}

fn is_of_user_code(code: Code) -> bool {
    let op_code = code.op_code();
    op_code.is_instruction() && !op_code.must_be_cpl0()
}

fn extension(code: Code) -> String {
    let features: Vec<String> = code.cpuid_features().iter().map(|feature| format!("{feature:?}")).collect();
    let encoding = match code.encoding() {
        EncodingKind::VEX => "VEX ",
        EncodingKind::EVEX => "EVEX ",
        _ => "",
    };
    format!("{encoding}{}", features.join("+"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_count() {
        let count = Count { comparisons: [0, 340, 0], mismatches: 2 };
        let line = "Addps_xmm_xmmm128 in 32-bit code: 340 comparisons, 2 differ";
        assert_eq!(parse(line), Some(("Addps_xmm_xmmm128", count)));
        assert_eq!(parse(&format!("..{line}")), Some(("Addps_xmm_xmmm128", count)));
        for other in ["in all 3 instructions", "test a: ok", "Nopd in 31-bit code: 1 comparisons, 0 differ"] {
            assert_eq!(parse(other), None);
        }
    }

    #[test]
    fn forms_are_counted_by_extension() {
        let count = Count { comparisons: [7, 2, 1], mismatches: 1 };
        let compared = [(Code::Adcx_r32_rm32, count), (Code::Adcx_r64_rm64, count)].into();
        let table = Table::new(&compared);
        let row = &table.0["ADX"];
        assert_eq!((table.0.len(), row.forms, row.compared), (1, 4, 2));
        assert_eq!(row.count, Count { comparisons: [14, 4, 2], mismatches: 2 });
        assert_eq!(row.missing, ["Adox_r32_rm32", "Adox_r64_rm64"]);
        let text = table.to_string();
        assert!(text.ends_with("\n20 comparisons in all\n"), "{text}");
        assert!(!is_of_user_code(Code::Hlt));
    }
}
