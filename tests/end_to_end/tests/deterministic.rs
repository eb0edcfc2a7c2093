//! Machines that do the same whenever they run, recordings of them, and their replays.

use end_to_end::gdb::gdb;
use end_to_end::{Guest, PROMPT, program, run, wait_for};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// The exit code of a replay that is not what was recorded.
const DIVERGED: i32 = 12;

/// A folder with a disk that has something on it.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..8u32 << 20).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
        fs::write(folder.path().join("disk.raw"), content).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The machine of the runs here.
    fn machine(&self) -> Vec<String> {
        self.machine_with("512M", "dbt")
    }

    fn machine_with(&self, memory: &str, accelerator: &str) -> Vec<String> {
        let drive = format!("file={},format=raw,snapshot=on", self.text("disk.raw"));
        ["debian:13", "-m", memory, "--accel", accelerator, "--drive", &drive].map(str::to_owned).into()
    }

    /// Boots to the shell, does something there, and records that; gives what was printed and how many instructions
    /// that took.
    fn record(&self, name: &str) -> (String, String) {
        let errors = fs::File::create(self.path("errors")).unwrap();
        let mut arguments = self.machine();
        arguments.extend(["--icount", "sleep=off", "--record"].map(str::to_owned));
        arguments.push(self.text(name));
        let mut guest = Guest::start_with_errors(arguments, errors);
        guest.expect(PROMPT);
        // What a disk holds, what is random, what time it is, what was written and read again.
        assert_eq!(guest.shell("sha256sum /dev/vda; head -c 16 /dev/hwrng | md5sum"), 0);
        assert_eq!(guest.shell("date; cat /proc/uptime; head -c 8 /dev/urandom | md5sum"), 0);
        assert_eq!(guest.shell("dd if=/dev/urandom of=/dev/vda bs=64k count=20 && sync; md5sum /dev/vda"), 0);
        guest.send("sleep 2; dmesg | tail -n 5\n");
        guest.expect(PROMPT);
        guest.send("poweroff\n");
        let (status, text) = guest.finish();
        assert_eq!(status.code(), Some(0));
        (text, instructions(&fs::read_to_string(self.path("errors")).unwrap()))
    }

    /// Replays a recording.
    fn replay(&self, name: &str, more: &[&str]) -> Output {
        self.replay_on(&self.machine(), name, more)
    }

    fn replay_on(&self, machine: &[String], name: &str, more: &[&str]) -> Output {
        let mut command = Command::new(program());
        command.arg("run").args(machine).arg("--replay").arg(self.path(name)).args(more);
        command.stdin(Stdio::null()).output().expect("the program starts")
    }
}

