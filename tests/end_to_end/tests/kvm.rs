//! Stock Debian kernels and wrong words under KVM, in the lab where it is real.

use end_to_end::in_lab::{in_lab, with_cpus, with_images, with_programs};
use end_to_end::{Guest, program};
use image_store::Release;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

/// A prompt of the shell in the image's initramfs.
const PROMPT: &str = "root@vireo:~# ";
const BOTH: &[Release] = &[Release::Bookworm, Release::Trixie];
const TRIXIE: &[Release] = &[Release::Trixie];

fn boot(arguments: &[&str]) -> Guest {
    let mut guest = Guest::start(["--accel", "kvm", "-m", "512M"].iter().chain(arguments));
    guest.expect(PROMPT);
    guest
}

fn power_off(mut guest: Guest) {
    guest.send("poweroff\n");
    assert_eq!(guest.wait().code(), Some(0));
}

/// The kernel runs on KVM, with its clock, and found nothing wrong.
fn check_kernel(guest: &mut Guest, version: &str, vcpus: u32) {
    assert_eq!(guest.shell(&format!("uname -r | grep ^{version}")), 0);
    assert_eq!(guest.shell(&format!("test $(nproc) = {vcpus}")), 0);
    assert_eq!(guest.shell("dmesg | grep 'Hypervisor detected: KVM'"), 0);
    assert_eq!(guest.shell("dmesg | grep -i -E 'soft lockup|BUG:|Oops|rcu.*stall'"), 1);
}

#[test]
fn debian_12_and_13_on_one_vcpu() {
    in_lab(
        "debian_12_and_13_on_one_vcpu",
        |lab| with_images(lab, BOTH),
        || {
            for (image, version) in [("debian:12", "6.1."), ("debian:13", "6.12.")] {
                let mut guest = boot(&[image]);
                check_kernel(&mut guest, version, 1);
                power_off(guest);
            }
        },
    );
}

#[test]
fn debian_12_and_13_on_two_vcpus() {
    in_lab(
        "debian_12_and_13_on_two_vcpus",
        |lab| with_cpus(with_images(lab, BOTH), 2),
        || {
            for (image, version) in [("debian:12", "6.1."), ("debian:13", "6.12.")] {
                let mut guest = boot(&[image, "--smp", "2"]);
                check_kernel(&mut guest, version, 2);
                power_off(guest);
            }
        },
    );
}

#[test]
fn microvm_runs_reboots_and_has_its_disk() {
    in_lab(
        "microvm_runs_reboots_and_has_its_disk",
        |lab| with_cpus(with_images(lab, BOTH), 2),
        || {
            let folder = tempfile::tempdir().unwrap();
            let disk = folder.path().join("disk.raw");
            std::fs::write(&disk, vec![b'd'; 1 << 20]).unwrap();
            let drive = format!("file={},format=raw", disk.display());
            let images = [("debian:12", "6.1."), ("debian:13", "6.12.")];
            for ((image, version), vcpus) in images.into_iter().flat_map(|image| [(image, 1), (image, 2)]) {
                let smp = vcpus.to_string();
                let mut guest = boot(&[image, "-M", "microvm", "--smp", &smp, "--drive", &drive]);
                check_kernel(&mut guest, version, vcpus);
                assert_eq!(
                    guest.shell("test $(head -c 4 /dev/vda) = dddd && ! ls /sys/bus/pci/devices/*"),
                    0
                );
                guest.send("reboot\n");
                guest.expect("Linux version");
                guest.expect(PROMPT);
                assert_eq!(guest.shell("printf e | dd of=/dev/vda conv=notrunc && sync"), 0);
                power_off(guest);
                assert_eq!(std::fs::read(&disk).unwrap()[..4], *b"eddd");
                std::fs::write(&disk, vec![b'd'; 1 << 20]).unwrap();
            }
        },
    );
}

#[test]
fn a_reset_reboots_and_with_no_reboot_ends() {
    in_lab(
        "a_reset_reboots_and_with_no_reboot_ends",
        |lab| with_images(lab, TRIXIE),
        || {
            let mut guest = boot(&["debian:13"]);
            guest.send("reboot\n");
            // The shell prompts once more before it is ended.
            guest.expect("Linux version");
            guest.expect(PROMPT);
            power_off(guest);
            let mut guest = boot(&["debian:13", "--no-reboot"]);
            guest.send("reboot\n");
            assert_eq!(guest.wait().code(), Some(0));
        },
    );
}

