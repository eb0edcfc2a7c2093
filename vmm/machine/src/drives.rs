//! The images of a machine's disks: how they are opened, and that they are closed.

use crate::spec::References;
use crate::{DriveSpec, MachineError};
use block_graph::{
    AllowAll, Backend, Errno, Error, NodeRef, OpenContext, OpenFlags, OpenRule, Options, Reference,
    RefuseAll, Secrets, protocol_prefix,
};
use io_loop::block_on;
use jobs::Storage;
use std::sync::Arc;

/// Hears of what jobs on disks do.
pub type StorageListener = Arc<dyn Fn(jobs::Event) + Send + Sync>;

/// The images of a machine's disks.
pub(crate) struct Drives {
    context: OpenContext,
    backends: Vec<Arc<Backend>>,
    /// What changes the disks while the VM runs, if anybody is to.
    storage: Option<Arc<Storage>>,
}

impl Drives {
    /// None.
    pub(crate) fn new() -> Self {
        let registry = Arc::new(blockdev::registry());
        let context = OpenContext::new(registry, Arc::new(Secrets::default()), Arc::new(RefuseAll));
        Self { context, backends: Vec::new(), storage: None }
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
        let name = drive.id.clone().unwrap_or_else(|| format!("virtio{}", self.backends.len()));
        if self.backends.iter().any(|backend| backend.name() == name) {
            let reason = format!("there is another drive with id={name}");
            return Err(MachineError::Drive { file: drive.file.clone(), reason });
        }
        let backend = Backend::new(name, node);
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

    /// What changes the disks while the VM runs: the same at each call, but that `listener` hears of what happens from
    /// the first on. Images that it opens may name files by their paths.
    ///
    /// # Errors
    /// [`MachineError::Storage`], if the host has no thread for it.
    pub(crate) fn storage(&mut self, listener: StorageListener) -> Result<Arc<Storage>, MachineError> {
        if let Some(storage) = &self.storage {
            return Ok(storage.clone());
        }
        let failed = |error: Error| MachineError::Storage(error.to_string());
        let storage = Storage::new(self.context.with_rule(Arc::new(PathsOnly)), listener).map_err(failed)?;
        for backend in &self.backends {
            storage.attach(backend.clone()).map_err(failed)?;
        }
        let storage = Arc::new(storage);
        self.storage = Some(storage.clone());
        Ok(storage)
    }

    /// Closes all images: what is held back of their metadata is written. The machine stands still.
    pub(crate) fn close(&mut self) {
        self.backends.clear();
        let closed = match self.storage.take() {
            Some(storage) => storage.close(),
            None => block_on(self.context.close_all()),
        };
        if let Err(error) = closed {
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
