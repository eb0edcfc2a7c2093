//! The assembly tests of FEX: each a source file for nasm that begins with what memory it needs and what is to be in
//! registers when it halts, in JSON. They are user code, and run on a bare vCPU of ours.

use super::report::{Row, Verdict};
use super::snippet::{self, Registers, Snippet, Stopped, Width};
use super::sources::{self, Repository};
use super::{Bench, Engine, tcg};
use accel::Tier;
use anyhow::{Context, Result};
use clock::TimerService;
use serde_json::{Map, Value};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use x86_cpuid::{CpuModel, feature};

const REPOSITORY: Repository = Repository { name: "FEX", url: "https://github.com/FEX-Emu/FEX.git" };
/// Where code begins, and the memory that every test has.
const CODE: u64 = 0x1_0000;
const MEMORY: [Range<u64>; 2] = [0xe000_0000..0xf000_0000, 0x2_0000_0000..0x3_0000_1000];
/// Where tests are, and what comes before their names in lists of them.
const FOLDERS: [(&str, &str); 2] = [("ASM", ""), ("32Bit_ASM", "32Bit_")];
/// What SMSW does with a 32-bit register in this test is what Linux makes of it where it answers in the processor's place
/// (it has no user code read CR0): it keeps the upper half.
const OF_LINUX: &str = "Secondary/07_XX_04.asm";
/// The longest text of a difference in the table.
const DETAIL: usize = 60;

/// What a test wants to be there and to come out.
#[derive(Debug, Default, PartialEq)]
struct Expectation {
    memory: Vec<Range<u64>>,
    data: Vec<(u64, Vec<u8>)>,
    /// Registers by name, each with one or more 64-bit words.
    registers: Vec<(String, Vec<u64>)>,
    /// Units that the processor must have.
    features: Vec<String>,
    /// It is for a mode of FEX that no processor has.
    own_mode: bool,
    width: Width,
}

/// Assembles the tests and runs each.
pub(crate) fn run(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let source = sources::clone(bench, &REPOSITORY)?;
    let columns = bench.engines.len();
    let timers = snippet::timers()?;
    let model = snippet::model()?;
    let mut rows = Vec::new();
    for (folder, prefix) in FOLDERS {
        let folder = source.join("unittests").join(folder);
        let skipped = skipped(&folder, prefix);
        for file in files(&folder)? {
            let name = file.strip_prefix(&folder).unwrap_or(&file).to_string_lossy().into_owned();
            if skipped.contains(&name) || prefix.is_empty() && name == OF_LINUX {
                continue;
            }
            let test = if prefix.is_empty() { name } else { format!("32/{name}") };
            if !bench.wants(&test) {
                continue;
            }
            let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
            let verdicts = match expectation(&text) {
                Ok(wanted) if wanted.own_mode || !wanted.features.iter().all(|name| has(&model, name)) => {
                    vec![Verdict::Skip; columns]
                }
                Ok(wanted) => match assemble(bench, &source, &text, wanted.width) {
                    Ok(code) => {
                        let engines = bench.engines.iter();
                        engines.map(|engine| execute(bench, &wanted, &code, engine, &timers)).collect()
                    }
                    Err(error) => vec![Verdict::Fail(shorten(&error.to_string())); columns],
                },
                Err(error) => vec![Verdict::Fail(shorten(&error.to_string())); columns],
            };
            rows.push(Row { test, verdicts });
        }
    }
    Ok(rows)
}

fn tier(engine: &Engine) -> Option<Tier> {
    let Engine::Vireo { tier, .. } = engine else { return None };
    Tier::NAMES.iter().find(|(name, _)| name == tier).map(|(_, tier)| *tier)
}

fn shorten(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(DETAIL).collect()
}

