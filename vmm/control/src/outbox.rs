//! What waits to be written to a client.

use parking_lot::Mutex;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Bytes of answers and events that may wait for a client before no more of its commands are read.
const CALM: usize = 1 << 20;
/// Bytes that may wait before the client counts as lost.
const MOST: usize = 16 << 20;

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// Events are sent: the client has negotiated capabilities.
    wants_events: bool,
    /// Nothing more comes in.
    closed: bool,
    /// What is there is not to be written any more.
    lost: bool,
    wakers: Vec<Waker>,
}

impl State {
    fn wake(&mut self) {
        std::mem::take(&mut self.wakers).into_iter().for_each(Waker::wake);
    }
}

/// What waits to be written to a client. Any thread adds to it; the client's writer takes it.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    state: Mutex<State>,
}

impl Outbox {
    /// Adds an answer.
    pub(crate) fn push(&self, text: &str) {
        self.add(text, |_| true);
    }

    /// Adds an event, if the client is to hear of events.
    pub(crate) fn push_event(&self, text: &str) {
        self.add(text, |state| state.wants_events);
    }

    fn add(&self, text: &str, wanted: impl Fn(&State) -> bool) {
        let mut state = self.state.lock();
        if state.closed || !wanted(&state) {
            return;
        }
        if state.waiting.len() + text.len() > MOST {
            tracing::warn!("a client of the control socket reads nothing; its connection is ended");
            (state.closed, state.lost) = (true, true);
        } else {
            state.waiting.extend(text.as_bytes());
        }
        state.wake();
    }

    /// From now on the client hears of events.
    pub(crate) fn want_events(&self) {
        self.state.lock().wants_events = true;
    }

    /// Nothing more is to come in; what is there is still written.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.wake();
    }

    /// The client is gone.
    pub(crate) fn lose(&self) {
        let mut state = self.state.lock();
        (state.closed, state.lost) = (true, true);
        state.waiting = Vec::new();
        state.wake();
    }

    async fn wait<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> T {
        poll_fn(|context| {
            let mut state = self.state.lock();
            match ready(&mut state) {
                Some(value) => Poll::Ready(value),
                None => {
                    if !state.wakers.iter().any(|waker| waker.will_wake(context.waker())) {
                        state.wakers.push(context.waker().clone());
                    }
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Waits for something to write; `None` says that there will be no more.
    pub(crate) async fn take(&self) -> Option<Vec<u8>> {
        self.wait(|state| match (state.lost, state.waiting.is_empty(), state.closed) {
            (true, _, _) | (false, true, true) => Some(None),
            (false, true, false) => None,
            (false, false, _) => {
                let taken = std::mem::take(&mut state.waiting);
                // Whoever waits for room has it.
                state.wake();
                Some(Some(taken))
            }
        })
        .await
    }

    /// What waits now.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn take_all(&self) -> Vec<u8> {
        std::mem::take(&mut self.state.lock().waiting)
    }

    /// Waits until the client has taken enough to be listened to; `false` says that it is lost.
    pub(crate) async fn calm(&self) -> bool {
        self.wait(|state| (state.lost || state.waiting.len() < CALM).then_some(!state.lost)).await
    }

    /// Waits until the client is lost.
    pub(crate) async fn lost(&self) {
        self.wait(|state| state.lost.then_some(())).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn a_client_that_reads_nothing_is_lost_and_takes_no_memory() {
        let outbox = Outbox::default();
        outbox.push_event("not yet");
        assert!(outbox.take().now_or_never().is_none());
        outbox.want_events();
        let event = "x".repeat(1 << 10);
        for _ in 0..CALM >> 10 {
            outbox.push_event(&event);
        }
        assert!(outbox.calm().now_or_never().is_none(), "no more commands");
        for _ in 0..(2 * MOST) >> 10 {
            outbox.push_event(&event);
            assert!(outbox.state.lock().waiting.len() <= MOST);
        }
        assert_eq!(outbox.calm().now_or_never(), Some(false));
        assert_eq!(outbox.take().now_or_never(), Some(None));
    }

    #[test]
    fn what_was_said_before_the_end_is_still_written() {
        let outbox = Outbox::default();
        outbox.push("a");
        outbox.close();
        outbox.push("b");
        assert_eq!(outbox.take().now_or_never(), Some(Some(b"a".to_vec())));
        assert_eq!(outbox.take().now_or_never(), Some(None));
    }
}
