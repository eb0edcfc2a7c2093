//! The initramfs: busybox with all its names, the kernel's drivers, and what starts a shell.

use crate::cpio::Archive;
use crate::kernel_modules::{Module, alias_file, dependency_file};

/// Drivers to have at hand; `modprobe` loads those whose devices are there. Names as the kernel's.
pub(crate) const MODULES: &[&str] = &[
    // Virtio and its devices.
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "virtio_scsi",
    "virtio_input",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "9pnet_virtio",
    "9p",
    // Other disks and network adapters that machines have.
    "sd_mod",
    "sr_mod",
    "ahci",
    "nvme",
    "e1000",
    "e1000e",
    // The board.
    "button",
    "evdev",
    "pvpanic_mmio",
    "pvpanic_pci",
    "i6300esb",
    // File systems and what they use.
    "ext4",
    "crc32c_generic",
    "crc32c_intel",
    "libcrc32c",
    "vfat",
    "nls_ascii",
    "nls_cp437",
    "nls_iso8859_1",
    "nls_utf8",
    "isofs",
    "squashfs",
    "overlay",
    "loop",
    "af_packet",
];

/// Drivers of a host for VMs, which only a guest that is a host itself needs.
pub(crate) const HYPERVISOR_MODULES: &[&str] =
    &["kvm_amd", "kvm_intel", "tun", "tap", "vhost", "vhost_net", "vhost_vsock", "bridge"];

/// What an initramfs is made of.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    /// The static busybox.
    pub(crate) busybox: &'a [u8],
    /// The chosen modules.
    pub(crate) modules: &'a [Module],
    /// The kernel's release, for the modules' folder.
    pub(crate) kernel_release: &'a str,
    /// What the greeting calls the system.
    pub(crate) system: &'a str,
}

const FOLDERS: &[&str] =
    &["bin", "dev", "etc", "etc/init.d", "lib", "mnt", "proc", "root", "run", "sys", "usr", "var"];
/// Programs are all in `/bin`; these names for its place are links to it.
const PROGRAM_FOLDERS: &[(&str, &str)] = &[
    ("sbin", "bin"),
    ("usr/bin", "../bin"),
    ("usr/sbin", "../bin"),
    ("usr/lib", "../lib"),
    ("var/run", "../run"),
];
const FILES: &[(&str, u32, &str)] = &[
    ("etc/inittab", 0o644, include_str!("guest/inittab")),
    ("etc/init.d/rcS", 0o755, include_str!("guest/rcS")),
    ("etc/profile", 0o644, include_str!("guest/profile")),
    ("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n"),
    ("etc/group", 0o644, "root:x:0:\n"),
    ("etc/hostname", 0o644, "vireo\n"),
    ("etc/hosts", 0o644, "127.0.0.1\tlocalhost vireo\n"),
    ("etc/filesystems", 0o644, "ext4\nvfat\niso9660\nsquashfs\n"),
];