/// The tests that FEX's own lists leave out on a real processor. Their names there begin with `prefix`.
fn skipped(folder: &Path, prefix: &str) -> Vec<String> {
    let lists = ["Known_Failures", "Known_Failures_host", "Disabled_Tests", "Disabled_Tests_host"];
    let texts = lists.iter().filter_map(|list| fs::read_to_string(folder.join(list)).ok());
    // Their last lines may have no end.
    texts.flat_map(|text| listed(&text, prefix)).collect()
}

fn listed(text: &str, prefix: &str) -> Vec<String> {
    let names = text.lines().filter_map(|line| line.trim().strip_prefix("Test_")?.strip_prefix(prefix));
    names.map(str::to_owned).collect()
}

/// All test files, by name.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut folders = vec![folder.to_owned()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "asm") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Reads what stands between `%ifdef CONFIG` and `%endif`.
fn expectation(text: &str) -> Result<Expectation> {
    let json = text.split("%ifdef CONFIG").nth(1).and_then(|rest| rest.split("%endif").next());
    let Some(json) = json else { return Ok(Expectation::default()) };
    let object: Map<String, Value> = serde_json::from_str(json).context("its JSON")?;
    let mut wanted = Expectation::default();
    for (key, value) in &object {
        match key.to_ascii_uppercase().as_str() {
            "REGDATA" => {
                for (name, value) in value.as_object().into_iter().flatten() {
                    wanted.registers.push((name.to_ascii_uppercase(), words(value)?));
                }
            }
            "MEMORYREGIONS" => {
                for (address, size) in value.as_object().into_iter().flatten() {
                    let (start, len) = (number(address)?, text_number(size)?);
                    wanted.memory.push(start..start.checked_add(len).context("a region's end")?);
                }
            }
            "MEMORYDATA" => {
                for (address, bytes) in value.as_object().into_iter().flatten() {
                    let bytes = hex_bytes(bytes.as_str().context("memory's content is no text")?)?;
                    wanted.data.push((number(address)?, bytes));
                }
            }
            "HOSTFEATURES" => {
                let names = value.as_array().into_iter().flatten().filter_map(Value::as_str);
                wanted.features = names.map(str::to_ascii_uppercase).collect();
            }
            "ENV" => {
                let mut names = value.as_object().into_iter().flatten().map(|(name, _)| name);
                wanted.own_mode = names.any(|name| name.to_ascii_uppercase().contains("REDUCEDPRECISION"));
            }
            "MODE" if value.as_str().is_some_and(|mode| mode.eq_ignore_ascii_case("32bit")) => {
                wanted.width = Width::Bits32;
            }
            _ => {}
        }
    }
    Ok(wanted)
}

fn number(text: &str) -> Result<u64> {
    let text = text.trim().replace('_', "");
    let text = text.as_str();
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let lower = digits.to_ascii_lowercase();
    let value = match lower.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    let value = value.with_context(|| format!("{text:?} is no number"))?;
    Ok(if negative { value.wrapping_neg() } else { value })
}

fn text_number(value: &Value) -> Result<u64> {
    number(value.as_str().context("a number that is no text")?)
}

fn words(value: &Value) -> Result<Vec<u64>> {
    match value {
        Value::Array(values) => values.iter().map(text_number).collect(),
        _ => Ok(vec![text_number(value)?]),
    }
}

/// Numbers in hexadecimal, each little-endian in as many bytes as it has digits for.
fn hex_bytes(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for number in text.split_ascii_whitespace() {
        let digits = number.strip_prefix("0x").unwrap_or(number);
        anyhow::ensure!(digits.is_ascii(), "{number:?} is no number");
        for pair in digits.as_bytes().rchunks(2) {
            let pair = std::str::from_utf8(pair).context("digits")?;
            bytes.push(u8::from_str_radix(pair, 16).with_context(|| format!("{number:?} is no number"))?);
        }
    }
    Ok(bytes)
}

