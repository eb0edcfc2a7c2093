//! Mending an image before it is used.

use crate::check;
use crate::storage::NodeFile;
use block_graph::{Errno, Error, NodeRef, Result};

/// Checks an image's file and repairs everything, for an image that is to be opened.
pub(crate) async fn repair(file: &NodeRef) -> Result<()> {
    let storage = NodeFile(file.clone());
    let report = check::check(&storage, check::Fix::ALL, &mut |line| eprintln!("{line}")).await;
    match report {
        Ok(report) if report.check_errors == 0 => Ok(()),
        Ok(_) => Err(Error::errno_only(Errno::IO)),
        Err(failed) => Err(Error::from(failed.error)),
    }
    .map_err(|error: Error| error.context("Could not repair dirty image"))
}
