//! Changes of the graph while it is in use.

use crate::node::Drained;
use crate::{Edge, Error, NodeRef, OpenContext, Result, Role};
use futures_util::lock::OwnedMutexGuard;
use std::sync::Arc;

/// Nodes that have no request in flight, and get none until this is dropped; nobody else changes the graph meanwhile.
///
/// Nodes above them are part of it, so that no request is half-way through any of them: edges between them may be
/// exchanged. Requests at them are made `within`.
#[derive(Debug)]
pub struct Quiesced {
    drained: Vec<Drained>,
    _alone: OwnedMutexGuard<()>,
}

impl Quiesced {
    /// Whether `node` is one of them.
    pub fn holds(&self, node: &NodeRef) -> bool {
        self.drained.iter().any(|drained| Arc::ptr_eq(drained.node(), node))
    }
}

/// The nodes that a request at `node` may lead to.
fn below(node: &NodeRef) -> impl Iterator<Item = NodeRef> {
    let children = node.driver().edges().into_iter().map(|edge| edge.node());
    children.chain(node.watchers_targets())
}

fn contains(nodes: &[NodeRef], node: &NodeRef) -> bool {
    nodes.iter().any(|other| Arc::ptr_eq(other, node))
}

/// `node`, and all nodes that it stands on, by edges.
pub(crate) fn subtree(node: &NodeRef) -> Vec<NodeRef> {
    let mut all = vec![node.clone()];
    let mut next = 0;
    while let Some(node) = all.get(next).cloned() {
        for edge in node.driver().edges() {
            let child = edge.node();
            if !contains(&all, &child) {
                all.push(child);
            }
        }
        next += 1;
    }
    all
}

impl OpenContext {
    /// The nodes that stand on `node`, each with the edge that does; where there is no node it is the edge of a
    /// [`crate::Role::Root`].
    pub fn users(&self, node: &NodeRef) -> Vec<(Option<NodeRef>, Arc<Edge>)> {
        let nodes = self.nodes();
        let owner = |edge: &Arc<Edge>| {
            let owns = |node: &&NodeRef| node.driver().edges().iter().any(|own| Arc::ptr_eq(own, edge));
            nodes.iter().find(owns).cloned()
        };
        node.parents().into_iter().map(|edge| (owner(&edge), edge)).collect()
    }

    /// `nodes` and all above them, those above first.
    fn ancestors(&self, nodes: &[NodeRef]) -> Vec<NodeRef> {
        let all = self.nodes();
        let mut found: Vec<NodeRef> = Vec::new();
        for node in nodes {
            if !contains(&found, node) {
                found.push(node.clone());
            }
        }
        loop {
            let leads_there = |node: &&NodeRef| {
                !contains(&found, node) && below(node).any(|child| contains(&found, &child))
            };
            let more: Vec<NodeRef> = all.iter().filter(leads_there).cloned().collect();
            if more.is_empty() {
                break;
            }
            found.extend(more);
        }
        let mut ordered = Vec::new();
        while !found.is_empty() {
            let on_top = |node: &NodeRef| {
                let stands_on = |other: &NodeRef| {
                    other.driver().edges().iter().any(|edge| Arc::ptr_eq(&edge.node(), node))
                };
                let above = |other: &NodeRef| !Arc::ptr_eq(other, node) && stands_on(other);
                !found.iter().any(above)
            };
            // Nodes do not stand on one another in a circle; if they did, any order would do.
            let at = found.iter().position(on_top).unwrap_or(0);
            ordered.push(found.remove(at));
        }
        ordered
    }

    /// Waits for what is in flight at `nodes` and all nodes above them, and holds up the rest. Nobody else changes the
    /// graph meanwhile: who has such a thing already must not want another.
    pub async fn quiesce(&self, nodes: &[NodeRef]) -> Quiesced {
        let alone = self.changing().lock_owned().await;
        let mut drained = Vec::new();
        // From above, so that what is in flight there finds nodes below that serve it.
        for node in self.ancestors(nodes) {
            drained.push(node.drain().await);
        }
        Quiesced { drained, _alone: alone }
    }

    /// Has all who stand on `old` stand on `new` instead, save those that `new` stands on itself, those who only hold it,
    /// and those of whom `stays` says so. Returns the edges that were moved, which lead to `old` if they are moved back.
    ///
    /// # Errors
    /// `old` is in use.
    pub fn replace_node(
        &self,
        quiesced: &Quiesced,
        old: &NodeRef,
        new: &NodeRef,
        stays: impl Fn(&Arc<Edge>) -> bool,
    ) -> Result<Vec<Arc<Edge>>> {
        if !quiesced.holds(old) {
            return Err(Error::new(crate::Errno::BUSY, format!("Node '{}' is in use", old.name())));
        }
        let own: Vec<Arc<Edge>> = subtree(new).iter().flat_map(|node| node.driver().edges()).collect();
        let mut moved = Vec::new();
        for edge in old.parents() {
            if edge.role() != Role::Hold && !own.iter().any(|own| Arc::ptr_eq(own, &edge)) && !stays(&edge) {
                edge.replace(new.clone());
                moved.push(edge);
            }
        }
        Ok(moved)
    }

    /// Whether somebody stands on `node` or holds it; nodes that are closed do not count.
    pub fn is_used(&self, node: &NodeRef) -> bool {
        let counts = |(owner, edge): &(Option<NodeRef>, Arc<Edge>)| {
            owner.is_some() || matches!(edge.role(), Role::Root | Role::Hold)
        };
        self.users(node).iter().any(counts)
    }

    /// Whether `below` is `node` or one that it stands on.
    pub fn stands_on(node: &NodeRef, below: &NodeRef) -> bool {
        contains(&subtree(node), below)
    }

    /// Closes all nodes, those above first.
    ///
    /// # Errors
    /// The first that was met; the rest is closed all the same.
    pub async fn close_all(&self) -> Result<()> {
        let mut result = Ok(());
        for node in self.ancestors(&self.nodes()) {
            result = result.and(node.close().await);
        }
        result
    }
}
