//! How nodes hang together.

use crate::NodeRef;
use arc_swap::ArcSwap;
use std::fmt;
use std::sync::{Arc, Weak};

/// What a node is to the node above it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The file that holds a format's metadata, and its data unless there is a data file.
    File,
    /// The file that holds a format's data.
    Data,
    /// What is read where the node above has nothing.
    Backing,
    /// What a filter lets through.
    Filtered,
    /// One of several alike.
    Member(u16),
    /// What a user who is no node stands on, such as a device.
    Root,
    /// A node that is kept open by whoever added it by name, or by a job; who makes requests of it does so himself.
    Hold,
}

/// A node's hold of a node below it, which may be exchanged for another while nothing is in flight.
pub struct Edge {
    role: Role,
    node: ArcSwap<crate::Node>,
    this: Weak<Self>,
}

impl Edge {
    /// An edge to `node`.
    pub fn new(role: Role, node: NodeRef) -> Arc<Self> {
        let below = node.clone();
        let edge = Arc::new_cyclic(|this| Self { role, node: ArcSwap::new(node), this: this.clone() });
        below.add_parent(edge.this.clone());
        edge
    }

    /// What the node is to the one above.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The node.
    pub fn node(&self) -> NodeRef {
        self.node.load_full()
    }

    /// Whether it leads to `node`.
    pub fn leads_to(&self, node: &NodeRef) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.node.load()), Arc::as_ptr(node))
    }

    /// Takes `node` instead, and returns what was there. The caller has seen to it that no request is in flight
    /// through this edge.
    pub fn replace(&self, node: NodeRef) -> NodeRef {
        node.add_parent(self.this.clone());
        let old = self.node.swap(node);
        old.remove_parent(self);
        old
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.node.load().remove_parent(self);
    }
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} -> {}", self.role, self.node.load().name())
    }
}
