//! kvm-unit-tests: programs that each test one system-level feature, and say how it went on a serial port and
//! by their exit code.

use super::process::{self, End};
use super::report::{Row, Verdict};
use super::sources::{self, Repository};
use super::{Bench, Engine};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const REPOSITORY: Repository =
    Repository { name: "kvm-unit-tests", url: "https://gitlab.com/kvm-unit-tests/kvm-unit-tests.git" };
/// Seconds that a test may take which says nothing of it.
const DEFAULT_TIMEOUT: u64 = 90;
/// MiB of memory for tests that ask for none.
const DEFAULT_MEMORY: &str = "128M";
/// What the debug-exit device makes of a test that passed, 2 * 0 + 1, and of one that was skipped.
const PASSED: i32 = 1;
const SKIPPED: i32 = 77;

/// A test, as the suite's list of them has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Case {
    name: String,
    file: String,
    smp: Option<String>,
    arguments: String,
    /// QEMU's options.
    options: Vec<String>,
    /// The only architecture it is for.
    arch: Option<String>,
    seconds: Option<u64>,
    /// It is for KVM, or not run unless somebody asks for it by name.
    unasked: bool,
    /// `PATH=VALUE`: files of the host's kernel and what must be in them.
    checks: Vec<String>,
}

/// The suite is built for 64-bit mode, and anew for 32-bit mode: the architecture's name, the folder, and what the
/// names of tests begin with.
const BUILDS: [(&str, &str, &str); 2] = [("x86_64", "source", ""), ("i386", "source-i386", "i386/")];

/// Builds the suite and runs each of its tests, both builds of it.
pub(crate) fn run(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (arch, folder, prefix) in BUILDS {
        let source = sources::clone_to(bench, &REPOSITORY, folder)?;
        let list = source.join("x86/unittests.cfg");
        let text = fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
        let mut cases = parse(&text);
        cases.retain(|case| case.arch.as_deref().is_none_or(|only| only == arch));
        cases.iter_mut().for_each(|case| case.name.insert_str(0, prefix));
        cases.retain(|case| bench.wants(&case.name));
        if cases.is_empty() {
            continue;
        }
        if !source.join("config.mak").is_file() {
            sources::build(&source, "./configure", &[&format!("--arch={arch}")])?;
        }
        sources::build(&source, "make", &["-j2"])?;
        rows.extend(run_cases(bench, &source, &cases)?);
    }
    Ok(rows)
}

fn run_cases(bench: &Bench<'_>, source: &Path, cases: &[Case]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for case in cases {
        let file = source.join("x86").join(&case.file);
        if !file.is_file() {
            continue;
        }
        eprintln!("kvm-unit-tests: {}", case.name);
        let verdicts = bench.engines.iter().map(|engine| {
            let output = output(bench, case, engine)?;
            execute(case, &file, engine, &output)
        });
        rows.push(Row { test: case.name.clone(), verdicts: verdicts.collect::<Result<_>>()? });
    }
    Ok(rows)
}

/// The file that has what a test prints.
fn output(bench: &Bench<'_>, case: &Case, engine: &Engine) -> Result<PathBuf> {
    let folder = bench.folder(REPOSITORY.name).join(engine.name());
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    Ok(folder.join(format!("{}.txt", case.name.replace('/', "-"))))
}

fn execute(case: &Case, file: &Path, engine: &Engine, output: &Path) -> Result<Verdict> {
    if case.unasked || !case.checks.iter().all(|check| holds(check)) {
        return Ok(Verdict::Skip);
    }
    let mut command = match engine {
        Engine::Tcg => tcg(case, file),
        Engine::Vireo { program, tier } => vireo(case, file, program, tier),
    };
    let limit = Duration::from_secs(case.seconds.unwrap_or(DEFAULT_TIMEOUT)) * engine.patience();
    let end = process::run(&mut command, output, limit, || false)?;
    let bytes = fs::read(output).with_context(|| format!("reading {}", output.display()))?;
    Ok(verdict(end, &String::from_utf8_lossy(&bytes)))
}