/// The line that says how many instructions were executed.
fn instructions(errors: &str) -> String {
    let line = errors.lines().find(|line| line.contains(" instructions, "));
    line.unwrap_or_else(|| panic!("no count in:\n{errors}")).to_owned()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_recorded_session_happens_again_and_again() {
    let place = Place::new();
    let (said, count) = place.record("session");
    assert!(said.contains("Linux version") && said.contains("] "), "{said}");
    for round in 0..2 {
        let output = place.replay("session", &[]);
        assert_eq!(output.status.code(), Some(0), "round {round}: {}", errors(&output));
        assert_eq!(text(&output), said, "round {round}");
        assert_eq!(instructions(&errors(&output)), count, "round {round}");
    }

    // One that was cut off goes to where it is whole.
    let bytes = fs::read(place.path("session")).unwrap();
    fs::write(place.path("cut"), &bytes[..bytes.len() * 2 / 3]).unwrap();
    let output = place.replay("cut", &[]);
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    assert!(errors(&output).contains("where the recording was cut off"), "{}", errors(&output));
    assert!(said.starts_with(&text(&output)) && text(&output).contains("Linux version"));

    // Another character was typed: it is taken, and then the output is another.
    let mut other = bytes.clone();
    let typed = other.windows(5).position(|window| window == b"sleep").unwrap_or_else(|| {
        // It came in pieces: any input will do.
        other.windows(5).position(|window| window == b"power").expect("something that was typed")
    });
    change(&mut other, typed);
    fs::write(place.path("other"), &other).unwrap();
    let output = place.replay("other", &[]);
    assert_eq!(output.status.code(), Some(DIVERGED), "{}", errors(&output));
    assert!(errors(&output).contains("the replay diverged at instruction "), "{}", errors(&output));

    // Damage is named with its place.
    let mut damaged = bytes;
    damaged[typed] ^= 1;
    fs::write(place.path("damaged"), &damaged).unwrap();
    let output = place.replay("damaged", &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        errors(&output).contains("it is damaged: a frame with a wrong sum at byte "),
        "{}",
        errors(&output)
    );
}

/// Changes the byte at `at` of a recording, and the sum of the frame that it is in.
fn change(recording: &mut [u8], at: usize) {
    recording[at] ^= 1;
    let mut begin = 12;
    loop {
        let len = u32::from_le_bytes(recording[begin + 1..begin + 5].try_into().unwrap()) as usize;
        let end = begin + 5 + len;
        if (begin..end).contains(&at) {
            let sum = crc32fast::hash(&recording[begin..end]);
            recording[end..end + 4].copy_from_slice(&sum.to_le_bytes());
            return;
        }
        begin = end + 4;
    }
}

#[test]
fn a_run_without_input_is_the_same_by_itself() {
    let boot = |more: &[&str]| {
        let arguments =
            ["run", "debian:13", "-m", "512M", "--accel", "dbt", "--no-reboot", "--serial", "stdio"];
        let panics = ["--append", "panic=-1 rdinit=/nothing init=/nothing"];
        let output = run(&[&arguments[..], &panics, more].concat());
        assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
        (text(&output), instructions(&errors(&output)))
    };
    let first = boot(&["--icount", "sleep=off"]);
    assert!(first.0.contains("Kernel panic"), "{}", first.0);
    assert_eq!(boot(&["--icount", "sleep=off"]), first);
    // How an idle guest waits makes no difference; its time, and what is random, does.
    assert_eq!(boot(&["--icount"]), first);
    assert_ne!(boot(&["--icount", "sleep=off,shift=2"]), first);
    assert_ne!(boot(&["--icount", "sleep=off,seed=1"]), first);
}

#[test]
fn another_machine_is_refused() {
    let place = Place::new();
    let recording = place.text("panic");
    let mut guest = Guest::start(place.machine().iter().map(String::as_str).chain(["--record", &recording]));
    guest.expect("Linux version");
    guest.send("\x01x");
    let (status, said) = guest.finish();
    assert_eq!(status.code(), Some(0));
    let output = place.replay("panic", &[]);
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    assert!(errors(&output).contains("has come to the recording's end"), "{}", errors(&output));
    assert_eq!(text(&output), said);
    let refused_on = |machine: &[String], more: &[&str], named: &str| {
        let output = place.replay_on(machine, "panic", more);
        let errors = errors(&output);
        assert!(matches!(output.status.code(), Some(1 | 10)) && errors.contains(named), "{more:?}: {errors}");
        assert_eq!(errors.lines().filter(|line| line.contains("vireo: ")).count(), 1, "{errors}");
    };
    let refused = |more: &[&str], named: &str| refused_on(&place.machine(), more, named);
    refused_on(&place.machine_with("256M", "dbt"), &[], "memory was \"536870912\" and is \"268435456\"");
    refused(&["--append", "quiet"], "append was ");
    refused(&["--cpu", "x86-64-v2"], "cpu was \"max\" and is \"x86-64-v2\"");
    refused(&["--no-rng"], "entropy source was \"true\" and is \"false\"");
    refused(&["--smp", "2"], "there is more than one vCPU");
    refused(&["--tier", "lockstep"], "--tier lockstep");
    refused_on(
        &place.machine_with("512M", "kvm"),
        &[],
        "--icount, --record and --replay are options of the translator",
    );
}

#[test]
fn bad_recordings_and_options_are_named() {
    let place = Place::new();
    let wrong = |arguments: &[&str], code, named: &str| {
        let arguments = [&["run", "--accel", "dbt", "debian:13"], arguments].concat();
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", errors(&output));
        assert!(errors(&output).contains(named), "{arguments:?}: {}", errors(&output));
    };
    fs::write(place.path("text"), "no recording").unwrap();
    fs::write(place.path("version"), b"VIREOREC\x09\0\0\0").unwrap();
    wrong(&["--replay", "/nowhere"], 1, "the recording /nowhere cannot be used");
    wrong(&["--replay", &place.text("text")], 1, "does not begin as recordings do");
    wrong(&["--replay", &place.text("version")], 1, "version 9; this program knows 1");
    wrong(&["--record", "/nowhere/r"], 1, "it cannot be written");
    let drive = format!("file={}", place.text("disk.raw"));
    wrong(&["--record", &place.text("r"), "--drive", &drive], 1, "needs readonly=on or snapshot=on");
    wrong(&["--record", "a", "--replay", "b"], 2, "cannot be used with");
    wrong(&["--record", "a", "--gdb", "tcp::1234"], 2, "cannot be used with");
    wrong(&["--icount", "shift=auto"], 2, "shift=auto follows the host's time");
    wrong(&["--icount", "shift=11"], 2, "a number from 0 to 10");
    assert!(!place.path("r").exists());
}

#[test]
fn gdb_debugs_a_replay_without_changing_it() {
    let place = Place::new();
    let recording = place.text("boot");
    let mut guest = Guest::start(place.machine().iter().map(String::as_str).chain([
        "--icount",
        "sleep=off",
        "--record",
        &recording,
    ]));
    guest.expect("Freeing unused");
    guest.send("\x01x");
    let (status, recorded) = guest.finish();
    assert_eq!(status.code(), Some(0));
    let socket = place.path("gdb.sock");
    let listen = format!("unix:{}", socket.display());
    let errors = fs::File::create(place.path("errors")).unwrap();
    let arguments = place.machine();
    let more = ["--replay", &recording, "--gdb", &listen, "--paused"];
    let mut replay = Guest::start_with_errors(arguments.iter().map(String::as_str).chain(more), errors);
    wait_for(&socket);
    let said = gdb(&[
        &format!("target remote {}", socket.display()),
        "stepi 500",
        "watch *(unsigned int *)$rsp",
        "continue 3",
        "delete",
        "stepi 100",
        "continue",
    ]);
    assert!(said.contains("exited normally"), "{said}");
    let (status, replayed) = replay.finish();
    assert_eq!(status.code(), Some(0), "{}", fs::read_to_string(place.path("errors")).unwrap());
    assert_eq!(replayed, recorded);
}