/// Whether a feature, as the tests name it, is there.
fn has(model: &CpuModel, name: &str) -> bool {
    let feature = match name {
        "SSE4A" => feature::SSE4A,
        "AVX" => feature::AVX2,
        "RAND" => feature::RDRAND,
        "SHA" => feature::SHA,
        "BMI1" => feature::BMI1,
        "BMI2" => feature::BMI2,
        "CLWB" => feature::CLWB,
        "AES256" => feature::VAES,
        "SSSE3" => feature::SSSE3,
        "SSE4.1" => feature::SSE41,
        "SSE4.2" => feature::SSE42,
        "AES" => feature::AES,
        "PCLMUL" => feature::PCLMUL,
        "MOVBE" => feature::MOVBE,
        "ADX" => feature::ADX,
        "XSAVE" => feature::XSAVE,
        "RDPID" => feature::RDPID,
        "CLFLOPT" => feature::CLFLUSHOPT,
        "FSGSBASE" => feature::FSGSBASE,
        // Of ARM hosts; every x86 processor does what it is for.
        "AFP" => return true,
        // Instructions of other processors, and Linux's system calls.
        _ => return false,
    };
    model.has(feature)
}

fn assemble(bench: &Bench<'_>, source: &Path, text: &str, width: Width) -> Result<Vec<u8>> {
    let folder = bench.folder(REPOSITORY.name);
    let (input, output) = (folder.join("test.asm"), folder.join("test.bin"));
    // As FEX's own build has it.
    let begin = match width {
        Width::Bits64 => "BITS 64",
        Width::Bits32 => "BITS 32\norg 10000h\nmov eax, 0x17\nmov ds, ax\nmov es, ax",
    };
    fs::write(&input, format!("{begin}\n{text}\nret\n")).context("writing a test")?;
    let includes = format!("{}/unittests/ASM/Includes/", source.display());
    let done = Command::new("nasm")
        .args(["-w-all", "-i", &includes, "-f", "bin"])
        .arg(&input)
        .arg("-o")
        .arg(&output)
        .output()
        .context("assembling needs nasm, which does not start")?;
    anyhow::ensure!(done.status.success(), "nasm: {}", String::from_utf8_lossy(&done.stderr));
    fs::read(&output).context("reading what nasm made")
}

fn execute(
    bench: &Bench<'_>,
    wanted: &Expectation,
    code: &[u8],
    engine: &Engine,
    timers: &Arc<TimerService>,
) -> Verdict {
    let memory: Vec<_> = MEMORY.iter().chain(&wanted.memory).cloned().collect();
    let snippet = Snippet { width: wanted.width, code, address: CODE, memory: &memory, data: &wanted.data };
    let stopped = match tier(engine) {
        Some(tier) => snippet::run(&snippet, tier, timers),
        None => tcg::run(&snippet, &bench.folder(REPOSITORY.name)),
    };
    verdict(wanted, stopped)
}

fn verdict(wanted: &Expectation, stopped: Result<Stopped>) -> Verdict {
    match stopped {
        Ok(Stopped::Halted(left)) => match difference(wanted, &left) {
            None => Verdict::Pass(String::new()),
            Some(difference) => Verdict::Fail(difference),
        },
        Ok(Stopped::Exception(vector, rip)) => Verdict::Fail(format!("exception {vector} at {rip:#x}")),
        Ok(Stopped::SystemCall) => Verdict::Skip,
        Ok(Stopped::Timeout) => Verdict::Timeout,
        Err(error) => Verdict::Fail(shorten(&format!("{error:#}"))),
    }
}

/// The first register that is not as it should be.
fn difference(wanted: &Expectation, left: &Registers) -> Option<String> {
    wanted.registers.iter().find_map(|(name, words)| {
        let found = register(left, name);
        let wrong = |(index, word): (usize, &u64)| (found.get(index) != Some(word)).then_some(index);
        let index = words.iter().enumerate().find_map(wrong)?;
        let found = found.get(index).map_or("nothing".to_owned(), |found| format!("{found:#x}"));
        Some(shorten(&format!("{name}[{index}] {found}, not {:#x}", words[index])))
    })
}