/// Whether a file has the value that a test asks for.
fn holds(check: &str) -> bool {
    let Some((path, value)) = check.split_once('=') else { return false };
    fs::read_to_string(path).is_ok_and(|content| content.trim() == value)
}

/// What a test's end and its text say.
fn verdict(end: End, text: &str) -> Verdict {
    let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim();
    let summary = text.lines().filter_map(|line| line.trim().strip_prefix("SUMMARY: ")).next_back();
    match end {
        End::Timeout => Verdict::Timeout,
        End::Code(SKIPPED) => Verdict::Skip,
        // Both programs end so, without a word of the test's, if they do not start it.
        End::Code(PASSED)
            if text.contains("enabling apic") || text.contains("PASS: ") || summary.is_some() =>
        {
            Verdict::Pass(summary.unwrap_or_default().to_owned())
        }
        End::Code(_) | End::Signal | End::Done => {
            let exception = text.lines().find(|line| line.starts_with("Unhandled exception"));
            Verdict::Fail(summary.or(exception).unwrap_or(last).chars().take(60).collect())
        }
    }
}

fn tcg(case: &Case, file: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["--no-reboot", "-nodefaults", "-display", "none", "-serial", "stdio"]);
    command.args(["-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"]);
    command.args(["-device", "pci-testdev", "-machine", "accel=tcg", "-cpu", "max"]);
    command.arg("-kernel").arg(file).args(["-smp", case.smp.as_deref().unwrap_or("1")]);
    command.args(["-append", &case.arguments]);
    // A later -cpu is the one that counts. A processor like the host's is no choice of TCG's.
    let words = case.options.iter().filter(|word| *word != "-enable-kvm");
    command.args(words.map(|word| if word.starts_with("host") { replace_host(word) } else { word.clone() }));
    command
}

/// The model `host`, which needs KVM, as `max`, without the features that need it too.
fn replace_host(word: &str) -> String {
    match word.strip_prefix("host") {
        Some(rest) if rest.is_empty() || rest.starts_with(',') => {
            let kept = rest.split(',').skip(1).filter(|word| !word.starts_with("hv_"));
            kept.fold("max".to_owned(), |model, word| format!("{model},{word}"))
        }
        _ => word.to_owned(),
    }
}

fn vireo(case: &Case, file: &Path, program: &Path, tier: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--accel", "dbt", "--tier", tier, "--serial", "stdio", "--no-reboot"]);
    command.args(["--device", "pc-testdev", "--device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
    command.args(["--no-rng", "--no-balloon"]).arg("--kernel").arg(file);
    command.args(["--smp", case.smp.as_deref().unwrap_or("1"), "--append", &case.arguments]);
    let value = |name: &str| {
        let at = case.options.iter().rposition(|word| word == name)?;
        case.options.get(at + 1).cloned()
    };
    let memory = value("-m").map_or(DEFAULT_MEMORY.to_owned(), |memory| memory.to_ascii_uppercase());
    command.args(["--memory", &memory, "--cpu", &cpu(&value("-cpu").unwrap_or("max".into()))]);
    command
}

/// A CPU model in our words: what QEMU says of the host's or of KVM's own has no meaning here, a vendor is the
/// model's, and Intel's virtualization is missed by the test itself, as under TCG. The oldest of AMD's models stands for any of AMD's with nothing beyond the x86-64 baseline.
fn cpu(text: &str) -> String {
    const WITHOUT_MEANING: [&str; 7] =
        ["host-phys-bits", "migratable", "vendor", "-skinit", "host-cache-info", "+vmx", "-vmx-mbec"];
    let text = replace_host(text);
    let mut words = text.split(',');
    let model = match words.next().unwrap_or("max") {
        "Opteron_G1" => "qemu64".to_owned(),
        model => model.to_owned(),
    };
    let kept = words.filter(|word| {
        let name = word.split('=').next().unwrap_or_default();
        !WITHOUT_MEANING.contains(&name)
    });
    kept.fold(model, |model, word| format!("{model},{word}"))
}

/// Reads the list of tests: sections of `key = value`.
fn parse(text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            cases.push(Case { name: name.to_owned(), ..Case::default() });
        }
        let (Some(case), Some((key, value))) = (cases.last_mut(), line.split_once('=')) else { continue };
        let value = value.trim();
        match key.trim() {
            "file" => case.file = value.to_owned(),
            "smp" => case.smp = Some(value.to_owned()),
            "test_args" => case.arguments = expand(value),
            "qemu_params" | "extra_params" => {
                case.options = value.split_ascii_whitespace().map(str::to_owned).collect();
            }
            "accel" => case.unasked |= value == "kvm",
            "groups" => case.unasked |= value.split_ascii_whitespace().any(|group| group == "nodefault"),
            "check" => case.checks = value.split_ascii_whitespace().map(str::to_owned).collect(),
            "arch" => case.arch = Some(value.to_owned()),
            "timeout" => case.seconds = value.trim_end_matches('s').parse().ok(),
            _ => {}
        }
    }
    cases
}

