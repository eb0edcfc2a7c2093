//! Snapshots: other images that are written to from now on, and those within an image.

use crate::blockers::Op;
use crate::inner::Inner;
use crate::nodes::image_of;
use crate::parameters::{
    Action, CompletionMode, NewImageMode, NewTarget, Snapshot, SnapshotInternal, SnapshotSync,
};
use crate::storage::Storage;
use block_graph::{Edge, Errno, Error, NodeRef, OpenContext, Quiesced, Result, Role, SnapshotInfo};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// An overlay that has been put above a node.
pub(crate) struct Overlaid {
    pub(crate) node: NodeRef,
    overlay: NodeRef,
    moved: Vec<Arc<Edge>>,
}

impl Overlaid {
    /// As if it had never been.
    pub(crate) fn undo(self) {
        for edge in self.moved {
            edge.replace(self.node.clone());
        }
        if let Some(image) = image_of(&self.overlay).driver().image()
            && let Err(error) = image.set_backing_node(None)
        {
            tracing::error!("an overlay keeps its backing file: {error}");
        }
    }
}

impl Inner {
    /// Makes and opens the overlay of a snapshot.
    pub(crate) async fn new_overlay(&self, given: &SnapshotSync) -> Result<NodeRef> {
        let node = self.find(&given.device)?;
        self.check_op(&node, Op::Snapshot)?;
        if let Some(name) = &given.snapshot_node_name {
            if self.context.node(name).is_some() {
                return Err(Error::invalid("New overlay node-name already in use"));
            }
            self.check_name(name)?;
        }
        let format = given.format.clone().unwrap_or_else(|| "qcow2".to_owned());
        if given.mode == NewImageMode::AbsolutePaths {
            self.create_image(&given.snapshot_file, &format, node.len(), Some(&node)).await?;
        }
        let target = NewTarget {
            target: given.snapshot_file.clone(),
            format: Some(format),
            node_name: given.snapshot_node_name.clone(),
            mode: given.mode,
        };
        self.open_target(&node, &target, None).await
    }

    /// Puts an overlay above a node for all who stand on it. Both are drained.
    pub(crate) async fn overlay(
        &self,
        quiesced: &Quiesced,
        node: NodeRef,
        overlay: NodeRef,
    ) -> Result<Overlaid> {
        self.check_op(&node, Op::Snapshot)?;
        self.check_op(&overlay, Op::Snapshot)?;
        let users = self.context.users(&overlay);
        if users.iter().any(|(owner, edge)| owner.is_some() || edge.role() == Role::Root)
            || OpenContext::stands_on(&node, &overlay)
        {
            return Err(Error::new(Errno::BUSY, "The overlay is already in use"));
        }
        if overlay.backing().is_some() {
            return Err(Error::invalid("The overlay already has a backing image"));
        }
        let image = image_of(&overlay);
        let without = || Error::unsupported("The overlay does not support backing images");
        let image = image.driver().image().ok_or_else(without)?;
        if overlay.len() != node.len() {
            let message = format!(
                "The overlay has {} bytes, and node '{}' has {}",
                overlay.len(),
                node.name(),
                node.len()
            );
            return Err(Error::invalid(message));
        }
        node.flush_within().await?;
        image.set_backing_node(Some(node.clone()))?;
        match self.context.replace_node(quiesced, &node, &overlay, |_| false) {
            Ok(moved) => Ok(Overlaid { node, overlay, moved }),
            Err(error) => {
                image.set_backing_node(None)?;
                Err(error)
            }
        }
    }

