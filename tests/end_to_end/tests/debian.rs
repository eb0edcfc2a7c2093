//! Stock Debian kernels, from the image store, to a shell and back.

use end_to_end::{PROMPT, boot, power_off, run};

#[test]
fn debian_13_cloud_on_one_vcpu() {
    let mut guest = boot(&["debian:13"]);
    assert_eq!(guest.shell("uname -r | grep 6.12"), 0);
    assert_eq!(guest.shell("test $(nproc) = 1"), 0);
    power_off(guest);
}

#[test]
fn debian_12_cloud_on_two_vcpus() {
    let mut guest = boot(&["debian:12", "--smp", "2"]);
    assert_eq!(guest.shell("uname -r | grep 6.1"), 0);
    assert_eq!(guest.shell("test $(nproc) = 2"), 0);
    power_off(guest);
}

#[test]
fn debian_13_generic_on_four_vcpus() {
    let mut guest = boot(&["debian:13:generic", "--smp", "4", "-m", "2G"]);
    assert_eq!(guest.shell("test $(nproc) = 4"), 0);
    assert_eq!(guest.shell("dmesg | grep -i -E 'soft lockup|unstable|BUG:'"), 1);
    power_off(guest);
}

#[test]
fn a_reset_reboots_and_with_no_reboot_ends() {
    let mut guest = boot(&["debian:13"]);
    guest.send("reboot\n");
    // The shell prompts once more before it is ended.
    guest.expect("Linux version");
    guest.expect(PROMPT);
    power_off(guest);
    let mut guest = boot(&["debian:13", "--no-reboot"]);
    guest.send("reboot\n");
    assert_eq!(guest.wait().code(), Some(0));
}

#[test]
fn ctrl_a_x_ends_the_program() {
    let mut guest = boot(&["debian:13"]);
    guest.send("\x01x");
    // Standard input is no terminal here: the keys work on pipes too.
    assert_eq!(guest.wait().code(), Some(0));
}

#[test]
fn a_kernel_panic_is_told() {
    // The kernel has nothing to start, panics, and resets at once.
    let output = run(&[
        "run",
        "debian:13",
        "--accel",
        "dbt",
        "--no-reboot",
        "--append",
        "panic=-1 rdinit=/nothing init=/nothing",
    ]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("Kernel panic"), "{text}");
    assert_eq!(output.status.code(), Some(0), "a reset after the panic, without pvpanic's driver");
}

#[test]
fn files_on_a_virtio_disk_survive() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.raw");
    std::fs::File::create(&disk).unwrap().set_len(400 << 20).unwrap();
    let drive = format!("file={},format=raw", disk.display());
    let mkfs = std::process::Command::new("/sbin/mkfs.ext4").args(["-q", "-F"]).arg(&disk).status().unwrap();
    assert!(mkfs.success());

    let mut guest = boot(&["debian:13", "--smp", "2", "--drive", &drive]);
    assert_eq!(guest.shell("mkdir -p /mnt && mount -t ext4 /dev/vda /mnt"), 0);
    assert_eq!(guest.shell("for i in 1 2 3 4; do dd if=/dev/urandom of=/mnt/$i bs=1M count=50; done"), 0);
    assert_eq!(guest.shell("cd /mnt && sha256sum 1 2 3 4 > sums; cd /; umount /mnt"), 0);
    power_off(guest);

    let fsck = std::process::Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&disk).output().unwrap();
    assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stdout));

    let read_only = format!("{drive},readonly=on");
    let mut guest = boot(&["debian:13", "--drive", &read_only]);
    assert_eq!(guest.shell("mkdir -p /mnt && mount -t ext4 -o ro /dev/vda /mnt"), 0);
    assert_eq!(guest.shell("cd /mnt && sha256sum -c sums; cd /"), 0);
    assert_ne!(guest.shell("dd if=/dev/zero of=/dev/vda count=1"), 0);
    power_off(guest);
}
