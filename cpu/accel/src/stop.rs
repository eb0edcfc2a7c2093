//! Ending the runs of vCPUs from other threads.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A vCPU that can be brought to look at its surroundings: out of guest code, or awake from a halt.
pub trait Kick: Send + Sync {
    /// Has the vCPU go round its run loop soon. Callable from any thread.
    fn kick(&self);
}

#[derive(Default)]
struct Attached {
    next: u64,
    vcpus: BTreeMap<u64, Arc<dyn Kick>>,
}

struct Inner {
    stopped: AtomicBool,
    attached: Mutex<Attached>,
}

/// Ends the runs of the vCPUs it is given to. Clones are the same token. A token that said stop says so for
/// good: the next run takes a new one.
#[derive(Clone)]
pub struct StopToken {
    inner: Arc<Inner>,
}

impl Default for StopToken {
    fn default() -> Self {
        Self::new()
    }
}

impl StopToken {
    /// A token that has not said stop.
    pub fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                stopped: AtomicBool::new(false),
                attached: Mutex::new(Attached::default()),
            }),
        }
    }

    /// Has every run with this token return promptly, those that have not begun included.
    pub fn stop(&self) {
        self.inner.stopped.store(true, Ordering::SeqCst);
        self.kick();
    }

    /// Whether [`StopToken::stop`] was called.
    pub fn is_stopped(&self) -> bool {
        self.inner.stopped.load(Ordering::SeqCst)
    }

    /// Has every vCPU that runs with this token go round its run loop, without stopping it.
    pub fn kick(&self) {
        let attached = self.inner.attached.lock();
        for vcpu in attached.vcpus.values() {
            vcpu.kick();
        }
    }

    /// For back ends: has stops and kicks reach `vcpu` until the attachment is dropped. Look at
    /// [`StopToken::is_stopped`] after this, not only before. `vcpu` must not use the token from within
    /// its `kick`.
    pub fn attach(&self, vcpu: Arc<dyn Kick>) -> Attachment {
        let mut attached = self.inner.attached.lock();
        let key = attached.next;
        attached.next += 1;
        attached.vcpus.insert(key, vcpu);
        Attachment { token: self.clone(), key }
    }
}

impl fmt::Debug for StopToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StopToken").field("stopped", &self.is_stopped()).finish_non_exhaustive()
    }
}

/// A vCPU's hold on a [`StopToken`].
#[derive(Debug)]
pub struct Attachment {
    token: StopToken,
    key: u64,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.token.inner.attached.lock().vcpus.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[derive(Default)]
    struct Count(AtomicU32);
    impl Kick for Count {
        fn kick(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn stops_and_kicks_reach_attached_vcpus_only() {
        let token = StopToken::new();
        let (first, second) = (Arc::new(Count::default()), Arc::new(Count::default()));
        let attachment = token.attach(first.clone());
        let _other = token.clone().attach(second.clone());
        token.kick();
        assert!(!token.is_stopped());
        drop(attachment);
        token.clone().stop();
        assert!(token.is_stopped());
        assert_eq!((first.0.load(Ordering::SeqCst), second.0.load(Ordering::SeqCst)), (1, 2));
    }
}
