//! Wrong words and files: one line that names them, and an exit code that says whose mistake it was.

use end_to_end::run;
use std::io::Write;

/// Runs the program with `arguments` and checks its exit code and that standard error names `words`.
fn refused(arguments: &[&str], code: i32, words: &[&str]) {
    let output = run(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
    for word in words {
        assert!(errors.contains(word), "{arguments:?} does not say {word:?}: {errors}");
    }
    assert!(!errors.contains("panicked at"), "{arguments:?}: {errors}");
}

/// A file with `content` that lives as long as what is returned.
fn file(content: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    file
}

#[test]
fn wrong_words_are_named() {
    for (words, named) in [
        (&["-m", "lots"][..], "lots"),
        (&["-m", "1Q"], "1Q"),
        (&["--smp", "many"], "many"),
        (&["--accel", "tcg"], "dbt"),
        (&["--cpu", ""], "CPU model"),
        (&["--cpu", "max,nonsense"], "nonsense"),
        (&["--drive", "format=raw"], "file=PATH"),
        (&["--drive", "file=x,format=vmdk"], "format=raw"),
        (&["--serial", "tcp:1"], "tcp:1"),
        (&["--tier", "t9"], "lockstep"),
        (&["--debug-exit", "0x12345"], "0xffff"),
        (&["--frobnicate"], "--frobnicate"),
    ] {
        let arguments: Vec<_> = ["run", "--kernel", "/dev/null"].iter().chain(words).copied().collect();
        refused(&arguments, 2, &[named]);
    }
    refused(&["run"], 2, &["IMAGE"]);
}

#[test]
fn absurd_sizes_are_refused() {
    let kernel = ["run", "--kernel", "/dev/null", "--serial", "null"];
    let with = |words: &[&'static str]| [&kernel[..], words].concat();
    refused(&with(&["-m", "0"]), 1, &["memory", "accepted"]);
    refused(&with(&["-m", "1000T"]), 1, &["memory", "accepted"]);
    refused(&with(&["--smp", "0"]), 1, &["0 vCPUs", "accepted"]);
    refused(&with(&["--smp", "100000"]), 1, &["100000 vCPUs", "accepted"]);
}

#[test]
fn wrong_files_are_named() {
    let kernel = |path: &str| ["run", "--serial", "null", "--kernel", path].map(str::to_owned);
    let check = |path: &str, words: &[&str]| {
        let arguments = kernel(path);
        refused(&arguments.each_ref().map(String::as_str), 1, words);
    };
    check("/nonexistent/kernel", &["/nonexistent/kernel", "kernel"]);
    check("/tmp", &["/tmp"]);
    let empty = file(b"");
    check(empty.path().to_str().unwrap(), &["cannot boot", empty.path().to_str().unwrap()]);
    let text = file(&b"no kernel at all ".repeat(1000));
    check(text.path().to_str().unwrap(), &["cannot boot"]);
    let elf = file(b"\x7fELF\x02\x01\x01");
    check(elf.path().to_str().unwrap(), &["cannot boot"]);
}

#[test]
fn wrong_cpus_disks_and_images_are_named() {
    let mut bz = vec![0u8; 4096];
    bz[0x202..0x206].copy_from_slice(b"HdrS");
    let kernel = file(&bz);
    let path = kernel.path().to_str().unwrap();
    refused(&["run", "--serial", "null", "--kernel", path, "--cpu", "z80"], 1, &["z80", "max"]);
    let missing = ["run", "--serial", "null", "--kernel", path, "--drive", "file=/nonexistent/disk"];
    refused(&missing, 1, &["/nonexistent/disk"]);
    refused(&["run", "windows"], 1, &["windows", "debian"]);
}
