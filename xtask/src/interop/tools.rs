//! The two tools of either side.

use anyhow::{Context, Result, bail};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// One side's programs.
pub(crate) struct Tools {
    img: PathBuf,
    io: PathBuf,
    name: &'static str,
}

impl Tools {
    /// Ours, under the others' names in `folder`.
    pub(crate) fn ours(program: &Path, folder: &Path) -> Result<Self> {
        let linked = |name: &str| -> Result<PathBuf> {
            let link = folder.join(name);
            symlink(program, &link).with_context(|| format!("making {}", link.display()))?;
            Ok(link)
        };
        Ok(Self { img: linked("qemu-img")?, io: linked("qemu-io")?, name: "vireo" })
    }

    /// QEMU's, as they are installed.
    pub(crate) fn theirs() -> Self {
        Self { img: "qemu-img".into(), io: "qemu-io".into(), name: "qemu-img" }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Runs a subcommand, which must succeed.
    pub(crate) fn img(&self, folder: &Path, arguments: &[String]) -> Result<()> {
        self.run(&self.img, folder, arguments)
    }

    /// Runs `commands` on an image that `image` names; all must succeed.
    pub(crate) fn io(
        &self,
        folder: &Path,
        image: &[String],
        commands: impl Iterator<Item = String>,
    ) -> Result<()> {
        let commands = commands.flat_map(|command| ["-c".to_owned(), command]);
        self.run(&self.io, folder, &commands.chain(image.iter().cloned()).collect::<Vec<_>>())
    }

    fn run(&self, program: &Path, folder: &Path, arguments: &[String]) -> Result<()> {
        let output = Command::new(program)
            .current_dir(folder)
            .args(arguments)
            .output()
            .with_context(|| format!("starting {}", program.display()))?;
        let Output { status, stdout, stderr } = output;
        let said = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        if !status.success() {
            let program = program.file_name().unwrap_or_default().to_string_lossy();
            bail!(
                "{program} of {} said to {}: {} ({status})",
                self.name,
                arguments.join(" "),
                said.trim().replace('\n', "; ")
            );
        }
        Ok(())
    }
}
