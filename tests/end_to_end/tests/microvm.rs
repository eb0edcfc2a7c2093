//! The machine type `microvm`, with stock Debian kernels.

use end_to_end::{Guest, PROMPT, boot, power_off};

fn micro(arguments: &[&str]) -> Guest {
    boot(&[&["-M", "microvm"], arguments].concat())
}

#[test]
fn debian_13_cloud_has_its_devices_and_no_pci() {
    let mut guest = micro(&["debian:13", "--console", "null"]);
    assert_eq!(guest.shell("test $(ls /sys/bus/virtio/devices | wc -l) = 3"), 0);
    assert_eq!(
        guest.shell("ls /sys/bus/virtio/drivers/virtio_rng/virtio* && head -c 64 /dev/hwrng >/dev/null"),
        0
    );
    assert_eq!(guest.shell("ls /sys/bus/virtio/drivers/virtio_balloon/virtio*"), 0);
    assert_eq!(guest.shell("test -e /dev/hvc0"), 0);
    assert_ne!(guest.shell("ls /sys/bus/pci/devices/*"), 0);
    // The clock is the host's.
    assert_eq!(guest.shell("test $(date +%Y) -ge 2024"), 0);
    assert_eq!(guest.shell("dmesg | grep -i -E 'soft lockup|unstable|BUG:|WARNING:'"), 1);
    assert_eq!(guest.shell("grep tsc /sys/devices/system/clocksource/clocksource0/current_clocksource"), 0);
    power_off(guest);
}

#[test]
fn debian_12_generic_on_three_vcpus() {
    let mut guest = micro(&["debian:12:generic", "--smp", "3"]);
    assert_eq!(guest.shell("test $(nproc) = 3"), 0);
    assert_eq!(guest.shell("dmesg | grep -i -E 'soft lockup|unstable|BUG:|WARNING:'"), 1);
    power_off(guest);
}

#[test]
fn a_reset_reboots_and_with_no_reboot_ends() {
    let mut guest = micro(&["debian:12", "--smp", "2"]);
    guest.send("reboot\n");
    guest.expect("Linux version");
    guest.expect(PROMPT);
    power_off(guest);
    let mut guest = micro(&["debian:13", "--no-reboot"]);
    guest.send("reboot\n");
    assert_eq!(guest.wait().code(), Some(0));
}

#[test]
fn files_on_many_virtio_disks_survive() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk.raw");
    std::fs::File::create(&disk).unwrap().set_len(100 << 20).unwrap();
    let mkfs = std::process::Command::new("/sbin/mkfs.ext4").args(["-q", "-F"]).arg(&disk).status().unwrap();
    assert!(mkfs.success());
    let drive = format!("file={},format=raw", disk.display());
    // More devices than there are interrupts: some share one.
    let others: Vec<String> = (0..17)
        .map(|index| {
            let path = folder.path().join(format!("other-{index}.raw"));
            std::fs::write(&path, vec![b'a' + index; 4096]).unwrap();
            format!("file={},format=raw,readonly=on", path.display())
        })
        .collect();
    let mut arguments = vec!["debian:13", "--smp", "2", "--drive", &drive];
    for other in &others {
        arguments.extend(["--drive", other]);
    }
    let mut guest = micro(&arguments);
    assert_eq!(guest.shell("mkdir -p /mnt && mount -t ext4 /dev/vda /mnt"), 0);
    assert_eq!(guest.shell("for i in 1 2 3; do dd if=/dev/urandom of=/mnt/$i bs=1M count=20; done"), 0);
    assert_eq!(guest.shell("cd /mnt && sha256sum 1 2 3 > sums; cd /; umount /mnt"), 0);
    assert_eq!(guest.shell("test $(head -c 3 /dev/vdb)$(head -c 3 /dev/vdr) = aaaqqq"), 0);
    power_off(guest);

    let fsck = std::process::Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&disk).output().unwrap();
    assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stdout));
    // What was written on one machine type is there on the other.
    let mut guest = boot(&["debian:13", "--drive", &drive]);
    assert_eq!(guest.shell("mkdir -p /mnt && mount -t ext4 -o ro /dev/vda /mnt"), 0);
    assert_eq!(guest.shell("cd /mnt && sha256sum -c sums; cd /"), 0);
    power_off(guest);
}
