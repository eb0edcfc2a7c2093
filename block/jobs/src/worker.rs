//! The thread that jobs run on.

use block_graph::{Errno, Error, Result};
use futures_util::future::LocalBoxFuture;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::task::{Poll, Waker};

/// What is to be done on the thread.
type Order<S> = Box<dyn FnOnce(Rc<S>) -> LocalBoxFuture<'static, ()> + Send>;

struct Inbox<S> {
    orders: VecDeque<Order<S>>,
    waker: Option<Waker>,
    closed: bool,
}

/// A thread with a loop and a state of its own, on which everybody may have something done.
pub(crate) struct Worker<S: 'static> {
    inbox: Arc<Mutex<Inbox<S>>>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl<S: 'static> Worker<S> {
    /// Starts the thread; `state` makes its state there.
    ///
    /// # Errors
    /// There can be no more threads.
    pub(crate) fn start(name: &str, state: impl FnOnce() -> S + Send + 'static) -> Result<Self> {
        let inbox = Arc::new(Mutex::new(Inbox { orders: VecDeque::new(), waker: None, closed: false }));
        let orders = inbox.clone();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            io_loop::block_on(async {
                let state = Rc::new(state());
                while let Some(order) = next(&orders).await {
                    io_loop::spawn(order(state.clone())).detach();
                }
            });
            // Who still waits is told that nothing comes.
            orders.lock().orders.clear();
        })?;
        Ok(Self { inbox, thread: Mutex::new(Some(thread)) })
    }

    /// Has `work` done on the thread beside what else it does, and waits for its result. Not to be called on that
    /// thread itself.
    ///
    /// # Errors
    /// That of `work`, or if the thread has ended.
    pub(crate) fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(Rc<S>) -> LocalBoxFuture<'static, Result<R>> + Send + 'static,
    ) -> Result<R> {
        let (sender, receiver) = sync_channel(1);
        let order: Order<S> = Box::new(move |state| {
            Box::pin(async move {
                // Who asked may have gone.
                let _ = sender.send(work(state).await);
            })
        });
        let ended = || Error::new(Errno::IO, "The disks have been closed");
        let mut inbox = self.inbox.lock();
        if inbox.closed {
            return Err(ended());
        }
        inbox.orders.push_back(order);
        if let Some(waker) = inbox.waker.take() {
            waker.wake();
        }
        drop(inbox);
        receiver.recv().unwrap_or_else(|_| Err(ended()))
    }

    /// Ends the thread, and waits for it. What was still under way there is dropped.
    pub(crate) fn stop(&self) {
        let mut inbox = self.inbox.lock();
        inbox.closed = true;
        if let Some(waker) = inbox.waker.take() {
            waker.wake();
        }
        drop(inbox);
        let thread = self.thread.lock().take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the thread of block jobs panicked");
        }
    }
}

impl<S: 'static> Drop for Worker<S> {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn next<S>(inbox: &Mutex<Inbox<S>>) -> Option<Order<S>> {
    poll_fn(|context| {
        let mut inbox = inbox.lock();
        if let Some(order) = inbox.orders.pop_front() {
            return Poll::Ready(Some(order));
        }
        if inbox.closed {
            return Poll::Ready(None);
        }
        inbox.waker = Some(context.waker().clone());
        Poll::Pending
    })
    .await
}
