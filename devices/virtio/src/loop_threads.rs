//! I/O threads with a loop each, for devices that have many requests in flight: one serves one queue, wakes when its
//! doorbell rings, and stands still while the VM does.

use crate::thread_control::Shared;
use crate::{Interrupt, QueueError};
use async_trait::async_trait;
use futures_util::FutureExt;
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, ready};

/// What serves a queue with many requests in flight.
#[async_trait(?Send)]
pub trait QueueServer: Send {
    /// Serves the queue until it is empty and no request is in flight, or, once `wake` says to stop, until none is in
    /// flight. It is called again whenever the doorbell rings and when the VM runs on.
    ///
    /// # Errors
    /// [`QueueError`]: the device goes into the error state, in which the server is not called.
    async fn serve(&mut self, wake: &Wake<'_>) -> Result<(), QueueError>;
}

type Ringing = Pin<Box<dyn Future<Output = io::Result<()>>>>;

/// Tells a [`QueueServer`] of doorbells and of the end.
pub struct Wake<'a> {
    stop: &'a AtomicBool,
    /// What is waited for on this thread; `None` where the queue is served on the thread that rings.
    doorbell: Option<(&'a Shared, &'a RefCell<Option<Ringing>>)>,
}

impl<'a> Wake<'a> {
    /// For a queue that is served on the thread that rings its doorbell.
    pub(crate) fn inline(stop: &'a AtomicBool) -> Self {
        Self { stop, doorbell: None }
    }

    /// Whether to take no more requests.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Whether the queue is served on the thread that rings its doorbell. Requests are then to be carried out one after
    /// the other, so that the same guest always sees the same.
    pub fn is_inline(&self) -> bool {
        self.doorbell.is_none()
    }

    /// Waits until the doorbell rings, or it is time to stop. The wait goes on when the future is dropped.
    pub async fn rung(&self) {
        let Some((shared, ringing)) = self.doorbell else { return std::future::pending().await };
        // It fails only where the descriptor does, and then nothing will ever ring.
        if let Err(error) = rung(shared, ringing).await {
            tracing::error!("an I/O thread's event descriptor fails: {error}");
            std::future::pending::<()>().await;
        }
    }
}

async fn rung(shared: &Shared, ringing: &RefCell<Option<Ringing>>) -> io::Result<()> {
    poll_fn(|context| {
        let mut ringing = ringing.borrow_mut();
        let wait = ringing.get_or_insert_with(|| {
            let event = shared.event().clone();
            Box::pin(async move { io_loop::readable(&event).await })
        });
        let result = ready!(wait.as_mut().poll(context));
        *ringing = None;
        Poll::Ready(result)
    })
    .await?;
    shared.take_ring()
}

/// What an I/O thread with a loop does until it is to end.
pub(crate) fn run(shared: &Shared, interrupt: &Arc<dyn Interrupt>, mut server: impl QueueServer) {
    let ringing = RefCell::new(None);
    io_loop::block_on(async {
        let wake = Wake { stop: shared.stop(), doorbell: Some((shared, &ringing)) };
        loop {
            if let Err(error) = rung(shared, &ringing).await {
                tracing::error!("an I/O thread's event descriptor fails: {error}");
                return;
            }
            if !shared.wait_until_running() {
                return;
            }
            if !interrupt.failed() {
                let result = AssertUnwindSafe(server.serve(&wake)).catch_unwind().await;
                let panicked = |_| Err(QueueError::Device("its I/O thread panicked".into()));
                if let Err(error) = result.unwrap_or_else(panicked) {
                    interrupt.fail(&error);
                }
            }
            shared.set_idle();
        }
    });
}
