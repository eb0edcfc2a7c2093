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

/// Runs qemu-img, which must succeed.
fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// What a guest that goes on writing does to its disk, in a loop in the background.
const LOAD: &str = "i=0; while [ ! -e /enough ]; do \
                    dd if=/dev/urandom of=/dev/vda bs=64k count=4 seek=$((i * 37 % 1000)) conv=notrunc,fsync 2>/dev/null; \
                    i=$((i + 1)); done &\n";

#[test]
fn disks_are_snapshot_backed_up_committed_and_mirrored_while_the_guest_writes() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        eprintln!(
            "SKIPPED: qemu-img is missing, so that no image can be looked at: apt-get install qemu-utils"
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (disk, backup, overlay, mirror) = (path("disk"), path("backup"), path("overlay"), path("mirror"));
    qemu_img(&["create", "-q", "-f", "qcow2", &disk, "64M"]);
    let socket = folder.path().join("qmp");
    let place = format!("unix:{}", socket.display());
    let drive = format!("file={disk},format=qcow2,id=disk0");
    let mut guest = Guest::start(["debian:13", "--accel", "dbt", "--qmp", &place, "--drive", &drive]);
    guest.expect(PROMPT);
    let mut raw = RawClient::connect(&socket);
    let mut python = PythonClient::connect(&socket);
    let client: &mut dyn Qmp = match &mut python {
        Some(python) => python,
        None => &mut raw,
    };
    guest.send(LOAD);
    let written = |client: &mut dyn Qmp, bytes: u64| {
        // As long as nothing is written nothing is tested.
        let before = client.ask("query-block")[0]["inserted"]["image"]["actual-size"].as_u64().unwrap();
        while client.ask("query-block")[0]["inserted"]["image"]["actual-size"].as_u64().unwrap()
            < before + bytes
        {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    };
    written(client, 4 << 20);

    // At one moment a state is kept within the image, and a backup begins.
    client.execute(
        "transaction",
        json!({ "actions": [
            { "type": "blockdev-snapshot-internal-sync", "data": { "device": "disk0", "name": "moment" } },
            { "type": "drive-backup", "data": {
                "device": "disk0", "job-id": "backup", "target": backup, "format": "qcow2", "sync": "full",
                "speed": 8 << 20,
            } },
        ] }),
    );
    assert_eq!(client.ask("query-jobs")[0]["type"], "backup");
    assert_eq!(client.event("BLOCK_JOB_COMPLETED")["data"]["error"], json!(null));

    let snapshot = json!({ "device": "disk0", "snapshot-file": overlay, "snapshot-node-name": "over" });
    client.execute("blockdev-snapshot-sync", snapshot);
    let inserted = client.ask("query-block")[0]["inserted"].take();
    assert_eq!((&inserted["node-name"], &inserted["file"]), (&json!("over"), &json!(overlay)));
    written(client, 1 << 20);
    client.execute("block-commit", json!({ "device": "disk0", "job-id": "commit" }));
    client.event("BLOCK_JOB_READY");
    client.execute("block-job-complete", json!({ "device": "commit" }));
    assert_eq!(client.event("BLOCK_JOB_COMPLETED")["data"]["error"], json!(null));
    assert_eq!(client.ask("query-block")[0]["inserted"]["file"], json!(disk));

    let copy =
        json!({ "device": "disk0", "job-id": "mirror", "target": mirror, "format": "qcow2", "sync": "full" });
    client.execute("drive-mirror", copy);
    client.event("BLOCK_JOB_READY");
    client.execute("block-job-complete", json!({ "device": "mirror" }));
    assert_eq!(client.event("BLOCK_JOB_COMPLETED")["data"]["error"], json!(null));
    assert_eq!(client.ask("query-block")[0]["inserted"]["file"], json!(mirror));
    let busy = client.try_execute("block-job-complete", json!({ "device": "mirror" })).unwrap_err();
    assert_eq!(busy, ("DeviceNotActive".into(), "Block job 'mirror' not found".into()));

    assert_eq!(guest.shell("touch /enough; wait; sync; echo 3 > /proc/sys/vm/drop_caches"), 0);
    guest.send("sha256sum /dev/vda\n");
    guest.expect("  /dev/vda");
    let text = guest.text();
    let sum = text.split("  /dev/vda").next().unwrap().rsplit(['\n', '\r']).next().unwrap().to_owned();
    guest.send("poweroff\n");
    let end = client.event("SHUTDOWN");
    assert_eq!(end["data"], json!({ "guest": true, "reason": "guest-shutdown" }));
    assert_eq!(guest.wait().code(), Some(0));

    for image in [&disk, &backup, &mirror] {
        qemu_img(&["check", "-q", image]);
    }
    let (moment, end) = (path("moment"), path("end"));
    qemu_img(&["convert", "-l", "snapshot.name=moment", "-O", "raw", &disk, &moment]);
    qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2", &moment, &backup]);
    qemu_img(&["convert", "-O", "raw", &mirror, &end]);
    let host = Command::new("sha256sum").arg(&end).output().unwrap();
    assert!(String::from_utf8_lossy(&host.stdout).starts_with(&sum), "{sum}");
    assert_eq!(sum.len(), 64, "{sum:?}");
}

#[test]
fn a_guest_waits_until_its_disk_has_space_again() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, socket) = (folder.path().join("disk"), folder.path().join("qmp"));
    std::fs::File::create(&disk).unwrap().set_len(4 << 20).unwrap();
    let injected = json!({
        "driver": "blkdebug",
        "image": { "driver": "file", "filename": disk },
        "inject-error": [
            { "event": "none", "iotype": "write", "errno": 28, "once": true },
            { "event": "none", "iotype": "write", "errno": 5, "once": true },
        ],
    });
    let drive = format!("file=json:{injected},id=disk0").replace(",\"", ",,\"").replace(",{", ",,{");
    let place = format!("unix:{}", socket.display());
    let mut guest = Guest::start(["debian:13", "--accel", "dbt", "--qmp", &place, "--drive", &drive]);
    guest.expect(PROMPT);
    let mut client = RawClient::connect(&socket);
    guest.send("dd if=/dev/zero bs=4k count=1 of=/dev/vda conv=fsync; echo \"wrote\"=$?.\n");
    let event = client.event("BLOCK_IO_ERROR");
    assert_eq!(event["data"]["device"], "disk0");
    assert_eq!((&event["data"]["action"], &event["data"]["nospace"]), (&json!("stop"), &json!(true)));
    client.event("STOP");
    assert_eq!(client.ask("query-status"), json!({ "running": false, "status": "io-error" }));
    assert_eq!(client.ask("query-block")[0]["io-status"], "nospace");
    assert!(!guest.text().contains("wrote=0"));
    // It is tried again, and fails for another reason, which the guest is told.
    client.ask("cont");
    let event = client.event("BLOCK_IO_ERROR");
    assert_eq!((&event["data"]["action"], &event["data"]["nospace"]), (&json!("report"), &json!(false)));
    guest.expect("wrote=1.");
    assert_eq!(client.ask("query-block")[0]["io-status"], "ok");
    assert_eq!(guest.shell("dd if=/dev/zero bs=4k count=1 of=/dev/vda conv=fsync"), 0);
    client.ask("quit");
    assert_eq!(guest.wait().code(), Some(0));
}
