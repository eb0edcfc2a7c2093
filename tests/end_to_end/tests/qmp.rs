//! A guest under the control of programs: with a plain socket, and with the public Python client.

use end_to_end::qmp::{PythonClient, Qmp, RawClient};
use end_to_end::{Guest, PROMPT};
use serde_json::json;
use std::process::Command;

#[test]
fn a_guest_is_started_stopped_reset_and_ended() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let place = format!("unix:{},server=on,wait=off", socket.display());
    let mut guest =
        Guest::start(["debian:13", "--accel", "dbt", "--paused", "--name", "a guest", "--qmp", &place]);
    let mut raw = RawClient::connect(&socket);
    let python = PythonClient::connect(&socket);
    let mut client: Box<dyn Qmp> = match python {
        Some(python) => Box::new(python),
        None => Box::new(RawClient::connect(&socket)),
    };
    assert_eq!(client.ask("query-status"), json!({ "running": false, "status": "prelaunch" }));
    assert_eq!(client.ask("query-name"), json!({ "name": "a guest" }));
    assert_eq!(client.ask("query-cpus-fast")[0]["thread-id"], 0);
    assert!(!guest.text().contains("Linux"), "it has not begun");
    client.ask("cont");
    guest.expect(PROMPT);

    // Time stands still while the guest does.
    guest.send("while true; do cat /proc/uptime; sleep 0.2; done\n");
    client.ask("stop");
    assert_eq!(client.ask("query-status"), json!({ "running": false, "status": "paused" }));
    let seen = guest.text().len();
    std::thread::sleep(std::time::Duration::from_millis(600));
    let more = guest.text().len() - seen;
    assert!(more < 100, "{more} bytes were printed by a guest that stands still");
    client.ask("cont");
    assert_ne!(client.ask("query-cpus-fast")[0]["thread-id"], 0);
    client.ask("inject-nmi");
    guest.expect("NMI received");

    client.ask("system_reset");
    guest.expect("Linux version");
    let reset = raw.event("RESET");
    assert_eq!(reset["data"], json!({ "guest": false, "reason": "host-qmp-system-reset" }));
    client.ask("system_powerdown");
    client.event("POWERDOWN");
    let (class, description) = client.try_execute("system_wakeup", json!({})).unwrap_err();
    assert_eq!(
        (class.as_str(), description.as_str()),
        ("GenericError", "Unable to wake up: guest is not in suspended state")
    );
    // The command-line client.
    let program = end_to_end::program();
    let output = Command::new(&program).arg("qmp").arg(&socket).arg("query-status").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "{\"running\":true,\"status\":\"running\"}\n");
    let output = Command::new(&program).arg("qmp").arg(&socket).arg("nope").output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "vireo: CommandNotFound: The command nope has not been found\n"
    );
    client.ask("quit");
    let end = raw.event("SHUTDOWN");
    assert_eq!(end["data"], json!({ "guest": false, "reason": "host-qmp-quit" }));
    assert_eq!(guest.wait().code(), Some(0));
    assert!(!socket.exists());
}
