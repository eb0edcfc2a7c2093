//! test386: a program in the BIOS's place that tests the instructions of an 80386 in real and protected mode, and
//! writes which test it is at to a diagnostic port.

use super::process::{self, End};
use super::report::{Row, Verdict};
use super::sources::{self, Repository};
use super::{Bench, Engine};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const REPOSITORY: Repository =
    Repository { name: "test386.asm", url: "https://github.com/barotto/test386.asm.git" };
/// The port that the program writes its progress to, and what it writes at its end.
const PORT: &str = "0x190";
const AT_END: u8 = 0xff;
const LIMIT: Duration = Duration::from_secs(60);

/// Assembles the program for ROMs of both sizes, and runs them.
pub(crate) fn run(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let source = sources::clone(bench, &REPOSITORY)?;
    let mut rows = Vec::new();
    for (test, large) in [("test386", false), ("test386-128K", true)] {
        if !bench.wants(test) {
            continue;
        }
        let rom = assemble(bench, &source, test, large)?;
        eprintln!("test386: {test}");
        let verdicts = bench.engines.iter().map(|engine| execute(bench, test, &rom, engine));
        rows.push(Row { test: test.to_owned(), verdicts: verdicts.collect::<Result<_>>()? });
    }
    Ok(rows)
}

/// Assembles a ROM of 64 or 128 KiB; the larger one has more tests.
fn assemble(bench: &Bench<'_>, source: &Path, test: &str, large: bool) -> Result<std::path::PathBuf> {
    let rom = bench.folder(REPOSITORY.name).join(format!("{test}.bin"));
    let configuration = source.join("src/configuration.asm");
    let text =
        fs::read_to_string(&configuration).with_context(|| format!("reading {}", configuration.display()))?;
    let (plain, extended) = ("ROM128 equ 0", "ROM128 equ 1");
    if !text.contains(plain) && !text.contains(extended) {
        bail!("{} does not say how large the ROM is", configuration.display());
    }
    let wanted = if large { text.replace(plain, extended) } else { text.replace(extended, plain) };
    fs::write(&configuration, wanted).with_context(|| format!("writing {}", configuration.display()))?;
    let output = rom.to_string_lossy().into_owned();
    sources::build(source, "nasm", &["-i./src/", "-f", "bin", "src/test386.asm", "-o", &output])?;
    Ok(rom)
}

fn execute(bench: &Bench<'_>, test: &str, rom: &Path, engine: &Engine) -> Result<Verdict> {
    let folder = bench.folder(REPOSITORY.name).join(engine.name());
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let codes = folder.join(format!("{test}.codes"));
    fs::write(&codes, []).with_context(|| format!("making {}", codes.display()))?;
    let path = codes.to_string_lossy().into_owned();
    let mut command = match engine {
        Engine::Tcg => {
            let mut command = Command::new("qemu-system-x86_64");
            command.args([
                "-nodefaults",
                "-display",
                "none",
                "-machine",
                "pc,accel=tcg",
                "-cpu",
                "max",
                "-m",
                "16M",
            ]);
            command.args(["-chardev", &format!("file,id=codes,path={path}")]);
            command.args(["-device", &format!("isa-debugcon,iobase={PORT},chardev=codes")]);
            command.arg("-bios").arg(rom);
            command
        }
        Engine::Vireo { program, tier } => {
            let mut command = Command::new(program);
            command.args(["run", "--accel", "dbt", "--tier", tier, "-m", "16M", "--serial", "null"]);
            let path = path.replace(',', ",,");
            command.args(["--device", &format!("isa-debugcon,iobase={PORT},chardev=file={path}")]);
            command.arg("--bios").arg(rom);
            command
        }
    };
    let ended = || fs::read(&codes).is_ok_and(|codes| codes.last() == Some(&AT_END));
    let end = process::run(&mut command, &folder.join(format!("{test}.txt")), LIMIT, ended)?;
    let written = fs::read(&codes).with_context(|| format!("reading {}", codes.display()))?;
    Ok(verdict(end, &written))
}

/// What the program's end and the codes that it wrote say. It halts at the test that fails.
fn verdict(end: End, codes: &[u8]) -> Verdict {
    match (end, codes.last()) {
        (End::Done, _) => Verdict::Pass(format!("{} parts", codes.len())),
        (End::Timeout, Some(code)) => Verdict::Fail(format!("in part {code:#04x}")),
        (End::Timeout, None) => Verdict::Fail("it does not begin".into()),
        (end, _) => Verdict::Fail(format!("{end:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_say_how_far_it_came() {
        assert_eq!(verdict(End::Done, &[0, 1, 0xff]), Verdict::Pass("3 parts".into()));
        assert_eq!(verdict(End::Timeout, &[0, 9]), Verdict::Fail("in part 0x09".into()));
        assert!(matches!(verdict(End::Code(2), &[]), Verdict::Fail(_)));
    }
}
