//! What is known of a range of a node without reading it.

use crate::NodeRef;

/// What a range of a node is, for as many bytes from its start as are alike.
#[derive(Debug, Clone, Default)]
pub struct BlockStatus {
    /// How many bytes are alike; at least 1 where the range has any.
    pub len: u64,
    /// The bytes are stored (or come from somewhere further down, with `recurse`).
    pub data: bool,
    /// The bytes read as zero.
    pub zero: bool,
    /// The node itself decides what the bytes are; otherwise its backing node does.
    pub allocated: bool,
    /// They are stored compressed.
    pub compressed: bool,
    /// The node that they are stored in uncompressed and unencrypted, and where, if there is such a place.
    pub at: Option<(NodeRef, u64)>,
    /// The node `at` knows more (a filter's or raw image's file).
    pub recurse: bool,
    /// The range ends where the node ends.
    pub eof: bool,
}

impl BlockStatus {
    /// `len` bytes that are stored here.
    pub fn data(len: u64) -> Self {
        Self { len, data: true, allocated: true, ..Self::default() }
    }

    /// `len` bytes that are known here to be zero.
    pub fn zero(len: u64) -> Self {
        Self { len, zero: true, allocated: true, ..Self::default() }
    }

    /// `len` bytes that the backing node decides.
    pub fn unallocated(len: u64) -> Self {
        Self { len, ..Self::default() }
    }

    /// The same, stored at `offset` of `node`.
    #[must_use]
    pub fn stored_at(mut self, node: NodeRef, offset: u64) -> Self {
        self.at = Some((node, offset));
        self
    }

    /// Whether `other`, which follows this, says the same of its bytes, so that both are one range.
    pub fn continues(&self, other: &Self) -> bool {
        let places = match (&self.at, &other.at) {
            (None, None) => true,
            (Some((a, from)), Some((b, to))) => {
                std::sync::Arc::ptr_eq(a, b) && from.checked_add(self.len) == Some(*to)
            }
            _ => false,
        };
        let kind = |s: &Self| (s.data, s.zero, s.allocated, s.compressed, s.recurse);
        places && kind(self) == kind(other)
    }
}