#[test]
fn files_on_a_virtio_disk_survive() {
    let prepare = |lab| with_programs(with_images(lab, TRIXIE), &["mkfs.ext4", "e2fsck"]);
    in_lab("files_on_a_virtio_disk_survive", prepare, || {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk.raw");
        std::fs::File::create(&disk).unwrap().set_len(100 << 20).unwrap();
        let made = Command::new("/usr/local/bin/mkfs.ext4").args(["-q", "-F"]).arg(&disk).status().unwrap();
        assert!(made.success());
        let drive = format!("file={},format=raw", disk.display());

        let mut guest = boot(&["debian:13", "--drive", &drive]);
        assert_eq!(guest.shell("mkdir -p /mnt && mount -t ext4 /dev/vda /mnt"), 0);
        assert_eq!(guest.shell("for i in 1 2 3 4; do dd if=/dev/urandom of=/mnt/$i bs=1M count=12; done"), 0);
        assert_eq!(guest.shell("cd /mnt && sha256sum 1 2 3 4 > sums; cd /; umount /mnt"), 0);
        power_off(guest);

        let checked = Command::new("/usr/local/bin/e2fsck").args(["-f", "-n"]).arg(&disk).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));

        let read_only = format!("{drive},readonly=on");
        let mut guest = boot(&["debian:13", "--drive", &read_only]);
        assert_eq!(guest.shell("mkdir -p /mnt && mount -t ext4 -o ro /dev/vda /mnt"), 0);
        assert_eq!(guest.shell("cd /mnt && sha256sum -c sums; cd /"), 0);
        assert_ne!(guest.shell("dd if=/dev/zero of=/dev/vda count=1"), 0);
        power_off(guest);
    });
}

/// `VIREO_BOOTS` asks for more than the few that every run of the tests makes.
#[test]
fn boots_in_a_row() {
    const VARIABLE: &str = "VIREO_BOOTS";
    let boots = std::env::var(VARIABLE).map_or(3, |text| text.parse().expect("VIREO_BOOTS is a number"));
    let limit = std::time::Duration::from_secs(120 + 30 * boots);
    let prepare = |lab| with_images(lab, TRIXIE).env(VARIABLE, boots.to_string()).limit(limit);
    in_lab("boots_in_a_row", prepare, || {
        for boot_number in 1..=boots {
            let mut guest = boot(&["debian:13"]);
            assert_eq!(guest.shell("dmesg | grep -i -E 'soft lockup|BUG:|Oops|rcu.*stall'"), 1);
            power_off(guest);
            println!("boot {boot_number} of {boots} ended well");
        }
    });
}

/// Runs the program as `user` and checks its exit code, and that one line of standard error names `words`.
fn refused(user: u32, arguments: &[&str], code: i32, words: &[&str]) {
    let mut command = Command::new(program());
    command.args(arguments).stdin(Stdio::null()).uid(user).gid(user).current_dir("/");
    let Output { status, stderr, .. } = command.output().expect("the program starts");
    let errors = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(code), "{arguments:?}: {errors}");
    for word in words {
        assert!(errors.contains(word), "{arguments:?} does not say {word:?}: {errors}");
    }
    assert_eq!(errors.lines().count(), 1, "{arguments:?}: {errors}");
}

