//! A stock kernel debugged with the real gdb.

use end_to_end::elf::{elf32, multiboot_header};
use end_to_end::gdb::{Debugger, Symbols, gdb, symbols};
use end_to_end::{Guest, PATIENCE, PROMPT, boot, power_off, run, wait_for};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
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

/// Starts a guest with `boot`, which waits for gdb; has gdb take it for `architecture` and carry out `commands`, the last
/// of which kills it. Gives what gdb printed.
fn debug_small_guest(boot: [&str; 2], architecture: &str, commands: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("gdb.sock");
    let place = format!("unix:{}", socket.display());
    let [option, file] = boot;
    let mut guest =
        Guest::start(["--accel", "dbt", "-m", "16M", option, file, "--gdb", place.as_str(), "--paused"]);
    wait_for(&socket);
    let target = format!("target remote {}", socket.display());
    let again = format!("monitor arch {architecture}");
    let said = gdb(&[&[target.as_str(), &again, "disconnect", &target], commands].concat());
    assert_eq!(guest.wait().code(), Some(0), "{said}");
    assert!(said.contains("killed]"), "{said}");
    said
}

/// A multiboot kernel of these instructions in `folder`, and where they are.
fn small_kernel(folder: &Path, code: &[u8]) -> (PathBuf, u32) {
    const LOAD_ADDRESS: u32 = 0x10_0000;
    let header = multiboot_header();
    let entry = LOAD_ADDRESS + header.len() as u32;
    let kernel = folder.join("kernel");
    let file = elf32(entry, &[(1, &[&header, code].concat(), LOAD_ADDRESS)]);
    std::fs::write(&kernel, file).unwrap();
    (kernel, entry)
}

/// Waits until the guest has printed nothing for a second; how much it had.
fn wait_until_silent(guest: &Guest) -> usize {
    let end = Instant::now() + PATIENCE;
    loop {
        let before = guest.text().len();
        std::thread::sleep(Duration::from_secs(1));
        if guest.text().len() == before {
            return before;
        }
        assert!(Instant::now() < end, "the guest goes on printing");
    }
}

#[test]
fn whoever_only_looks_for_the_stub_does_not_stop_the_guest_for_good() {
    let folder = tempfile::tempdir().unwrap();
    // next: mov al, 'x'; mov dx, 0x3f8; out dx, al; mov ecx, 1000000; wait: loop wait; jmp next
    let code = b"\xb0\x78\x66\xba\xf8\x03\xee\xb9\x40\x42\x0f\x00\xe2\xfe\xeb\xf0";
    let (kernel, _) = small_kernel(folder.path(), code);
    let socket = folder.path().join("gdb.sock");
    let place = format!("unix:{}", socket.display());
    let mut guest = Guest::start([
        "--accel",
        "dbt",
        "-m",
        "16M",
        "--kernel",
        kernel.to_str().unwrap(),
        "--gdb",
        place.as_str(),
    ]);
    guest.expect("xx");
    let mut client = UnixStream::connect(&socket).unwrap();
    let stopped = wait_until_silent(&guest);
    client.shutdown(Shutdown::Both).unwrap();
    let end = Instant::now() + PATIENCE;
    while guest.text().len() == stopped {
        assert!(Instant::now() < end, "the guest stays stopped");
        std::thread::sleep(Duration::from_millis(20));
    }
    // One who says something has it.
    client = UnixStream::connect(&socket).unwrap();
    client.write_all(b"$?#3f").unwrap();
    client.read_exact(&mut [0; 4]).unwrap();
    drop(client);
    wait_until_silent(&guest);
    assert!(gdb(&[&format!("target remote {}", socket.display()), "kill"]).contains("killed]"));
    assert_eq!(guest.wait().code(), Some(0));
}

#[test]
fn code_of_32_bits_is_shown_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    // mov eax, 0x11223344; mov ebx, 0x55667788; next: inc ecx; jmp next
    let code = b"\xb8\x44\x33\x22\x11\xbb\x88\x77\x66\x55\x41\xeb\xfd";
    let (kernel, entry) = small_kernel(folder.path(), code);
    let said = debug_small_guest(
        ["--kernel", kernel.to_str().unwrap()],
        "i386",
        &[
            "x/3i $pc",
            "stepi",
            "stepi",
            "printf \"%x %x %x\\n\", $eax, $ebx, $eip",
            "set var $edx = 0x99aabbcc",
            "p/x $edx",
            &format!("break *{:#x}", entry + 11),
            "continue",
            "continue",
            "p $ecx",
            "info registers",
            "kill",
        ],
    );
    for expected in [
        "=> 0x10000c:\tmov    $0x11223344,%eax",
        "   0x100016:\tinc    %ecx",
        "11223344 55667788 100016",
        "$1 = 0x99aabbcc",
        "Breakpoint 1, 0x00100017",
        "$2 = 2",
        "eip            0x100017",
    ] {
        assert!(said.contains(expected), "no {expected:?} in:\n{said}");
    }
    assert!(!said.contains("r15 "), "{said}");
}

#[test]
fn code_of_16_bits_is_shown_from_the_reset_vector_on() {
    // At 16 bytes below the end: mov ax, 0x1234; next: inc ax; jmp next
    let mut rom = vec![0xf4; 4096];
    rom[0xff0..0xff6].copy_from_slice(b"\xb8\x34\x12\x40\xeb\xfd");
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("rom");
    std::fs::write(&image, rom).unwrap();
    let said = debug_small_guest(
        ["--bios", image.to_str().unwrap()],
        "i8086",
        &[
            "x/2i $pc",
            "stepi",
            "p/x $ax",
            "hbreak *0xfffffff4",
            "continue",
            "continue",
            "p/x $ax",
            // A far jump by hand: the base follows the selector.
            "set var $cs = 0x1000",
            "set var $eip = 0x10005",
            "monitor info registers",
            "kill",
        ],
    );
    for expected in [
        "=> 0xfffffff0:\tmov    $0x1234,%ax",
        "   0xfffffff3:\tinc    %ax",
        "$1 = 0x1234",
        "Breakpoint 1, 0xfffffff4",
        "$2 = 0x1236",
        "RIP=0000000000000005",
        "CS =1000 base=0000000000010000",
    ] {
        assert!(said.contains(expected), "no {expected:?} in:\n{said}");
    }
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
