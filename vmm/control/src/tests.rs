//! The server, over sockets, with a VM that only says what it was asked for.

use crate::client::{Client, ClientError};
use crate::fuzzing::Obedient;
use crate::{Address, Bound, Ear, Endpoint, Server, VmFacts};
use machine::{Ending, Quitter};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

struct Bench {
    folder: tempfile::TempDir,
    vm: Arc<Obedient>,
    server: Option<Server>,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ear = Ear::default();
        let vm = Arc::new(Obedient::new(&ear));
        let facts = VmFacts { name: Some("a guest".into()), vcpus: 2, ..VmFacts::default() };
        let endpoint: Endpoint = format!("unix:{}", folder.path().join("qmp").display()).parse().unwrap();
        let bound: Vec<Bound> = vec![endpoint.bind().unwrap()];
        let server = Server::start(bound, vm.clone(), facts, &ear, None).unwrap();
        Self { folder, vm, server: Some(server) }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    fn client(&self) -> Client {
        Client::connect(&Address::Unix(self.path())).unwrap()
    }

    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }
}

fn run(client: &mut Client, command: &str, arguments: Value) -> Result<Value, String> {
    let Value::Object(arguments) = arguments else { panic!("arguments are an object") };
    client.execute(command, arguments).map_err(|error| match error {
        ClientError::Command { class, description } => format!("{class}: {description}"),
        other => panic!("{other}"),
    })
}

fn ask(client: &mut Client, command: &str) -> Value {
    run(client, command, json!({})).unwrap()
}

/// Sends `text`, ends sending, and returns the lines of the answer.
fn exchange(bench: &Bench, text: &[u8]) -> Vec<Value> {
    let mut stream = bench.raw();
    stream.write_all(text).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_conversation_begins_with_a_greeting_and_negotiation() {
    let bench = Bench::new();
    let lines = exchange(
        &bench,
        b"{\"execute\":\"query-status\"}{\"execute\":\"nope\"}\n{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[]}}\
          {\"execute\":\"qmp_capabilities\",\"id\":1}{\"execute\":\"nope\"}{'execute':'query-status','id':{'a':[1]}}",
    );
    assert_eq!(lines[0]["QMP"]["capabilities"], json!([]));
    assert_eq!(lines[0]["QMP"]["version"]["qemu"]["major"], 10);
    let not_found = |description: &str| json!({ "class": "CommandNotFound", "desc": description });
    let expecting = not_found("Expecting capabilities negotiation with 'qmp_capabilities'");
    assert_eq!(lines[1]["error"], expecting);
    assert_eq!(lines[2]["error"], expecting);
    assert_eq!(lines[3], json!({ "return": {} }));
    let complete = not_found("Capabilities negotiation is already complete, command ignored");
    assert_eq!(lines[4], json!({ "error": complete, "id": 1 }));
    assert_eq!(lines[5]["error"], not_found("The command nope has not been found"));
    assert_eq!(
        lines[6],
        json!({ "return": { "running": false, "status": "prelaunch" }, "id": { "a": [1] } })
    );
    assert_eq!(lines.len(), 7);
}

#[test]
fn the_vm_is_run_and_stopped_and_all_clients_hear_of_it() {
    let bench = Bench::new();
    let (mut client, mut other) = (bench.client(), bench.client());
    ask(&mut client, "cont");
    assert_eq!(ask(&mut client, "query-status"), json!({ "running": true, "status": "running" }));
    ask(&mut client, "stop");
    ask(&mut client, "stop");
    ask(&mut client, "system_reset");
    ask(&mut client, "system_powerdown");
    ask(&mut client, "inject-nmi");
    let asleep = run(&mut client, "system_wakeup", json!({})).unwrap_err();
    assert_eq!(asleep, "GenericError: Unable to wake up: guest is not in suspended state");
    for client in [&mut client, &mut other] {
        let names: Vec<_> = (0..4).map(|_| client.event().unwrap()["event"].take()).collect();
        assert_eq!(names, ["RESUME", "STOP", "RESET", "POWERDOWN"]);
    }
    ask(&mut client, "quit");
    assert_eq!(bench.vm.asked(), ["nmi", "quit"]);
}

#[test]
fn the_end_is_told_before_the_socket_goes() {
    let mut bench = Bench::new();
    let mut client = bench.client();
    let mut silent = BufReader::new(bench.raw());
    let mut greeting = String::new();
    silent.read_line(&mut greeting).unwrap();
    bench.server.take().unwrap().finish(Some(&Ending::Quit(Quitter::Control)));
    let event = client.event().unwrap();
    assert_eq!(event["event"], "SHUTDOWN");
    assert_eq!(event["data"], json!({ "guest": false, "reason": "host-qmp-quit" }));
    assert!(matches!(client.event(), Err(ClientError::Ended)));
    let mut rest = String::new();
    silent.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "there are no events before negotiation");
    assert!(!bench.path().exists());
}