#[test]
fn a_kvm_that_cannot_be_had_is_told() {
    const USER: u32 = 65534;
    const RUN: &[&str] =
        &["run", "--kernel", "/lab/guest", "-m", "256M", "--serial", "null", "--accel", "kvm"];
    in_lab(
        "a_kvm_that_cannot_be_had_is_told",
        |lab| lab.memory(1024),
        || {
            std::fs::write("/lab/guest", jump_to(0xfed0_0000)).unwrap();
            refused(USER, RUN, 10, &["accelerator kvm", "no permission to open /dev/kvm", "group"]);
            let asked =
                Command::new(program()).args(["info", "--json"]).uid(USER).gid(USER).output().unwrap();
            let text = String::from_utf8_lossy(&asked.stdout).into_owned();
            assert!(text.contains(r#""chosen": "dbt""#) && text.contains("no permission"), "{text}");

            std::fs::remove_file("/dev/kvm").unwrap();
            refused(0, RUN, 10, &["accelerator kvm", "there is no /dev/kvm", "kvm_amd"]);
            // Something else by that name.
            let made = Command::new("mknod").args(["/dev/kvm", "c", "1", "3"]).status().unwrap();
            assert!(made.success());
            refused(0, RUN, 10, &["/dev/kvm is not KVM's device"]);
            std::fs::remove_file("/dev/kvm").unwrap();
            std::fs::create_dir("/dev/kvm").unwrap();
            refused(0, RUN, 10, &["/dev/kvm cannot be opened"]);
            // A device number that no driver serves.
            std::fs::remove_dir("/dev/kvm").unwrap();
            assert!(Command::new("mknod").args(["/dev/kvm", "c", "10", "77"]).status().unwrap().success());
            refused(0, RUN, 10, &["there is no /dev/kvm"]);
        },
    );
}

#[test]
fn what_kvm_cannot_do_is_told() {
    const RUN: &[&str] = &["run", "--kernel", "/lab/guest", "--serial", "null", "--accel", "kvm"];
    in_lab(
        "what_kvm_cannot_do_is_told",
        |lab| lab,
        || {
            std::fs::write("/lab/guest", jump_to(0xfed0_0000)).unwrap();
            let with = |words: &[&'static str]| [RUN, words].concat();
            refused(0, &with(&["--tier", "interpreter"]), 10, &["--tier", "translator"]);
            refused(0, &with(&["--smp", "100000"]), 1, &["100000 vCPUs", "accepted"]);
            refused(0, &with(&["-m", "1000T"]), 1, &["memory", "accepted"]);
            refused(0, &with(&["--cpu", "z80"]), 1, &["z80", "max"]);
            // A guest that executes what is no memory: KVM has no answer, and its error says where.
            refused(0, RUN, 8, &["the accelerator failed", "vCPU 0", "fed00000"]);
        },
    );
}

#[test]
fn the_default_takes_kvm_and_says_so() {
    in_lab(
        "the_default_takes_kvm_and_says_so",
        |lab| lab.memory(1024),
        || {
            std::fs::write("/lab/guest", [0x90; 64]).unwrap();
            let output = Command::new(program()).args(["info", "--json"]).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(text.contains(r#""chosen": "kvm""#) && text.contains("AMD-V"), "{text}");
            std::fs::write("/lab/guest", jump_to(0xfed0_0000)).unwrap();
            let run = ["run", "--kernel", "/lab/guest", "-m", "256M", "--serial", "null"];
            let output = Command::new(program()).args(run).output().unwrap();
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(errors.starts_with("vireo: accelerator: kvm, on AMD-V\n"), "{errors}");
            // Without permission for the device the translator takes over, and the reason is said.
            std::fs::set_permissions("/dev/kvm", PermissionsExt::from_mode(0o600)).unwrap();
            let mut unprivileged = Command::new(program());
            unprivileged.args(["run", "--kernel", "/nonexistent", "--serial", "null"]).uid(65534).gid(65534);
            let output = unprivileged.output().unwrap();
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(
                errors.starts_with("vireo: accelerator: dbt") && errors.contains("no permission"),
                "{errors}"
            );
        },
    );
}

/// An ELF file with one segment that jumps to `address`.
fn jump_to(address: u32) -> Vec<u8> {
    const BASE: u64 = 0x10_0000;
    const HEADERS: u64 = 64 + 56;
    let mut code = vec![0xb8];
    code.extend(address.to_le_bytes()); // mov eax, address
    code.extend([0xff, 0xe0]); // jmp rax
    let length = HEADERS + code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(2u16.to_le_bytes()); // an executable
    file.extend(62u16.to_le_bytes()); // for x86-64
    file.extend(1u32.to_le_bytes());
    file.extend((BASE + HEADERS).to_le_bytes()); // the entry
    file.extend(64u64.to_le_bytes()); // program headers
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for field in [64u16, 56, 1, 64, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // loaded
    file.extend(7u32.to_le_bytes());
    for field in [0, BASE, BASE, length, length, 0x1000] {
        file.extend(field.to_le_bytes());
    }
    file.extend(code);
    file
}
