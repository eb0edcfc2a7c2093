//! Transactions: several actions at one moment, of which either all happen or none.

use crate::backup::ReadyBackup;
use crate::inner::Inner;
use crate::lifecycle;
use crate::parameters::{Action, BitmapName, CompletionMode};
use crate::snapshot::Overlaid;
use crate::storage::Storage;
use block_graph::{DirtyBitmap, Error, NodeRef, Quiesced, Result};
use std::rc::Rc;

/// What has been done, and how it is undone.
enum Done {
    Nothing,
    BitmapAdded(BitmapName),
    BitmapRemoved(NodeRef, std::sync::Arc<DirtyBitmap>),
    /// It is going to be removed when all else is done.
    BitmapToRemove(BitmapName),
    BitmapChanged(BitmapName, DirtyBitmap),
    BitmapSwitched(BitmapName, bool),
    Overlaid(Overlaid),
    SnapshotMade(String, String),
    Backup(ReadyBackup),
}

impl Inner {
    /// The nodes that an action is about, beside images that it makes.
    fn nodes_of(&self, action: &Action) -> Result<Vec<NodeRef>> {
        Ok(match action {
            Action::Abort => Vec::new(),
            Action::BitmapAdd(add) => vec![self.find(&add.node)?],
            Action::BitmapRemove(which)
            | Action::BitmapClear(which)
            | Action::BitmapEnable(which)
            | Action::BitmapDisable(which) => vec![self.find(&which.node)?],
            Action::BitmapMerge(merge) => {
                let mut nodes = vec![self.find(&merge.node)?];
                for source in &merge.bitmaps {
                    nodes.push(self.find(&source.node)?);
                }
                nodes
            }
            Action::BlockdevBackup(given) => vec![self.find(&given.backup.device)?],
            Action::DriveBackup(given) => vec![self.find(&given.backup.device)?],
            Action::Snapshot(given) => vec![self.find(&given.node)?, self.find(&given.overlay)?],
            Action::SnapshotSync(given) => vec![self.find(&given.device)?],
            Action::SnapshotInternal(given) => vec![self.find(&given.device)?],
        })
    }

    /// Makes the images that the actions need, before anything stands still. One for each action.
    async fn make_images(&self, actions: &[Action], made: &mut Vec<Option<NodeRef>>) -> Result<()> {
        for action in actions {
            made.push(match action {
                Action::SnapshotSync(given) => Some(self.new_overlay(given).await?),
                Action::DriveBackup(given) => Some(self.backup_target(given).await?),
                _ => None,
            });
        }
        Ok(())
    }

    async fn carry_out(
        self: &Rc<Self>,
        quiesced: &Quiesced,
        action: &Action,
        made: Option<&NodeRef>,
    ) -> Result<Done> {
        let opened = || made.cloned().ok_or_else(|| Error::invalid("the action has no image"));
        Ok(match action {
            Action::Abort => return Err(Error::invalid("Transaction aborted using Abort action")),
            Action::BitmapAdd(add) => {
                self.bitmap_add(add).await?;
                Done::BitmapAdded(BitmapName { node: add.node.clone(), name: add.name.clone() })
            }
            Action::BitmapRemove(which) => {
                let node = self.find_changeable(which)?;
                let memory = node.bitmaps().into_iter().find(|bitmap| bitmap.name() == Some(&which.name));
                match memory {
                    Some(bitmap) => {
                        node.remove_bitmap(&bitmap);
                        Done::BitmapRemoved(node, bitmap)
                    }
                    None if self.bitmap_statuses(&node).iter().any(|bitmap| bitmap.name == which.name) => {
                        Done::BitmapToRemove(which.clone())
                    }
                    None => self.bitmap_remove(which).await.map(|()| Done::Nothing)?,
                }
            }
            Action::BitmapClear(which) => Done::BitmapChanged(which.clone(), self.bitmap_clear(which).await?),
            Action::BitmapEnable(which) => {
                Done::BitmapSwitched(which.clone(), self.bitmap_enable(which, true).await?)
            }
            Action::BitmapDisable(which) => {
                Done::BitmapSwitched(which.clone(), self.bitmap_enable(which, false).await?)
            }
            Action::BitmapMerge(merge) => {
                let before = self.bitmap_merge(merge).await?;
                Done::BitmapChanged(
                    BitmapName { node: merge.node.clone(), name: merge.target.clone() },
                    before,
                )
            }
            Action::BlockdevBackup(given) => {
                let ready = self.ready_blockdev_backup(given).await?;
                ready.begin(quiesced);
                Done::Backup(ready)
            }
            Action::DriveBackup(given) => {
                let ready = self.ready_drive_backup(given, opened()?).await?;
                ready.begin(quiesced);
                Done::Backup(ready)
            }
            Action::Snapshot(given) => {
                let (node, overlay) = (self.find(&given.node)?, self.find(&given.overlay)?);
                Done::Overlaid(self.overlay(quiesced, node, overlay).await?)
            }
            Action::SnapshotSync(given) => {
                let node = self.find(&given.device)?;
                Done::Overlaid(self.overlay(quiesced, node, opened()?).await?)
            }
            Action::SnapshotInternal(given) => {
                Done::SnapshotMade(given.device.clone(), self.snapshot_internal(given).await?)
            }
        })
    }