#[test]
fn what_is_known_of_the_vm_is_answered() {
    let bench = Bench::new();
    let mut client = bench.client();
    assert_eq!(ask(&mut client, "query-name"), json!({ "name": "a guest" }));
    let cpus = ask(&mut client, "query-cpus-fast");
    assert_eq!((cpus[0]["thread-id"].clone(), cpus[1]["cpu-index"].clone()), (json!(17), json!(1)));
    assert_eq!(ask(&mut client, "query-machines")[0]["is-default"], true);
    let commands = ask(&mut client, "query-commands");
    let names: Vec<&str> =
        commands.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"query-status") && names.is_sorted());
    let error = run(&mut client, "query-status", json!({ "x": 1 })).unwrap_err();
    assert_eq!(error, "GenericError: Parameter 'x' is unexpected");
}

#[test]
fn introspection_tells_of_every_command_and_event() {
    let bench = Bench::new();
    let mut client = bench.client();
    let schema = ask(&mut client, "query-qmp-schema");
    let schema = schema.as_array().unwrap();
    let of = |kind: &str| -> Vec<&Value> { schema.iter().filter(|info| info["meta-type"] == kind).collect() };
    let commands = ask(&mut client, "query-commands");
    assert_eq!(of("command").len(), commands.as_array().unwrap().len());
    let names: Vec<_> = schema.iter().map(|info| &info["name"]).collect();
    for info in of("command") {
        assert!(names.contains(&&info["arg-type"]) && names.contains(&&info["ret-type"]), "{info}");
        let arguments = schema.iter().find(|kind| kind["name"] == info["arg-type"]).unwrap();
        assert_eq!(arguments["meta-type"], "object", "{info}");
    }
    assert!(of("event").iter().any(|info| info["name"] == "SHUTDOWN"));
}

#[test]
fn what_is_no_qmp_is_answered_and_the_conversation_goes_on() {
    let bench = Bench::new();
    let mut text = b"{\"execute\":\"qmp_capabilities\"}\n".to_vec();
    for line in [&b"nope\n"[..], b"}}}}\n", b"\xff\xfe\x00\n", b"[1]", b"{\"execute\" 1}\n", b"\"x\" 1 {}\n"]
    {
        text.extend(line);
    }
    text.extend(vec![b'['; 100_000]);
    text.extend(b"\n{\"execute\":\"query-name\"}");
    let lines = exchange(&bench, &text);
    assert_eq!(lines.last().unwrap()["return"]["name"], "a guest");
    let errors: Vec<_> = lines.iter().filter_map(|line| line["error"]["desc"].as_str()).collect();
    assert_eq!(
        errors,
        [
            "JSON parse error, invalid keyword 'nope'",
            "JSON parse error, expecting value",
            "JSON parse error, invalid UTF-8 sequence in string",
            "QMP input must be a JSON object",
            "JSON parse error, expected `:` at line 1 column 12",
            "QMP input must be a JSON object",
            "QMP input must be a JSON object",
            "QMP input lacks member 'execute'",
            "JSON nesting depth limit exceeded",
        ]
    );
}

#[test]
fn clients_come_and_go() {
    let bench = Bench::new();
    for _ in 0..100 {
        let mut stream = bench.raw();
        stream.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"query-").unwrap();
    }
    let mut clients: Vec<_> = (0..10).map(|_| bench.client()).collect();
    for client in &mut clients {
        assert_eq!(ask(client, "query-name")["name"], "a guest");
    }
}

#[test]
fn a_client_that_does_not_read_is_not_listened_to_and_others_are() {
    let bench = Bench::new();
    let mut stream = bench.raw();
    stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}").unwrap();
    let many = b"{\"execute\":\"query-qmp-schema\"}".repeat(100);
    let mut sent = 0;
    // The answers are some 10 KiB each: it stops reading long before they fill memory.
    while sent < 64 << 20 && stream.write_all(&many).is_ok() {
        sent += many.len();
    }
    assert!(sent < 64 << 20);
    let mut client = bench.client();
    assert_eq!(ask(&mut client, "query-name")["name"], "a guest");
    // When it reads, everything comes.
    let mut lines = BufReader::new(stream).lines();
    assert!((0..1000).all(|_| lines.next().unwrap().is_ok()));
}

#[test]
fn commands_that_came_before_the_connection_broke_are_carried_out() {
    let bench = Bench::new();
    let mut stream = bench.raw();
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"inject-nmi\"}").unwrap();
    drop(stream);
    let mut client = bench.client();
    for _ in 0..200 {
        ask(&mut client, "query-name");
        if !bench.vm.asked().is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the command was lost");
}

#[test]
fn a_client_can_be_who_listens() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("client");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let endpoint: Endpoint = format!("unix:{},server=off", path.display()).parse().unwrap();
    let ear = Ear::default();
    let vm = Obedient::new(&ear);
    let bound = vec![endpoint.bind().unwrap()];
    let server = Server::start(bound, Arc::new(vm), VmFacts::default(), &ear, None).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let mut greeting = String::new();
    BufReader::new(stream).read_line(&mut greeting).unwrap();
    assert!(greeting.starts_with("{\"QMP\""), "{greeting}");
    server.finish(None);
}

#[test]
fn a_server_that_is_none_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"SSH-2.0\n").unwrap());
    let Err(error) = Client::connect(&Address::Unix(path)) else { panic!("it is none") };
    assert!(error.to_string().contains("no control socket"), "{error}");
    thread.join().unwrap();
}
