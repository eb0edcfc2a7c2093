//! What devices' threads do first.
//!
//! A guest's driver has a device start its I/O threads, so that it is a vCPU's thread which starts them, and
//! they inherit its processors and its scheduling policy. Who placed the vCPU's thread sets a hook on it that
//! places the others.

use std::cell::RefCell;
use std::sync::Arc;

/// Called on a new thread before anything else.
pub type StartHook = Arc<dyn Fn() + Send + Sync>;

thread_local! {
    static HOOK: RefCell<Option<StartHook>> = const { RefCell::new(None) };
}

/// Sets what the threads do first that devices start from the calling thread.
pub fn set_start_hook(hook: Option<StartHook>) {
    HOOK.set(hook);
}

/// What a thread that a device starts from the calling one is to do first.
pub fn start_hook() -> Option<StartHook> {
    HOOK.with_borrow(Clone::clone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_that_of_its_thread() {
        assert!(start_hook().is_none());
        set_start_hook(Some(Arc::new(|| {})));
        assert!(start_hook().is_some());
        assert!(std::thread::spawn(|| start_hook().is_none()).join().unwrap());
        set_start_hook(None);
        assert!(start_hook().is_none());
    }
}