    /// Undoes what was done while all still stands still. What cannot be undone then is returned.
    async fn undo(&self, done: Done) -> Option<ReadyBackup> {
        let undone = match done {
            Done::Nothing | Done::BitmapToRemove(_) => Ok(()),
            Done::BitmapAdded(which) => self.bitmap_remove(&which).await,
            Done::BitmapRemoved(node, bitmap) => {
                node.add_bitmap(bitmap);
                Ok(())
            }
            Done::BitmapChanged(which, before) => {
                self.bitmap_restore(&which, &before).await;
                Ok(())
            }
            Done::BitmapSwitched(which, enabled) => self.bitmap_enable(&which, enabled).await.map(drop),
            Done::Overlaid(overlaid) => {
                overlaid.undo();
                Ok(())
            }
            Done::SnapshotMade(device, id) => self.undo_snapshot(&device, &id).await,
            Done::Backup(ready) => return Some(ready),
        };
        if let Err(error) = undone {
            tracing::error!("a part of a transaction that failed could not be undone: {error}");
        }
        None
    }

    async fn undo_snapshot(&self, device: &str, id: &str) -> Result<()> {
        let node = crate::nodes::image_of(&self.find(device)?);
        match node.driver().image() {
            Some(image) => image.snapshot_delete(id).await,
            None => Ok(()),
        }
    }

    async fn transaction(self: &Rc<Self>, actions: Vec<Action>, mode: CompletionMode) -> Result<()> {
        let mut images = Vec::new();
        if let Err(error) = self.make_images(&actions, &mut images).await {
            self.release(&images.into_iter().flatten().collect::<Vec<_>>()).await;
            return Err(error);
        }
        let result = self.at_one_moment(&actions, &images).await;
        let made: Vec<NodeRef> = images.into_iter().flatten().collect();
        match result {
            Ok(done) => {
                self.afterwards(done, mode).await;
                Ok(())
            }
            Err(error) => {
                self.release(&made).await;
                Err(error)
            }
        }
    }

    async fn at_one_moment(
        self: &Rc<Self>,
        actions: &[Action],
        images: &[Option<NodeRef>],
    ) -> Result<Vec<Done>> {
        let mut nodes: Vec<NodeRef> = images.iter().flatten().cloned().collect();
        for action in actions {
            nodes.extend(self.nodes_of(action)?);
        }
        let quiesced = self.context.quiesce(&nodes).await;
        let mut done = Vec::new();
        let mut failed = None;
        for (action, image) in actions.iter().zip(images) {
            match self.carry_out(&quiesced, action, image.as_ref()).await {
                Ok(one) => done.push(one),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if failed.is_none() {
            failed = self.remove_bitmaps(&done).await.err();
        }
        let Some(error) = failed else { return Ok(done) };
        let mut jobs = Vec::new();
        for one in done.into_iter().rev() {
            jobs.extend(self.undo(one).await);
        }
        drop(quiesced);
        for ready in jobs {
            self.drop_job(&ready.job).await;
        }
        Err(error)
    }

    async fn remove_bitmaps(&self, done: &[Done]) -> Result<()> {
        for one in done {
            if let Done::BitmapToRemove(which) = one {
                self.bitmap_remove(which).await?;
            }
        }
        Ok(())
    }

    /// What follows once all has happened.
    async fn afterwards(self: &Rc<Self>, done: Vec<Done>, mode: CompletionMode) {
        let mut jobs = Vec::new();
        for one in done {
            match one {
                Done::Backup(ready) => jobs.push(ready.job),
                Done::Overlaid(overlaid) => {
                    // Nobody writes to it any more.
                    if let Err(error) = self.set_writable(&overlaid.node, false).await {
                        tracing::warn!("node '{}' stays writable: {error}", overlaid.node.name());
                    }
                }
                _ => {}
            }
        }
        lifecycle::start(self, &jobs, mode == CompletionMode::Grouped);
    }
}

impl Storage {
    /// `transaction`: does several things at one moment, of which either all happen or none. Jobs that it starts end
    /// together if `mode` says so.
    ///
    /// # Errors
    /// Why the first that failed did; all is as before.
    pub fn transaction(&self, actions: Vec<Action>, mode: CompletionMode) -> Result<()> {
        self.call(move |inner| Box::pin(async move { inner.transaction(actions, mode).await }))
    }
}
