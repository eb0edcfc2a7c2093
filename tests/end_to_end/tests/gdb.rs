//! A stock kernel debugged with the real gdb.

use end_to_end::gdb::{Debugger, Symbols, gdb, symbols};
use end_to_end::{Guest, PATIENCE, PROMPT, boot, power_off, run};
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

/// Boots Debian's kernel where its link says, and takes its symbols from it.
fn kernel_symbols() -> Symbols {
    let mut guest = boot(&["debian:13", "--append", "nokaslr"]);
    let symbols = symbols(
        &mut guest,
        &["start_kernel", "linux_banner", "x86_64_start_reservations", "panic", "jiffies_64"],
    );
    power_off(guest);
    symbols
}

/// Waits until something listens at `socket`.
fn wait_for(socket: &Path) {
    let end = Instant::now() + PATIENCE;
    while !socket.exists() {
        assert!(Instant::now() < end, "nothing listens at {}", socket.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_kernel_is_debugged_from_start_kernel_to_its_end() {
    let symbols = kernel_symbols();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("gdb.sock");
    let place = format!("unix:{}", socket.display());
    let mut guest = Guest::start([
        "--accel",
        "dbt",
        "debian:13",
        "--smp",
        "2",
        "--append",
        "nokaslr",
        "--gdb",
        &place,
        "--paused",
    ]);
    wait_for(&socket);
    let elf = symbols.file(folder.path());
    let at = |name: &str| symbols.address(name);
    // It has not begun: the first processor is where the kernel is entered, the other waits.
    let said = gdb(&[
        &format!("file {}", elf.display()),
        &format!("target remote {}", socket.display()),
        "info threads",
        &format!("hbreak *{:#x}", at("start_kernel")),
        "continue",
        "bt 2",
        &format!("x/s {:#x}", at("linux_banner")),
        "p/x $cr0 & 0x80000001",
        "p/x $efer & 0x500",
        "p $xmm0.uint128",
        "stepi",
        &format!("p $rip != {:#x}", at("start_kernel")),
        "monitor info cpus",
        "monitor info registers 1",
        "delete",
        // A variable that the timer's interrupt counts.
        &format!("watch *(unsigned long *){:#x}", at("jiffies_64")),
        "continue",
        "delete",
        "detach",
    ]);
    for expected in [
        "vCPU 1, waits to be started",
        "Breakpoint 1, 0x",
        "in start_kernel ()",
        "#1  0x",
        "in x86_64_start_reservations ()",
        "Linux version 6.12.",
        "= 0x80000001",
        "= 0x500",
        "$3 = 0",
        "$4 = 1",
        "vCPU 0: 0xffffffff",
        "hit Hardware watchpoint 2",
        "Old value = ",
        "detached",
    ] {
        assert!(said.contains(expected), "no {expected:?} in:\n{said}");
    }
    guest.expect(PROMPT);
    // Again, while it runs; and it is there to the end.
    let client = Debugger::start(&[
        &format!("file {}", elf.display()),
        &format!("target remote {}", socket.display()),
        "info threads",
        "echo now it runs\\n",
        "continue",
    ]);
    client.expect("now it runs");
    assert_eq!(guest.shell("echo it goes on; cat /proc/interrupts | grep -c LOC"), 0);
    power_off(guest);
    let said = client.finish();
    assert!(said.contains("exited normally"), "{said}");
    assert_eq!(said.matches("vCPU ").count(), 2, "{said}");
}

#[test]
fn ctrl_c_stops_a_kernel_and_breakpoints_come_and_go() {
    let symbols = kernel_symbols();
    let folder = tempfile::tempdir().unwrap();
    let elf = symbols.file(folder.path());
    let socket = folder.path().join("gdb.sock");
    let mut guest = Guest::start([
        "--accel",
        "dbt",
        "debian:13",
        "--append",
        "nokaslr",
        "--gdb",
        &format!("unix:{}", socket.display()),
    ]);
    guest.expect(PROMPT);
    let client = Debugger::start(&[
        &format!("file {}", elf.display()),
        &format!("target remote {}", socket.display()),
        "break panic",
        "monitor stepirq on",
        "stepi 200",
        "p/x $cs",
        "set var $saved = $rax",
        "set var $rax = 0x1234",
        "p/x $rax",
        "set var $rax = $saved",
        "monitor xp /2g 0x1000",
        "echo now it runs\\n",
        "continue",
        "info registers rip",
        "detach",
    ]);
    client.expect("now it runs");
    std::thread::sleep(Duration::from_secs(1));
    client.interrupt();
    let said = client.finish();
    for expected in [
        "Breakpoint 1 at",
        "Single steps take interrupts: on",
        "= 0x1234",
        "0000000000001000: 0x",
        "Program received signal SIGINT",
        "detached",
    ] {
        assert!(said.contains(expected), "no {expected:?} in:\n{said}");
    }
    assert_eq!(guest.shell("true"), 0);
    // gdb comes back, and sees the kernel panic.
    let client = Debugger::start(&[
        &format!("file {}", elf.display()),
        &format!("target remote {}", socket.display()),
        &format!("break *{:#x}", symbols.address("panic")),
        "echo now it runs\\n",
        "continue",
        "bt 1",
        "kill",
    ]);
    client.expect("now it runs");
    std::thread::sleep(Duration::from_secs(1));
    guest.send("echo c > /proc/sysrq-trigger\n");
    let said = client.finish();
    assert!(said.contains("Breakpoint 1, 0x") && said.contains("in panic ()"), "{said}");
    assert_eq!(guest.wait().code(), Some(0), "gdb has killed it");
}

#[test]
fn wrong_places_for_gdb_are_named() {
    let refused = |arguments: &[&str], code, named: &str| {
        let output = run(&[&["run", "--kernel", "/dev/null"], arguments].concat());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
        assert!(errors.contains(named), "{arguments:?}: {errors}");
    };
    refused(&["--gdb", "1234"], 2, "tcp::PORT");
    refused(&["--gdb", "tcp::99999"], 2, "tcp::PORT");
    refused(&["--paused"], 2, "--gdb");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("tcp::{}", taken.local_addr().unwrap().port());
    refused(
        &["--gdb", &place],
        1,
        &format!("gdb cannot be listened for at tcp:127.0.0.1:{}", taken.local_addr().unwrap().port()),
    );
}
