//! Guests booted with the program as users run it: starting it, typing into it, waiting for what it says.

pub mod elf;
pub mod gdb;
pub mod in_lab;
pub mod qmp;

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// How long anything in a guest may take before a test gives up. Generous: machines are slow and shared.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// The program under test: `$VIREO`, or the workspace's release build.
pub fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("VIREO") {
        return path.into();
    }
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| own.join("../../target"), PathBuf::from);
    let path = target.join("release/vireo");
    assert!(path.is_file(), "{} is missing: cargo build --release --package vireo", path.display());
    path
}

/// Runs the program to its end without input.
pub fn run(arguments: &[&str]) -> Output {
    Command::new(program()).args(arguments).stdin(Stdio::null()).output().expect("the program starts")
}

/// A prompt of the shell in an image's initramfs.
pub const PROMPT: &str = "root@vireo:~# ";

/// Boots one of the store's images to its shell, under the translator even where there is KVM.
pub fn boot(arguments: &[&str]) -> Guest {
    let mut guest = Guest::start(["--accel", "dbt"].iter().chain(arguments));
    guest.expect(PROMPT);
    guest
}

/// Waits until something listens at the socket of that name.
pub fn wait_for(socket: &Path) {
    let end = Instant::now() + PATIENCE;
    while !socket.exists() {
        assert!(Instant::now() < end, "nothing listens at {}", socket.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Has a guest's shell switch the machine off, and checks that the program ends well.
pub fn power_off(mut guest: Guest) {
    guest.send("poweroff\n");
    assert_eq!(guest.wait().code(), Some(0));
}

#[derive(Default)]
struct Console {
    text: Mutex<(String, bool)>,
    changed: Condvar,
}

/// A guest whose serial port is the program's standard input and output.
pub struct Guest {
    child: Child,
    input: Option<ChildStdin>,
    console: Arc<Console>,
    seen: usize,
}

impl Guest {
    /// Starts `vireo run` with `arguments`.
    pub fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        Self::start_with_errors(arguments, Stdio::inherit())
    }

    /// The same with standard error going to `errors`.
    pub fn start_with_errors<S: AsRef<OsStr>>(
        arguments: impl IntoIterator<Item = S>,
        errors: impl Into<Stdio>,
    ) -> Self {
        let mut command = Command::new(program());
        command.arg("run").args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let mut child = command.spawn().expect("the program starts");
        let mut output = child.stdout.take().expect("its output is piped");
        let console = Arc::new(Console::default());
        let for_thread = console.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let count = output.read(&mut buffer).unwrap_or(0);
                let mut text = for_thread.text.lock().unwrap();
                text.0.push_str(&String::from_utf8_lossy(&buffer[..count]));
                text.1 = count == 0;
                for_thread.changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        let input = child.stdin.take();
        Self { child, input, console, seen: 0 }
    }

    /// Everything the guest has printed.
    pub fn text(&self) -> String {
        self.console.text.lock().unwrap().0.clone()
    }

    /// Waits until the guest prints `expected`, after what was waited for before.
    pub fn expect(&mut self, expected: &str) {
        let end = Instant::now() + PATIENCE;
        let mut text = self.console.text.lock().unwrap();
        loop {
            if let Some(at) = text.0[self.seen..].find(expected) {
                self.seen += at + expected.len();
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            if text.1 || left.is_zero() {
                let why = if text.1 { "the guest ended" } else { "time is up" };
                let tail: String = text
                    .0
                    .lines()
                    .rev()
                    .take(40)
                    .collect::<Vec<_>>()
                    .into_iter()
                    .rev()
                    .fold(String::new(), |all, line| all + line + "\n");
                drop(text);
                panic!("{why} before {expected:?} came; its last lines:\n{tail}");
            }
            text = self.console.changed.wait_timeout(text, left.min(Duration::from_secs(1))).unwrap().0;
        }
    }

    /// Types `text` at the guest's console.
    pub fn send(&mut self, text: &str) {
        let input = self.input.as_mut().expect("the console's input is open");
        input.write_all(text.as_bytes()).expect("the guest takes input");
        input.flush().expect("the guest takes input");
    }

    /// Types a shell command, waits for its end, and returns its exit status as the guest's shell has it.
    pub fn shell(&mut self, command: &str) -> i32 {
        // The marker is put together by the shell, so that the echoed command does not look like it.
        self.send(&format!("{command}; echo \"status\"=$?.\n"));
        self.expect("status=");
        self.expect(".");
        let text = self.text();
        let number = &text[..self.seen - 1];
        let start = number.rfind('=').map_or(0, |at| at + 1);
        number[start..].trim().parse().expect("the shell prints a number")
    }

    /// Waits for the program's end.
    pub fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("the program can be waited for") {
                return status;
            }
            assert!(Instant::now() < end, "the program does not end; the guest said:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the program's end, and gives all that the guest has printed with how it ended.
    pub fn finish(&mut self) -> (ExitStatus, String) {
        let status = self.wait();
        let mut text = self.console.text.lock().unwrap();
        while !text.1 {
            text = self.console.changed.wait(text).unwrap();
        }
        (status, text.0.clone())
    }

    /// The program's process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
