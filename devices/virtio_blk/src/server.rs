//! Serving a queue: many requests in flight, on the loop of the queue's thread.

use crate::request::Disk;
use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::any::Any;
use std::pin::pin;
use std::sync::Arc;
use virtio::{Chain, QueueError, QueueHandle, QueueServer, Wake};

/// What became of a request: bytes written to its chain, or `None` if it is to be kept.
type Carried = Result<Option<u32>, QueueError>;

/// Serves one queue of a disk.
pub(crate) struct Server {
    queue: QueueHandle,
    disk: Arc<Disk>,
    /// Keeps guest memory where it is while the host reads or writes it.
    keep: Arc<dyn Any + Send + Sync>,
}

impl Server {
    pub(crate) fn new(queue: QueueHandle, disk: Arc<Disk>) -> Self {
        let keep = Arc::new(queue.memory.clone());
        Self { queue, disk, keep }
    }

    async fn carry_out(&self, chain: Chain) -> (Chain, Carried) {
        let written = self.disk.request(&self.queue.memory, &self.keep, &chain).await;
        (chain, written)
    }

    /// The requests that were kept and are to be tried again.
    fn kept(&self) -> Result<Vec<Chain>, QueueError> {
        let heads = self.disk.failures.take(self.queue.index);
        heads.into_iter().map(|head| self.queue.chain(head)).collect()
    }

    /// Keeps a request until the VM runs on.
    fn keep(&self, chain: &Chain) {
        self.disk.failures.keep(self.queue.index, chain.head());
    }

    /// Carries a request out and gives it back. `false` says that it is kept.
    async fn serve_one(&self, chain: Chain) -> Result<bool, QueueError> {
        let (chain, written) = self.carry_out(chain).await;
        match written? {
            Some(written) => self.queue.complete(&chain, written).map(|()| true),
            None => {
                self.keep(&chain);
                Ok(false)
            }
        }
    }

    /// One request after the other.
    async fn in_turn(&self, wake: &Wake<'_>) -> Result<(), QueueError> {
        for chain in self.kept()? {
            self.serve_one(chain).await?;
        }
        loop {
            self.queue.disable_doorbell()?;
            while !wake.stopping()
                && let Some(chain) = self.queue.pop()?
            {
                self.serve_one(chain).await?;
            }
            if !self.queue.enable_doorbell()? || wake.stopping() {
                return Ok(());
            }
        }
    }

    /// As many requests at a time as there are.
    async fn side_by_side(&self, wake: &Wake<'_>) -> Result<(), QueueError> {
        let mut in_flight = FuturesUnordered::new();
        let mut ended = Vec::new();
        // Where the queue was left is not known to ask for a doorbell for what comes next.
        let mut result = self.queue.enable_doorbell().map(drop);
        match self.kept() {
            Ok(kept) => kept.into_iter().for_each(|chain| in_flight.push(self.carry_out(chain))),
            Err(error) => result = Err(error),
        }
        while result.is_ok() {
            result = self.take_all(wake, &mut |chain| in_flight.push(self.carry_out(chain)));
            if result.is_err() {
                break;
            }
            if in_flight.is_empty() {
                return Ok(());
            }
            match select(in_flight.next(), pin!(wake.rung())).await {
                Either::Left((first, _)) => {
                    ended.extend(first);
                    while let Some(Some(next)) = in_flight.next().now_or_never() {
                        ended.push(next);
                    }
                    result = self.give_back(&mut ended);
                }
                // More may have become available, or it is time to stop.
                Either::Right(_) => {}
            }
        }
        // What is in flight ends before the device does, and is not given back.
        while in_flight.next().await.is_some() {}
        result
    }

    /// Gives back what has ended, with one interrupt at most.
    fn give_back(&self, ended: &mut Vec<(Chain, Carried)>) -> Result<(), QueueError> {
        let failed = ended.iter().find_map(|(_, written)| written.as_ref().err().cloned());
        for (chain, _) in ended.iter().filter(|(_, written)| matches!(written, Ok(None))) {
            self.keep(chain);
        }
        let done = ended.iter().filter_map(|(chain, written)| Some((chain, (*written.as_ref().ok()?)?)));
        let result = self.queue.complete_all(done);
        ended.clear();
        failed.map_or(result, Err)
    }

    /// Takes what is available, and asks for a doorbell when more is.
    fn take_all(&self, wake: &Wake<'_>, take: &mut dyn FnMut(Chain)) -> Result<(), QueueError> {
        if wake.stopping() {
            return Ok(());
        }
        loop {
            let mut any = false;
            while let Some(chain) = self.queue.pop()? {
                any = true;
                take(chain);
            }
            // Asking costs a fence: not when a request that has just ended finds nothing new.
            if !any || !self.queue.enable_doorbell()? {
                return Ok(());
            }
        }
    }
}

#[async_trait(?Send)]
impl QueueServer for Server {
    async fn serve(&mut self, wake: &Wake<'_>) -> Result<(), QueueError> {
        if wake.is_inline() { self.in_turn(wake).await } else { self.side_by_side(wake).await }
    }
}
