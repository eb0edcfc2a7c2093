//! Overlays that live as long as they are open.

use block_graph::{Errno, Error, NodeRef, OpenContext, OpenFlags, Options, Result};

/// A disk that begins with what is in `image`, which stays as it is: what is written goes to a file without a name, in
/// the folder for temporary files, and with the node.
///
/// # Errors
/// There is no room for such a file.
pub async fn temporary(context: &OpenContext, image: NodeRef) -> Result<NodeRef> {
    let failed = |error: Error| error.context("Could not create a temporary overlay");
    let file = io_loop::blocking(|| tempfile::Builder::new().prefix("vireo-overlay-").tempfile())
        .await
        .map_err(|error| failed(error.into()))?;
    let path = file.path().to_str().ok_or_else(|| failed(Error::errno_only(Errno::INVALID)))?.to_owned();
    let kind = context.registry.get("qcow2")?;
    let mut options = Options::with("size", image.len().to_string());
    kind.create(context, &path, &mut options).await.map_err(failed)?;
    let mut options = Options::with("driver", "qcow2");
    options.set("file.driver", "file");
    options.set("file.filename", path);
    options.set("backing", image);
    // Nobody will read it after a crash.
    let flags = OpenFlags { no_flush: true, ..OpenFlags::WRITE };
    // The file loses its name when `file` goes.
    context.open(options, flags).await.map_err(failed)
}