/// The words of a register; MM0 to MM7 are the x87 registers by their number, not by their place on the stack.
fn register(left: &Registers, name: &str) -> Vec<u64> {
    const GENERAL: [&str; 16] = [
        "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
        "R14", "R15",
    ];
    let numbered = |prefix: &str| name.strip_prefix(prefix).and_then(|number| number.parse::<usize>().ok());
    if let Some(index) = GENERAL.iter().position(|general| *general == name) {
        return vec![left.general[index]];
    }
    if let Some(vector) = numbered("XMM").and_then(|index| left.fpu.vectors.get(index)) {
        return vector.to_vec();
    }
    if let Some(index) = numbered("MM").filter(|index| *index < 8) {
        let top = usize::from(left.fpu.status >> 11 & 7);
        let bytes = left.fpu.st[(index + 8 - top) % 8];
        let low = bytes.first_chunk().map_or(0, |bytes: &[u8; 8]| u64::from_le_bytes(*bytes));
        return vec![low, u16::from_le_bytes([bytes[8], bytes[9]]).into()];
    }
    match name {
        "RIP" => vec![left.rip],
        "FS" => vec![left.fs_base],
        "GS" => vec![left.gs_base],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expectations_are_read() {
        let text = "%ifdef CONFIG\n{ \"RegData\": { \"RAX\": \"0x10\", \"xmm1\": [\"0x1\", \"-1\"] },\n\
                    \"MemoryRegions\": { \"0x100000000\": \"4096\" }, \"MemoryData\": { \"0x5000\": \"0x1234 AB\" },\n\
                    \"HostFeatures\": [\"avx\"] }\n%endif\nhlt\n";
        let wanted = expectation(text).unwrap();
        assert_eq!(wanted.registers, [("RAX".into(), vec![16]), ("XMM1".into(), vec![1, u64::MAX])]);
        assert_eq!((wanted.memory.len(), wanted.memory[0].clone()), (1, 0x1_0000_0000..0x1_0000_1000));
        assert_eq!(wanted.data, [(0x5000, vec![0x34, 0x12, 0xab])]);
        assert_eq!(wanted.features, ["AVX"]);
        assert!(expectation("%ifdef CONFIG\n{ \"RegData\" }\n%endif").is_err());
        assert_eq!(expectation("hlt").unwrap(), Expectation::default());
        let wanted = expectation(
            "%ifdef CONFIG\n{ \"Mode\": \"32BIT\", \"RegData\": { \"RAX\": \"0x1_0000\" } }\n%endif",
        )
        .unwrap();
        assert_eq!((wanted.width, &wanted.registers[0].1[..]), (Width::Bits32, &[0x1_0000][..]));
    }

    #[test]
    fn lists_name_tests_of_one_folder() {
        let text = "# why\nTest_X87/A.asm\n\nTest_32Bit_X87/B.asm";
        assert_eq!(listed(text, "32Bit_"), ["X87/B.asm"]);
        assert!(listed(text, "").contains(&"X87/A.asm".to_owned()));
    }

    #[test]
    fn what_a_program_leaves_is_compared() {
        let timers = snippet::timers().unwrap();
        let execute = |wanted: &Expectation, code: &[u8]| {
            let snippet = Snippet { width: wanted.width, code, address: CODE, memory: &[], data: &[] };
            verdict(wanted, snippet::run(&snippet, Tier::Interpreter, &timers))
        };
        let wanted =
            |value| Expectation { registers: vec![("RAX".into(), vec![value])], ..Expectation::default() };
        let code = [0xb8, 7, 0, 0, 0, 0xf4]; // mov eax, 7; hlt
        assert_eq!(execute(&wanted(7), &code), Verdict::Pass(String::new()));
        let verdict = execute(&wanted(8), &code);
        assert_eq!(verdict, Verdict::Fail("RAX[0] 0x7, not 0x8".into()));
    }
}
