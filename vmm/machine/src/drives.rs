//! The images of a machine's disks: how they are opened, and that they are closed.

use crate::spec::References;
use crate::{DriveSpec, MachineError};
use block_graph::{
    AllowAll, Backend, Errno, Error, NodeRef, OpenContext, OpenFlags, OpenRule, Options, Reference,
    RefuseAll, Secrets, protocol_prefix,
};
use io_loop::block_on;
use std::sync::Arc;

/// The images of a machine's disks.
pub(crate) struct Drives {
    context: OpenContext,
    backends: Vec<Arc<Backend>>,
}

impl Drives {
    /// None.
    pub(crate) fn new() -> Self {
        let registry = Arc::new(blockdev::registry());
        let context = OpenContext::new(registry, Arc::new(Secrets::default()), Arc::new(RefuseAll));
        Self { context, backends: Vec::new() }
    }

    /// Opens the image of `drive`, which stays open until [`Drives::close`].
    ///
    /// # Errors
    /// [`MachineError::Drive`].
    pub(crate) fn open(&mut self, drive: &DriveSpec) -> Result<Arc<Backend>, MachineError> {
        let node = block_on(self.open_node(drive)).map_err(|error| {
            let reason = error.hints().iter().fold(error.to_string(), |all, hint| format!("{all} ({hint})"));
            MachineError::Drive { file: drive.file.clone(), reason }
        })?;
        let backend = Backend::new(format!("virtio{}", self.backends.len()), node);
        self.backends.push(backend.clone());
        Ok(backend)
    }

    async fn open_node(&self, drive: &DriveSpec) -> Result<NodeRef, Error> {
        let rule: Arc<dyn OpenRule> = match drive.references {
            References::Files => Arc::new(PathsOnly),
            References::Any => Arc::new(AllowAll),
            References::Nothing => Arc::new(RefuseAll),
        };
        let context = self.context.with_rule(rule);
        let mut options: Options =
            drive.options.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        if let Some(format) = &drive.format {
            options.set("driver", format.as_str());
        }
        let overlaid = drive.snapshot && !drive.read_only;
        let mut flags = if drive.read_only || overlaid { OpenFlags::READ } else { OpenFlags::WRITE };
        if let Some(mode) = drive.cache {
            flags = flags.with_cache(mode);
        }
        let image = context.open_filename(&drive.file, options, flags).await?;
        if !overlaid {
            return Ok(image);
        }
        blockdev::overlay::temporary(&context, image).await
    }

    /// Closes all images: what is held back of their metadata is written. The machine stands still.
    pub(crate) fn close(&mut self) {
        self.backends.clear();
        if let Err(error) = block_on(self.context.close_all()) {
            tracing::error!("cannot close an image: {error}; what was flushed is safe");
        }
    }
}

impl Drop for Drives {
    /// A machine that was never finished closes them too.
    fn drop(&mut self) {
        self.close();
    }
}

/// Lets images name files by their paths.
struct PathsOnly;

impl OpenRule for PathsOnly {
    fn check(&self, reference: Reference<'_>, _: &Options) -> Result<(), Error> {
        let Reference { by, role, name } = reference;
        if protocol_prefix(name).is_none() {
            return Ok(());
        }
        let message = format!("'{by}' names '{name}' as its {role:?} file, which is not the path of a file");
        Err(Error::new(Errno::NOT_PERMITTED, message)
            .hint("references=any allows it, if you trust the image"))
    }
}
