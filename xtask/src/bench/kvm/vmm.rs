//! The monitors that are compared, and how each is started with the same guest.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// The longest that a guest may take to say something.
const PATIENCE: Duration = Duration::from_secs(120);

/// A kind of monitor with its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    VireoPc,
    VireoMicrovm,
    QemuQ35,
    QemuMicrovm,
    Firecracker,
    CloudHypervisor,
}

/// A monitor to start.
#[derive(Debug, Clone)]
pub(super) struct Vmm {
    pub(super) kind: Kind,
    program: PathBuf,
}

/// What a guest boots.
pub(super) struct GuestSpec<'a> {
    pub(super) kernel: &'a Path,
    pub(super) initrd: Option<&'a Path>,
    /// Words for the end of the kernel's command line.
    pub(super) append: &'a str,
    /// Memory, in MiB.
    pub(super) memory: u32,
    /// A raw image for the first virtio disk, read only.
    pub(super) disk: Option<&'a Path>,
    /// With QEMU's disk on a thread of its own and io_uring, instead of as it comes.
    pub(super) tuned: bool,
}

/// All that can be had; tells of the others.
pub(super) fn find_all(vireo: &Path, firecracker: Option<&Path>, cloud: Option<&Path>) -> Vec<Vmm> {
    let own = |kind| Vmm { kind, program: vireo.to_owned() };
    let mut found = vec![own(Kind::VireoPc)];
    if has_microvm(vireo) {
        found.push(own(Kind::VireoMicrovm));
    } else {
        println!("left out: vireo's machine microvm, which this build does not have");
    }
    let mut add = |kinds: &[Kind], name: &str, given: Option<&Path>| match given
        .map(Path::to_owned)
        .or_else(|| ::kvm_lab::find_program(name))
    {
        Some(program) => found.extend(kinds.iter().map(|kind| Vmm { kind: *kind, program: program.clone() })),
        None => println!("left out: {name}, which is not here"),
    };
    add(&[Kind::QemuQ35, Kind::QemuMicrovm], "qemu-system-x86_64", None);
    add(&[Kind::Firecracker], "firecracker", firecracker);
    add(&[Kind::CloudHypervisor], "cloud-hypervisor", cloud);
    found
}

/// Whether our program knows the machine type: a wrong command line ends with 2.
fn has_microvm(vireo: &Path) -> bool {
    let words = ["run", "--machine", "microvm", "--kernel", "/nonexistent", "--serial", "null"];
    let status = Command::new(vireo).args(words).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.code() != Some(2))
}

