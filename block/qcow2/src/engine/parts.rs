//! Parts of one request that are under way at the same time.

use block_graph::Result;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::pin::pin;
use std::task::Poll;

/// Parts of one request that are under way at a time.
const MOST: usize = 16;

/// The parts of a request that have been begun. They get on only while one of the methods is awaited.
pub(crate) struct Parts<F> {
    under_way: FuturesUnordered<F>,
    failed: Result<()>,
}

impl<F: Future<Output = Result<()>>> Parts<F> {
    pub(crate) fn new() -> Self {
        Self { under_way: FuturesUnordered::new(), failed: Ok(()) }
    }

    /// Waits for `next`, which may wait for something that parts hold, or that others hold who wait for parts: they get
    /// on meanwhile.
    pub(crate) async fn beside<T>(&mut self, next: impl Future<Output = Result<T>>) -> Result<T> {
        let mut next = pin!(next);
        std::future::poll_fn(|context| {
            if let Poll::Ready(result) = next.as_mut().poll(context) {
                return Poll::Ready(result);
            }
            while let Poll::Ready(Some(result)) = self.under_way.poll_next_unpin(context) {
                self.note(result);
            }
            Poll::Pending
        })
        .await
    }

    /// Begins a part, once not too many are under way.
    pub(crate) async fn begin(&mut self, part: F) {
        while self.under_way.len() >= MOST {
            let ended = self.under_way.next().await;
            self.note(ended.unwrap_or(Ok(())));
        }
        self.under_way.push(part);
    }

    fn note(&mut self, result: Result<()>) {
        if self.failed.is_ok() {
            self.failed = result;
        }
    }

    /// Waits for all parts; `before` is how beginning them ended.
    pub(crate) async fn end(mut self, before: Result<()>) -> Result<()> {
        while let Some(result) = self.under_way.next().await {
            self.note(result);
        }
        before.and(self.failed)
    }
}