/// Makes the archive; `None` if `busybox` isn't one.
pub(crate) fn build(parts: &Parts<'_>) -> Option<Vec<u8>> {
    let applets = applets(parts.busybox)?;
    let mut archive = Archive::new();
    for folder in FOLDERS {
        archive.folder(folder, 0o755);
    }
    archive.folder("tmp", 0o1777);
    for (path, target) in PROGRAM_FOLDERS {
        archive.link(path, target);
    }
    // The kernel opens it before anything is mounted.
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("bin/busybox", 0o755, parts.busybox);
    for applet in applets.iter().filter(|applet| *applet != "busybox") {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive.link("init", "bin/busybox");
    for (path, mode, text) in FILES {
        archive.file(path, *mode, text.as_bytes());
    }
    let greeting = format!(
        "\n{} with kernel {}\nA virtual machine by Vireo. `poweroff` ends it, `reboot` starts it anew.\n\n",
        parts.system, parts.kernel_release
    );
    archive.file("etc/motd", 0o644, greeting.as_bytes());
    add_modules(&mut archive, parts, parts.modules);
    Some(archive.finish())
}

/// Makes an archive with the modules among those of `parts` that `first`, the modules of the archive that
/// it is to be appended to, lacks; with the index files of all.
pub(crate) fn build_more_modules(parts: &Parts<'_>, first: &[Module]) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.folder("lib", 0o755);
    let more: Vec<Module> = parts
        .modules
        .iter()
        .filter(|module| !first.iter().any(|known| known.path == module.path))
        .cloned()
        .collect();
    add_modules(&mut archive, parts, &more);
    archive.finish()
}

/// Adds `modules`, and the index files of all of `parts`.
fn add_modules(archive: &mut Archive, parts: &Parts<'_>, modules: &[Module]) {
    let root = format!("lib/modules/{}", parts.kernel_release);
    archive.folder("lib/modules", 0o755);
    archive.folder(&root, 0o755);
    let mut folders: Vec<&str> = Vec::new();
    for module in modules {
        for (end, _) in module.path.match_indices('/') {
            let folder = &module.path[..end];
            if !folders.contains(&folder) {
                folders.push(folder);
                archive.folder(&format!("{root}/{folder}"), 0o755);
            }
        }
        archive.file(&format!("{root}/{}", module.path), 0o644, &module.bytes);
    }
    archive.file(&format!("{root}/modules.dep"), 0o644, dependency_file(parts.modules).as_bytes());
    archive.file(&format!("{root}/modules.alias"), 0o644, alias_file(parts.modules).as_bytes());
}

/// The names that a busybox program answers to: its table is a run of zero-terminated strings in order,
/// the first of which are the two names of `test`.
fn applets(busybox: &[u8]) -> Option<Vec<String>> {
    const START: &[u8] = b"[\0[[\0";
    const MOST: usize = 1000;
    if !busybox.starts_with(b"\x7fELF") {
        return None;
    }
    let mut from = 0;
    while let Some(at) = busybox[from..].windows(START.len()).position(|window| window == START) {
        let table = &busybox[from + at..];
        let names: Vec<String> = table
            .split(|byte| *byte == 0)
            .take(MOST)
            .take_while(|name| is_applet(name))
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect();
        if ["init", "mount", "sh", "modprobe", "cttyhack"].iter().all(|name| names.iter().any(|n| n == name))
        {
            return Some(names);
        }
        from += at + 1;
    }
    None
}

fn is_applet(name: &[u8]) -> bool {
    let character = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"[_-.".contains(byte);
    (1..32).contains(&name.len()) && name.iter().all(character) && !name.starts_with(b".")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cpio::tests::entries;
    use crate::kernel_modules::tests::object;
    use crate::kernel_modules::{PackedModule, select};

    /// The beginning of a busybox and its table.
    pub(crate) fn busybox() -> Vec<u8> {
        let mut bytes = b"\x7fELF other [\0[[\0not the table\0".to_vec();
        bytes.extend_from_slice(
            b"\0[\0[[\0ash\0busybox\0cttyhack\0init\0modprobe\0mount\0sh\0zcat\0\0\x01rest",
        );
        bytes
    }

    #[test]
    fn the_applets_are_read_from_the_program() {
        let names = applets(&busybox()).unwrap();
        assert_eq!(
            names,
            ["[", "[[", "ash", "busybox", "cttyhack", "init", "modprobe", "mount", "sh", "zcat"]
        );
        assert_eq!(applets(b"\x7fELF\0[\0[[\0ash\0"), None);
        assert_eq!(applets(b"#!/bin/sh"), None);
    }

    #[test]
    fn the_archive_has_everything_that_its_scripts_use() {
        let packed = PackedModule::new("kernel/drivers/block/virtio_blk.ko", object("alias=x\n")).unwrap();
        let modules = select(&[packed], MODULES).unwrap();
        let busybox = busybox();
        let parts = Parts { busybox: &busybox, modules: &modules, kernel_release: "6.1.0", system: "Debian" };
        let archive = build(&parts).unwrap();
        assert_eq!(build(&parts).unwrap(), archive);
        let entries = entries(&archive);
        let get =
            |path: &str| entries.iter().find(|entry| entry.0 == path).unwrap_or_else(|| panic!("no {path}"));
        assert_eq!(get("bin/busybox").2, busybox);
        assert_eq!((get("init").1, get("init").2.as_slice()), (0o120_777, b"bin/busybox".as_slice()));
        assert_eq!(get("bin/[[").2, b"busybox");
        assert_eq!(get("dev/console").1, 0o020_600);
        assert_eq!(get("etc/init.d/rcS").1, 0o100_755);
        assert_eq!(get("lib/modules/6.1.0/modules.alias").2, b"alias x virtio_blk\n");
        assert!(get("lib/modules/6.1.0/modules.dep").2.starts_with(b"kernel/drivers/block/virtio_blk.ko:"));
        // Every folder stands before what's in it.
        for (index, (path, _, _)) in entries.iter().enumerate() {
            if let Some((parent, _)) = path.rsplit_once('/') {
                let before =
                    entries[..index].iter().any(|entry| entry.0 == parent && entry.1 & 0o040_000 != 0);
                assert!(before, "{path}");
            }
        }
        assert!(build(&Parts { busybox: b"\x7fELF", ..parts }).is_none());
    }
}