impl Vmm {
    pub(super) fn name(&self) -> &'static str {
        match self.kind {
            Kind::VireoPc => "vireo pc",
            Kind::VireoMicrovm => "vireo microvm",
            Kind::QemuQ35 => "QEMU q35",
            Kind::QemuMicrovm => "QEMU microvm",
            Kind::Firecracker => "Firecracker",
            Kind::CloudHypervisor => "Cloud Hypervisor",
        }
    }

    /// Whether it boots a bzImage; all boot an ELF kernel.
    pub(super) fn takes_bzimage(&self) -> bool {
        !matches!(self.kind, Kind::Firecracker | Kind::CloudHypervisor)
    }

    /// Whether the guest finds a PC's devices.
    pub(super) fn is_pc(&self) -> bool {
        matches!(self.kind, Kind::VireoPc | Kind::QemuQ35)
    }

    /// The command that boots `guest` with its first serial port on standard output.
    pub(super) fn command(&self, guest: &GuestSpec<'_>) -> Result<Command> {
        let mut command = Command::new(&self.program);
        let append = format!("console=ttyS0 quiet panic=-1 {}", guest.append);
        match self.kind {
            Kind::VireoPc | Kind::VireoMicrovm => {
                let machine = if self.kind == Kind::VireoPc { "pc" } else { "microvm" };
                command.args(["run", "--accel", "kvm", "--no-reboot", "--no-rng", "--no-balloon"]);
                command.args(["--serial", "stdio", "--machine", machine]);
                command.arg("-m").arg(format!("{}M", guest.memory)).arg("--kernel").arg(guest.kernel);
                if let Some(initrd) = guest.initrd {
                    command.arg("--initrd").arg(initrd).arg("--append").arg(append);
                }
                if let Some(disk) = guest.disk {
                    command.arg("--drive").arg(format!("file={},format=raw,readonly=on", disk.display()));
                }
            }
            Kind::QemuQ35 | Kind::QemuMicrovm => {
                let machine = if self.kind == Kind::QemuQ35 { "q35" } else { "microvm" };
                command.args(["-machine", &format!("{machine},accel=kvm"), "-cpu", "host", "-nodefaults"]);
                command.args(["-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"]);
                command.arg("-m").arg(format!("{}M", guest.memory)).arg("-kernel").arg(guest.kernel);
                if let Some(initrd) = guest.initrd {
                    command.arg("-initrd").arg(initrd).arg("-append").arg(append);
                }
                if let Some(disk) = guest.disk {
                    let aio = if guest.tuned { ",aio=io_uring" } else { "" };
                    let drive = format!("file={},format=raw,if=none,id=d,readonly=on{aio}", disk.display());
                    let device = if self.is_pc() { "virtio-blk-pci" } else { "virtio-blk-device" };
                    command.arg("-drive").arg(drive);
                    if guest.tuned {
                        command.args(["-object", "iothread,id=io"]);
                        command.arg("-device").arg(format!("{device},drive=d,iothread=io"));
                    } else {
                        command.arg("-device").arg(format!("{device},drive=d"));
                    }
                }
            }
            Kind::Firecracker => {
                let config = guest.kernel.with_file_name("firecracker.json");
                std::fs::write(&config, firecracker_config(guest, &append))
                    .context("writing Firecracker's file")?;
                command.args(["--no-api", "--boot-timer", "--config-file"]).arg(config);
            }
            Kind::CloudHypervisor => {
                command.args(["--cpus", "boot=1", "--serial", "tty", "--console", "off", "--kernel"]);
                command.arg(guest.kernel).arg("--memory").arg(format!("size={}M", guest.memory));
                if let Some(initrd) = guest.initrd {
                    command.arg("--initramfs").arg(initrd).arg("--cmdline").arg(append);
                }
                if let Some(disk) = guest.disk {
                    command.arg("--disk").arg(format!("path={},readonly=on", disk.display()));
                }
            }
        }
        Ok(command)
    }
}

fn firecracker_config(guest: &GuestSpec<'_>, append: &str) -> String {
    let initrd =
        guest.initrd.map(|path| format!(r#","initrd_path":"{}""#, path.display())).unwrap_or_default();
    let disk = guest.disk.map(|path| {
        let path = path.display();
        format!(r#"{{"drive_id":"d","path_on_host":"{path}","is_root_device":false,"is_read_only":true}}"#)
    });
    format!(
        r#"{{"boot-source":{{"kernel_image_path":"{}","boot_args":"{append} reboot=k pci=off"{initrd}}},"drives":[{}],"machine-config":{{"vcpu_count":1,"mem_size_mib":{}}}}}"#,
        guest.kernel.display(),
        disk.unwrap_or_default(),
        guest.memory,
    )
}

/// A monitor that runs; dropping it ends it.
pub(super) struct Running {
    pub(super) child: Child,
    start: Instant,
    lines: Receiver<(Duration, String)>,
    said: Vec<String>,
}

impl Running {
    /// Starts `command`.
    pub(super) fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let start = Instant::now();
        let mut child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
        let (sender, lines) = mpsc::channel();
        let errors = child.stderr.take().context("standard error is not piped")?;
        let output = child.stdout.take().context("standard output is not piped")?;
        for stream in [Box::new(output) as Box<dyn std::io::Read + Send>, Box::new(errors)] {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                    let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                    if sender.send((start.elapsed(), line)).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self { child, start, lines, said: Vec::new() })
    }

    /// Waits for a line with `expected` in it; returns when it came after the start, and the line.
    pub(super) fn expect(&mut self, expected: &str) -> Result<(Duration, String)> {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok((time, line)) if line.contains(expected) => return Ok((time, line)),
                Ok((_, line)) => self.said.push(line),
                Err(error) => {
                    let why = match error {
                        RecvTimeoutError::Timeout => "time is up",
                        RecvTimeoutError::Disconnected => "the monitor ended",
                    };
                    let last = &self.said[self.said.len().saturating_sub(8)..];
                    bail!(
                        "{why} after {:.1} s, before {expected:?} came; last: {last:#?}",
                        self.start.elapsed().as_secs_f64()
                    );
                }
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