/// A value without the quotes that a shell would take away, and with the time where the shell would put it.
fn expand(value: &str) -> String {
    let quoted = |quote: char| value.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
    let text = quoted('"').or_else(|| quoted('\'')).unwrap_or(value);
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    text.replace("`date +%s`", &now.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_tests_is_read() {
        let text = "# words\n\n[one]\nfile = a.flat\nsmp = 2\ntest_args = \"-x y\"\ntimeout = 30s\n\
                    qemu_params = -cpu host,-svm -m 4g\n[two]\nfile = b.flat\narch = i386\naccel = kvm\ncheck = /a=Y\n";
        let cases = parse(text);
        assert_eq!(cases.len(), 2);
        let one = Case {
            name: "one".into(),
            file: "a.flat".into(),
            smp: Some("2".into()),
            arguments: "-x y".into(),
            options: ["-cpu", "host,-svm", "-m", "4g"].map(Into::into).into(),
            arch: None,
            seconds: Some(30),
            ..Case::default()
        };
        assert_eq!(cases[0], one);
        assert_eq!((cases[1].arch.as_deref(), cases[1].unasked), (Some("i386"), true));
        assert_eq!(cases[1].checks, ["/a=Y"]);
        let words: Vec<_> = vireo(&one, Path::new("a.flat"), Path::new("vireo"), "auto")
            .get_args()
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        assert!(words.ends_with(&["--memory", "4G", "--cpu", "max,-svm"].map(Into::into)), "{words:?}");
    }

    #[test]
    fn models_are_put_in_our_words() {
        assert_eq!(cpu("host,migratable=no,+pcid"), "max,+pcid");
        assert_eq!(cpu("max,host-phys-bits"), "max");
        assert_eq!(cpu("hostile"), "hostile");
        assert_eq!(cpu("max,+vmx,-pku"), "max,-pku");
        assert_eq!(cpu("Opteron_G1,vendor=AuthenticAMD"), "qemu64");
        assert_eq!(replace_host("host,hv_passthrough"), "max");
    }

    #[test]
    fn ends_have_meanings() {
        let good = "enabling apic\nPASS: a\nSUMMARY: 1 tests\n";
        assert_eq!(verdict(End::Code(1), good), Verdict::Pass("1 tests".into()));
        assert_eq!(verdict(End::Code(1), "cannot boot"), Verdict::Fail("cannot boot".into()));
        assert_eq!(verdict(End::Code(77), good), Verdict::Skip);
        assert_eq!(verdict(End::Timeout, good), Verdict::Timeout);
        let bad = "FAIL: a\nSUMMARY: 2 tests, 1 unexpected failures\n";
        assert_eq!(verdict(End::Code(3), bad), Verdict::Fail("2 tests, 1 unexpected failures".into()));
    }
}
