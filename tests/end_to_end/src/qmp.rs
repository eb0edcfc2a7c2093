//! Clients of a VM's control socket: a plain one, and the public Python package `qemu.qmp`.

use crate::PATIENCE;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// A client of a control socket.
pub trait Qmp {
    /// Carries a command out: its answer, or its error's class and description.
    fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, (String, String)>;

    /// The next event of that name, which may have come already.
    fn event(&mut self, name: &str) -> Value;

    /// Carries a command out that must not fail.
    fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.try_execute(command, arguments.clone())
            .unwrap_or_else(|error| panic!("{command} {arguments}: {error:?}"))
    }

    /// Carries a command without arguments out that must not fail.
    fn ask(&mut self, command: &str) -> Value {
        self.execute(command, json!({}))
    }
}

fn error_of(answer: &Value) -> (String, String) {
    let text = |name: &str| answer["error"][name].as_str().unwrap_or_default().to_owned();
    (text("class"), text("desc"))
}

/// A connection on which nothing but JSON is known.
pub struct RawClient {
    input: BufReader<UnixStream>,
    output: UnixStream,
    events: Vec<Value>,
}

impl RawClient {
    /// Connects, when there is a socket, and negotiates.
    pub fn connect(socket: &Path) -> Self {
        crate::wait_for(socket);
        let output = UnixStream::connect(socket).expect("the control socket takes clients");
        output.set_read_timeout(Some(PATIENCE)).expect("sockets have time limits");
        let input = BufReader::new(output.try_clone().expect("the host has descriptors"));
        let mut client = Self { input, output, events: Vec::new() };
        assert!(client.read()["QMP"]["capabilities"].is_array());
        client.ask("qmp_capabilities");
        client
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.input.read_line(&mut line).expect("the VM answers");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?} is no JSON: {error}"))
    }
}

impl Qmp for RawClient {
    fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, (String, String)> {
        let request = json!({ "execute": command, "arguments": arguments, "id": command });
        writeln!(self.output, "{request}").expect("the VM takes commands");
        loop {
            let mut answer = self.read();
            if answer.get("event").is_some() {
                self.events.push(answer);
                continue;
            }
            assert_eq!(answer["id"], command);
            return if answer.get("error").is_some() {
                Err(error_of(&answer))
            } else {
                Ok(answer["return"].take())
            };
        }
    }

    fn event(&mut self, name: &str) -> Value {
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return self.events.remove(at);
            }
            let message = self.read();
            self.events.push(message);
        }
    }
}

/// The public Python client.
pub struct PythonClient {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl PythonClient {
    /// Connects, or says loudly that there is no such client here.
    pub fn connect(socket: &Path) -> Option<Self> {
        let Some(python) = python() else {
            eprintln!(
                "SKIPPED: the public Python client is missing, so that nothing is tested with it: \
                 python3 -m venv target/python && target/python/bin/pip install qemu.qmp"
            );
            return None;
        };
        crate::wait_for(socket);
        let mut command = Command::new(python);
        command.args(["-c", include_str!("qmp_driver.py")]).arg(socket);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("Python starts");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("its output is piped"));
        Some(Self { child, input, output })
    }

    fn exchange(&mut self, request: &Value) -> Value {
        let input = self.input.as_mut().expect("its input is open");
        writeln!(input, "{request}").expect("the client takes commands");
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the client answers");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?} is no JSON: {error}"))
    }
}

impl Qmp for PythonClient {
    fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, (String, String)> {
        let mut answer = self.exchange(&json!([command, arguments]));
        if answer.get("error").is_some() { Err(error_of(&answer)) } else { Ok(answer["return"].take()) }
    }

    fn event(&mut self, name: &str) -> Value {
        self.exchange(&json!(["wait", name]))
    }
}

impl Drop for PythonClient {
    fn drop(&mut self) {
        // At the end of its input it disconnects.
        self.input = None;
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.output.read_to_end(&mut Vec::new());
    }
}

/// The Python that has the client: `$VIREO_PYTHON`, that of the test command's environment, or the system's.
fn python() -> Option<PathBuf> {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| own.join("../../target"), PathBuf::from);
    let named = std::env::var_os("VIREO_PYTHON").map(PathBuf::from);
    let places = named.into_iter().chain([target.join("python/bin/python"), "python3".into()]);
    let has_client = |python: &PathBuf| {
        let output = Command::new(python).args(["-c", "import qemu.qmp"]).output();
        output.is_ok_and(|output| output.status.success())
    };
    places.into_iter().find(has_client)
}
