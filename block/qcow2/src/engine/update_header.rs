//! Rewriting the header.

use super::state::{FirstCluster, Qcow2};
use crate::format::Header;
use crate::format::extensions;
use crate::format::feature_name::FeatureName;
use block_graph::{Result, WriteFlags};
use io_loop::IoBuffer;

impl Qcow2 {
    /// Changes fields of the header and writes it.
    pub(crate) async fn change_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        self.change_first_cluster(|first| change(&mut first.header)).await
    }

    /// Changes what the first cluster says and writes it. If it does not fit or cannot be written, nothing has changed
    /// in memory.
    pub(crate) async fn change_first_cluster(&self, change: impl FnOnce(&mut FirstCluster)) -> Result<()> {
        let _writing = self.header_writing.lock().await;
        let mut first = self.first_cluster.lock().clone();
        let before = first.encoded()?.len();
        change(&mut first);
        if first.header.version > 2 {
            first.extensions.feature_names = FeatureName::known();
        }
        first.extensions.stale_bitmaps = false;
        let mut bytes = first.encoded()?;
        // Nothing of what was there before is left behind the new end.
        let length = bytes.len().max(before).next_multiple_of(512).min(self.geometry.cluster_size() as usize);
        bytes.resize(length.max(bytes.len()), 0);
        self.file.node().write(0, &IoBuffer::from(&bytes[..]).into_io(), WriteFlags::empty()).await?;
        *self.first_cluster.lock() = first;
        Ok(())
    }
}

impl FirstCluster {
    /// The bytes of the first cluster's used part; sets the fields of the header that say where its parts are.
    pub(crate) fn encoded(&mut self) -> Result<Vec<u8>> {
        let name = self.backing_name.as_deref();
        Ok(extensions::encode_first_cluster(&mut self.header, &self.extensions, name)?)
    }
}
