//! A Debian of real size on a disk image, made by debootstrap and kept in the user's cache folder.

use anyhow::{Context, Result, bail};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const SUITE: &str = "trixie";
/// All that programs run on it call; a comma between each.
const PACKAGES: &str = "systemd,systemd-sysv,udev,dbus,init,kmod,iproute2,procps,ca-certificates,linux-image-amd64,\
    gcc,gcc-multilib,libc6-dev,libstb-dev,python3,perl,nodejs,default-jre-headless,sqlite3,openssl,xz-utils,zstd,stress-ng";
/// The disk's size.
const SIZE: u64 = 6 << 30;
/// Says in the folder that everything in it is there, and which version of this file made it.
const MARK: &str = "complete-2";

/// The disk, and what to boot it with. Once it is up, it runs `/root/run.sh`, which `copy` brings.
pub(crate) struct DebianDisk {
    disk: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
}

impl DebianDisk {
    /// The disk in the cache, made anew if there is none. Needs root, debootstrap and a Debian mirror.
    pub(crate) fn get() -> Result<Self> {
        let folder = cache("vireo-userland")?;
        let disk = Self {
            disk: folder.join("disk.raw"),
            kernel: folder.join("vmlinuz"),
            initrd: folder.join("initrd.img"),
        };
        if !folder.join(MARK).is_file() {
            disk.make(&folder)?;
            fs::write(folder.join(MARK), "").context("marking the image as complete")?;
        }
        Ok(disk)
    }

    fn make(&self, folder: &Path) -> Result<()> {
        eprintln!("making a Debian in {}: this takes some minutes", folder.display());
        if folder.is_dir() {
            fs::remove_dir_all(folder).context("removing an incomplete image")?;
        }
        let tree = folder.join("tree");
        fs::create_dir_all(&tree).context("making the cache folder")?;
        let include = format!("--include={PACKAGES}");
        let log = fs::File::create(folder.join("log")).context("making the log")?;
        let mut debootstrap = Command::new("debootstrap");
        debootstrap.args(["--variant=minbase", &include, SUITE]).arg(&tree).stdout(log);
        run(&mut debootstrap).with_context(|| {
            format!("debootstrap (as root; apt-get install debootstrap); see {}/log", folder.display())
        })?;
        let install = "dpkg --add-architecture i386 && apt-get update -qq && \
             DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends bash-static:i386 && apt-get clean";
        run(Command::new("chroot").arg(&tree).args(["sh", "-c", install]))?;
        for (name, copy) in [("vmlinuz", &self.kernel), ("initrd.img", &self.initrd)] {
            let boot = fs::read_dir(tree.join("boot")).context("reading the image's /boot")?;
            let file = boot
                .flatten()
                .find(|entry| entry.file_name().to_string_lossy().starts_with(name))
                .with_context(|| format!("the image has no {name}"))?;
            fs::copy(file.path(), copy).with_context(|| format!("copying {name}"))?;
        }
        let unit = "[Unit]\nAfter=multi-user.target\n[Service]\nType=idle\nExecStart=/root/run.sh\n\
                    [Install]\nWantedBy=multi-user.target\n";
        fs::write(tree.join("etc/systemd/system/userland.service"), unit).context("writing the unit")?;
        fs::write(tree.join("etc/fstab"), "/dev/vda / ext4 defaults 0 1\n").context("writing fstab")?;
        run(Command::new("chroot").arg(&tree).args(["systemctl", "enable", "--quiet", "userland.service"]))?;
        fs::File::create(&self.disk)
            .and_then(|disk| disk.set_len(SIZE))
            .with_context(|| format!("making {}", self.disk.display()))?;
        run(Command::new("/sbin/mkfs.ext4").args(["-q", "-F", "-d"]).arg(&tree).arg(&self.disk))?;
        fs::remove_dir_all(&tree).context("removing the tree")
    }

    /// A copy of the disk in `folder`, with `files` in its `/root`.
    pub(crate) fn copy(&self, folder: &Path, files: &[PathBuf]) -> Result<PathBuf> {
        let copy = folder.join("disk.raw");
        run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(&self.disk).arg(&copy))?;
        let mut commands = String::from("cd /root\n");
        for file in files {
            let name = file.file_name().context("a file without a name")?.to_string_lossy();
            commands += &format!("write {} {name}\nsif {name} mode 0100755\n", file.display());
        }
        let script = folder.join("commands");
        fs::write(&script, commands)?;
        let output = Command::new("/sbin/debugfs").arg("-w").arg("-f").arg(&script).arg(&copy).output();
        let output = output.context("starting debugfs")?;
        // It succeeds whatever its commands do, and echoes them.
        let said = String::from_utf8_lossy(&output.stderr);
        let complaint = said.lines().find(|line| !line.starts_with("debugfs ") && !line.is_empty());
        if !output.status.success() || complaint.is_some() {
            bail!("debugfs failed: {}", complaint.unwrap_or_default());
        }
        Ok(copy)
    }
}

/// A folder of that name in the user's cache folder; it need not exist.
pub(crate) fn cache(name: &str) -> Result<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    Ok(base.context("neither XDG_CACHE_HOME nor HOME is set")?.join(name))
}

/// Runs `command`, which must succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{:?} failed: {status}", command.get_program());
    }
    Ok(())
}
