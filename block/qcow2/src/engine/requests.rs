//! Which requests are under way: for what must wait until older ones have ended, and for what wants to be alone.

use super::wakers::Wakers;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::ops::Range;
use std::task::Poll;

/// The requests under way, by the epoch in which they began.
///
/// A request that resolved a guest cluster to a host cluster may still be reading or writing there when another one
/// frees that cluster. A freed cluster is therefore marked with an epoch ([`Requests::next_epoch`]) and becomes
/// allocatable when all requests of earlier epochs have ended ([`Requests::ended_before`]).
#[derive(Debug, Default)]
pub(crate) struct Requests {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The epoch of `counts`' first element.
    first: u64,
    /// Requests under way of each epoch; the last is the current one's. Empty means that there is none.
    counts: VecDeque<usize>,
    /// Somebody is alone, or waits to be.
    exclusive: bool,
    wakers: Wakers,
}

impl State {
    fn total(&self) -> usize {
        self.counts.iter().sum()
    }
}

/// A request under way; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    of: &'a Requests,
    epoch: u64,
}

/// While this is there, no request is under way.
#[derive(Debug)]
pub(crate) struct Exclusive<'a> {
    of: &'a Requests,
}

impl Requests {
    /// Begins a request, once nobody is alone.
    pub(crate) async fn enter(&self) -> Request<'_> {
        std::future::poll_fn(|context| {
            let mut state = self.state.lock();
            if state.exclusive {
                state.wakers.add(context);
                return Poll::Pending;
            }
            if state.counts.is_empty() {
                state.counts.push_back(0);
            }
            *state.counts.back_mut().expect("there is a current epoch") += 1;
            let epoch = state.first + state.counts.len() as u64 - 1;
            Poll::Ready(Request { of: self, epoch })
        })
        .await
    }

    /// Waits until no request is under way, and keeps new ones from beginning.
    pub(crate) async fn exclusive(&self) -> Exclusive<'_> {
        let claim = std::future::poll_fn(|context| {
            let mut state = self.state.lock();
            if state.exclusive {
                state.wakers.add(context);
                return Poll::Pending;
            }
            state.exclusive = true;
            Poll::Ready(Exclusive { of: self })
        })
        .await;
        std::future::poll_fn(|context| {
            let mut state = self.state.lock();
            if state.total() > 0 {
                state.wakers.add(context);
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
        claim
    }

    /// Begins a new epoch and returns its number.
    pub(crate) fn next_epoch(&self) -> u64 {
        let mut state = self.state.lock();
        if state.counts.is_empty() || state.counts.back() == Some(&0) && state.counts.len() == 1 {
            // Nobody is under way: the next to come begins in an epoch that is new anyway.
            state.counts.clear();
            state.first += 1;
            return state.first;
        }
        state.counts.push_back(0);
        state.first + state.counts.len() as u64 - 1
    }

    /// Whether all requests that began before `epoch` have ended.
    pub(crate) fn ended_before(&self, epoch: u64) -> bool {
        let state = self.state.lock();
        let oldest = state.counts.iter().position(|count| *count > 0);
        oldest.is_none_or(|index| state.first + index as u64 >= epoch)
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        let mut state = self.of.state.lock();
        let index = (self.epoch - state.first) as usize;
        state.counts[index] -= 1;
        while state.counts.len() > 1 && state.counts.front() == Some(&0) {
            state.counts.pop_front();
            state.first += 1;
        }
        if state.exclusive && state.total() == 0 {
            state.wakers.wake();
        }
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        let mut state = self.of.state.lock();
        state.exclusive = false;
        state.wakers.wake();
    }
}

/// The guest clusters to which something is being allocated, or from which it is taken: two such operations on one
/// cluster wait for each other.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    state: Mutex<ClaimState>,
}

#[derive(Debug, Default)]
struct ClaimState {
    claimed: Vec<Range<u64>>,
    wakers: Wakers,
}

/// A range of guest clusters, claimed until this is dropped.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    of: &'a Claims,
    range: Range<u64>,
}

impl Claims {
    /// Claims the guest bytes of `range`, which is of whole clusters, once nobody else claims any of them.
    pub(crate) async fn claim(&self, range: Range<u64>) -> Claim<'_> {
        std::future::poll_fn(|context| {
            let mut state = self.state.lock();
            if state.claimed.iter().any(|other| other.start < range.end && range.start < other.end) {
                state.wakers.add(context);
                return Poll::Pending;
            }
            state.claimed.push(range.clone());
            Poll::Ready(Claim { of: self, range: range.clone() })
        })
        .await
    }
}

impl Claim<'_> {
    /// Gives up the end of the claim: it ends at `end` from now on.
    pub(crate) fn shorten(&mut self, end: u64) {
        if end >= self.range.end {
            return;
        }
        let mut state = self.of.state.lock();
        if let Some(mine) = state.claimed.iter_mut().find(|other| **other == self.range) {
            mine.end = end;
        }
        self.range.end = end;
        state.wakers.wake();
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.of.state.lock();
        if let Some(index) = state.claimed.iter().position(|other| *other == self.range) {
            state.claimed.swap_remove(index);
        }
        state.wakers.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn a_freed_cluster_waits_for_the_requests_before() {
        let requests = Requests::default();
        let old = requests.enter().now_or_never().unwrap();
        let epoch = requests.next_epoch();
        let new = requests.enter().now_or_never().unwrap();
        assert!(!requests.ended_before(epoch));
        drop(old);
        assert!(requests.ended_before(epoch));
        let later = requests.next_epoch();
        assert!(!requests.ended_before(later));
        drop(new);
        assert!(requests.ended_before(later));
        assert!(requests.ended_before(requests.next_epoch()));
    }

    #[test]
    fn alone_is_alone() {
        let requests = Requests::default();
        let one = requests.enter().now_or_never().unwrap();
        let mut alone = Box::pin(requests.exclusive());
        assert!(alone.as_mut().now_or_never().is_none());
        assert!(requests.enter().now_or_never().is_none());
        drop(one);
        let alone = alone.now_or_never().unwrap();
        assert!(requests.enter().now_or_never().is_none());
        drop(alone);
        assert!(requests.enter().now_or_never().is_some());
        // One that gave up waiting holds up nobody.
        let one = requests.enter().now_or_never().unwrap();
        drop(requests.exclusive().now_or_never());
        assert!(requests.enter().now_or_never().is_some());
        drop(one);
    }

    #[test]
    fn claims_of_one_cluster_wait_for_each_other() {
        let claims = Claims::default();
        let mut one = claims.claim(0..3).now_or_never().unwrap();
        assert!(claims.claim(2..4).now_or_never().is_none());
        assert!(claims.claim(3..4).now_or_never().is_some());
        one.shorten(2);
        assert!(claims.claim(2..4).now_or_never().is_some());
        drop(one);
        assert!(claims.claim(0..9).now_or_never().is_some());
    }
}