    /// Takes an internal snapshot of a node that is drained. Returns its id.
    pub(crate) async fn snapshot_internal(&self, given: &SnapshotInternal) -> Result<String> {
        let node = self.find(&given.device)?;
        self.check_op(&node, Op::InternalSnapshot)?;
        let device = &given.device;
        if node.read_only() {
            return Err(Error::new(Errno::NOT_PERMITTED, format!("Device '{device}' is read only")));
        }
        if given.name.is_empty() {
            return Err(Error::invalid("Name is empty"));
        }
        let image = image_of(&node);
        let image = image.driver().image().ok_or_else(|| {
            Error::unsupported(format!(
                "Block format '{}' used by device '{device}' does not support feature 'internal snapshots'",
                node.driver().format_name()
            ))
        })?;
        if image.snapshots().iter().any(|snapshot| snapshot.name == given.name) {
            let message = format!("Snapshot with name '{}' already exists on device '{device}'", given.name);
            return Err(Error::invalid(message));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let snapshot = SnapshotInfo {
            name: given.name.clone(),
            date_seconds: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
            date_nanoseconds: now.subsec_nanos(),
            disk_size: node.len(),
            ..SnapshotInfo::default()
        };
        image.snapshot_create(snapshot).await.map_err(|error| {
            error.context(format_args!("Failed to create snapshot '{}' on device '{device}'", given.name))
        })?;
        let made = image.snapshots().into_iter().find(|snapshot| snapshot.name == given.name);
        Ok(made.map(|snapshot| snapshot.id).unwrap_or_default())
    }

    pub(crate) async fn delete_internal(
        &self,
        device: &str,
        id: Option<&str>,
        name: Option<&str>,
    ) -> Result<SnapshotInfo> {
        if id.is_none() && name.is_none() {
            return Err(Error::invalid("Name or id must be provided"));
        }
        let node = self.find(device)?;
        self.check_op(&node, Op::InternalSnapshot)?;
        let image = image_of(&node);
        let image = image.driver().image().ok_or_else(|| {
            Error::unsupported(format!(
                "Block format '{}' used by device '{device}' does not support feature 'internal snapshots'",
                node.driver().format_name()
            ))
        })?;
        let named = |snapshot: &SnapshotInfo| {
            id.is_none_or(|id| snapshot.id == id) && name.is_none_or(|name| snapshot.name == name)
        };
        let found = image.snapshots().into_iter().find(named).ok_or_else(|| {
            Error::new(
                Errno::NOT_FOUND,
                format!(
                    "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
                    id.unwrap_or("null"),
                    name.unwrap_or("null")
                ),
            )
        })?;
        let quiesced = self.context.quiesce(std::slice::from_ref(&node)).await;
        image.snapshot_delete(&found.id).await?;
        drop(quiesced);
        Ok(found)
    }
}

impl Storage {
    /// `blockdev-snapshot`: has another node be written to from now on, which stands on the one that was.
    ///
    /// # Errors
    /// What is wrong with the nodes; all is as before.
    pub fn blockdev_snapshot(&self, snapshot: Snapshot) -> Result<()> {
        self.transaction(vec![Action::Snapshot(snapshot)], CompletionMode::Individual)
    }

    /// `blockdev-snapshot-sync`: the same, with an image that is made and opened for it.
    ///
    /// # Errors
    /// What is wrong with what was given, or the host's; the disk is as before.
    pub fn blockdev_snapshot_sync(&self, snapshot: SnapshotSync) -> Result<()> {
        self.transaction(vec![Action::SnapshotSync(snapshot)], CompletionMode::Individual)
    }

    /// `blockdev-snapshot-internal-sync`.
    ///
    /// # Errors
    /// There is one of this name, or the format's; the disk is as before.
    pub fn blockdev_snapshot_internal(&self, snapshot: SnapshotInternal) -> Result<()> {
        self.transaction(vec![Action::SnapshotInternal(snapshot)], CompletionMode::Individual)
    }

    /// `blockdev-snapshot-delete-internal-sync`. Returns what was deleted.
    ///
    /// # Errors
    /// There is none of this id and name (where given), or the format's.
    pub fn blockdev_snapshot_delete_internal(
        &self,
        device: &str,
        id: Option<&str>,
        name: Option<&str>,
    ) -> Result<SnapshotInfo> {
        let (device, id, name) = (device.to_owned(), id.map(str::to_owned), name.map(str::to_owned));
        self.call(move |inner| {
            Box::pin(async move { inner.delete_internal(&device, id.as_deref(), name.as_deref()).await })
        })
    }
}
