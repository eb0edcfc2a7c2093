//! Clusters that were decompressed, for those who read them in pieces.

use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;

/// Decompressed clusters that are kept.
const KEPT: usize = 4;

/// The last clusters that were decompressed, by the descriptor that named them.
#[derive(Debug, Default)]
pub(crate) struct Decompressed {
    kept: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
}

impl Decompressed {
    /// The cluster that this descriptor names, if it is kept.
    pub(crate) fn get(&self, descriptor: u64) -> Option<Arc<Vec<u8>>> {
        let kept = self.kept.lock();
        kept.iter().find(|(other, _)| *other == descriptor).map(|(_, data)| data.clone())
    }

    /// Keeps a cluster, in place of the one that was kept first.
    pub(crate) fn keep(&self, descriptor: u64, data: Arc<Vec<u8>>) {
        let mut kept = self.kept.lock();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back((descriptor, data));
    }

    /// Forgets all: a descriptor may soon mean something else.
    pub(crate) fn forget(&self) {
        self.kept.lock().clear();
    }
}
